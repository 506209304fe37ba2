"""Runs whose teachers are files of predictions."""

import csv
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ranks import run_ranks
from small import (
    ALONE,
    grammar_task,
    model_bytes,
    read,
    relabel,
    run_distill,
    save_teacher,
    student_shape,
    sweep_words,
    words,
    write_task,
)

from sead_dist.cli.grammar import LABELS, grammar_tokenizer
from sead_dist.config.load import load_config
from sead_dist.data.examples import identities
from sead_dist.data.splits import load_examples
from sead_dist.errors import UserError
from sead_dist.objectives.ensemble import make_ensemble
from sead_dist.planning.table import plan
from sead_dist.runs.distillation import distill
from sead_dist.runs.pool_worker import teach
from sead_dist.runs.requests import answered_examples, idle_row_lines
from sead_dist.runtime.distributed import StopFlag
from sead_dist.store.store import StoreFolder, TeacherKey
from sead_dist.sweep.run import run_sweep
from sead_dist.teachers.entries import read_teachers


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task of 54 training rows and two teachers, the first right nearly always."""
    root = tmp_path_factory.mktemp("files")
    teachers = [save_teacher(root / "a"), save_teacher(root / "b", seed=1)]
    data = write_task(root / "data")
    relabel(data, teachers[0], flip=0.1)
    student_shape(data)
    return data, teachers


@pytest.fixture(scope="module")
def live(task, tmp_path_factory):
    """A run of both teachers, and what they say of every text of it."""
    output = tmp_path_factory.mktemp("live") / "run"
    run = run_of(task, output, task[1], ensemble="mean_logits")
    texts = texts_of(task[0])
    return run, texts, [said_by(run, teacher.name, texts) for teacher in task[1]]


def run_of(task, output, teachers, **changes):
    keys = {"max_steps": 7, **changes}
    return distill(load_config(words(task[0], teachers, output, **keys)), ALONE)


def texts_of(data, *splits):
    given = load_config(words(data, [], data / "unused"))
    examples = load_examples(given, grammar_task(data))
    parts = {"train": examples.train, "selection": examples.selection, **examples.official}
    chosen = [part for name, part in parts.items() if not splits or name in splits]
    return list(dict.fromkeys(text for part in chosen for text in part.texts_a))


def said_by(run, name, texts):
    """The logits that the store keeps of a teacher, in the order of the task's classes."""
    of = {one["name"]: one for one in read(run / "teacher_manifest.json")}[name]
    key = TeacherKey(of["fingerprint"], of["numerics"], name, 2)
    ids_B2 = identities([((text,), ()) for text in texts])
    order = np.lexsort((ids_B2[:, 1], ids_B2[:, 0]))
    store = StoreFolder(run.parent / "store")
    table = store.table(key, ids_B2[order], "grammar", "any", "test")
    logits_BC, present_B = table.lookup(np.arange(len(texts)))
    assert present_B.all()
    return logits_BC[np.argsort(order)][:, of["order"]]


def parquet(path, texts, logits, order=None):
    order = list(range(len(texts)) if order is None else order)
    columns = {name: np.float32(logits[order, place]) for place, name in enumerate(LABELS)}
    pq.write_table(pa.table({"sentence": [texts[at] for at in order], **columns}), path)
    return path


def entry(path, more="kind: logits, calibrate: off"):
    return f"{{predictions: {path}, {more}}}"


def log_of(run):
    return (run / "log.txt").read_text()


def test_float32_logits_of_a_file_give_the_student_of_the_teacher_bit_for_bit(task, live, tmp_path):
    run, texts, said = live
    one, two = (
        parquet(tmp_path / f"{name}.parquet", texts, of)
        for name, of in zip("ab", said, strict=True)
    )
    files = run_of(task, tmp_path / "files", [entry(one), entry(two)], ensemble="mean_logits")
    assert model_bytes(files) == model_bytes(run)
    assert read(files / "scores.json")["splits"] == read(run / "scores.json")["splits"]
    assert read(files / "run_summary.json")["teacher_forwards"] == 0
    beside = run_of(
        task, tmp_path / "beside", [task[1][0], entry(two)], store=run.parent / "store",
        ensemble="mean_logits",
    )  # fmt: skip
    assert model_bytes(beside) == model_bytes(run)


def test_neither_the_order_of_rows_nor_the_form_of_the_file_changes_anything(task, live, tmp_path):
    _, texts, (said, _) = live
    first = parquet(tmp_path / "a.parquet", texts, said)
    run = run_of(task, tmp_path / "run", [entry(first)])
    order = np.random.default_rng(0).permutation(len(texts)).tolist()
    other = run_of(
        task, tmp_path / "other", [entry(parquet(tmp_path / "b.parquet", texts, said, order))]
    )
    assert model_bytes(other) == model_bytes(run)
    lines = tmp_path / "c.jsonl"
    lines.write_text(
        "".join(
            json.dumps(
                {"sentence": f" {texts[at]} "} | dict(zip(LABELS, said[at].tolist(), strict=True))
            )
            + "\n"
            for at in order
        )
    )
    stopped = tmp_path / "stopped"
    stop = StopFlag()
    stop.signal = 15
    given = words(task[0], [entry(first)], stopped, max_steps=7)
    distill(load_config(given), ALONE, stop=stop)
    assert not (stopped / "model").exists()
    # another form of the same answers resumes the run
    distill(load_config(words(task[0], [entry(lines)], stopped, max_steps=7)), ALONE)
    assert model_bytes(stopped) == model_bytes(run)


def test_a_resume_with_other_answers_is_refused(task, live, tmp_path):
    _, texts, (said, other) = live
    stop = StopFlag()
    stop.signal = 15
    file = parquet(tmp_path / "a.parquet", texts, said)
    given = words(task[0], [entry(file)], tmp_path / "run", max_steps=7)
    distill(load_config(given), ALONE, stop=stop)
    calibrated = words(
        task[0], [entry(file, "kind: logits, calibrate: on")], tmp_path / "run", max_steps=7
    )
    with pytest.raises(UserError, match="calibrate of teacher 1 was None, is on"):
        distill(load_config(calibrated), ALONE)
    parquet(file, texts, other)
    with pytest.raises(UserError, match="fingerprint of teacher 1 was"):
        distill(load_config(given), ALONE)


@pytest.mark.parametrize(
    "ensemble",
    ["single", "mean_logits", "answers",
     *(pytest.param(name, marks=pytest.mark.slow)
       for name in ("mean_probabilities", "fixed", "confidence", "entropy", "random"))],
)  # fmt: skip
def test_every_ensemble_takes_a_file_that_answers_some_rows(task, live, tmp_path, ensemble):
    """And a run that was stopped comes to the same student."""
    _, texts, (_, said) = live
    file = parquet(tmp_path / "half.parquet", texts[::2], said[::2])
    keys = {"ensemble": ensemble, "store": live[0].parent / "store"}
    if ensemble == "single":
        keys["teacher"] = "half"
    teachers = [task[1][0], entry(file)]
    run = run_of(task, tmp_path / "run", teachers, **keys)
    stop = StopFlag()
    stop.signal = 15
    given = words(task[0], teachers, tmp_path / "again", max_steps=7, save_steps=1, **keys)
    distill(load_config(given), ALONE, stop=stop)
    distill(load_config(given), ALONE)
    assert model_bytes(tmp_path / "again") == model_bytes(run)
    assert "half.parquet has predictions of 2" in log_of(run)
    assert "the first row without one is train row" in log_of(run)


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(task, live, tmp_path):
    _, texts, (_, said) = live
    file = parquet(tmp_path / "half.parquet", texts[::2], said[::2])
    keys = {"max_steps": 3, "store": live[0].parent / "store"}
    teachers = [task[1][0], entry(file)]
    one = run_of(task, tmp_path / "one", teachers, **keys)
    given = words(task[0], teachers, tmp_path / "two", **keys)
    run_ranks(2, tmp_path / "ranks", run_distill, given)
    scores = [read(run / "scores.json")["splits"] for run in (one, tmp_path / "two")]
    assert scores[0]["validation"]["ensemble"] == scores[1]["validation"]["ensemble"]
    losses = [
        json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        for run in (one, tmp_path / "two")
    ]
    assert losses[0].get("loss") == pytest.approx(losses[1].get("loss"), rel=1e-4)


def test_a_file_stands_beside_teachers_of_the_pool(task, live, tmp_path):
    _, texts, (_, said) = live
    file = parquet(tmp_path / "half.parquet", texts[::2], said[::2])
    teachers = [task[1][0], entry(file)]
    here = run_of(task, tmp_path / "here", teachers)
    keys = {"max_steps": 7, "placement": "pool", "store": tmp_path / "pool"}
    given = words(task[0], teachers, tmp_path / "run", **keys)
    teach(load_config(given), "1/1", ALONE)
    distill(load_config(given), ALONE)
    assert model_bytes(tmp_path / "run") == model_bytes(here)
    placed = [one["placement"] for one in read(tmp_path / "run" / "teacher_manifest.json")]
    assert placed == ["pool", "colocated"]


def test_plan_counts_no_work_for_a_file(task, live, tmp_path):
    _, texts, (_, said) = live
    file = parquet(tmp_path / "half.parquet", texts, said)
    forwards = []
    for teachers in ([task[1][0], entry(file)], [task[1][0]], [entry(file)]):
        given = words(task[0], teachers, tmp_path / "run", store=tmp_path / "empty")
        plan(load_config(given), ALONE, None, None, None, False, tmp_path / "plan.json")
        forwards.append(read(tmp_path / "plan.json")["teacher_forwards"])
    assert forwards[0] == forwards[1] > 0
    assert forwards[2] == 0


def test_a_sweep_compares_methods_with_a_file_among_the_teachers(task, live, tmp_path):
    _, texts, (_, said) = live
    file = parquet(tmp_path / "half.parquet", texts[::2], said[::2])
    given = sweep_words(
        task[0], tmp_path / "sweep", "encoders=[]", f"teachers=[{task[1][0]},{entry(file)}]",
        f"data.path={task[0]}", "methods=[finetune,mean]", "seeds=1",
    )  # fmt: skip
    run_sweep(given, ALONE)
    report = read(tmp_path / "sweep" / "report" / "report.json")
    assert {cell["method"] for cell in report["cells"]} == {"finetune", "mean"}
    assert "half" in (tmp_path / "sweep" / "report" / "report.md").read_text()


def test_text_that_no_file_answers_is_left_out_and_counted(task, live, tmp_path):
    """With files alone there are no automatic copies; labelled rows without answers stay."""
    data = task[0]
    texts = texts_of(data)
    lines = (data / "unlabeled.tsv").read_text().splitlines()[1:]
    file = tmp_path / "gpt.csv"
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["sentence", "label"])
        writer.writerows([text, LABELS[0]] for text in [*texts[:30], *lines[:5]])
    given = [entry(file, "calibrate: off")]
    keys = {"augment__copies": "auto", "unlabeled__path": data / "unlabeled.tsv"}
    run = run_of(task, tmp_path / "run", given, **keys)
    log, summary = log_of(run), read(run / "run_summary.json")
    assert "left out: 15 unlabelled rows without a prediction in any file" in log
    assert (summary["train_rows"], summary["unlabelled_rows"], summary["copy_rows"]) == (59, 5, 0)
    assert "labels alone, each as one vote smoothed by 0.1 a class" in log
    assert read(run / "scores.json")["splits"]["validation"]["ensemble"] is None
    assert read(run / "scores.json")["splits"]["validation"]["teachers"] == [
        {"name": "gpt", "metrics": {}, "rows": 0}
    ]
    card = (run / "model" / "README.md").read_text()
    assert "ensemble" in card
    # the same line again finds it finished, though the files leave rows out
    made = (run / "run_summary.json").stat().st_mtime_ns
    run_of(task, run, given, **keys)
    assert (run / "run_summary.json").stat().st_mtime_ns == made


def test_a_file_that_holds_the_gold_labels_is_refused_or_told(task, tmp_path):
    """The run's own file is refused; of a copy it may be chance, and is told in log and card."""
    data = task[0]
    rows = [row for name in ("train", "validation") for row in rows_of(data / f"{name}.tsv")]
    own = data / "train.tsv"
    with pytest.raises(UserError) as caught:
        run_of(task, tmp_path / "own", [entry(own, "calibrate: off")])
    assert str(caught.value) == (
        f"teacher train has the gold label as its prediction in all 60 rows that have one: {own} is the file "
        "of these rows; name the column of its own predictions with column, or leave it out"
    )
    assert not (tmp_path / "own").exists()
    told = "has the gold label as its prediction in all"
    named = run_of(task, tmp_path / "named", [entry(own, "column: label, calibrate: off")])
    assert f"WARNING: teacher train {told} 60 rows" in log_of(named)
    (remark,) = [line for line in read(named / "scores.json")["remarks"] if told in line]
    assert remark in (named / "model" / "README.md").read_text()

    def left(texts, wrong=0, **more):
        file = tmp_path / f"gpt-{len(texts)}-{wrong}-{len(more)}.jsonl"
        swap = dict(zip(LABELS, LABELS[::-1], strict=True))
        said = [(text, swap[of] if n < wrong else of) for n, (text, of) in enumerate(texts)]
        lines = [{"sentence": text, "label": of, **more} for text, of in said]
        for n, line in enumerate(lines):
            line.update({key: values[n % 2] for key, values in more.items()})
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        given = load_config(words(data, [entry(file, "calibrate: off")], tmp_path / "unused"))
        spec = grammar_task(data)
        examples = load_examples(given, spec)
        (found,) = read_teachers(given, spec, ALONE, grammar_tokenizer(), examples)
        return found.file.remarks

    (line,) = left(rows)
    assert f"{told} 80 rows that have one: a file of gold labels teaches nothing more" in line
    assert left(rows, wrong=1) == []
    assert left(rows[:9]) == []  # chance
    assert left(rows, confidence=(0.9, 0.8)) == []  # it says more than the label


def rows_of(path):
    """(text, label) of each row."""
    return [tuple(line.split("\t")) for line in path.read_text().splitlines()[1:]]


def test_text_that_no_teacher_asked_of_it_answers_is_left_out(task, tmp_path):
    """Whatever others answer: those that the keys name count, or the row's own column."""
    data, (model, _) = task
    texts = texts_of(data)
    lines = (data / "unlabeled.tsv").read_text().splitlines()[1:]
    few, all_of = tmp_path / "few.tsv", tmp_path / "all.tsv"
    for file, said in ((few, [*texts, *lines[:4]]), (all_of, [*texts, *lines])):
        rows = [f"{text}\t{LABELS[0]}" for text in dict.fromkeys(said)]
        file.write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    routed = tmp_path / "routed"
    shutil.copytree(data, routed)
    for name in ("train", "validation", "unlabeled"):
        head, *rows = (routed / f"{name}.tsv").read_text().splitlines()
        rows = [f"{row}\t{('few', 'all')[n % 2]}" for n, row in enumerate(rows)]
        (routed / f"{name}.tsv").write_text("\n".join([f"{head}\twho", *rows]) + "\n")

    def left(teachers, folder=data, **changes):
        more = {"unlabeled__path": folder / "unlabeled.tsv", "augment__copies": "null", **changes}
        given = load_config(words(folder, teachers, tmp_path / "run", **more))
        spec = grammar_task(folder)
        examples = load_examples(given, spec)
        found = read_teachers(given, spec, ALONE, grammar_tokenizer(), examples)
        kept = answered_examples(given, examples, found)
        weights_N = torch.tensor([1.0, 0.0] if given.ensemble == "single" else [0.5, 0.5])
        ensemble = make_ensemble(given, spec.task_kind, weights_N)
        return kept.unlabelled_rows, idle_row_lines(ensemble, found, kept.train)

    two = [f"{{predictions: {few}, name: few}}", f"{{predictions: {all_of}, name: all}}"]
    assert left(two, ensemble="mean_logits") == (20, [])
    by_weight = [f"{two[1][:-1]}, weight: 0}}", two[0]]
    assert left(by_weight, ensemble="fixed")[0] == 4
    assert left([two[0], f"{{path: {model}, weight: 0}}"], ensemble="fixed")[0] == 4
    own = {"ensemble": "routed", "teacher_column": "who"}
    # the first 4 rows of text are answered by both, and of the others each second one is its own
    assert left(two, routed, **own) == (12, [])
    assert left(two, ensemble="single", teacher="few") == (4, [])
    # which one it will be is not known before the teachers are scored
    ((line,), rows) = left(two, ensemble="single")[::-1]
    assert rows == 20
    assert line.startswith("WARNING: 16 unlabelled rows stay in the batches without a loss: few ha")
    assert "(a new run with teacher=few leaves them out)" in line
    assert "16 unlabelled rows" in left(two, ensemble="random")[1][0]


def test_a_run_with_a_baseline_ends_where_a_file_could_not_be_weighed_up(task, live, tmp_path):
    """A file that answers too few selection rows to be validated."""
    _, texts, (said, _) = live
    given = words(task[0], [], tmp_path / "fine", method="finetune", max_steps=2)
    fine = distill(load_config(given), ALONE)
    file = parquet(tmp_path / "a.parquet", texts, said)
    run = run_of(
        task, tmp_path / "run", [entry(file)], baseline=fine, teacher_validation="on", max_steps=2
    )
    assert not (run / "learnable.json").exists()
    assert read(run / "run_summary.json")["finished"]


def test_a_store_that_cannot_be_one_is_told_before_anything_is_written(task, tmp_path):
    with pytest.raises(UserError, match=r"store=.* holds other things"):
        run_of(task, tmp_path / "run", task[1], store=task[0])
    assert not (tmp_path / "run").exists()


def test_a_file_is_validated_on_the_selection_rows_that_it_answers_from_50_up(
    task, tmp_path_factory
):
    root = tmp_path_factory.mktemp("large")
    teacher = save_teacher(root / "a")
    data = write_task(root / "data", rows=200, dev=20)
    relabel(data, teacher)
    gold = dict(
        line.split("\t")
        for name in ("train", "validation")
        for line in (data / f"{name}.tsv").read_text().splitlines()[1:]
    )
    selection = texts_of_half(data)
    file = root / "gpt.jsonl"

    def write(texts, wrong=False):
        swap = dict(zip(LABELS, LABELS[::-1], strict=True))
        rows = [{"sentence": t, "label": swap[gold[t]] if wrong else gold[t]} for t in texts]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    keys = {"teacher_validation": "on", "selection__fraction": 0.5, "max_steps": 2}
    write([*list(gold)[:20], *selection[:49]])
    run = run_of((data, None), root / "few", [teacher, entry(file, "calibrate: off")], **keys)
    assert "gpt is not validated: it has predictions of" in log_of(run)
    assert "Teacher gpt was not validated" in (run / "model" / "README.md").read_text()
    write(selection[:60])
    run = run_of((data, None), root / "more", [teacher, entry(file, "calibrate: off")], **keys)
    assert "validated gpt: accuracy 1.0000" in log_of(run)
    assert f"on the 60 of {len(selection)} selection rows that it has predictions of" in log_of(run)
    told = "the ensemble is scored on 0 of 20 validation rows"
    assert told in log_of(run)
    assert told in (run / "model" / "README.md").read_text()
    write(selection[:60], wrong=True)
    failed = r"teacher gpt failed its validation.*\{predictions: .*labels: \{"
    with pytest.raises(UserError, match=failed):
        run_of((data, None), root / "wrong", [teacher, entry(file, "calibrate: off")], **keys)
    write(selection[:10])
    few = "each teacher's score, and gpt has predictions of 10 of .* rows, where a score needs 50"
    with pytest.raises(UserError, match=few):
        run_of(
            (data, None),
            root / "score",
            [teacher, entry(file, "name: gpt")],
            ensemble="score",
            **keys,
        )
    assert not (root / "score").exists()


def texts_of_half(data):
    given = load_config(words(data, [], data / "unused", selection__fraction=0.5))
    return load_examples(given, grammar_task(data)).selection.texts_a


@pytest.mark.slow
def test_a_file_that_is_too_sure_is_calibrated_on_the_selection_split(tmp_path_factory):
    root = tmp_path_factory.mktemp("calibrated")
    data = write_task(root / "data", rows=420, dev=20)
    gold = dict(line.split("\t") for line in (data / "train.tsv").read_text().splitlines()[1:])
    swap = dict(zip(LABELS, LABELS[::-1], strict=True))
    random = np.random.default_rng(0)
    rows = []
    for text, label in gold.items():
        said = label if random.random() < 0.8 else swap[label]
        rows.append({"sentence": text, "label": said, "confidence": 0.999})
    file = root / "gpt.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"selection__fraction": 0.5, "max_steps": 2, "ensemble": "mean_logits"}
    run = run_of((data, None), root / "run", [entry(file, "name: gpt")], **keys)
    (temperature,) = read(run / "ensemble.json")["calibration"]
    said = {row["sentence"]: row["label"] for row in rows}
    right = np.mean([said[text] == gold[text] for text in texts_of_half(data)])
    # .999 is a margin of log 999, and that is what it should be
    assert temperature == pytest.approx(np.log(999) / np.log(right / (1 - right)), rel=1e-3)
    assert f"gpt is calibrated by the temperature {temperature:.3f}" in log_of(run)
    off = run_of((data, None), root / "off", [entry(file, "calibrate: off")], **keys)
    assert "calibration" not in read(off / "ensemble.json")
    assert model_bytes(off) != model_bytes(run)
    stop = StopFlag()
    stop.signal = 15
    given = words(data, [entry(file, "name: gpt")], root / "again", save_steps=1, **keys)
    distill(load_config(given), ALONE, stop=stop)
    distill(load_config(given), ALONE)
    assert model_bytes(root / "again") == model_bytes(run)
    few = run_of(
        (data, None), root / "few", [save_teacher(root / "a"), entry(file, "name: gpt")],
        **{**keys, "selection__fraction": 0.2},
    )  # fmt: skip
    assert "and 200 are needed; give ensemble=mean_probabilities, since" in log_of(few)


def test_scores_of_a_file_teach_a_task_of_scores(tmp_path):
    names = "".join(f"{n}\tthe plot was {n % 5}\n" for n in range(60))
    rows = [line.split("\t") for line in names.splitlines()]
    data = tmp_path / "data"
    data.mkdir()
    for name, part in (("train", rows[:50]), ("validation", rows[50:])):
        lines = [f"{text} {n}\t{int(n) % 5}" for n, text in part]
        (data / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    (data / "task.yaml").write_text(
        'name: marks\nkind: regression\ntext_a: "{sentence}"\nscore_range: [0, 5]\n'
    )
    student_shape(data)
    grammar_tokenizer().save_pretrained(data / "tokenizer")
    said = [f"{text} {n},{int(n) % 5 + 0.1}" for n, text in rows if int(n) % 7]
    (tmp_path / "marks.csv").write_text("\n".join(["sentence,score", *said, "another,3"]) + "\n")
    keys = {"selection__fraction": 0.5, "ensemble": "answers"}
    run = run_of((data, None), tmp_path / "run", [entry(tmp_path / "marks.csv", "name: m")], **keys)
    assert "1 prediction in" in log_of(run)
    teachers = read(run / "scores.json")["splits"]["validation"]["teachers"]
    assert teachers[0]["metrics"]["pearson"] == pytest.approx(1.0)


def test_a_file_is_no_feature_teacher(task, live, tmp_path):
    _, texts, (said, _) = live
    file = parquet(tmp_path / "a.parquet", texts, said)
    with pytest.raises(UserError, match="teacher a is a file, and feature_loss=distilbert needs"):
        run_of(task, tmp_path / "run", [entry(file)], feature_loss="distilbert")
    with pytest.raises(UserError, match=r"teacher none: .*none.csv does not exist"):
        run_of(task, tmp_path / "run", [entry(tmp_path / "none.csv")])
