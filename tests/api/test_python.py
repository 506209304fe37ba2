"""The Python interface at work: the same student as the command line, data in memory, and a process
that is left as it was."""

import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers.utils import logging as transformers_logging

import sead_dist as sd
from sead_dist.runs import results

ROOT = Path(__file__).parents[2]


def model_bytes(run):
    return (Path(run) / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def own(grammar):
    """The built-in task as an object."""
    return sd.TaskSpec(
        name="grammar",
        kind="classification",
        text_a="{sentence}",
        labels=["negative", "positive"],
    )


@pytest.fixture(scope="module")
def frames(grammar):
    return {
        split: pd.read_csv(grammar / f"{split}.tsv", sep="\t") for split in ("train", "validation")
    }


@pytest.fixture(scope="module")
def keys(grammar, teachers):
    return {
        "teachers": teachers,
        "student": grammar / "shape.yaml",
        "learning_rate": 5e-3,
        "num_train_epochs": 1,
        "augment": {"copies": None},
    }


def accelerate_state():
    """What the caller's Accelerator and its Trainer read at each call."""
    states = (AcceleratorState, PartialState, GradientState)
    return [dict(state._shared_state) for state in states]


def surroundings():
    """What a caller has of its own."""
    loggers = [logging.root, *map(logging.getLogger, ("sead_dist", "transformers", "DeepSpeed"))]
    return {
        "python": random.getstate(),
        "numpy": repr(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)],
        "environment": dict(os.environ),
        "verbosity": transformers_logging.get_verbosity(),
        "bars": transformers_logging.is_progress_bar_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "accelerate": accelerate_state(),
        "loggers": [(x.level, list(x.handlers), list(x.filters), x.disabled) for x in loggers],
    }


@pytest.fixture(scope="module")
def run(grammar, frames, keys, own, tmp_path_factory):
    """A distillation of data frames, and what the process was like before and after it."""
    random.seed(1)
    drawn = random.getstate()
    names = dict(os.environ)
    distill = sd.distill
    assert (random.getstate(), dict(os.environ)) == (drawn, names)
    torch.manual_seed(2)
    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    torch.use_deterministic_algorithms(True, warn_only=True)
    # as a notebook that has trained with Transformers' Trainer in other numbers than the run
    caller = Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=4)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    before = surroundings()
    output = tmp_path_factory.mktemp("python") / "run"
    made = distill(own, data=frames, output_dir=output, **keys)
    after = surroundings()
    assert (caller.mixed_precision, caller.gradient_accumulation_steps) == ("bf16", 4)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    caller.prepare(torch.nn.Linear(2, 2))
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    torch.use_deterministic_algorithms(False)
    transformers_logging.set_verbosity_warning()
    return made, before, after


def test_a_call_leaves_the_process_as_it_was(run):
    _, before, after = run
    assert before["bars"]
    for name, value in before.items():
        assert after[name] == value, name


def test_the_student_is_the_command_lines_bit_for_bit(run, words, cli, tmp_path):
    """The command in a process of its own, on the files; the call in this one, on data frames."""
    made, _, _ = run
    done = cli("distill", *words(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert model_bytes(tmp_path / "run") == model_bytes(made)


def test_the_second_call_of_a_process_gives_the_same_student(run, grammar, keys, tmp_path):
    made, _, _ = run
    random.seed(5)
    torch.manual_seed(6)
    task = grammar / "task.yaml"
    again = sd.distill(task, data=grammar, output_dir=tmp_path / "run", **keys)
    assert model_bytes(again) == model_bytes(made)


def test_the_line_that_a_run_records_gives_it_again(run, words, cli, tmp_path):
    made, _, _ = run
    record = json.loads((made.path / "run.json").read_text())
    assert record["from_python"] is True
    assert record["command"] == ["distill", str(made.path / "config.yaml")]
    again = cli(*record["command"])
    assert again.returncode == 0, again.stderr
    assert f"{made.path} holds this run, finished" in again.stdout
    given = words(tmp_path / "line", "max_steps=1")
    assert cli("distill", *given).returncode == 0
    record = json.loads((tmp_path / "line" / "run.json").read_text())
    assert (record["from_python"], record["command"]) == (False, ["distill", *given])


def test_a_run_has_scores_predictions_and_its_configuration(run, grammar):
    made, _, _ = run
    assert made.finished
    assert made.config.num_train_epochs == 1
    assert (made.model_dir / "config.json").is_file()
    score = made.scores["validation"]["student"]["accuracy"]
    said = made.predictions("validation")
    chosen_B = np.stack(said.student_logits).argmax(1)
    assert score == pytest.approx((chosen_B == said.label).mean())
    with pytest.raises(
        sd.UserError, match="no predictions of 'test'; give one of selection, valid"
    ):
        made.predictions("test")


def test_a_run_that_is_not_finished_is_named_with_its_state(tmp_path):
    def said():
        run = sd.Run(tmp_path / "run")
        with pytest.raises(sd.UserError) as caught:
            _ = run.model_dir
        for read in (lambda: run.scores, lambda: run.predictions("validation")):
            with pytest.raises(sd.UserError, match=re.escape(str(caught.value))):
                read()
        return str(caught.value).removeprefix(str(run.path)).replace(str(run.path), "RUN")

    fix = "expected the folder of a finished run; give the output_dir of one"
    assert said() == f" does not exist; {fix}"
    (tmp_path / "run").mkdir()
    assert said() == f" holds no run; {fix}"
    (tmp_path / "run" / "run.json").write_text("{}")
    repeat = "expected a finished run; repeat the call or the command that began it"
    assert said() == f"the run RUN is not finished: no step is done; {repeat}"
    (tmp_path / "run" / "progress.json").write_text('{"step": 3, "total": 60}')
    assert said() == f"the run RUN is not finished: it is at step 3 of 60; {repeat}"


def test_data_in_memory_are_found_again(run, own, frames, keys, distil, capfd):
    """By the same call, by `evaluate`, and by the command line."""
    made, _, _ = run
    again = sd.distill(own, data=frames, output_dir=made, **keys)
    assert again == made
    assert sorted(path.name for path in (made.path / ".data").glob("[!.]*")) == [
        *("task.yaml", "train.parquet", "validation.parquet")
    ]
    scores = sd.evaluate(made)
    assert scores["eval_accuracy"] == made.scores["validation"]["student"]["accuracy"]
    assert capfd.readouterr() == ("", "")  # only commands print
    distil([str(made.path / "config.yaml")])  # as the command does
    assert "finished: nothing to do" in capfd.readouterr().out


def test_one_table_alone_gives_the_student_of_the_command_line_with_one_file(
    own, grammar, frames, keys, words, distil, cli, tmp_path
):
    """The command divides its one file into training and validation rows, and so does the call."""
    file = tmp_path / "all.tsv"
    file.write_bytes((grammar / "train.tsv").read_bytes())
    data = ["data.path=null", f"data.train={file}", "data.validation_fraction=0.2"]
    line = words(tmp_path / "line", *data, "max_steps=6")
    done = cli("distill", *line)
    assert done.returncode == 0, done.stderr
    short = {**keys, "max_steps": 6, "data.validation_fraction": 0.2}
    made = sd.distill(own, data=frames["train"], output_dir=tmp_path / "run", **short)
    assert model_bytes(made) == model_bytes(tmp_path / "line")
    assert made.scores == sd.Run(tmp_path / "line").scores
    # it is found in the run's folder: by `evaluate`, the same call, and the command line
    score = made.scores["validation"]["student"]["accuracy"]
    assert sd.evaluate(made)["eval_accuracy"] == score
    assert len(made.predictions("validation")) == sd.evaluate(made)["eval_samples"] < 120
    assert sd.distill(own, data={"train": frames["train"]}, output_dir=made, **short) == made
    distil([str(made.path / "config.yaml")])
    with pytest.raises(sd.UserError, match="holds a run with other train rows"):
        sd.distill(own, data=frames["validation"], output_dir=made, **short)


def test_a_run_that_was_moved_is_evaluated_on_its_own_data(run, tmp_path):
    import shutil

    made, _, _ = run
    moved = shutil.copytree(made.path, tmp_path / "moved")
    config = yaml.safe_load((moved / "config.yaml").read_text())
    config["data"]["path"] = str(tmp_path / "gone" / ".data")
    (moved / "config.yaml").write_text(yaml.safe_dump(config))
    assert sd.evaluate(moved)["eval_accuracy"] == sd.evaluate(made)["eval_accuracy"]


def test_other_data_are_refused_and_nothing_is_written_over(run, own, frames, keys):
    made, _, _ = run
    kept = (made.path / ".data" / "train.parquet").read_bytes()
    other = {**frames, "train": frames["train"].head(50)}
    with pytest.raises(sd.UserError, match="holds a run with other train rows"):
        sd.distill(own, data=other, output_dir=made, **keys)
    assert (made.path / ".data" / "train.parquet").read_bytes() == kept


def test_evaluate_takes_data_of_any_form(run, grammar, frames, own):
    import datasets

    made, _, _ = run
    score = made.scores["validation"]["student"]["accuracy"]
    dev = frames["validation"]
    for data in (dev, datasets.Dataset.from_pandas(dev), frames, grammar / "validation.tsv"):
        assert sd.evaluate(made, data=data)["eval_accuracy"] == score
    assert sd.evaluate(made.model_dir, task=own, data=grammar)["eval_accuracy"] == score
    some = sd.evaluate(made, data=dev.head(10))
    assert some["eval_samples"] == 10


def test_predict_answers_texts_and_rows(run, frames):
    made, _, _ = run
    dev = frames["validation"]
    said = sd.predict(made, list(dev.sentence))
    assert said == sd.predict(made, dev) == sd.predict(made, dev.to_dict("records"))
    assert said == sd.predict(made, dev.sentence)
    right = np.mean([one["predicted_label"] for one in said] == dev.label)
    assert right == pytest.approx(made.scores["validation"]["student"]["accuracy"])
    assert sum(v for k, v in said[0].items() if k.startswith("probability_")) == pytest.approx(1)
    with pytest.raises(sd.UserError, match="is one text; give a list"):
        sd.predict(made, "a text")
    with pytest.raises(
        sd.UserError, match=r"give a file, a pandas .*, or a list of texts or rows$"
    ):
        sd.predict(made, 3)


def test_a_mistake_is_an_exception_of_one_line(own, frames, keys, grammar, teachers, tmp_path, capfd, monkeypatch):  # fmt: skip
    def ended(code):
        raise AssertionError(f"the process was ended with {code}")

    monkeypatch.setattr(os, "_exit", ended)
    before = surroundings()
    wrong = {**frames, "train": frames["train"].assign(label="neutral")}
    for call, says in (
        (lambda: sd.distill(own, data=frames, output_dir=grammar, **keys), "holds other files"),
        (lambda: sd.distill(own, data=wrong, output_dir=tmp_path / "a", **keys), "'neutral'"),
        (
            lambda: sd.distill("sst2", data=tmp_path, output_dir=tmp_path / "b", **keys),
            "no train file",
        ),
        (lambda: sd.finetune(own, data=frames, output_dir=tmp_path / "c"), "encoders is empty"),
        (
            lambda: sd.distill(
                own, data=frames, output_dir=tmp_path / "d", **{**keys, "teachers": None}
            ),
            "teachers is empty, so there is nothing to distil",
        ),
        (lambda: sd.evaluate(tmp_path, task=own, data=frames), "holds no config.json"),
        (lambda: sd.evaluate(teachers[0], data=frames), "not a run directory that names its task"),
    ):
        with pytest.raises(sd.UserError) as error:
            call()
        assert says in str(error.value)
        assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert surroundings() == before
    # what was refused stands in nobody's way
    more = {"max_steps": 2, "teacher_validation": "off"}
    assert sd.distill(own, data=frames, output_dir=tmp_path / "a", **{**keys, **more}).finished


def test_a_full_disk_is_a_run_error(own, frames, keys, tmp_path, monkeypatch):
    from sead_dist.runs import distillation

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(distillation, "run_to_end", full)
    with pytest.raises(sd.RunError, match="No space left on device; fix it"):
        sd.distill(own, data=frames, output_dir=tmp_path / "run", **keys)


def test_ctrl_c_saves_and_the_same_call_or_its_recorded_line_goes_on(
    run, own, frames, keys, cli, tmp_path
):
    made, _, _ = run
    before = signal.getsignal(signal.SIGINT)
    metrics = tmp_path / "run" / "metrics.jsonl"

    class AtStep(logging.Handler):
        def emit(self, record):
            if "validation" in record.getMessage() or "teacher" in record.getMessage():
                os.kill(os.getpid(), signal.SIGINT)

    logger, handler = logging.getLogger("sead_dist"), AtStep()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            sd.distill(own, data=frames, output_dir=tmp_path / "run", **keys)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert signal.getsignal(signal.SIGINT) is before
    assert metrics.is_file()
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    line = json.loads((copy / "run.json").read_text())["command"]
    done = cli(*line, f"output_dir={copy}")
    assert done.returncode == 0, done.stderr
    assert model_bytes(copy) == model_bytes(made)
    again = sd.distill(own, data=frames, output_dir=tmp_path / "run", **keys)
    assert model_bytes(again) == model_bytes(made)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, sd.RunError)]
)
def test_a_signal_while_the_report_is_written_is_not_lost(
    number, error, own, frames, keys, tmp_path, monkeypatch
):
    written = results.write_report

    def interrupted(folder):
        written(folder)
        os.kill(os.getpid(), number)

    asked = {"data": frames, "output_dir": tmp_path / "run", **keys, "max_steps": 1}
    with monkeypatch.context() as patched:
        patched.setattr(results, "write_report", interrupted)
        with pytest.raises(error) as raised:
            sd.distill(own, **asked)
    if error is sd.RunError:
        assert "the run is finished; repeat the call to get it" in str(raised.value)
    assert sd.distill(own, **asked).finished


def test_a_call_from_a_thread_works(own, frames, keys, tmp_path):
    """Signals are the main thread's."""
    found = []
    keys = {**keys, "max_steps": 1, "teacher_validation": "off"}
    thread = threading.Thread(
        target=lambda: found.append(
            sd.distill(own, data=frames, output_dir=tmp_path / "run", **keys)
        )
    )
    thread.start()
    thread.join()
    assert found[0].finished


def test_finetuned_teachers_of_data_in_memory_teach(own, frames, keys, grammar, tmp_path):
    short = {
        "max_steps": 3,
        "teacher_validation": "off",
        "student.tokenizer": grammar / "tokenizer",
    }
    made = sd.finetune(
        own, data=frames, encoders=[grammar / "shape.yaml"], output_dir=tmp_path / "t", **short
    )
    assert [one.path.name for one in made] == ["teacher-0"]
    student = {
        **keys,
        "teachers": made,
        "student": made[0],
        "max_steps": 3,
        "teacher_validation": "off",
    }
    out = sd.distill(own, data=frames, output_dir=tmp_path / "student", **student)
    assert out.scores["validation"]["teachers"][0]["name"] == "teacher-0"


RANKS = """
import sys
import pandas as pd
import sead_dist as sd
from sead_dist.runs import results
folder, output, *teachers = sys.argv[1:]
frames = {n: pd.read_csv(f"{folder}/{n}.tsv", sep="\\t") for n in ("train", "validation")}
keys = dict(student=f"{folder}/shape.yaml", learning_rate=5e-3, max_steps=3, teacher_validation="off")
run = sd.distill(f"{folder}/task.yaml", data=frames, teachers=teachers, output_dir=output, **keys)
assert sd.evaluate(run)["eval_accuracy"] == run.scores["validation"]["student"]["accuracy"]
"""


@pytest.mark.slow
def test_the_same_script_runs_under_a_launcher(grammar, teachers, tmp_path):
    (tmp_path / "script.py").write_text(RANKS)
    launcher = "torch.distributed.run --standalone --nproc_per_node 2".split()
    done = subprocess.run(
        [sys.executable, "-m", *launcher, tmp_path / "script.py", grammar, tmp_path / "run", *teachers],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "run_summary.json").read_text())["finished"]
