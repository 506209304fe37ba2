"""KEY=VALUE words: a text is what was typed, and whatever is not a text is of its key's own type."""

import pytest

from sead_dist.config.load import load_config, read_layers
from sead_dist.config.schema import SweepConfig
from sead_dist.config.yaml_text import parse_yaml, read_word, to_flow
from sead_dist.errors import UserError

BASE = ["sst2", "student=s", "output_dir=o"]
AS_TYPED = (
    *("exp #2/run", "007", "2026-11-28", "1_0", "a: b", "on", "1e5", "t[1]", "true", "~"),
    *("runs/[ab]*", "runs/{a,b}", "it's", "a b", "#x", "[ab]*", "{task}/x", "{x}", "*", "&a", "!x"),
)


@pytest.mark.parametrize(
    "text", ["exp #2/run", "007", "2026-11-28", "1_0", "[a", "a: b", "{x}", " a ", "on", "1e5"]
)
def test_a_path_is_what_was_typed(text):
    assert load_config(["sst2", "student=s", f"output_dir={text}"]).output_dir == text


def test_a_word_is_of_its_keys_own_type():
    read = load_config(
        [
            *BASE,
            "num_train_epochs=7",
            "learning_rate=1e-3",
            "alpha_end=null",
            "teacher_validation=off",
        ]
    )
    assert (read.num_train_epochs, read.learning_rate, read.alpha_end, read.teacher_validation) == (
        7,
        1e-3,
        None,
        "off",
    )
    assert load_config([*BASE, "data.path=a", "data.path=null"]).data.path is None
    assert load_config([*BASE, 'data.path="null"']).data.path == "null"
    assert load_config([*BASE, "teacher=a", "teacher=null"]).teacher is None
    assert load_config([*BASE, "store=a", "store=null"]).store.path is None
    assert load_config([*BASE, "teachers=[a]", "teachers=null"]).teachers == []
    assert load_config([*BASE, 'store="null"']).store.path == "null"
    assert load_config([*BASE, "student=a #1"]).student.path == "a #1"
    assert load_config([*BASE, "student={path: a, layers: [0, 1]}"]).student.layers == [0, 1]
    named = load_config([*BASE, "teachers=[a, {path: b, name: c}]"]).teachers
    assert [(entry.path, entry.name) for entry in named] == [("a", None), ("b", "c")]
    with pytest.raises(UserError, match="num_train_epochs='many'"):
        load_config([*BASE, "num_train_epochs=many"])


@pytest.mark.parametrize("text", AS_TYPED)
def test_a_path_in_a_list_or_mapping_is_what_was_typed_too(text):
    plain = f"teachers=[{text}, b, {{path: {text}, name: {text}, weight: 2}}]"
    read = read_word("teachers", plain.removeprefix("teachers="))
    assert read == [text, "b", {"path": text, "name": text, "weight": 2}]
    assert read_word("tasks", f"[c,{text}]") == ["c", text]
    assert read_word("tasks", text) == text
    assert read_word("student", f"{{path: {text}, layers: [0, 1]}}") == {
        "path": text,
        "layers": [0, 1],
    }
    assert read_word("per_task", f"{{rte: {{data: {{path: {text}}}, num_train_epochs: 5}}}}") == {
        "rte": {"data": {"path": text}, "num_train_epochs": 5}
    }
    assert read_word("per_task.rte.data.path", text) == text
    assert read_word("finetune.store", text) == text


def test_what_yaml_says_of_lists_and_mappings_still_holds():
    for key, text, value in (
        ("teachers", "['a, b', \"null\", null, ]", ["a, b", "null", None]),
        ("teachers", "[]", []),
        ("teachers", '[{"path":"a: b", labels: [no, 1], offload: true}]',
         [{"path": "a: b", "labels": ["no", "1"], "offload": True}]),
        ("student", "{path: a, layers: null, tokenizer: 'x # y'}",
         {"path": "a", "layers": None, "tokenizer": "x # y"}),
        ("seeds", "[0, 3]", [0, 3]),
        ("student.layers", "[1, 3]", [1, 3]),
        ("finetune", "{num_train_epochs: 5, learning_rate: 1e-5}", {"num_train_epochs": 5, "learning_rate": 1e-5}),
        ("data.max_train_examples", "null", None),
    ):  # fmt: skip
        assert read_word(key, text) == value, text


@pytest.mark.parametrize(
    "text",
    [
        *("a, b", "a]", "[a", "it's", "'a', 'b'", 'say "a, b"', "a: b", "{a}", "a}"),
        *("\\", '\\", x', "\\'"),
        *("a\nb", " a ", "", "null", "true", "007", "1e5", "#x", "ä", "- a", "?", "a ''b', c"),
        *("a\r\nb", "a\u2028b", "? a", "x" * 200, "a\nb, c", "long, [key" * 20),
    ],
)
def test_a_list_or_mapping_that_is_written_is_read_back(text):
    entries = [text, {"path": "m", "labels": [text, "b"], "prompt": text}, "last"]
    assert read_word("teachers", to_flow(entries)) == entries
    assert parse_yaml(to_flow(entries), "x") == entries
    assert "\n" not in to_flow(entries)
    renames = {"predictions": "p.csv", "labels": {text: "a", "c": text}}
    assert read_word("teachers", to_flow(renames)) == renames


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{path: m, prompt: Q: 'tis}", {"path": "m", "prompt": "Q: 'tis"}),
        ("[m: 'b]", ["m: 'b"]),
    ],
)
def test_a_quotation_mark_that_is_not_closed_is_a_letter(text, value):
    assert read_word("teachers", text) == value


@pytest.mark.parametrize("word", ["student.layers=0-5", "student.layers=[0-5]"])
def test_a_range_is_no_number_of_a_layer(word):
    with pytest.raises(UserError, match=r"give \[(NUMBER, NUMBER|0, 2, 4)\]"):
        load_config(["task=sst2", "output_dir=run", "student=a", word])


def test_brackets_left_open_and_keys_given_twice_are_refused():
    for key, text, message in (
        ("teachers", "[a, b", r"the value of teachers, '\[a, b', has a \[ that is not closed"),
        ("student", "{path: a, path: b}", "the key 'path' stands twice"),
        ("selection", "{split: dev, split: dev}", "the key 'split' stands twice"),
    ):
        with pytest.raises(UserError, match=message):
            read_word(key, text)


def test_a_path_that_yaml_reads_as_a_number_is_refused_in_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("teachers: [7]\n")
    with pytest.raises(UserError, match="teachers: 7 is not a text in YAML; put the path in quot"):
        load_config([str(tmp_path / "mine.yaml"), *BASE])


def test_words_of_a_sweep_are_read_alike():
    (layer,) = read_layers(["tasks=[sst2, my #1.yaml]"])
    assert set(layer) <= set(SweepConfig.model_fields)
    assert layer == {"tasks": ["sst2", "my #1.yaml"]}
