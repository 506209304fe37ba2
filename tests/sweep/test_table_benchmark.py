"""The table of results: its arms, and the part of qqp that is divided for it."""

import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from sead_dist.sweep.grid import make_plan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "table", raising=False)
    import table

    return table


def test_the_arms_of_the_table_differ_in_what_they_are_meant_to(table):
    given = ["student=L3", "encoders=[E,E,E]", "output_dir=out", "data.path=data/{task}"]
    plan = make_plan([str(table.ARMS), f"tasks=[{','.join(table.TASKS)}]", *given])
    assert plan.methods == ["finetune", "control", "single", "mean", "sead"]
    assert (plan.reference, len(plan.seeds), plan.keep_models) == ("control", 5, False)
    configs = {u.method: u.config for u in plan.students("sst2") if u.config.seed == 0}
    long = [name for name, config in configs.items() if config.max_steps == 1500]
    assert long == ["control", "single", "mean", "sead"]
    taught = [configs[name] for name in ("single", "mean", "sead")]
    assert all(config.has_text and config.augment == taught[0].augment for config in taught)
    assert configs["control"].augment.copies == "auto"
    assert (configs["finetune"].augment.copies, configs["finetune"].has_text) == (None, False)
    assert len({repr(config.student) for config in configs.values()}) == 1


def test_an_arm_of_the_levers_differs_from_sead_in_one_thing(table, tmp_path):
    arms, tasks = table.PARTS["levers"]
    rows = tmp_path / "train.tsv"
    rows.write_text("sentence\tlabel\na warm and funny film\t1\n")
    file = table.filled(arms, tmp_path, "ENC", [rows])
    assert (tmp_path / "plain.txt").read_text() == "a warm and funny film\n"
    given = ["student=L3", "encoders=[E,E,E]", "output_dir=out", "data.path=data/{task}"]
    plan = make_plan([str(file), f"tasks=[{','.join(tasks)}]", *given])
    assert list(plan.unfit) == [("stsb", "hard-labels")]
    assert (plan.reference, len(plan.seeds)) == ("sead", 3)
    configs = {u.method: u.config for u in plan.students("sst2") if u.config.seed == 0}
    keys = {name: config.identity() for name, config in configs.items()}

    def changed(arm: str, since: str = "sead") -> set[str]:
        both = keys[arm].keys() | keys[since].keys()
        return {key for key in both if keys[arm].get(key) != keys[since].get(key)}

    assert changed("hard-labels") == {"loss"}
    assert not changed("no-text")  # its data's fingerprint counts
    assert [name for name, config in configs.items() if not config.has_text] == ["no-text"]
    assert {key.split(".")[0] for key in changed("no-copies")} == {"augment"}
    assert (changed("third-of-steps"), changed("last")) == ({"max_steps"}, {"final_checkpoint"})
    assert changed("truncated") == {"student.path", "student.layers"}
    assert {key.split(".")[0] for key in changed("repaired", "truncated")} == {"repair"}


@pytest.mark.parametrize(
    ("part", "tasks", "rates"),
    [
        ("core", ["sst2"], "per_task={}"),
        ("core", ["sst2", "stsb"], "per_task={stsb: {learning_rate: 2.0e-4}}"),
        ("levers", ["stsb"], "per_task={stsb: {learning_rate: 2.0e-4}}"),
        ("defaults", ["sst2"], "per_task={}"),
    ],
)
def test_a_task_has_a_learning_rate_of_its_own_in_its_own_sweep(
    table, tmp_path, monkeypatch, part, tasks, rates
):
    monkeypatch.setattr(table, "lay_out", lambda folder, task: None)
    monkeypatch.setattr(table, "filled", lambda arms, *rest: table.ARMS)
    given = {"encoders": [Path("E")], "student": Path("L3"), "work": tmp_path, "search": False}
    words = table.table_words(Namespace(part=part, tasks=tasks, **given))
    assert rates in words
    make_plan(words)


@pytest.mark.parametrize("part", ["little", "defaults"])
def test_the_other_parts_name_what_they_compare(part, table):
    arms, tasks = table.PARTS[part]
    given = ["student=L3", "encoders=[E,E,E]", "output_dir=out", "data.path=data/{task}"]
    plan = make_plan([str(arms), f"tasks=[{','.join(tasks)}]", *given])
    (steps,) = {unit.config.max_steps for unit in plan.students(tasks[0])}
    assert (plan.methods[1], len(plan.seeds)) == ("sead", 3)
    assert steps == {"little": 750, "defaults": None}[part]


def test_rows_that_are_set_apart_share_no_question_with_the_others(table):
    rows = [f"{n}\t0\t0\tquestion {n % 40}\tQuestion  {n // 2 + 100}\t{n % 2}" for n in range(80)]
    # two questions are one where only case and blanks differ
    rows += ["x\t0\t0\tQUESTION 0\tquestion 1\t1"]
    train, test = table.divided(rows, (3, 4), 20)
    assert sorted(train + test) == sorted(rows)
    assert 20 <= len(test) < 40
    sides = [
        {" ".join(text.casefold().split()) for row in part for text in row.split("\t")[3:5]}
        for part in (train, test)
    ]
    assert not sides[0] & sides[1]
    assert table.divided(rows, (3, 4), 20) == (train, test)


def test_the_search_reads_training_rows_alone(table, tmp_path, monkeypatch):
    (tmp_path / "sst2").mkdir()
    rows = [f"text {n % 3000}\t{n % 2}" for n in range(4000)]
    (tmp_path / "sst2" / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    monkeypatch.setenv("SEAD_DIST_DATA", str(tmp_path))
    table.lay_out_search(tmp_path / "out", "sst2")
    parts = {}
    for name in ("train", "validation"):
        head, *parts[name] = (tmp_path / "out" / f"{name}.tsv").read_text().splitlines()
        assert head == "sentence\tlabel"
    assert sorted(parts["train"] + parts["validation"]) == sorted(rows)
    assert len(parts["validation"]) >= 2000
    assert not {row.split("\t")[0] for row in parts["train"]} & {
        row.split("\t")[0] for row in parts["validation"]
    }


def test_a_folder_of_rows_that_was_cut_off_is_written_again(table, tmp_path, monkeypatch):
    (tmp_path / "qqp_subset").mkdir()
    rows = [f"{n}\t0\t0\tquestion {n}\tother {n}\t{n % 2}" for n in range(6000)]
    (tmp_path / "qqp_subset" / "train.tsv").write_text("\n".join(rows) + "\n")
    monkeypatch.setenv("SEAD_DIST_DATA", str(tmp_path))
    for lay_out in (table.lay_out, table.lay_out_search):
        folder = tmp_path / lay_out.__name__ / "qqp"
        folder.mkdir(parents=True)
        (folder / "validation.tsv").write_text("half a r")
        with monkeypatch.context() as patch:
            patch.setattr(table, "TEST_ROWS", 100)
            patch.setattr(table, "SEARCH_ROWS", {"qqp": 100})
            lay_out(folder, "qqp")
            whole = {path.name: path.read_text() for path in folder.iterdir()}
            lay_out(folder, "qqp")
        assert set(whole) == {"train.tsv", "validation.tsv"}
        assert "half a r" not in whole["validation.tsv"]
        assert {path.name: path.read_text() for path in folder.iterdir()} == whole


def test_runs_that_were_done_again_are_kept_again_and_undone_ones_no_more(table, tmp_path):
    work, kept = tmp_path / "work", tmp_path / "kept"
    names = ("again", "undone", "same", "other")
    runs = {name: Path("sst2", name, "seed-0") for name in names}

    def finish(folder, steps, *files):
        folder.mkdir(parents=True)
        (folder / "predictions").mkdir()
        for name in files:
            (folder / "predictions" / name).write_text(str(steps))
        (folder / "run_summary.json").write_text(f'{{"finished": true, "steps": {steps}}}')

    for name in ("again", "undone", "same"):
        finish(work / runs[name], 1, "old")
    table.keep_runs(work, kept, [])
    before = table.finished_runs(work)
    assert before == sorted(runs[name] for name in ("again", "undone", "same"))
    for name in ("again", "undone"):
        shutil.rmtree(work / runs[name])
    finish(work / runs["again"], 2, "new")
    finish(kept / runs["other"], 1, "old")  # another machine's
    table.keep_runs(work, kept, before)
    found = {str(path.relative_to(kept / "sst2")) for path in kept.rglob("predictions/*")}
    assert found == {f"{name}/seed-0/predictions/old" for name in ("same", "other")} | {
        "again/seed-0/predictions/new"
    }
    assert '"steps": 2' in (kept / runs["again"] / "run_summary.json").read_text()


def test_finished_runs_are_kept_without_models_and_brought_back(table, tmp_path):
    done, open_ = (tmp_path / "work" / "sst2" / name / "seed-0" for name in ("sead", "mean"))
    for run, finished in ((done, "true"), (open_, "false")):
        (run / "model").mkdir(parents=True)
        (run / "predictions").mkdir()
        (run / "predictions" / "validation.parquet").write_bytes(b"x")
        (run / "run.json").write_text("{}")
        (run / "run_summary.json").write_text(f'{{"finished": {finished}}}')
    table.copy_runs(tmp_path / "work", tmp_path / "kept")
    table.copy_runs(tmp_path / "kept", tmp_path / "again")
    found = {str(p.relative_to(tmp_path / "again")) for p in (tmp_path / "again").rglob("*.*")}
    run = "sst2/sead/seed-0"
    assert found == {
        *(f"{run}/run.json", f"{run}/run_summary.json", f"{run}/predictions/validation.parquet")
    }
