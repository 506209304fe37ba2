"""Which teacher may be the feature teacher, and what it shows."""

from dataclasses import replace

import pytest
import torch
from small import (
    ALONE,
    CPU,
    config,
    edit_json,
    load_teachers,
    model_inputs,
    save_teacher,
    small_split,
)

from sead_dist.data.order import make_batch
from sead_dist.errors import UserError
from sead_dist.models.hidden_states import WantedLayers, find_layer_parts
from sead_dist.runtime.distributed import World
from sead_dist.teachers.feature_teacher import (
    FeatureTeacher,
    check_feature_teacher,
    colocate_candidates,
    load_feature_teacher,
)

TWO = World(0, 2, CPU)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    save_teacher(root / "plain")
    save_teacher(root / "deberta", "deberta-v2", seed=1)
    save_teacher(root / "short", seed=2, max_position_embeddings=20)
    for kind in ("roformer", "convbert", "gpt2"):
        save_teacher(root / kind, kind)
    return root


def checked(folders, entries, world=TWO, length=32, **keys):
    teachers = load_teachers([entry.replace("@", f"{folders}/") for entry in entries])
    given = config("teachers=[a]", **{"method": "minilm", **keys})
    check_feature_teacher(given, teachers, model_inputs(length), world.size)


@pytest.mark.parametrize(
    ("entries", "keys", "said"),
    [
        (
            ["{path: @plain, placement: partitioned}"],
            {},
            "teacher plain is partitioned, and feature_loss=minilm needs it on every rank; "
            "give its entry placement: colocated, or choose another teacher: teacher=NAME",
        ),
        (["@plain"], {"placement": "partitioned"}, "teacher plain is partitioned"),
        (["@plain"], {"placement": "sharded"}, "teacher plain is sharded"),
        (
            ["@plain", "{path: @plain, placement: sharded, name: split}"],
            {},
            "teacher split is sharded",
        ),
        (["@short"], {}, "teacher short reads at most 20 tokens.* give max_length=20"),
        (
            ["@deberta"],
            {},
            r"teacher deberta: its attention \(deberta-v2\) is not built like BERT's",
        ),
        (
            ["@roformer"],
            {},
            r"teacher roformer \(roformer\): its layers cannot be read: the attention of layer 1 "
            "differs from the model's output by .* or a method that needs only logits",
        ),
        (
            ["@convbert"],
            {"method": "distilbert"},
            "teacher convbert is a convbert, whose logits change with the padding of a batch, and "
            "feature_loss=distilbert runs it on the student's rows, padded on the right; leave it "
            "out, or choose another teacher: teacher=NAME",
        ),
        (["@gpt2"], {}, r"teacher gpt2: its attention \(gpt2\) is not built like BERT's"),
    ],
)
def test_a_teacher_that_cannot_be_the_feature_teacher_is_told(folders, entries, keys, said):
    with pytest.raises(UserError, match=said):
        checked(folders, entries, **keys)


def test_a_feature_teacher_of_another_tokeniser_is_told(folders):
    teachers = load_teachers([folders / "plain"])
    other = replace(model_inputs(), tokenizer_hash="other")
    with pytest.raises(UserError, match="teacher plain has another tokeniser than the student"):
        check_feature_teacher(config("teachers=[a]", method="minilm"), teachers, other, TWO.size)


def test_a_feature_teacher_that_is_padded_on_the_other_side_than_the_student_is_told(folders):
    (teacher,) = load_teachers([folders / "plain"])
    one = replace(teacher, cut=replace(teacher.cut, padding="left"))
    said = "teacher plain is a bert, whose rows must be padded on the left, and feature_loss=minilm"
    with pytest.raises(UserError, match=said):
        check_feature_teacher(
            config("teachers=[a]", method="minilm"), [one], model_inputs(), TWO.size
        )


def test_the_feature_teacher_is_fed_by_the_rules_of_any_teacher(folders, tmp_path):
    # whatever its file says, the padding token is the tokeniser's
    edit_json(save_teacher(tmp_path / "odd", seed=3) / "config.json", pad_token_id=7)
    (teacher,) = load_teachers([tmp_path / "odd"])
    given = config("teachers=[a]", method="minilm")
    assert load_feature_teacher(given, teacher, CPU).config.pad_token_id == 0
    # and with its own weights its answers stand the padding
    asked = replace(teacher, cut=replace(teacher.cut, padding="left"))
    with pytest.raises(UserError, match="other logits in a batch padded on the left than alone"):
        load_feature_teacher(given, asked, CPU)


def test_a_feature_teacher_with_its_own_weights_is_compared_when_it_is_loaded(folders):
    (teacher,) = load_teachers([folders / "roformer"])
    with pytest.raises(
        UserError, match=r"teacher roformer \(roformer\): its layers cannot be read: the"
    ):
        load_feature_teacher(config("teachers=[a]", method="minilm"), teacher, CPU)
    load_feature_teacher(config("teachers=[a]", method="distilbert"), teacher, CPU)


def test_int8_weights_are_told_without_the_library_that_makes_them(folders):
    (teacher,) = load_teachers([folders / "plain"])
    entry = teacher.entry.model_copy(update={"quantization": "int8"})
    teachers = [type(teacher)(**{**vars(teacher), "entry": entry})]
    with pytest.raises(
        UserError, match=r"quantization=int8, and feature_loss=minilm .* give dtype: bf16"
    ):
        check_feature_teacher(
            config("teachers=[a]", method="minilm"), teachers, model_inputs(), TWO.size
        )


@pytest.mark.parametrize(
    ("entries", "world", "keys"),
    [
        (["@plain"], TWO, {"placement": "colocated"}),
        # alone, every placement is the same
        (["@plain"], ALONE, {"placement": "partitioned"}),
        # only the one that is named must be able to
        (["@plain", "{path: @short, placement: partitioned}"], TWO, {"teacher": "plain"}),
        # hidden states alone are read of any attention
        (["@deberta"], TWO, {"method": "distilbert"}),
        # without layer outputs nothing is asked
        (["{path: @deberta, placement: sharded}"], TWO, {"method": "single"}),
    ],
)
def test_a_teacher_that_can_be_the_feature_teacher_passes(folders, entries, world, keys):
    checked(folders, entries, world, **keys)


def test_auto_holds_on_every_rank_what_may_become_the_feature_teacher(folders):
    teachers = load_teachers(
        [folders / "plain", f"{{path: {folders / 'short'}, placement: partitioned}}"]
    )
    placements = {
        (method, feature_teacher): [
            teacher.entry.placement
            for teacher in colocate_candidates(
                config("teachers=[a]", method=method, teacher=feature_teacher, placement="auto"),
                teachers,
            )
        ]
        for method, feature_teacher in (
            ("minilm", "plain"),
            ("minilm", "short"),
            ("single", "plain"),
        )
    }
    assert placements == {
        ("minilm", "plain"): ["colocated", "partitioned"],
        ("minilm", "short"): [None, "partitioned"],
        ("single", "plain"): [None, "partitioned"],
    }


def test_the_feature_teacher_shows_the_layer_outputs_of_a_micro_batch_without_dropout_or_gradient(
    folders,
):
    (teacher,) = load_teachers([folders / "plain"])
    model = load_feature_teacher(config("teachers=[a]"), teacher, CPU)
    feature_teacher = FeatureTeacher(
        "plain", model, find_layer_parts(model, "it", True), WantedLayers((0, 1), (1,)), 3
    )
    batch = make_batch(small_split(), torch.tensor([0, 1, -1, -1]).numpy())
    torch.manual_seed(0)
    drawn = torch.random.get_rng_state()
    found = feature_teacher.layer_outputs(batch)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    rows, length = batch.inputs["input_ids"].shape
    assert found.hidden[1].shape == (rows, length, 32) == (4, length, 32)
    assert not found.hidden[1].requires_grad
    # autograd may keep it
    assert not found.hidden[1].is_inference()
    again = feature_teacher.layer_outputs(batch)
    assert torch.equal(found.queries[1], again.queries[1])
