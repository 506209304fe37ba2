"""The table of results: its arms, and the part of qqp that is divided for it."""

import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from sead_dist.data.augmentation import run_rows
from sead_dist.sweep.grid import make_grid

ROOT = Path(__file__).parents[2]
BENCHMARKS, KEPT = ROOT / "benchmarks", ROOT / "docs" / "results" / "table" / "runs"
# by task, the rows that a sample of 2,500 leaves over, as text
LEFT_OVER = {"sst2": 58364, "stsb": 2722, "mrpc": 1168, "qqp": 30000}
LEFT_OVER |= {"cola": 6051, "wic": 2928, "rte": 0, "cb": 0}


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "table", raising=False)
    import table

    return table


def test_the_arms_of_the_table_differ_in_what_they_are_meant_to(table):
    given = ["student=L3", "encoders=[E,E,E]", "output_dir=out", "data.path=data/{task}"]
    grid = make_grid([str(table.ARMS), f"tasks=[{','.join(table.TASKS)}]", *given])
    assert grid.methods == ["finetune", "control", "single", "mean", "sead"]
    assert (grid.reference, len(grid.seeds), grid.keep_models) == ("control", 5, False)
    configs = {u.method: u.config for u in grid.students("sst2") if u.config.seed == 0}
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
    grid = make_grid([str(file), f"tasks=[{','.join(tasks)}]", *given])
    assert list(grid.unfit) == [("stsb", "hard-labels")]
    assert (grid.reference, len(grid.seeds)) == ("sead", 3)
    configs = {u.method: u.config for u in grid.students("sst2") if u.config.seed == 0}
    keys = {name: config.identity() for name, config in configs.items()}

    def changed(arm: str, since: str = "sead") -> set[str]:
        both = keys[arm].keys() | keys[since].keys()
        return {key for key in both if keys[arm].get(key) != keys[since].get(key)}

    assert changed("hard-labels") == {"loss"}
    assert not changed("no-text")  # its data's fingerprint counts
    assert [name for name, config in configs.items() if not config.has_text] == [
        "no-text",
        "neither",
    ]
    assert {key.split(".")[0] for key in changed("no-copies")} == {"augment"}
    assert {key.split(".")[0] for key in changed("neither")} == {"augment"}
    assert (changed("third-of-steps"), changed("last")) == ({"max_steps"}, {"final_checkpoint"})
    assert changed("truncated") == {"student.path", "student.layers"}
    assert {key.split(".")[0] for key in changed("repaired", "truncated")} == {"repair"}


STSB = "stsb: {learning_rate: 2.0e-4"
STSB_ARMS = (
    "methods: {finetune: {learning_rate: 1.0e-4}, "
    "control: {augment: {copies: null, gold_labels: false}}}"
)


@pytest.mark.parametrize(
    ("part", "tasks", "own"),
    [
        ("core", ["sst2"], ""),
        ("core", ["sst2", "stsb"], f"{STSB}, {STSB_ARMS}}}"),
        ("levers", ["sst2", "stsb"], "sst2: {methods: {no-copies: null}}, " + STSB + "}"),
        ("defaults", ["sst2"], ""),
    ],
)
def test_a_task_has_learning_rates_of_its_own_and_may_lack_an_arm(words_of, part, tasks, own):
    words = words_of(part, tasks)
    assert f"per_task={{{own}}}" in words
    make_grid(words)


@pytest.fixture
def words_of(table, tmp_path, monkeypatch):
    """`words_of(part, tasks)`: the words of a part's sweep; a task's data are one row."""

    def lay_out(folder, task):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.tsv").write_text("sentence\tlabel\na warm and funny film\t1\n")

    for name in ("lay_out", "lay_out_search"):
        monkeypatch.setattr(table, name, lay_out)

    def make(part, tasks, search=False):
        given = {"encoders": [Path("E")] * 3, "student": Path("l3"), "work": tmp_path}
        return table.table_words(Namespace(part=part, tasks=tasks, search=search, **given))

    return make


def test_the_kept_runs_are_those_that_the_table_asks_for(words_of):
    grid = make_grid([*words_of("core", ["sst2", "stsb"]), "seeds=[0]"])
    assert len(grid.students("sst2")) == len(grid.students("stsb")) == 5
    for unit in (*grid.students("sst2"), *grid.students("stsb")):
        kept = KEPT / unit.task / unit.method / unit.folder.name / "run.json"
        asked, had = unit.config.identity(), json.loads(kept.read_text())["identity"]["config"]
        assert {key for key in asked if had.get(key) != asked[key]} == set(), unit.title


@pytest.mark.parametrize(
    ("part", "search"),
    [("core", False), ("levers", False), ("little", False), ("defaults", False), ("core", True)],
)
def test_no_two_arms_of_a_part_make_the_same_run(table, words_of, part, search):
    tasks = table.TASKS if search else table.PARTS[part][1]
    grid = make_grid(words_of(part, tasks, search))
    seed = grid.seeds[0]
    for task in tasks:
        runs = {}
        for unit in grid.students(task):
            if unit.config.seed == seed:
                runs.setdefault(what_it_makes(unit.config, LEFT_OVER[task]), []).append(unit.method)
        assert [names for names in runs.values() if len(names) > 1] == []
    if part == "levers":
        assert ("sst2", "no-copies") in grid.unfit
        assert ("stsb", "no-copies") not in grid.unfit


def what_it_makes(config, left_over):
    """All that decides a run of 2,250 labelled rows, with the copies that there are in the end."""
    text = left_over if config.has_text else 0
    copies = run_rows(config, 2250, text) - 2250 - text
    keys = {k: v for k, v in config.identity().items() if copies or not k.startswith("augment.")}
    return repr((sorted(keys.items(), key=lambda item: item[0]), text, copies))


def test_the_search_tries_rates_for_each_kind_of_arm(words_of):
    grid = make_grid(words_of("core", ["sst2"], search=True))
    found = {unit.method: unit.config for unit in grid.students("sst2")}
    for kind in ("finetune", "control", "control-no-copies"):
        tried = [of.learning_rate for name, of in found.items() if name.startswith(kind)]
        assert {5e-5, 1e-4, 3e-4} <= set(tried)
    assert {found[name].max_steps for name in found if name.startswith("finetune")} == {None}
    rates = [found[name].learning_rate for name in ("sead", "sead-2e-4", "sead-3e-4")]
    assert rates == [1e-4, 2e-4, 3e-4]
    assert (found["sead-fitted"].ensemble, found["sead-centered"].loss) == (
        "fitted",
        "mse_centered",
    )


@pytest.mark.parametrize("part", ["little", "defaults"])
def test_the_other_parts_name_what_they_compare(part, table):
    arms, tasks = table.PARTS[part]
    given = ["student=L3", "encoders=[E,E,E]", "output_dir=out", "data.path=data/{task}"]
    grid = make_grid([str(arms), f"tasks=[{','.join(tasks)}]", *given])
    (steps,) = {unit.config.max_steps for unit in grid.students(tasks[0])}
    assert (grid.methods[1], len(grid.seeds)) == ("sead", 3)
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
