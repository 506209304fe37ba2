"""Every task's official metric, worked out by hand on its fixture; label names; own tasks.

The fixtures' binary labels are 1 0 1 1 (rte, qnli: 0 1 0 0). Against predictions 1 1 1 0 that is
2 true positives, 1 false positive, 1 false negative, 0 true negatives.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from rows import load_split

from sead_dist.data.examples import ExampleSet, build_examples, subset
from sead_dist.data.kinds import align_name
from sead_dist.data.tasks import (
    TASKS,
    compute_metrics,
    constant_score,
    find_problem,
    load_task,
)
from sead_dist.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"


def fixture_examples(name: str, split: str = "validation") -> ExampleSet:
    task = TASKS[name]
    return build_examples(task, load_split(task, split, FIXTURES / name, None, None, False), split)


def one_hot(predictions: list[int], classes: int) -> np.ndarray:
    return np.eye(classes)[predictions]


@pytest.mark.parametrize(
    ("name", "split", "predictions", "expected"),
    [
        # (0*2 - 1*1) / sqrt((2+1)(2+1)(0+1)(0+1)) = -1/3
        ("cola", "validation", [1, 1, 1, 0], {"matthews_correlation": -1 / 3}),
        ("sst2", "validation", [1, 1, 1, 0], {"accuracy": 2 / 4}),
        # F1 = 2*2 / (2*2 + 1 + 1)
        ("mrpc", "validation", [1, 1, 1, 0], {"accuracy": 2 / 4, "f1": 4 / 6}),
        ("qqp", "validation", [1, 1, 1, 0], {"accuracy": 2 / 4, "f1": 4 / 6}),
        # gold 0 1 2 0; the second dev set holds the same rows in reverse: 0 2 1 0
        ("mnli", "validation_matched", [0, 1, 1, 0], {"accuracy": 3 / 4}),
        ("mnli", "validation_mismatched", [0, 1, 2, 0], {"accuracy": 2 / 4}),
        ("qnli", "validation", [0, 0, 0, 1], {"accuracy": 2 / 4}),
        ("rte", "validation", [0, 1, 0, 1], {"accuracy": 3 / 4}),
        ("superglue_rte", "validation", [0, 1, 0, 1], {"accuracy": 3 / 4}),
        ("wnli", "validation", [0, 0, 0, 0], {"accuracy": 1 / 4}),
        ("boolq", "validation", [1, 1, 1, 0], {"accuracy": 2 / 4}),
        # gold 0 1 2 1: F1 1, 2*2/(2*2+1) = 0.8, 0; their mean 0.6
        ("cb", "validation", [0, 1, 1, 1], {"accuracy": 3 / 4, "f1_macro": 0.6}),
        ("copa", "validation", [0, 1, 0, 0], {"accuracy": 3 / 4}),
        ("wic", "validation", [1, 1, 1, 1], {"accuracy": 3 / 4}),
        ("wsc", "validation", [0, 0, 1, 1], {"accuracy": 3 / 4}),
        # gold 1 0 1 | 0 1: 3 true positives, 1 false positive; the first question is all right
        ("multirc", "validation", [1, 0, 1, 1, 1], {"f1_a": 6 / 7, "exact_match": 1 / 2}),
    ],
)
def test_official_metric_by_hand(name, split, predictions, expected):
    examples = fixture_examples(name, split)
    logits_BC = one_hot(predictions, TASKS[name].num_labels)
    assert compute_metrics(TASKS[name], logits_BC, examples) == pytest.approx(expected)


def test_stsb_correlations_by_hand():
    # Gold 1 2 3 4, deviations -1.5 -0.5 0.5 1.5; scores 1 2 4 12, deviations -3.75 -2.75 -0.75 7.25:
    # products sum to 17.5, squares to 5 and 74.75. The order is right, so Spearman is 1.
    got = compute_metrics(
        TASKS["stsb"], np.array([[1.0], [2], [4], [12]]), fixture_examples("stsb")
    )
    assert got == pytest.approx({"pearson": 17.5 / math.sqrt(5 * 74.75), "spearmanr": 1.0})


def test_record_scores_the_best_candidate_of_each_query():
    examples = fixture_examples("record")
    margin = {
        (0, "Lund"): 2.0,  # accepted: exact match and F1 are 1
        (0, "the Harbour"): 1.0,
        # Of the tokens "north harbour" and (without its article) "harbour" one is shared:
        # F1 = 2*1 / (2+1), no exact match.
        (1, "North Harbour"): 0.5,
    }
    logits_BC = np.array(
        [
            (0.0, margin.get((int(g), a.candidate), -1.0))
            for g, a in zip(examples.groups_B, examples.answers, strict=True)
        ]
    )
    expected = {"exact_match": 1 / 2, "f1": (1 + 2 / 3) / 2}
    assert compute_metrics(TASKS["record"], logits_BC, examples) == pytest.approx(expected)


def test_metrics_of_groups_do_not_need_neighbouring_rows():
    examples = fixture_examples("multirc")
    order = np.array([3, 0, 4, 2, 1])
    logits_BC = one_hot([1, 0, 1, 1, 1], 2)
    got = compute_metrics(TASKS["multirc"], logits_BC[order], subset(examples, order))
    assert got == pytest.approx({"f1_a": 6 / 7, "exact_match": 1 / 2})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sst2", 3 / 4),
        ("cola", 0.0),
        ("stsb", 0.0),
        ("cb", 2 / 4),
        ("multirc", 2 * 3 / (2 * 3 + 2)),  # always true: 3 right, 2 false positives
        ("record", (2 / 5 + 1 / 5) / 2),  # 5 candidates, 2 accepted, then 1
    ],
)
def test_best_constant_prediction(name, expected):
    assert constant_score(TASKS[name], fixture_examples(name)) == pytest.approx(expected)


def test_constant_scores_have_no_correlation():
    got = compute_metrics(TASKS["stsb"], np.full((4, 1), 2.5), fixture_examples("stsb"))
    assert got == {"pearson": 0.0, "spearmanr": 0.0}


def test_unlabelled_rows_have_no_metric():
    task = TASKS["sst2"]
    examples = build_examples(task, [{"sentence": "a"}], "unlabelled", labelled=False)
    with pytest.raises(ValueError, match="label in every row"):
        compute_metrics(task, np.zeros((1, 2)), examples)
    with pytest.raises(ValueError, match="for 1 labels"):
        compute_metrics(task, np.zeros((2, 2)), examples)


def test_every_builtin_task_is_consistent():
    assert {name: find_problem(task) for name, task in TASKS.items()} == dict.fromkeys(TASKS)
    assert len(TASKS) == 17


def test_every_builtin_task_has_a_config_of_its_name():
    folder = Path(__file__).parents[2] / "configs" / "tasks"
    named = {path.stem: yaml.safe_load(path.read_text())["task"] for path in folder.glob("*.yaml")}
    assert {name: named.get(name) for name in TASKS} == {name: name for name in TASKS}


def test_hub_label_order():
    orders = {name: task.labels for name, task in TASKS.items()}
    assert orders["rte"] == ("entailment", "not_entailment")
    assert orders["wnli"] == ("not_entailment", "entailment")
    assert orders["mnli"] == ("entailment", "neutral", "contradiction")
    assert orders["cb"] == ("entailment", "contradiction", "neutral")
    assert orders["mrpc"] == ("not_equivalent", "equivalent")


def test_label_names_align_by_meaning_never_by_number():
    mnli, rte, sst2 = TASKS["mnli"], TASKS["rte"], TASKS["sst2"]
    assert [align_name(mnli, n) for n in ("CONTRADICTION", "Neutral", "entailment")] == [2, 1, 0]
    assert align_name(rte, "not entailment") == align_name(rte, "Non-Entailment") == 1
    assert align_name(sst2, "POS") == 1
    for says_nothing in ("LABEL_0", "label_1", "0", "1", "", "joy"):
        assert align_name(sst2, says_nothing) is None


def test_unknown_task_names_the_nearest_and_all():
    with pytest.raises(
        UserError, match=r"'sst'; did you mean 'sst2'\? known: cola, sst2, .*record"
    ):
        load_task("sst")


def own_task(tmp_path: Path, text: str) -> str:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return str(path)


STARS = 'name: stars\ntext_a: "{title}. {body}"\nlabels: ["1", "2", "3"]\n'


def test_own_task_from_yaml(tmp_path):
    task = load_task(
        own_task(tmp_path, STARS + "label_column: stars\nmetrics: [accuracy, f1_macro]\n")
    )
    assert task.kind == "classification"
    assert task.fields == task.sentences == ("title", "body")
    rows = [
        {"title": "Good", "body": "It {works}", "stars": 3},
        {"title": "a", "body": "b", "stars": "1"},
    ]
    examples = build_examples(task, rows, "train")
    assert examples.texts_a[0] == "Good. It {works}"
    assert examples.labels_B.tolist() == [2, 0]  # numbers that are label names are names
    assert align_name(task, "3") == 2


def test_own_task_may_say_what_the_files_numbers_mean(tmp_path):
    text = 'name: tweets\ntext_a: "{text}"\nlabels: [bad, good]\nvalue_aliases: {0: bad, 4: good}\n'
    task = load_task(own_task(tmp_path, text))
    rows = [{"text": "x", "label": 4}, {"text": "y", "label": "0"}]
    assert build_examples(task, rows, "train").labels_B.tolist() == [1, 0]
    with pytest.raises(UserError, match=r"label 1 .* allowed: bad, good, 0, 4"):
        build_examples(task, [{"text": "x", "label": 1}], "train")
    assert align_name(task, "4") is None


def test_own_regression_and_choice_tasks(tmp_path):
    scores = load_task(own_task(tmp_path, 'name: s\ntext_a: "{text}"\nscore_range: [-1, 1]\n'))
    assert (scores.kind, scores.metrics, scores.num_labels) == (
        "regression",
        ("pearson", "spearmanr"),
        1,
    )
    text = (
        'name: c\nkind: choice\ntext_a: "{q}"\nchoices: ["{a}", "{b}", "{c}"]\nlabels: [a, b, c]\n'
    )
    task = load_task(own_task(tmp_path, text))
    examples = build_examples(
        task, [{"q": "Q", "a": "x", "b": "y", "c": "z", "label": "c"}], "train"
    )
    assert (examples.choices, examples.texts_a, examples.texts_b) == (3, ["Q"] * 3, ["x", "y", "z"])
    assert examples.labels_B.tolist() == [2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (STARS + "lables: [a]\n", "unknown key 'lables'; did you mean 'labels'"),
        (STARS + "label: team\n", "unknown key 'label'; did you mean 'label_column'"),
        (
            STARS + "metrics: accuracy\n",
            r"metrics is 'accuracy': expected a list; give \[accuracy\]",
        ),
        (STARS + "symmetric: maybe\n", "symmetric is 'maybe': expected true or false; give"),
        (STARS + "label_column: null\n", "label_column is null: "),
        (
            "name: x\ntext_a: '{t'\n",
            r"text_a has '{t', in which a brace stands alone .*; write {COL",
        ),
        ("name: x\nfields: [t]\ntext_a: '{t'\nlabels: [a, b]\n", "text_a has '{t', in which a br"),
        ("name: x\ntext_a: '{t}'\nchoices: ['{a', 'b}']\n", "choices has '{a', in which a brace"),
        ("name: x\nlabels: [a, b]\n", "key 'text_a' is missing"),
        ('name: x\ntext_a: "{t}"\nlabels: [false, true]\n', r"labels.0 is false.*quote it"),
        ('name: x\ntext_a: "{t}"\nlabels: [LABEL_0, LABEL_1]\n', "'label_0', which names no class"),
        ('name: x\ntext_a: "{t}"\nlabels: [a]\n', "two or more"),
        ('name: x\ntext_a: "{t}"\nlabels: [a, A]\n', "two or more different"),
        ('name: x\ntext_a: "{t"\nlabels: [a, b]\n', "text_a has '{t', in which .*expected '}'"),
        ('name: x\ntext_a: "t"\nlabels: [a, b]\n', "must name a column"),
        (STARS + "metrics: [bleu]\n", "metrics is .'bleu'.; allowed here: accuracy"),
        (STARS + "metrics: [f1]\n", "use f1_macro"),
        (STARS + "aliases: {one: first}\n", "alias 'one' stands for 'first'; allowed: 1, 2, 3"),
        (STARS + 'value_aliases: {0: "1", "0": "2"}\n', "line 4: the key '0' stands twice; remove"),
        (
            STARS + 'aliases: {ein s: "1", Ein-S: "2"}\n',
            "'Ein-S' stands for '2' in aliases and for '1'",
        ),
        (STARS + 'aliases: {"1": "2"}\n', "'1' stands for '2' in aliases and for '1' in labels"),
        (STARS + 'value_aliases: {"1": "2"}\n', "'1' stands for '2' in value_aliases and for '1'"),
        (STARS + "kind: choice\n", "needs one for each label"),
        (STARS + "sentences: [text]\n", "sentences names .'text'."),
        (STARS + "splits: {train: [train]}\n", "needs train and a split to evaluate"),
        ('name: x\ntext_a: "{t}"\nscore_range: [5, 0]\n', "give .lowest, highest."),
        (STARS + "score_range: [0, 5]\n", "has score_range instead; leave labels out"),
        (STARS + "kind: classification\nscore_range: [0, 5]\n", "is for kind 'regression'"),
        (STARS.replace("stars", "a/b"), "name is 'a/b'"),
        ("- a\n", "expected keys and values"),
        ("a: [\n", "is not valid YAML"),
    ],
)
def test_mistakes_in_an_own_task_are_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        load_task(own_task(tmp_path, text))
    assert "\n" not in str(error.value)


def test_missing_task_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none.yaml cannot be read: No such file"):
        load_task(str(tmp_path / "none.yaml"))
