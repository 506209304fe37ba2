"""The intervals of the table's page: those of the kept runs, by the package's own statistics."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from sead_dist.data.significance import compare, mean_difference

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


@pytest.fixture
def intervals(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "intervals", raising=False)
    import intervals

    return intervals


@pytest.fixture
def runs(intervals, tmp_path):
    return intervals.made_up(tmp_path / "runs")


def test_the_page_of_the_table_has_what_the_kept_runs_say(intervals):
    page = (RESULTS / "table.md").read_text("utf-8")
    for runs in sorted(path for path in (RESULTS / "table").iterdir() if path.is_dir()):
        assert intervals.page_of(runs) in page, runs.name


def test_of_one_task_nothing_is_said_over_tasks(intervals, runs):
    assert "mean over sst2, stsb" in intervals.page_of(runs)
    shutil.rmtree(runs / "stsb")
    assert "mean over" not in intervals.page_of(runs)


def test_one_seed_has_the_paired_interval_over_rows(intervals, runs):
    of = intervals.read_task(runs / "sst2")
    mine, other = (of.arms[arm][0].logits_BC for arm in ("sead", "finetune"))
    gap = intervals.paired_gap("accuracy", of.task.task_kind, mine, other, of.rows)
    more, interval = intervals.difference_cells(of, "finetune")
    assert interval == f"{gap.interval[0]:+.4f} to {gap.interval[1]:+.4f}"
    assert more == f"{gap.value:+.4f}"
    assert "the spread between seeds is not in it" in intervals.pooled([of], "control")


def test_three_seeds_have_the_interval_of_a_sweeps_report(intervals, runs):
    tasks = [intervals.read_task(runs / name) for name in ("sst2", "stsb")]
    chance = np.random.default_rng(1)
    for of in tasks:
        for arm in of.arms.values():
            for seed in (1, 2):
                noise_BC = chance.normal(size=arm[0].logits_BC.shape).astype(np.float32)
                arm[seed] = intervals.replace(arm[0], logits_BC=arm[0].logits_BC + noise_BC)
    found = []
    for of in tasks:
        scores = [[of.score(arm, seed) for seed in (0, 1, 2)] for arm in ("sead", "control")]
        drawn = [of.resampled_SR(arm, [0, 1, 2]) for arm in ("sead", "control")]
        found.append(compare(*scores, *drawn, 60))
    over = mean_difference(found)
    told = intervals.pooled(tasks, "control")
    assert f"{over.value:+.4f} (95% interval {over.interval[0]:+.4f} to " in told
    assert "over rows and seeds, as in the sweep's report; 3 seeds or more" in told
    assert intervals.difference_cells(tasks[0], "control")[1].startswith(
        f"{found[0].interval[0]:+.4f}"
    )


def test_the_tables_stand_between_two_lines_of_a_page(intervals, tmp_path):
    page = tmp_path / "page.md"
    begin, end = "<!-- intervals: begin -->", "<!-- intervals: end -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    intervals.put_into(page, "new", intervals.PART)
    assert page.read_text() == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"
    page.write_text("nothing\n")
    with pytest.raises(SystemExit, match="lacks the lines"):
        intervals.put_into(page, "new", intervals.PART)


def test_a_page_that_is_measured_again_keeps_what_was_written_by_hand(intervals, tmp_path, capsys):
    import result_file

    page = tmp_path / "results" / "page.md"
    result_file.write_page(page, "Title", "old figures")
    text = page.read_text().replace("# Title\n", "# Title\n\n> A note.\n")
    page.write_text(f"{text}\nHow to read it. By hand.\n")
    result_file.write_page(page, "Title", "new figures")
    said = page.read_text()
    assert said.startswith("# Title\n\n> A note.\n\n<!-- measured: begin -->\n\nnew figures\n")
    assert said.endswith("<!-- measured: end -->\n\nHow to read it. By hand.\n")
    assert "old figures" not in said
    assert "page.md: what stands outside the measured part is kept" in capsys.readouterr().out


def test_every_page_that_a_benchmark_writes_can_be_measured_again():
    text = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    named = re.findall(r"Writes `docs/results/(\w+\.md)`", text)
    assert len(named) >= 5
    for name in named:
        page = (RESULTS / name).read_text("utf-8")
        begin, end = page.find("<!-- measured: begin -->"), page.find("<!-- measured: end -->")
        assert page.startswith("# "), name
        assert 0 < begin < end, name
