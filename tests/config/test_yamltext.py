"""YAML files: each key once."""

import pytest
import yaml

from sead_dist.cli.grammar import grammar_tokenizer
from sead_dist.config.load import load_config, read_method
from sead_dist.config.schema import StudentConfig
from sead_dist.config.yaml_text import parse_yaml, to_yaml
from sead_dist.data.tasks import load_task
from sead_dist.errors import UserError
from sead_dist.models.student import check_start
from sead_dist.slurm.settings import load_settings
from sead_dist.sweep.grid import make_grid


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 3\nseed: 1\nepochs: 4\n", "3: the key 'epochs' stands twice, first in line 1; re"),
        ("data:\n  path: a\n  path: b\n", "3: the key 'path' stands twice, first in line 2; remove"),
        ("per_task: {sst2: {seed: 1}, sst2: {}}\n", "1: the key 'sst2' stands twice; remove or"),
    ],
)  # fmt: skip
def test_a_key_that_stands_twice_is_refused_in_every_file_with_its_line(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    grammar_tokenizer().save_pretrained(tmp_path)
    shape = StudentConfig(path=None, shape=str(path), layers=None, tokenizer=str(tmp_path))
    for read in (
        lambda: load_config([str(path), "student=s", "output_dir=o"]),
        lambda: make_grid([str(path), "tasks=[sst2]", "student=s", "output_dir=o"]),
        lambda: load_task(path),
        lambda: check_start(shape, False),
        lambda: read_method(str(path)),
        lambda: load_settings(str(path), {}),
    ):
        with pytest.raises(UserError, match=f"mine.yaml, line {message}") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2\n", "line 2 is not valid YAML: .*; correct this line or the one before it$"),
        ("a: [1", "line 1 is not valid YAML: .*; correct it$"),
        ("a: 1\nb: 99999999999999999999\n", "line 2 .*: the number is too large; correct it$"),
        ("a: \x07", "here is not valid YAML: special characters are not allowed; correct it$"),
    ],
)
def test_a_line_that_is_no_yaml_is_named_with_a_fix(text, message):
    with pytest.raises(UserError, match=message):
        parse_yaml(text, "here")


def test_keys_that_are_one_number_are_one_key_and_unlike_ones_are_not():
    for text in ('{0: a, "0": b}', "{7: a, +7: b}"):
        with pytest.raises(UserError, match="stands twice"):
            parse_yaml(text, "here")
    assert parse_yaml("{a: 1, A: 2, 1: {a: 3}}", "here") == {"a": 1, "A": 2, 1: {"a": 3}}


def test_a_merged_mapping_may_be_laid_over():
    read = parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", "here")
    assert read["b"] == {"x": 3, "y": 2}


def test_numbers_are_read_as_they_look():
    read = parse_yaml("[010, 1_0, 1:30, 0x10, 12, -3, 0, 1e2]", "here")
    assert read == ["010", "1_0", "1:30", "0x10", 12, -3, 0, 100.0]
    assert load_config(["sst2", "student=s", "output_dir=o", "seed=010"]).seed == 10
    with pytest.raises(UserError, match=r"temperature='1:30': expected a number, such as 0.1; see"):
        load_config(["sst2", "student=s", "output_dir=o", "temperature=1:30"])


@pytest.mark.parametrize(
    "word", ["num_train_epochs=true", "alpha=true", "student.layers=[1, true]"]
)
def test_true_is_no_number(word):
    with pytest.raises(
        UserError, match=r"=(true|\[1, true\]): input should be a number, not true or false"
    ):
        load_config(["sst2", "student=s", "output_dir=o", word])


@pytest.mark.parametrize(
    "text",
    [
        *("1e5", "1E-5", ".5e1", "1.", "007", "1_0", "1:30"),
        *("no", "On", "~", ".inf", "a: b", "", " a"),
    ],
)
def test_a_text_that_is_written_is_read_back_as_this_text(text):
    assert parse_yaml(to_yaml({text: [text]}), "x") == {text: [text]}
    # other readers have YAML 1.1
    assert yaml.safe_load(to_yaml([text])) == [text]
