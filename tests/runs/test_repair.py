"""A start with few layers of a model, which learns that model's hidden states before any task."""

import os
import signal
import time
from contextlib import ExitStack

import pytest
import torch
from ranks import finish, run_ranks, start
from safetensors.torch import load_file
from small import ALONE, read, run_distill, save_teacher, sentences, words, write_task

from sead_dist.config.load import load_config
from sead_dist.errors import UserError
from sead_dist.models.hidden_states import WantedLayers, find_layer_parts, reading
from sead_dist.models.sequence_classifier import load_plain
from sead_dist.runs.claim import try_lock
from sead_dist.runs.distillation import distill
from sead_dist.runs.repair import WEIGHTS
from sead_dist.runtime.distributed import StopFlag

STEPS = 30
# a crowded machine may take long
WAIT_S = 240


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task, its text, and a start of four layers."""
    root = write_task(tmp_path_factory.mktemp("task"))
    save_teacher(root / "whole", num_hidden_layers=4)
    (root / "text.txt").write_text("\n".join([*sentences(40, seed=7), "", "  "]), "utf-8")
    return root


def given_words(task, output, folder, **changes):
    """A fine-tuning of two steps of two of the four layers."""
    keys = {
        "student__path": task / "whole",
        "student__layers": "[1,3]",
        "max_steps": 2,
        "method": "finetune",
        "final_checkpoint": "last",
        "repair__text": task / "text.txt",
        "repair__steps": STEPS,
        "repair__folder": folder,
    }
    given = words(task, [], output, **{**keys, **changes})
    return [word for word in given if not word.startswith("student.shape=")]


def task_of_scores(task, folder):
    """The same texts with scores for labels."""
    for name in ("train", "validation"):
        lines = (task / f"{name}.tsv").read_text().splitlines()
        rows = [lines[0], *(f"{line.split(chr(9))[0]}\t{len(line) % 5}" for line in lines[1:])]
        (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    (folder / "task.yaml").write_text("name: s\ntext_a: '{sentence}'\nscore_range: [0, 5]\n")


def made_in(folder):
    """The one repaired start of a folder."""
    (path,) = folder.glob(f"*/{WEIGHTS}")
    return path


@pytest.fixture(scope="module")
def repaired(task, tmp_path_factory):
    """(the run, the folder of repaired starts)."""
    root = tmp_path_factory.mktemp("repaired")
    return distill(
        load_config(given_words(task, root / "run", root / "kept")), ALONE
    ), root / "kept"


def last_states(model, layer):
    ids_RL = torch.arange(5, 25)[None]
    parts = find_layer_parts(model.eval(), "it", attention=False)
    with torch.no_grad(), reading(parts, WantedLayers((layer,))) as found:
        model(input_ids=ids_RL, attention_mask=torch.ones_like(ids_RL))
    return found.hidden[layer]


def error(task, run):
    """How far the last hidden states of a run's student are from those of the whole model."""
    whole = last_states(load_plain(task / "whole"), 4)
    return float(((last_states(load_plain(run / "model"), 2) - whole) ** 2).mean())


def test_a_repaired_start_is_nearer_to_the_whole_model(task, repaired, tmp_path):
    run, kept = repaired
    # both have taken two small steps since
    plain = distill(
        load_config([*given_words(task, tmp_path / "run", kept), "repair.text=null"]), ALONE
    )
    assert error(task, run) < 0.5 * error(task, plain)
    assert "the squared error went from " in (made_in(kept).parent / "log.txt").read_text()
    assert not (made_in(kept).parent / "checkpoints").exists()
    # the repair has a log of its own
    log = (run / "log.txt").read_text()
    assert f"the start is repaired: {made_in(kept).parent}" in log
    assert "the squared error went from " not in log


def test_it_is_made_once_for_all_tasks_and_seeds(task, repaired, tmp_path):
    _, kept = repaired
    before = made_in(kept).read_bytes()
    task_of_scores(task, tmp_path)
    more = [f"task={tmp_path / 'task.yaml'}", f"data.path={tmp_path}"]
    given = given_words(task, tmp_path / "run", kept, seed=5, learning_rate=1e-9)
    run = distill(load_config([*given, *more]), ALONE)
    assert "the start was repaired before: " in (run / "log.txt").read_text()
    assert made_in(kept).read_bytes() == before
    body, student = load_file(made_in(kept)), load_file(run / "model" / "model.safetensors")
    assert not [name for name in body if name.startswith("classifier") or "pooler" in name]
    assert len(body) > 30
    for name, tensor in body.items():
        torch.testing.assert_close(tensor, student[name], atol=1e-6, rtol=0)


def test_a_killed_repair_goes_on_to_the_same_start(task, repaired, tmp_path):
    given = given_words(task, tmp_path / "run", tmp_path / "kept", save_steps=1)
    ranks = start(1, tmp_path / "ranks", run_distill, given)
    end = time.monotonic() + WAIT_S
    while not [*tmp_path.glob("kept/*/checkpoints/step-0000000[5-9]")]:
        assert time.monotonic() < end
        assert ranks[0].is_alive()
        time.sleep(0.001)
    os.kill(ranks[0].pid, signal.SIGKILL)
    ranks[0].join()
    assert not [*tmp_path.glob(f"kept/*/{WEIGHTS}")]
    run_ranks(1, tmp_path / "ranks", run_distill, given)
    assert "resuming at step" in (made_in(tmp_path / "kept").parent / "log.txt").read_text()
    assert made_in(tmp_path / "kept").read_bytes() == made_in(repaired[1]).read_bytes()


def test_a_repair_that_is_stopped_is_saved_and_says_so(task, tmp_path, capsys, shown):
    stop = StopFlag()
    stop.signal = signal.SIGTERM
    distill(load_config(given_words(task, tmp_path / "run", tmp_path / "kept")), ALONE, stop=stop)
    assert [*tmp_path.glob("kept/*/checkpoints/step-00000001/state.json")]
    assert f"stopped at step 1 of {STEPS} of the start's repair, saved" in capsys.readouterr().out


def test_two_ranks_make_the_same_start(task, repaired, tmp_path):
    given = given_words(task, tmp_path / "run", tmp_path / "kept")
    run_ranks(2, tmp_path / "ranks", run_distill, given)
    mine, theirs = load_file(made_in(tmp_path / "kept")), load_file(made_in(repaired[1]))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-5, rtol=1e-4)


def test_a_run_waits_while_another_repairs_the_same_start(task, repaired, tmp_path):
    name = made_in(repaired[1]).parent.name
    given = given_words(task, tmp_path / "run", tmp_path / "kept", repair__steps=STEPS)
    with ExitStack() as stack:
        assert stack.enter_context(try_lock(tmp_path / "kept" / f"{name}.lock"))
        ranks = start(1, tmp_path / "ranks", run_distill, given)
        log, end = tmp_path / "run" / "log.txt", time.monotonic() + WAIT_S
        while "waiting for another run" not in (log.read_text() if log.is_file() else ""):
            assert time.monotonic() < end
            time.sleep(0.01)
        (tmp_path / "kept" / name).mkdir()
        (tmp_path / "kept" / name / WEIGHTS).write_bytes(made_in(repaired[1]).read_bytes())
    finish(ranks, tmp_path / "ranks", WAIT_S)
    assert "the start was repaired before" in log.read_text()


def test_another_text_or_teacher_is_another_start_and_no_resume(task, repaired, tmp_path):
    run, kept = repaired
    other = tmp_path / "other.txt"
    other.write_text("the plot was good", "utf-8")
    with pytest.raises(UserError, match="the student's start was "):
        distill(load_config([*given_words(task, run, kept), f"repair.text={other}"]), ALONE)
    # nothing is asked of a text that is gone where the run is finished
    given = [*given_words(task, run, kept), f"repair.text={tmp_path / 'gone.txt'}"]
    assert distill(load_config(given), ALONE) == run


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"student.layers": "null"}, "needs student.layers or repair.teacher"),
        ({"student_init": "feature_teacher"}, "replaces this start"),
    ],
)
def test_keys_that_rule_a_repair_out_are_named(task, tmp_path, keys, said):
    given = [*given_words(task, tmp_path / "r", tmp_path), *(f"{k}={v}" for k, v in keys.items())]
    with pytest.raises(UserError, match=said):
        load_config(given)


@pytest.mark.parametrize("what", ["table", "blank", "missing", "tokeniser", "positions"])
def test_a_text_or_a_teacher_that_does_not_fit_is_refused_before_any_step(task, tmp_path, what):
    more, said = {
        "table": (f"repair.text={task / 'train.tsv'}", "is a file of rows with columns"),
        "blank": (f"repair.text={tmp_path / 'blank.txt'}", "has no rows"),
        "missing": (f"repair.text={tmp_path / 'missing.txt'}", "does not exist"),
        "tokeniser": (f"repair.teacher={tmp_path / 'other'}", "has another tokeniser"),
        "positions": (f"repair.teacher={tmp_path / 'short'}", "give max_length=20"),
    }[what]
    (tmp_path / "blank.txt").write_text("\n \n")
    if what == "tokeniser":
        save_teacher(tmp_path / "other", "roberta")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            path = tmp_path / "other" / name
            path.write_text(path.read_text().replace("##s", "##zz"))
    if what == "positions":
        from transformers import AutoConfig, AutoModelForSequenceClassification

        save_teacher(tmp_path / "short")
        config = AutoConfig.from_pretrained(tmp_path / "short", max_position_embeddings=20)
        model = AutoModelForSequenceClassification.from_config(config)
        model.save_pretrained(tmp_path / "short")
    given = [*given_words(task, tmp_path / "run", tmp_path / "kept"), more]
    with pytest.raises(UserError, match=said):
        distill(load_config(given), ALONE)
    assert not [*tmp_path.glob("kept/*/progress.json")]


def test_a_teacher_of_another_width_and_depth_teaches_through_a_projection(task, tmp_path):
    save_teacher(tmp_path / "wide", hidden_size=64, num_hidden_layers=3)
    given = given_words(task, tmp_path / "run", tmp_path / "kept", repair__steps=4)
    run = distill(load_config([*given, f"repair.teacher={tmp_path / 'wide'}"]), ALONE)
    body = load_file(made_in(tmp_path / "kept"))
    assert not [name for name in body if "projections" in name]
    assert read(run / "run_summary.json")["steps"] == 2
