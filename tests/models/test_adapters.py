"""A LoRA adapter's folder is a teacher: merged into its base, and identified by both."""

import json
import shutil

import numpy as np
import pytest
import torch
from kinds import save_kind
from safetensors.torch import load_file, save_file
from small import LABELS, edit_json, load_teachers, said_by, sentences
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from sead_dist.errors import UserError
from sead_dist.models import adapters
from sead_dist.models.pretrained import locate, weights_hash

peft = pytest.importorskip("peft")
NAMES = f"[{', '.join(LABELS)}]"
TEXTS = sentences(6)
AIMS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def save_adapter(folder, kind="bert", classes=2, seed=0, head=False):
    """A base without a head (or with it) in folder/base and an adapter in folder/lora; what peft's
    own model says of TEXTS, each alone."""
    base = save_kind(folder / "base", kind)
    if not head:
        AutoModel.from_pretrained(base).save_pretrained(base)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes)
    asked = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=AIMS[kind])
    both = peft.get_peft_model(model, asked)
    with torch.no_grad():
        for name, parameter in both.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    both.eval().save_pretrained(folder / "lora")
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.inference_mode():
        said = [both(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS]
    return torch.cat(said).numpy()


def entry(folder):
    return f"{{path: {folder}, labels: {NAMES}}}"


@pytest.mark.parametrize("kind", AIMS)
def test_an_adapter_answers_as_peft_says_on_its_base(tmp_path, kind):
    expected_RC = save_adapter(tmp_path, kind)
    (teacher,) = load_teachers([entry(tmp_path / "lora")])
    np.testing.assert_allclose(said_by(teacher, TEXTS), expected_RC, atol=1e-5)
    assert np.ptp(expected_RC, axis=0).min() > 0.01


def test_it_is_merged_once_and_draws_nothing(tmp_path, monkeypatch):
    save_adapter(tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = locate(str(tmp_path / "lora"))
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(adapters, "_merge", None)
    assert locate(str(tmp_path / "lora")) == first
    assert [one.name for one in first.folder.parent.iterdir()] == [first.origin]


def test_what_is_merged_lies_in_the_folder_that_is_named_and_a_quicker_ranks_stays(
    tmp_path, monkeypatch
):
    save_adapter(tmp_path)
    monkeypatch.setenv("SEAD_DIST_MERGED", str(tmp_path / "named"))
    merge, mine = adapters._merge, []

    def late(adapter, base, folder):
        merge(adapter, base, folder)
        mine.append(folder)
        if len(mine) == 1:  # another rank is done meanwhile
            (locate(str(tmp_path / "lora")).folder / "first").touch()

    monkeypatch.setattr(adapters, "_merge", late)
    found = locate(str(tmp_path / "lora")).folder
    assert found.parent == tmp_path / "named"
    assert (found / "first").exists()
    assert [one.name for one in found.parent.iterdir()] == [found.name]
    assert not (tmp_path / "cache" / "sead_dist" / "merged").exists()


def test_its_identity_covers_adapter_and_base(tmp_path):
    save_adapter(tmp_path)

    def identity():
        return weights_hash(locate(str(tmp_path / "lora")))

    found = [identity()]
    shutil.move(tmp_path / "base", tmp_path / "moved")
    edit_json(
        tmp_path / "lora" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "moved")
    )
    found.append(identity())
    base = AutoModel.from_pretrained(tmp_path / "moved")
    with torch.no_grad():
        base.embeddings.word_embeddings.weight[5] += 1
    base.save_pretrained(tmp_path / "moved")
    found.append(identity())
    edit_json(tmp_path / "moved" / "config.json", layer_norm_eps=1e-3)
    found.append(identity())
    edit_json(tmp_path / "lora" / "adapter_config.json", lora_alpha=1)
    found.append(identity())
    assert len(set(found)) == len(found)


def test_a_head_of_other_classes_and_names_comes_from_the_adapter(tmp_path):
    save_adapter(tmp_path, classes=3)
    said = json.loads((locate(str(tmp_path / "lora")).folder / "config.json").read_text())
    assert list(said["id2label"]) == ["0", "1", "2"]
    names = {0: "a", 1: "b", 2: "c"}
    config = AutoConfig.from_pretrained(tmp_path / "base", id2label=names, label2id=None)
    config.save_pretrained(tmp_path / "lora")
    said = json.loads((locate(str(tmp_path / "lora")).folder / "config.json").read_text())
    assert list(said["id2label"].values()) == ["a", "b", "c"]


def test_without_names_of_its_classes_the_line_to_copy_is_told(tmp_path):
    save_adapter(tmp_path)
    edit_json(
        tmp_path / "base" / "config.json",
        id2label={"0": "LABEL_0", "1": "LABEL_1"},
        label2id={"LABEL_0": 0, "LABEL_1": 1},
    )
    with pytest.raises(UserError, match=r"does not show their order.*labels: task_order"):
        load_teachers([tmp_path / "lora"])


def bad(folder, **changes):
    edit_json(folder / "lora" / "adapter_config.json", **changes)


def without_numbers(folder):
    file = folder / "lora" / "adapter_model.safetensors"
    save_file(
        {n: t * float("nan") if "lora_B" in n else t for n, t in load_file(file).items()}, file
    )


MISTAKES = {
    "no numbers": (without_numbers, "cannot be read: .*NaN"),
    "base gone": (
        lambda f: shutil.rmtree(f / "base"),
        r"is an adapter of .*base \(base_model_name.*",
    ),
    "no base": (
        lambda f: bad(f, base_model_name_or_path=None),
        "adapter of None .*not a model; write the base's folder",
    ),
    "itself": (lambda f: bad(f, base_model_name_or_path=str(f / "lora")), "which is not a model"),
    "another kind": (lambda f: bad(f, peft_type="IA3"), "peft_type=IA3 .* peft_type=LORA"),
    "another task": (lambda f: bad(f, task_type="CAUSAL_LM"), "task_type=CAUSAL_LM; give one"),
    "no weights": (
        lambda f: (f / "lora" / "adapter_model.safetensors").unlink(),
        "holds no adapter_model.safetensors",
    ),
    "no JSON": (lambda f: (f / "lora" / "adapter_config.json").write_text("{"), "cannot be read"),
    "other layers": (
        lambda f: bad(f, target_modules=["query"]),
        "does not fit this base in base_model",
    ),
    "no such layers": (
        lambda f: bad(f, target_modules=["xyz"]),
        "cannot be read: .*No modules were targeted",
    ),
    "other sizes": (lambda f: bad(f, r=3), "cannot be read: .*size mismatch|lora"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_merged_is_refused_in_one_line(tmp_path, mistake):
    save_adapter(tmp_path)
    spoil, said = MISTAKES[mistake]
    spoil(tmp_path)
    with pytest.raises(UserError, match=said) as told:
        load_teachers([entry(tmp_path / "lora")])
    assert "\n" not in str(told.value)
    assert not [*(tmp_path / "cache").rglob("*.aside*")]


def test_the_line_that_installs_peft_is_told(tmp_path, monkeypatch):
    save_adapter(tmp_path)
    monkeypatch.setattr(adapters, "find_spec", lambda _name: None)
    with pytest.raises(
        UserError, match=r"package peft is not installed; pip install 'sead-dist\[peft\]'"
    ):
        locate(str(tmp_path / "lora"))


def test_an_adapter_without_a_head_over_a_base_without_one_is_refused(tmp_path):
    save_adapter(tmp_path)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "lora" in n}, file)
    with pytest.raises(UserError, match="tensors of a bert are") as told:
        load_teachers([entry(tmp_path / "lora")])
    assert "classifier" in str(told.value)
