"""`sead-dist reproduce`, with local stand-ins for the hub's models and data."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small import grammar_tokenizer, read, sentences
from transformers import BertConfig, BertModel

from sead_dist.cli.commands import main
from sead_dist.cli.reproduce import CHECKPOINTS, reproduce
from sead_dist.errors import UserError
from sead_dist.runtime.distributed import World

FIXTURES = Path(__file__).parent.parent / "fixtures"
ALONE = World(0, 1, torch.device("cpu"))
# what config.json of the real ones says
XTREMEDISTIL = {
    256: {
        "num_hidden_layers": 6,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "intermediate_size": 1024,
        "vocab_size": 30522,
    },
    384: {
        "num_hidden_layers": 6,
        "hidden_size": 384,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "vocab_size": 30522,
    },
}
SMALL_BERT = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def stand_in(folder, **fields):
    """An encoder without a head, as the hub's are, with new weights."""
    tokenizer = grammar_tokenizer()
    torch.manual_seed(0)
    BertModel(BertConfig(**{"vocab_size": len(tokenizer), **fields})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Stand-ins: bert (small), and the students h256 and h384 in their real shapes."""
    root = tmp_path_factory.mktemp("models")
    stand_in(root / "bert", **SMALL_BERT)
    for width, fields in XTREMEDISTIL.items():
        stand_in(root / f"h{width}", **fields)
    return root


def words(models, data, output, width, *more):
    return [
        f"data.path={data}",
        f"encoders=[{models / 'bert'}]",
        f"student={models / f'h{width}'}",
        f"output_dir={output}",
        "teacher_validation=off",
        "max_steps=2",
        *more,
    ]


@pytest.mark.slow
def test_a_checkpoint_is_made_from_its_teachers_on_and_put_beside_the_published(
    models, grammar, tmp_path, capsys
):
    output = tmp_path / "sst2"
    # what the student asks of teachers does not change them
    own = ["student.layers=[0,1,2,3,4,5]", "temperature=5.0", "method=mean"]
    given = words(models, grammar, output, 256, *own)
    main(["reproduce", "sst2-h256", *given, "--teachers", "2"])
    made = read(output / "reproduce.json")
    (figure,) = made["figures"]
    scored = read(output / "student" / "eval_results.json")["eval_accuracy"]
    assert figure["published"] == 0.9266
    assert figure["obtained"] == scored
    assert figure["difference"] == pytest.approx(scored - 0.9266)
    own = [
        read(output / "teachers" / f"teacher-{n}" / "eval_results.json")["eval_accuracy"]
        for n in range(2)
    ]
    assert figure["teachers"] == own
    line = f"| validation | accuracy | 0.9266 | {scored:.4f} | {scored - 0.9266:+.4f} |"
    assert line in (output / "reproduce.md").read_text()
    said = capsys.readouterr().out
    assert "published (selected on dev, single run)" in said
    config = read(output / "student" / "model" / "config.json")
    assert {key: config[key] for key in XTREMEDISTIL[256]} == XTREMEDISTIL[256]
    seeds = [
        (output / "teachers" / f"teacher-{n}" / "config.yaml").read_text().count(f"\nseed: {n}\n")
        for n in range(2)
    ]
    assert seeds == [1, 1]
    for n in range(2):
        folder = output / "teachers" / f"teacher-{n}"
        made_with = yaml.safe_load((folder / "config.yaml").read_text())
        assert (made_with["ensemble"], made_with["temperature"]) == ("none", 1.0)
        layers = read(folder / "model" / "config.json")["num_hidden_layers"]
        assert layers == SMALL_BERT["num_hidden_layers"]
    # again: nothing is trained, the figures are printed
    done = {path: path.stat().st_mtime_ns for path in output.glob("**/run_summary.json")}
    assert len(done) == 3
    reproduce("sst2-h256", given, 2, ALONE)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert "0.9266" in capsys.readouterr().out
    # broken off after its teachers: they are not trained again
    shutil.rmtree(output / "student")
    reproduce("sst2-h256", given, 2, ALONE)
    after = {path for path in done if path.stat().st_mtime_ns != done[path]}
    assert after == {output / "student" / "run_summary.json"}
    assert read(output / "reproduce.json") == made


def write_rows(folder, task):
    """48 rows of two sentences each for training, 12 for dev."""
    texts = iter(sentences(120))
    folder.mkdir()
    for split, count in (("train", 48), ("dev", 12)):
        rows = [
            {
                "sentence1": next(texts),
                "sentence2": next(texts),
                "label": n % 5 if task == "stsb" else n % 2,
            }
            for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "stsb-h256",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mnli-h384", "mrpc-h256")),
    ],
)
def test_scores_and_several_splits_and_metrics_are_reproduced_too(name, models, tmp_path):
    task, _, width = name.partition("-h")
    data = FIXTURES / task if task == "mnli" else write_rows(tmp_path / "data", task)
    given = words(models, data, tmp_path / "out", width, "selection.fraction=0.5")
    reproduce(name, [*given, "max_steps=1", "global_batch_size=4", "micro_batch_size=4"], 1, ALONE)
    made = [
        (one["split"], one["metric"], one["published"])
        for one in read(tmp_path / "out" / "reproduce.json")["figures"]
    ]
    assert made == [(f.split, f.metric, f.score) for f in CHECKPOINTS[name].figures()]
    assert len(made) == 2


def test_given_teachers_are_taken_in_place_of_new_ones(models, grammar, teachers, tmp_path):
    output = tmp_path / "sst2"
    given = words(models, grammar, output, 256, f"teachers=[{teachers[0]}]", "max_steps=1")
    reproduce("sst2-h256", given, 3, ALONE)
    assert not (output / "teachers").exists()
    assert len(read(output / "reproduce.json")["figures"][0]["teachers"]) == 1


def test_sixteen_checkpoints_are_listed_with_their_figures(capsys):
    main(["reproduce"])
    said = capsys.readouterr().out
    assert len(CHECKPOINTS) == 16
    for name, one in CHECKPOINTS.items():
        (line,) = [line for line in said.splitlines() if f" {name} " in line]
        assert one.student in line
        assert all(f"{figure.score:.4f}" in line for figure in one.figures())


@pytest.mark.slow
def test_without_the_hub_it_fails_at_once_and_names_all_that_is_missing(tmp_path, monkeypatch):
    """In a process of its own, where no variable says that it is offline: nobody answers at the
    hub's address."""
    program = "import sys; from sead_dist.cli.commands import main; main(sys.argv[1:])"
    env = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "home"),
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program, "reproduce", "rte-h384"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
        check=False,
    )
    assert done.returncode == 2
    # nothing but this line: no library tried again and again
    assert done.stderr.splitlines() == [
        "sead-dist: rte-h384 needs data or models that cannot be reached here: data nyu-mll/glue rte (or give "
        "data.path=DIR), encoder google-bert/bert-base-uncased (or give encoders=[DIR]), student "
        "microsoft/xtremedistil-l6-h384-uncased (or give student=DIR)"
    ]
    assert not (tmp_path / "reproduce").exists()


def test_only_what_is_missing_is_named(models, grammar, tmp_path):
    given = words(models, grammar, tmp_path / "out", 256, "student=owner/name")
    with pytest.raises(UserError, match=r"here: student owner/name \(or give student=DIR\)$"):
        reproduce("sst2-h256", given, 1, ALONE)
    given = words(models, tmp_path / "none", tmp_path / "out", 256)
    with pytest.raises(UserError, match=r"data.path .*none does not exist"):
        reproduce("sst2-h256", given, 1, ALONE)


def test_mistakes_are_told_first(models, grammar, tmp_path):
    for name, more, count, message in (
        ("sst-h256", (), 1, "unknown checkpoint 'sst-h256'; did you mean 'sst2-h256'"),
        ("cola-h256", (), 1, "unknown checkpoint 'cola-h256'.* known: sst2-h256, sst2-h384"),
        ("sst2-h256", ("task=rte",), 1, "task=rte, but sst2-h256 is a checkpoint for sst2"),
        ("sst2-h256", ("epoch=1",), 1, "unknown key 'epoch'; did you mean 'num_train_epochs'"),
        ("sst2-h256", (), 0, "--teachers 0 is below 1; give 1 or more"),
        ("sst2-h256", ("push_to_hub=true",), 1, "HF_HUB_OFFLINE is set"),
    ):
        with pytest.raises(UserError, match=message):
            reproduce(name, words(models, grammar, tmp_path / "out", 256, *more), count, ALONE)
    assert json.dumps([p.name for p in tmp_path.iterdir()]) == "[]"
