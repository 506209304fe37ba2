"""The Python interface: what its import costs, its pure functions, and how given data become rows."""

import inspect
import json
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import sead_dist as sd
from sead_dist.config.load import load_config
from sead_dist.data.formats import text_rows
from sead_dist.data.loading import read_rows, to_rows
from sead_dist.data.tasks import TASKS
from sead_dist.objectives.losses import SOFT_LOSSES, hard_loss, soft_loss
from sead_dist.objectives.weightings import Weighting
from sead_dist.runs.given import given_run

N, B, C = 3, 5, 4
PACKAGE = Path(sd.__file__).parent
MODULES = {
    package: sorted(path.stem for path in (PACKAGE / package).glob("[!_]*.py"))
    for package in ("config", "slurm")
}
HEAVY = {"numpy", "pandas", "pyarrow", "torch", "transformers"}


@pytest.mark.parametrize("module", ["sead_dist", "sead_dist.config", "sead_dist.slurm"])
def test_import_loads_nothing_heavy(module):
    code = f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY & set(json.loads(done.stdout)) == set()


def test_the_import_of_a_name_leaves_random_state_and_environment(monkeypatch):
    def imported(module):
        random.random()
        os.environ["SET_BY_A_LIBRARY"] = module
        os.environ["CHANGED_BY_A_LIBRARY"] = module
        del os.environ["REMOVED_BY_A_LIBRARY"]
        return SimpleNamespace(distill=module)

    monkeypatch.setattr(sd, "import_module", imported)
    monkeypatch.setenv("CHANGED_BY_A_LIBRARY", "before")
    monkeypatch.setenv("REMOVED_BY_A_LIBRARY", "before")
    random.seed(1)
    before = random.getstate(), dict(os.environ)
    assert sd.distill == "sead_dist.api"
    assert (random.getstate(), dict(os.environ)) == before


@pytest.mark.parametrize("package", ["config", "slurm"])
def test_no_module_of_a_light_package_loads_torch(package):
    names = [f"sead_dist.{package}.{name}" for name in MODULES[package]]
    assert len(names) > 2
    code = f"import json, sys, {', '.join(names)}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "transformers"} & set(json.loads(done.stdout)) == set()


def test_every_name_of_the_interface_is_there():
    names = "distill finetune evaluate predict load_config RunConfig TaskSpec soft_targets distillation_loss"
    assert {*names.split(), "Run", "UserError", "RunError"} <= set(dir(sd))
    assert all(getattr(sd, name) is not None for name in sd.__all__)
    with pytest.raises(AttributeError, match="distil"):
        sd.distil  # noqa: B018


@pytest.fixture
def logits_NBC():
    return torch.randn(N, B, C, generator=torch.Generator().manual_seed(0))


def test_soft_targets_are_the_softmax_of_the_mean_of_logits(logits_NBC):
    soft = sd.soft_targets(logits_NBC, ensemble="mean_logits", temperature=3.0)
    torch.testing.assert_close(soft.logits_BC, logits_NBC.mean(0))
    torch.testing.assert_close(soft.targets_BC, (logits_NBC.mean(0) / 3).softmax(-1))


def test_soft_targets_are_the_mean_of_probabilities_where_nothing_is_said(logits_NBC):
    soft = sd.soft_targets(logits_NBC)
    torch.testing.assert_close(soft.targets_BC, logits_NBC.softmax(-1).mean(0))


def test_soft_targets_follow_given_weights_and_gold_labels(logits_NBC):
    weights_N = torch.tensor([1.0, 3.0, 0.0])
    soft = sd.soft_targets(logits_NBC, ensemble="fixed", weights_N=weights_N, temperature=1.0)
    probabilities_NBC = logits_NBC.softmax(-1)
    torch.testing.assert_close(
        soft.targets_BC, (probabilities_NBC[0] + 3 * probabilities_NBC[1]) / 4
    )
    labels_B = torch.arange(B) % C
    soft = sd.soft_targets(logits_NBC, ensemble="answers", labels_B=labels_B)
    said_NB = probabilities_NBC[:, torch.arange(B), labels_B]
    torch.testing.assert_close(soft.weights_NB, said_NB / said_NB.sum(0))
    routes_B = torch.tensor([0, 1, 2, 1, 0])
    soft = sd.soft_targets(logits_NBC, ensemble="routed", routes_B=routes_B)
    torch.testing.assert_close(soft.logits_BC, logits_NBC[routes_B, torch.arange(B)])


def test_distillation_loss_is_the_mean_of_a_runs_loss(logits_NBC):
    student_BC = torch.randn(B, C, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels_B = torch.tensor([0, 1, -1, 3, 2])
    soft = sd.soft_targets(logits_NBC)
    loss = sd.distillation_loss(student_BC, soft, labels_B, alpha=0.25)
    soft_B, hard_B = soft_loss(student_BC, soft, "kl"), hard_loss(student_BC, labels_B)
    by_hand_B = torch.where(labels_B >= 0, 0.25 * soft_B + 0.75 * hard_B, soft_B)
    torch.testing.assert_close(loss, by_hand_B.mean())
    loss.backward()
    assert student_BC.grad is not None
    torch.testing.assert_close(sd.distillation_loss(student_BC, soft), soft_B.mean())
    labelled = sd.distillation_loss(student_BC, None, labels_B)
    torch.testing.assert_close(labelled, hard_B.mean())


def test_scores_are_learnt_by_squared_error():
    logits_NBC = torch.tensor([[[1.0], [2.0]], [[3.0], [2.0]]])
    soft = sd.soft_targets(logits_NBC)
    student_BC = torch.tensor([[0.0], [2.0]])
    assert sd.distillation_loss(student_BC, soft).item() == pytest.approx((2.0**2 + 0) / 2)
    labels_B = torch.tensor([1.0, float("nan")])
    by_hand = (0.9 * 4.0 + 0.1 * 1.0 + 0.0) / 2
    assert sd.distillation_loss(student_BC, soft, labels_B).item() == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t: sd.soft_targets(t[0]), "expected [N, B, C]"),
        (lambda t: sd.soft_targets(t, ensemble="fixed"), "ensemble=fixed needs weights_N"),
        (lambda t: sd.soft_targets(t, ensemble="random"), "ensemble='random' cannot be used here; give one of "),
        (lambda t: sd.soft_targets(t, ensemble="routed", routes_B=torch.zeros(2)), "expected [5]"),
        (lambda t: sd.soft_targets(t, temperature=0.0), "temperature=0.0; expected"),
        (lambda t: sd.soft_targets(t[..., :1], ensemble="entropy"), "needs classes"),
        (lambda t: sd.distillation_loss(t[0, :, :2], sd.soft_targets(t)), "the soft targets (5, 4)"),
        (lambda t: sd.distillation_loss(t[0], None), "nothing to learn from"),
        (lambda t: sd.distillation_loss(t[0], None, torch.full((B,), -1)), "no row has a label"),
        (lambda t: sd.distillation_loss(t[0], sd.soft_targets(t), alpha=2.0), "alpha=2.0; expected"),
        (lambda t: sd.distillation_loss(t[0], sd.soft_targets(t), loss="l1"), "loss='l1' is not a loss"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(logits_NBC, call, says):
    with pytest.raises(sd.UserError) as error:
        call(logits_NBC)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_keys_of_a_call_are_those_of_the_command(tmp_path):
    given = {"method": "entropy", "selection.fraction": 0.2, "store": tmp_path / "store"}
    asked = given_run(
        "sst2", tmp_path, {"output_dir": tmp_path / "run", "num_train_epochs": 2, **given}
    )
    words = [
        "sst2",
        f"data.path={tmp_path}",
        f"output_dir={tmp_path / 'run'}",
        "num_train_epochs=2",
    ]
    words += ["method=entropy", "selection.fraction=0.2", f"store={tmp_path / 'store'}"]
    assert asked.config == load_config(words) == sd.load_config(*words)
    assert sd.load_config("sst2", output_dir="run").max_length == 64
    again = given_run(asked.config, None, {"seed": 3, "selection": {"seed": 4}})
    assert again.config == load_config([*words, "seed=3", "selection.seed=4"])


@pytest.mark.parametrize(
    ("task", "data", "keys", "says"),
    [
        ("sst2", None, {"epoch": 3}, "unknown key 'epoch'; did you mean 'num_train_epochs'?"),
        ("mrcp", None, {}, "did you mean 'mrpc'?"),
        ("sst2", None, {"num_train_epochs": "many"}, "num_train_epochs='many'"),
        (
            "sst2",
            {"train": "a.tsv"},
            {},
            "data has no split 'validation'; it has train, and task 'sst2' needs train, validation; "
            "give each under its name",
        ),
        (sd.TaskSpec("own", "classification", "{text}"), None, {}, "task 'own': labels is []"),
        (
            {"name": "own"},
            None,
            {},
            "task is of type dict ({'name': 'own'}); give a shipped name (sst2), a YAML",
        ),
        (
            "sst2",
            None,
            {"unlabeled": 5},
            "unlabeled=5 is neither keys nor text; give keys, such as",
        ),
        ("sst2", None, {"augment": None}, "augment=null: augment is a group of keys (copies, oper"),
        (
            sd.TaskSpec("own", "classification", "{text}", labels=("a", "b")),
            ["a text", "another"],
            {},
            "data is of type list (['a text', 'another']); give a folder, a file, a pandas DataFrame",
        ),
    ],
)
def test_a_mistaken_call_is_refused_in_one_line(task, data, keys, says):
    with pytest.raises(sd.UserError) as error:
        given_run(task, data, {"output_dir": "unused", **keys})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"text_a": ["a", "b"]}, "text_a is of type list (['a', 'b']); give a template that names"),
        ({"text_a": "{text}", "text_b": 3}, "text_b is of type int (3); give a template that"),
        (
            {"text_a": "{text}", "choices": (1, 2)},
            "one of choices is of type int (1); give a templ",
        ),
        (
            {"text_a": "{text}", "choices": 3},
            "choices is of type int (3); give a list of templates",
        ),
        ({"text_a": "{text"}, "task 'own': text_a has '{text', in which a brace stands alone"),
    ],
)
def test_a_mistaken_template_is_refused_in_one_line(keys, says):
    with pytest.raises(sd.UserError) as error:
        sd.TaskSpec(name="own", kind="classification", labels=("a", "b"), **keys)
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


def test_unlabelled_text_may_be_a_column(tmp_path):
    texts = ["one text", "another"]
    layers = [
        given_run("sst2", tmp_path, {"output_dir": tmp_path / "run", "unlabeled": given})
        for given in (texts, pd.Series(texts))
    ]
    lists, column = (asked.tables()["unlabeled"].to_pylist() for asked in layers)
    assert column == lists == [{"sentence": text} for text in texts]


def test_one_table_alone_needs_rows_to_evaluate_on_where_a_task_has_several_splits_of_them(
    tmp_path,
):
    splits = {"train": ("train",), "validation": ("validation",), "other": ("other",)}
    own = sd.TaskSpec("own", "classification", "{text}", labels=("a", "b"), splits=splits)
    with pytest.raises(sd.UserError, match="data is the training split alone, and task 'own' has"):
        given_run(own, [{"text": "x", "label": "a"}], {"output_dir": "unused"})
    two = sd.TaskSpec("own", "classification", "{text}", labels=("a", "b"))
    for data in ([{"text": "x", "label": "a"}], {"train": [{"text": "x", "label": "a"}]}):
        asked = given_run(two, data, {"output_dir": "unused"}).config.data
        assert (asked.train, asked.validation) == ("unused/.data/train.parquet", None)
        assert asked.path is None
    file = tmp_path / "x.tsv"
    file.touch()
    for data in (file, {"train": file}):
        assert given_run(two, data, {"output_dir": "unused"}).config.data.train == str(file)


@pytest.mark.parametrize(
    "wrong", [3, b"m", None, ["m"], pd.DataFrame({"a": [1, 2]}), torch.ones(2)]
)
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: sd.Run(x), "path is of type"),
        (lambda x: sd.evaluate(x), "model is of type"),
        (lambda x: sd.predict(x, ["a"]), "model is of type"),
        (lambda x: sd.load_config(x), "argument 1 of load_config is of type"),
        (lambda x: sd.load_config("sst2", x), "argument 2 of load_config is of type"),
        (lambda x: sd.distill(x), "task is of type"),
        (lambda x: sd.finetune(x), "task is of type"),
        (lambda x: sd.load_config("sst2", output_dir="o", seed=[x, torch.ones(2)]), "seed is of type"),
        (lambda x: sd.predict("m", ["a"], batch_size=[x]), "batch_size is of type list"),
        (lambda x: sd.predict("m", ["a"], skip_malformed=[x]), "skip_malformed is of type list"),
        (lambda x: sd.evaluate("m", split=[x]), "split is of type list"),
        (lambda x: sd.soft_targets([x]), "logits_NBC is of type list"),
        (lambda x: sd.soft_targets(torch.ones(2, 3, 2), labels_B=[x]), "labels_B is of type list"),
        (lambda x: sd.distillation_loss([x], None), "student_BC is of type list"),
        (lambda x: sd.distillation_loss(torch.ones(3, 2), [x]), "soft is of type list"),
        (lambda x: sd.register_loss("mine", [x]), "the loss 'mine' is of type list"),
        (lambda x: sd.register_loss([x], len), "name is of type list"),
        (lambda x: sd.register_ensemble("mine", [x]), "the ensemble 'mine' is of type list"),
        (
            lambda x: sd.register_ensemble("mine", Weighting),
            "); give a function, or a Weighting (not its class)",
        ),
        (lambda x: sd.register_teacher("mine", [x]), "the kind of teacher 'mine' is of type list"),
        (lambda x: sd.register_task_kind(x), "kind is of type"),
    ],
)  # fmt: skip
def test_an_argument_of_another_type_is_refused_in_one_line(call, says, wrong):
    with pytest.raises(sd.UserError) as error:
        call(wrong)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert "mine" not in SOFT_LOSSES


class Strange:
    def __repr__(self):
        return "strange\nthing"


# arguments that fit, by function, besides task, data and model
FITTING = {
    "distill": {"teachers": ["t"], "student": "L1-H32-A2", "output_dir": "out"},
    "finetune": {"encoders": ["L1-H32-A2"], "output_dir": "out"},
    "predict": {"texts_or_rows": ["a"]},
    "soft_targets": {"logits_NBC": torch.ones(2, 3, 2)},
    "distillation_loss": {"student_BC": torch.ones(3, 2), "soft": None},
    "register_loss": {"name": "mine", "loss": len},
    "register_ensemble": {"name": "mine", "weighting": len},
    "register_teacher": {"kind": "mine", "open": len},
}
# what a rejection calls an argument, where that is not its name
SAID = {
    ("load_config", "words"): "argument 2 of load_config",
    ("register_teacher", "kind"): "name",
    ("register_teacher", "open"): "the kind of teacher 'mine'",
    ("register_loss", "loss"): "the loss 'mine'",
    ("register_ensemble", "weighting"): "the ensemble 'mine'",
}


@pytest.mark.parametrize(
    "function",
    [
        *("distill", "finetune", "evaluate", "predict", "load_config", "soft_targets", "Run"),
        *("distillation_loss", "register_ensemble", "register_loss", "register_task_kind"),
        *("register_teacher", "PredictionStore"),
    ],
)
def test_no_function_takes_an_argument_of_a_strange_type(function, tiny_task, tmp_path):
    of_a_run = {"task": tiny_task[0] / "task.yaml", "data": tiny_task[0]}
    called = getattr(sd, function)
    parameters = inspect.signature(called).parameters
    fitting = {"model": tiny_task[1][0], **of_a_run}
    fitting = {name: value for name, value in fitting.items() if name in parameters}
    for name, parameter in parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            asked = partial(called, "sst2", Strange())
        else:
            name = "seed" if parameter.kind is inspect.Parameter.VAR_KEYWORD else name
            asked = partial(called, **{**fitting, **FITTING.get(function, {}), name: Strange()})
        with pytest.raises(
            sd.UserError, match=r"is of type Strange \(strange thing\); give "
        ) as error:
            asked()
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(SAID.get((function, name), name))


def test_every_function_is_asked_for_strange_types():
    marks = test_no_function_takes_an_argument_of_a_strange_type.pytestmark[0].args[1]
    functions = {name for name in sd.__all__ if callable(getattr(sd, name))}
    # of these, errors take any value, and the others are checked where they are used
    assert functions - {*marks} == {"RunError", "UserError", "RunConfig", "TaskSpec"}


def test_a_label_a_task_and_a_text_of_another_type_are_refused():
    own = sd.TaskSpec("own", "classification", "{text}", labels=("a", "b"))
    with pytest.raises(sd.UserError, match=r"task is of type int \(3\); give a shipped name"):
        sd.evaluate("m", task=3)
    with pytest.raises(
        sd.UserError, match=r"labels is of type int \(3\); give the names of the classes"
    ):
        sd.predict("m", ["a"], task=own, labels=3)
    with pytest.raises(
        sd.UserError, match=r"text 2 is of type int \(3\); give texts of the columns text"
    ):
        sd.predict("m", ["a", 3], task=own)
    with pytest.raises(sd.UserError, match=r"output_dir is of type int \(3\); give a folder"):
        sd.distill(own, data=[{"text": "x", "label": "a"}], output_dir=3)


def test_rows_in_memory_are_those_of_a_file(tmp_path):
    import datasets

    rows = [{"sentence": "good", "label": 1}, {"sentence": 'a "bad" one', "label": 0}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sst2 = TASKS["sst2"]
    assert to_rows(pd.DataFrame(rows, index=[7, 3]), sst2, "data") == rows
    assert to_rows(rows, sst2, "data") == read_rows(tmp_path / "x.jsonl", sst2) == rows
    # class names of a data set decide, whatever order they have there
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["positive", "negative"]),
        }
    )
    named = datasets.Dataset.from_list(rows, features=features)
    assert [row["label"] for row in to_rows(named, sst2, "data")] == ["negative", "positive"]
    chosen = named.select([1])
    assert [row["sentence"] for row in to_rows(chosen, sst2, "data")] == ['a "bad" one']


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (3, r"data is of type int \(3\); give a folder, a file"),
        ([{"sentence": "a"}, {"sentence": 1}], "data cannot be a table"),
        (np.zeros(3), "data is of type ndarray"),
    ],
)
def test_what_is_no_table_is_refused(data, says):
    with pytest.raises(sd.UserError, match=says):
        to_rows(data, TASKS["sst2"], "data")


def test_texts_become_rows_of_the_tasks_columns():
    assert text_rows(["a", "b"], TASKS["sst2"]) == [{"sentence": "a"}, {"sentence": "b"}]
    assert text_rows([("a", "b")], TASKS["rte"]) == [{"sentence1": "a", "sentence2": "b"}]
    with pytest.raises(sd.UserError, match="text 1 is 'a', but task 'rte' reads sentence1, sent"):
        text_rows(["a"], TASKS["rte"])


def test_a_number_or_text_of_numpy_is_a_plain_one():
    keys = {"student": "a", "output_dir": "r", "temperature": np.float64(2), "seed": np.int64(3)}
    config = sd.load_config("sst2", method=np.str_("mean"), **keys)
    assert (config.temperature, config.seed, config.method) == (2.0, 3, "mean")
    assert type(config.seed) is int
    with pytest.raises(sd.UserError, match=r"student\.layers=2\.0: expected a list"):
        sd.load_config("sst2", output_dir="r", **{"student.layers": np.float64(2)})
