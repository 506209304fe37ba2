"""The table of results: its arms, and the part of qqp that is divided for it."""

import sys
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
