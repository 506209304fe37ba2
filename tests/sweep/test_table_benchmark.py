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
    rows += ["x\t0\t0\tQUESTION 0\tquestion 1\t1", "malformed\tline"]
    train, test = table.divided(rows, 20)
    assert sorted(train + test) == sorted(rows[:-1])
    assert 20 <= len(test) < 40
    sides = [
        {" ".join(text.casefold().split()) for row in part for text in row.split("\t")[3:5]}
        for part in (train, test)
    ]
    assert not sides[0] & sides[1]
    assert table.divided(rows, 20) == (train, test)
