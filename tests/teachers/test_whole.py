"""A whole teacher is filled from its files, and says bit for bit what from_pretrained's says."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import CPU, SHAPES, edit_json, load_teachers, save_teacher

from sead_dist.errors import UserError
from sead_dist.models.sequence_classifier import build_teacher
from sead_dist.teachers import whole
from sead_dist.teachers.sharding import check_shardable
from sead_dist.teachers.whole import load_whole

FORMAT = {"format": "pt"}


def inputs(model):
    ids = torch.arange(3, 23).reshape(2, 10) % model.config.vocab_size
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_a_filled_teacher_is_the_one_that_transformers_reads(tmp_path, kind, dtype):
    paths = [save_teacher(tmp_path / str(seed), kind, seed) for seed in range(2)]
    empty = {}
    for teacher in load_teachers(paths, teacher_precision=dtype):
        model = load_whole(teacher, CPU, False, empty)
        expected = build_teacher(teacher.entry, dtype, CPU, False)
        mine, theirs = model.state_dict(), expected.state_dict()
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert all(mine[name].dtype == theirs[name].dtype for name in mine)
        buffers = dict(expected.named_buffers())
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, buffers[name])
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        with torch.inference_mode():
            given = inputs(model)
            assert torch.equal(model(**given).logits, expected(**given).logits)
    # one empty model for both, whose own parameters still have no memory
    assert len(empty) == 1
    (outline,) = empty.values()
    assert {parameter.device.type for parameter in outline.parameters()} == {"meta"}


def test_teachers_of_one_shape_are_filled_apart(tmp_path):
    paths = [save_teacher(tmp_path / str(seed), seed=seed) for seed in range(2)]
    empty = {}
    one, two = (load_whole(teacher, CPU, False, empty) for teacher in load_teachers(paths))
    assert not torch.equal(one.classifier.weight, two.classifier.weight)
    assert torch.equal(
        one.classifier.weight, load_file(paths[0] / "model.safetensors")["classifier.weight"]
    )


def test_what_is_stored_otherwise_is_left_to_transformers(tmp_path, monkeypatch):
    old = save_teacher(tmp_path / "old", seed=1)
    tensors = load_file(old / "model.safetensors")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma"): t for name, t in tensors.items()
    }
    save_file(renamed, old / "model.safetensors", metadata=FORMAT)
    asked = []
    real = build_teacher
    monkeypatch.setattr(whole, "build_teacher", lambda *given: asked.append(1) or real(*given))
    (teacher,) = load_teachers([old])
    model = load_whole(teacher, CPU, False, {})
    assert asked == [1]
    name = "bert.embeddings.LayerNorm.weight"
    assert torch.equal(model.state_dict()[name], tensors[name])
    # codes whose scales stand elsewhere: no number of ours
    tensors["bert.pooler.dense.weight"] = tensors["bert.pooler.dense.weight"].to(
        torch.float8_e4m3fn
    )
    coded = save_teacher(tmp_path / "coded", seed=1)
    save_file(tensors, coded / "model.safetensors", metadata=FORMAT)
    (teacher,) = load_teachers([coded])
    load_whole(teacher, CPU, False, {})
    assert asked == [1, 1]
    with pytest.raises(UserError, match="are quantised in its files"):
        check_shardable(teacher, False)
    # a config that the files do not fit is Transformers' to refuse
    edit_json(old / "config.json", intermediate_size=16)
    (teacher,) = load_teachers([old])
    with pytest.raises((UserError, RuntimeError)):
        load_whole(teacher, CPU, False, {})
