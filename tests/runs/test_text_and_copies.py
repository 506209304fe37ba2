"""Whole runs with rows that the sample left out as text, and with copies: what the teachers label,
what changes nothing, what is refused, and what `sead-dist data` shows."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from small import (
    ALONE,
    grammar_task,
    model_bytes,
    read,
    run_distill,
    save_random_bert,
    save_teacher,
    words,
    write_task,
)

import sead_dist as sd
from sead_dist.config.load import load_config
from sead_dist.data import augmentation
from sead_dist.errors import UserError
from sead_dist.runs.checked_run import read_inputs
from sead_dist.runs.distillation import distill, finetune
from sead_dist.runs.pool_worker import teach
from sead_dist.runs.shown import show_data
from sead_dist.runtime.run_log import noted
from sead_dist.sweep.grid import make_grid
from sead_dist.training.engine import Engine
from sead_dist.training.identity import Identity

SAMPLED = {"data__max_train_examples": 40, "num_train_epochs": 1, "save_steps": 2}
# one pass over the 156 rows
COPIED = {**SAMPLED, "augment__copies": 2, "unlabeled__ratio": 0.5, "max_steps": 20}


@pytest.fixture(scope="module")
def task(two_kinds, tmp_path_factory):
    return *two_kinds, save_teacher(tmp_path_factory.mktemp("task") / "start", seed=5)


def given_words(task, root, **changes):
    """With a start whose embeddings have neighbours."""
    data, teachers, start = task
    own = {"student.shape": "null", "student.tokenizer": "null", "student.path": start}
    keys = {**COPIED, **own, **changes}
    return words(data, keys.pop("teachers", teachers), root / "run", root / "store", **keys)


def examples_of(given):
    return read_inputs(load_config(given))[1]


def run_and_note_copies(world, given):
    """The copies that this rank makes, and a run."""
    copies = examples_of(given).copies
    run_distill(world, given)
    return copies


@pytest.fixture(scope="module")
def whole(task, tmp_path_factory):
    """A run on one rank."""
    root = tmp_path_factory.mktemp("whole")
    distill(load_config(given_words(task, root)), ALONE)
    return root


def test_text_and_copies_are_labelled_once_through_the_store(task, whole):
    summary = read(whole / "run" / "run_summary.json")
    assert (summary["train_rows"], summary["unlabelled_rows"]) == (
        36 + 18 + summary["copy_rows"],
        18,
    )
    assert 80 < summary["copy_rows"] <= 2 * (36 + 18)
    assert summary["steps"] == 20 >= summary["train_rows"] / 8
    asked = 2 * (summary["train_rows"] + 4 + 20)
    assert summary["teacher_forwards"] == asked
    log = (whole / "run" / "log.txt").read_text()
    assert "unlabelled text: 18 rows of the train file, 0 of unlabeled.path; 0 removed" in log
    assert re.search(r"copies: \d+ \(mask \d+, ngram \d+, neighbor \d+\)", log)
    # another seed of the student: the same copies, and nothing to ask
    other = given_words(task, whole, seed=1, output_dir=whole / "other")
    distill(load_config(other), ALONE)
    assert read(whole / "other" / "run_summary.json")["teacher_forwards"] == 0


def test_copies_are_the_same_on_two_ranks(task, whole, tmp_path):
    found = run_ranks(2, tmp_path / "ranks", run_and_note_copies, given_words(task, tmp_path))
    identities = [Identity.read(root / "run" / "run.json") for root in (whole, tmp_path)]
    assert found[0] == found[1] == identities[0].copies == identities[1].copies != ""
    rows = [read(root / "run" / "run_summary.json")["copy_rows"] for root in (whole, tmp_path)]
    assert rows[0] == rows[1]


def test_a_run_that_was_cut_off_goes_on_with_the_same_copies(task, whole, tmp_path):
    given, steps, step = load_config(given_words(task, tmp_path)), [], Engine.step

    def cut_off_at_seven(self):
        steps.append(len(steps))
        if len(steps) > 7:
            raise KeyboardInterrupt
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", cut_off_at_seven)
        with pytest.raises(KeyboardInterrupt):
            distill(given, ALONE)
    run = tmp_path / "run"
    saved = sorted((run / "checkpoints").glob("step-*"))[-1]
    assert (
        read(saved / "state.json")["identity"]["copies"] == Identity.read(run / "run.json").copies
    )
    distill(given, ALONE)
    assert "resuming at step 6 of 20" in (run / "log.txt").read_text()
    assert model_bytes(run) == model_bytes(whole / "run")
    # given again it is finished, and no copy is made for that
    distill(given, ALONE)


def test_a_pool_worker_makes_the_copies_of_its_student(task, tmp_path):
    pooled = given_words(task, tmp_path, placement="pool")
    teach(load_config(pooled), "1/1", ALONE)
    distill(load_config(pooled), ALONE)
    summary = read(tmp_path / "run" / "run_summary.json")
    assert summary["copy_rows"] > 80
    assert summary["teacher_forwards"] == 0


def test_another_embedding_table_or_number_of_copies_is_another_run(task, whole, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    start = shutil.copytree(task[2], tmp_path / "start")
    weights = load_file(start / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"] *= -1
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    (tmp_path / "run" / "run_summary.json").unlink()
    for changes, said in (
        ({"augment__copies": 3}, "augment.copies was 2, is 3"),
        ({"augment__operations": "[mask]"}, r"augment.operations was None, is \['mask'\]"),
    ):
        with pytest.raises(UserError, match=f"holds another run.*{said}"):
            distill(load_config(given_words(task, tmp_path, **changes)), ALONE)
    before = examples_of(given_words(task, tmp_path))
    after = examples_of(given_words(task, tmp_path, **{"student.path": start}))
    assert before.copies != after.copies
    saved = Identity.read(tmp_path / "run" / "run.json")
    assert any("hash of the copies" in line for line in saved.differences(
        Identity(saved.config, saved.data, saved.teachers, saved.start, saved.rules, after.copies)
    ))  # fmt: skip


def test_a_run_without_automatic_copies_says_why(task, tmp_path, monkeypatch):
    given = given_words(task, tmp_path, augment__copies="auto")
    assert examples_of(given).copied
    monkeypatch.setattr(augmentation, "MOST_LABELLED", 35)
    with noted() as notes:
        assert not examples_of(given).copied
    (line,) = [note for note in notes if note.startswith("copies: ")]
    assert "the run has 36 labelled rows, and above 35 there are none" in line
    with noted() as notes:
        examples_of(given_words(task, tmp_path, augment__copies="null"))
    assert not [note for note in notes if note.startswith("copies: ")]


def test_no_row_of_text_and_no_copy_has_a_held_out_sentence(task, tmp_path):
    given = given_words(
        task, tmp_path, augment__copies=20, unlabeled__path=task[0] / "unlabeled.tsv"
    )
    # half of dev is in the text
    data = shutil.copytree(task[0], tmp_path / "data")
    dev = (data / "validation.tsv").read_text().splitlines()[1:11]
    with (data / "unlabeled.tsv").open("a") as file:
        file.writelines(f"{line.partition(chr(9))[0].upper()}\n" for line in dev)
    given = [word.replace(str(task[0]), str(data)) for word in given]
    examples = examples_of(given)
    held = {
        text.casefold().strip()
        for part in (examples.selection, *examples.official.values())
        for text in part.texts_a
    }
    assert sum(examples.removed.values()) >= 10
    assert (
        examples.removed["rows of text that share a sentence with selection or held-out rows"] == 10
    )
    assert not held & {text.casefold() for text in examples.train.texts_a}
    assert len(examples.copied) > 500


def test_only_the_soft_loss_sees_copies_unless_gold_labels_are_asked_for(task, tmp_path):
    plain = examples_of(given_words(task, tmp_path))
    first = plain.labelled_rows + plain.unlabelled_rows
    assert set(plain.train.labels_B[first:]) == {-1}
    gold = examples_of(given_words(task, tmp_path, augment__gold_labels="true"))
    labels_B = gold.train.labels_B[first:]
    assert gold.train.texts_a == plain.train.texts_a
    assert {op for op, label in zip(gold.copied, labels_B, strict=True) if label >= 0} == {
        "mask",
        "neighbor",
    }


def test_without_teachers_there_are_only_copies_of_labelled_rows_under_gold_labels(task, tmp_path):
    alone = {"teachers": [], "unlabeled__ratio": "null"}
    given = given_words(task, tmp_path, augment__gold_labels="true", **alone)
    distill(load_config(given), ALONE)
    summary = read(tmp_path / "run" / "run_summary.json")
    assert summary["unlabelled_rows"] == 0
    assert 36 < summary["copy_rows"] <= 72
    examples = examples_of(given)
    assert (examples.train.labels_B >= 0).all()
    assert set(examples.copied) == {"mask", "neighbor"}
    for changes, said in (
        ({"augment__copies": 2}, r"augment.copies=2: copies without gold labels need teachers"),
        (
            {"unlabeled__rest": "true"},
            r"unlabeled.rest=true: unlabelled rows need teachers",
        ),
        ({"ensemble": "none", "teachers": task[1]}, "augment.copies=2: .*ensemble=none uses none"),
    ):
        with pytest.raises(UserError, match=said):
            distill(load_config(given_words(task, tmp_path, **{**alone, **changes})), ALONE)
    # nothing that was not asked for is refused
    config = load_config(given_words(task, tmp_path, augment__copies="auto", **alone))
    assert examples_of(given_words(task, tmp_path, augment__copies="auto", **alone)).copied == ()
    assert not config.uses_copies


def test_finetune_gets_neither_text_nor_copies_without_gold_labels(task, tmp_path):
    encoders = {"encoders": f"[{task[2]}]", "teachers": [], "unlabeled__ratio": "null"}
    own = {"student.path": "null"}
    with pytest.raises(UserError, match=r"augment.copies=2: copies without .* finetune uses none"):
        finetune(load_config(given_words(task, tmp_path, **encoders, **own)), ALONE)
    given = given_words(task, tmp_path, augment__copies="null", max_steps=1, **encoders, **own)
    (run,) = finetune(load_config(given), ALONE)
    summary = read(run / "run_summary.json")
    assert (summary["train_rows"], summary["unlabelled_rows"], summary["copy_rows"]) == (36, 0, 0)


def test_a_student_with_new_embeddings_has_no_neighbours(task, tmp_path):
    shape = {"student.shape": task[0] / "student.yaml", "student.path": "null"}
    words(task[0], [], tmp_path / "run")  # writes the shape
    assert set(examples_of(given_words(task, tmp_path, **shape)).copied) == {"mask", "ngram"}
    asked = given_words(task, tmp_path, augment__operations="[neighbor]", **shape)
    with pytest.raises(UserError, match=r"augment.operations names 'neighbor': .*leave it out"):
        examples_of(asked)


def test_words_are_masked_only_with_a_token_that_every_teacher_has(task, tmp_path):
    mask = {"augment__operations": "[mask]"}
    same = examples_of(given_words(task, tmp_path, **mask))
    assert sum("[MASK]" in text for text in same.train.texts_a) == len(same.copied)
    other = shutil.copytree(task[1][0], tmp_path / "other")
    settings = other / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"[MASK]"', '"<mask>"'))
    tokens = other / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace('"[MASK]"', '"<mask>"'))
    mixed = examples_of(given_words(task, tmp_path, teachers=[*task[1], other], **mask))
    assert not any("[MASK]" in text for text in mixed.train.texts_a)
    assert mixed.copied


@pytest.mark.parametrize("kind", ["regression", "choice"])
def test_runs_of_other_kinds_have_copies_too(tmp_path, kind):
    folder = tmp_path / "data"
    task = write_other_task(folder, kind)
    labels = ["score"] if kind == "regression" else ["one"]
    write_task(tmp_path / "grammar")
    bert = save_random_bert(tmp_path / "teacher", tmp_path / "grammar" / "tokenizer", labels)
    given = [
        *(f"task={task}", f"data.path={folder}", f"teachers=[{bert}]", f"student={bert}"),
        *(
            f"output_dir={tmp_path / 'run'}",
            f"store={tmp_path / 'store'}",
            "teacher_validation=off",
        ),
        *("max_steps=3", "global_batch_size=8", "micro_batch_size=8", "data.max_train_examples=30"),
        "augment.copies=auto",
    ]
    distill(load_config(given), ALONE)
    summary = read(tmp_path / "run" / "run_summary.json")
    assert summary["unlabelled_rows"] > 10
    assert summary["copy_rows"] > 100
    found = show_data(load_config(given), 12)
    pairs = {"copy: swap", "copy: recombine"} & set(found.rows)
    assert len(pairs) == (2 if kind == "regression" else 0)
    assert len({row.kind for row in found.shown}) == len(found.rows)
    assert all((row.label == "-") == (row.kind != "labelled") for row in found.shown)


def write_other_task(folder, kind):
    """A task of pairs with scores, or of two choices, with 50 rows."""
    folder.mkdir()
    spec = {
        "regression": 'text_a: "{a}"\ntext_b: "{b}"\nscore_range: [0, 5]\nsymmetric: true\n',
        "choice": 'kind: choice\ntext_a: "{a}"\nchoices: ["{b}", "{c}"]\nlabels: [one, two]\n',
    }
    (folder / "task.yaml").write_text(f"name: other\n{spec[kind]}")
    nouns = ["movie", "plot", "music", "story", "acting"]
    random = np.random.default_rng(0)
    for name, rows in (("train", 50), ("validation", 10)):
        lines = ["a\tb\tc\tlabel"]
        for n in range(rows):
            texts = [f"the {random.choice(nouns)} was {name} {side}{n}" for side in "abc"]
            lines.append("\t".join([*texts, str(n % 2)]))
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder / "task.yaml"


def test_the_data_command_shows_what_goes_in(task, tmp_path, cli):
    given = given_words(task, tmp_path)
    done = cli("data", *given, "--show", "10")
    examples = examples_of(given)
    assert not (tmp_path / "run").exists()
    for kind, rows in (
        ("labelled", 36),
        ("text: rest of the train file", 18),
        *((f"copy: {op}", examples.copied.count(op)) for op in ("mask", "ngram", "neighbor")),
    ):
        assert re.search(rf"{kind} +│ +{rows} ", done.stdout), done.stdout
    assert "left out" in done.stdout
    shown = re.findall(r"^\[(.*?)\] (.*?): (.+)$", done.stdout, re.M)
    assert len(shown) == 10
    assert [kind for kind, _, _ in shown].count("labelled") == 2
    for kind, label, text in shown:
        assert (label == "-") == (kind != "labelled")
        assert text in examples.train.texts_a


def test_the_data_command_needs_no_student_where_there_are_no_copies(task):
    given = ["task=" + str(task[0] / "task.yaml"), f"data.path={task[0]}", "output_dir=unused"]
    found = show_data(load_config(given), 4)
    assert found.rows == {"labelled": 54}
    assert len(found.shown) == 4
    with pytest.raises(UserError, match=r"unlabeled\.rest=true: unlabelled rows need teachers"):
        show_data(load_config([*given, "unlabeled.rest=true"]), 4)


def test_a_sweep_gives_text_and_copies_to_methods_that_ask_teachers_alone(task, tmp_path):
    given = [
        *(f"tasks=[{task[0] / 'task.yaml'}]", "methods=[finetune,mean]", "seeds=1"),
        *(f"teachers=[{task[1][0]}]", f"data.path={task[0]}", f"student={task[2]}"),
        *("unlabeled.rest=true", "augment.copies=2", f"output_dir={tmp_path}"),
    ]
    grid = make_grid(given)
    uses = {
        unit.method: (unit.config.unlabeled.rest, unit.config.augment.copies) for unit in grid.units
    }
    assert uses == {"finetune": (None, None), "mean": (True, 2)}
    gold = make_grid([*given, "max_steps=2", "augment.gold_labels=true"])
    assert {unit.config.augment.copies for unit in gold.units} == {2}


def test_text_can_be_given_from_python(task, tmp_path):
    lines = (task[0] / "unlabeled.tsv").read_text().splitlines()[1:]
    keys = {
        **{"data": task[0], "teachers": [task[1][0]], "student": str(task[2]), "max_steps": 1},
        **{"teacher_validation": "off", "store": str(tmp_path / "store")},
    }
    frame = pd.DataFrame({"sentence": lines})
    named = {"unlabeled.ratio": 0.25}
    for name, text in (("frame", frame), ("texts", lines), ("file", task[0] / "unlabeled.tsv")):
        run = sd.distill(task[0] / "task.yaml", output_dir=tmp_path / name, unlabeled=text, **keys)
        assert read(run.path / "run_summary.json")["unlabelled_rows"] == 20
        # found again, and none of it is asked for again
        assert sd.distill(
            task[0] / "task.yaml", output_dir=tmp_path / name, unlabeled=text, **keys
        ).finished
    section = {"path": str(task[0] / "unlabeled.tsv"), "ratio": 0.25}
    run = sd.distill(task[0] / "task.yaml", output_dir=tmp_path / "s", unlabeled=section, **keys)
    assert read(run.path / "run_summary.json")["unlabelled_rows"] == 14
    run = sd.distill(
        task[0] / "task.yaml", output_dir=tmp_path / "r", unlabeled=frame, **keys, **named
    )
    assert read(run.path / "run_summary.json")["unlabelled_rows"] == 14
    with pytest.raises(UserError, match="unlabeled=7 is neither keys nor text"):
        sd.distill(task[0] / "task.yaml", output_dir=tmp_path / "t", unlabeled=7, **keys)


def test_symmetric_is_of_tasks_with_two_texts(tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text('name: own\ntext_a: "{a}"\nlabels: [x, y]\nsymmetric: true\n')
    with pytest.raises(UserError, match="symmetric is for tasks with two texts"):
        grammar_task(tmp_path)
