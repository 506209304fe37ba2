"""What a sharded teacher must be, found before anything is loaded; and where `auto` shards."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import load_teachers, save_teacher

from sead_dist.errors import UserError
from sead_dist.teachers import sharding as sharded
from sead_dist.teachers.placement import check_placements, choose_placements, held_bytes
from sead_dist.teachers.sharding import check_shardable, empty_model


@pytest.fixture
def folder(tmp_path):
    return save_teacher(tmp_path / "t", num_hidden_layers=2)


def refused(folder, match):
    with pytest.raises(UserError, match=match) as caught:
        check_shardable(load_teachers([folder])[0], False)
    assert "\n" not in str(caught.value)
    assert "placement: partitioned or colocated" in str(caught.value)


def test_a_checkpoint_without_safetensors_is_refused(folder):
    check_shardable(load_teachers([folder])[0], False)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    refused(folder, "reads slices of safetensors, and its weights are pytorch_model.bin")


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "bert.encoder.layer.1.output.dense.weight"
    tensors[name] = tensors[name][:, :10].contiguous()
    save_file(tensors, path)
    refused(folder, rf"no tensor {name} of shape \[32, 64\]")
    del tensors[name]
    save_file(tensors, path)
    refused(folder, rf"no tensor {name} of shape")


def test_a_model_without_layers_is_refused(folder):
    save_teacher(folder, num_hidden_layers=0)
    refused(folder, "cannot split BertForSequenceClassification: it has no list of layers")


def test_layers_that_share_parameters_are_refused(folder, monkeypatch):
    def shared(teacher, trust):
        model = empty_model(teacher, trust)
        first, second = model.bert.encoder.layer
        second.output.dense.weight = first.output.dense.weight
        return model

    monkeypatch.setattr(sharded, "empty_model", shared)
    refused(folder, "its layers share parameters")


def test_offload_of_a_teacher_that_is_not_sharded_is_refused(folder):
    teachers = load_teachers([f"{{path: {folder}, offload: true}}"])
    check_placements(teachers, ["sharded"])
    for where in ("colocated", "partitioned"):
        with pytest.raises(UserError, match=f"offload=true is for placement=sharded.*is {where}"):
            check_placements(teachers, [where])


def test_auto_shards_what_does_not_fit_on_one_rank_of_two(folder):
    small = load_teachers([folder])[0]
    large, asked = (
        replace(small, bytes=1000),
        small.entry.model_copy(update={"placement": "colocated"}),
    )
    small = replace(small, bytes=100)
    # bytes free on the smallest rank
    for free, expected in (
        (4000, ["colocated", "colocated"]),
        (1600, ["sharded", "colocated"]),
        # half of the large one and the small one do not fit together into 550
        (1100, ["sharded", "partitioned"]),
    ):
        assert choose_placements([large, small], "auto", 2, free)[0] == expected
    assert choose_placements([large], "auto", 1, 1100)[0] == ["partitioned"]
    kept = replace(large, entry=asked)
    assert choose_placements([kept], "auto", 2, 1100)[0] == ["colocated"]
    assert held_bytes(1001, "sharded", 4) == 251
    assert held_bytes(1001, "partitioned", 4) == 1001
