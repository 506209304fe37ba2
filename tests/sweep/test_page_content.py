"""The page of a sweep says what its report.json says, whatever is missing from it."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from sample_sweep import METHODS, sample_report, take_away

from sead_dist.sweep.page import ALL_TASKS, costs, gaps, render_page, spread_out
from sead_dist.sweep.report import markdown


class Tables(HTMLParser):
    """The texts of all tables' rows, by the table's id; the first row is the head."""

    def __init__(self):
        super().__init__()
        self.tables, self.rows, self.cell = {}, None, None

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.rows = self.tables[dict(attrs)["id"]] = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.cell = []

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self.rows[-1].append(" ".join("".join(self.cell).split()))
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell.append(data)


def render(report, folder):
    text = render_page(report, folder).read_text("utf-8")
    parser = Tables()
    parser.feed(text)
    return text, parser.tables


def score_rows(tables):
    """Method -> its cells by task, the mean first."""
    head, *rows = tables["score-table"]
    names = ["mean", *(cell.split()[0] for cell in head[2:])]
    return {row[0]: dict(zip(names, row[1:], strict=True)) for row in rows if len(row) > 1}


def test_every_score_and_spread_is_that_of_the_report(tmp_path):
    report = sample_report(tasks=("cola", "sst2", "stsb", "wic"), methods=METHODS)
    rows = score_rows(render(report, tmp_path)[1])
    for of in report["cells"]:
        shown = rows[of["method"]][of["task"]]
        assert f"{of['mean']:.4f} ± {of['spread']:.4f}" in shown
    for of in report["means"]:
        assert f"{of['score']:.4f}" in rows[of["method"]]["mean"]
    for of in report["ceilings"]:
        assert rows[of["who"]][of["task"]] == f"{of['score']:.4f}"
    assert rows["majority baseline"]["sst2"] == "0.5092"


def test_a_mark_stands_where_the_interval_leaves_out_zero_and_tells_it(tmp_path):
    report = sample_report(tasks=("cola", "sst2", "stsb", "wic"), methods=METHODS)
    rows = score_rows(render(report, tmp_path)[1])
    marked = {"▲": 0, "▼": 0, "": 0}
    for of in report["cells"]:
        shown = rows[of["method"]][of["task"]]
        sign = "" if not of["beyond_chance"] else "▲" if of["difference"] > 0 else "▼"
        assert shown.startswith(sign or "0"), shown
        if sign:
            low, high = of["interval"]
            assert f"{of['difference']:+.4f} against finetune" in shown
            assert f"95% interval {low:+.4f} to {high:+.4f}" in shown
        marked[sign] += 1
    assert min(marked.values()) > 0, "the sample must hold all three kinds"


def test_methods_stand_by_mean_and_the_best_of_each_task_is_emphasised(tmp_path):
    report = sample_report()
    text, tables = render(report, tmp_path)
    means = {of["method"]: of["score"] for of in report["means"]}
    shown = [row[0] for row in tables["score-table"][1 : len(means) + 1]]
    assert shown == sorted(means, key=lambda method: -means[method])
    best = [
        max(of["mean"] for of in report["cells"] if of["task"] == task["name"])
        for task in report["tasks"]
    ]
    emphasised = re.findall(r'class="best">([^<]+)<', text)
    assert sorted(emphasised) == sorted(f"{score:.4f}" for score in best)


def test_cost_adds_up_over_tasks(tmp_path):
    report = sample_report()
    _, *rows = render(report, tmp_path)[1]["cost-table"]
    for method, score, labelled, unlabelled, steps, seconds, forwards in rows:
        own = [of for of in report["cells"] if of["method"] == method]
        assert seconds == f"{sum(of['seconds'] for of in own):.1f}"
        assert forwards == f"{sum(of['teacher_forwards'] for of in own):,}"
        assert (labelled, steps) == ("2,700", "960")
        assert unlabelled == ("0" if method == "finetune" else "1,800")
        (mean,) = [of["score"] for of in report["means"] if of["method"] == method]
        assert score == f"{mean:.4f}"


def test_one_seed_has_neither_spread_nor_mark_and_says_so(tmp_path):
    report = sample_report(tasks=("sst2",), methods=METHODS[:2], seeds=(3,))
    text, tables = render(report, tmp_path)
    shown = " ".join(cell for row in tables["score-table"] for cell in row)
    assert not re.search("[±▲▼]", shown)
    assert "Single runs." in text
    (gap,) = gaps(report)
    one, other = (of["mean"] for of in report["cells"])
    assert gap.value == pytest.approx(other - one)
    assert gap.interval is None
    assert "1 difference without an interval: it may be chance." in text


def test_differences_are_drawn_with_the_reports_intervals():
    report = sample_report()
    drawn = {(gap.task, gap.method): (gap.value, gap.interval) for gap in gaps(report)}
    told = {
        (of.get("task", ALL_TASKS), of["method"]): (of["difference"], tuple(of["interval"]))
        for of in (*report["cells"], *report["means"])
        if of["difference"] is not None
    }
    assert drawn == told
    assert len(drawn) == 3 * 3 + 3


def test_runs_that_are_not_there_are_told_with_their_reason(tmp_path):
    report = sample_report()
    take_away(report, "cola", "mean", "failed", "the loss became NaN at step 12")
    take_away(report, "stsb", "confidence", "not_applicable", "labels are scores")
    take_away(report, "sst2", "single", "missing", "")
    text, tables = render(report, tmp_path)
    rows = score_rows(tables)
    assert rows["mean"]["cola"] == "failed"
    assert rows["confidence"]["stsb"] == "does not apply"
    assert rows["single"]["sst2"] == "not run"
    # no task has every method
    assert all(rows[method]["mean"] == "–" for method in report["methods"])
    assert "No task has a score of every method" in text
    assert "3 failed,\n3 not run yet" in text
    undone = tables["undone-table"]
    assert ["cola", "mean", "0", "failed: the loss became NaN at step 12"] in undone
    assert ["stsb", "confidence", "all", "does not apply: labels are scores"] in undone
    assert ["sst2", "single", "2", "not run yet"] in undone
    assert costs(report) == {}


@pytest.mark.parametrize("kind", ["failed", "missing", "not_applicable"])
def test_means_and_costs_are_over_the_tasks_that_every_method_has_and_name_them(kind, tmp_path):
    report = sample_report()
    take_away(report, "cola", "mean", kind, "why")
    text, tables = render(report, tmp_path)
    told = "have a score of every method: sst2, stsb. Left out: cola."
    assert told in text
    assert told in markdown(report)
    rows, (head, *spent) = score_rows(tables), tables["cost-table"]
    at = next(n for n, words in enumerate(head) if words.startswith("seconds"))
    seconds = {row[0]: row[at] for row in spent}
    for method in report["methods"]:
        own = [c for c in report["cells"] if c["method"] == method and c["task"] != "cola"]
        assert f"{sum(c['mean'] for c in own) / 2:.4f}" in rows[method]["mean"]
        assert seconds[method] == f"{sum(c['seconds'] for c in own):.1f}"
    assert set(costs(report)) == set(report["methods"])
    ensemble = [of["score"] for of in report["ceilings"] if of["who"] == "ensemble"]
    assert rows["ensemble"]["mean"] == f"{sum(ensemble) / 3:.4f}"


def test_a_method_without_any_score_does_not_count_for_the_means():
    report = sample_report()
    for task in ("cola", "sst2", "stsb"):
        take_away(report, task, "mean", "not_applicable", "why")
    told = "Means are over the tasks that have a score of every method that has any: "
    assert f"{told}cola, sst2, stsb." in markdown(report)


def test_page_and_markdown_mark_the_same_means_and_scores(tmp_path):
    report = sample_report(tasks=("cola", "sst2", "stsb", "wic"), methods=METHODS)
    rows = score_rows(render(report, tmp_path)[1])
    _, _, *lines = [line.split(" | ") for line in markdown(report).splitlines() if "|" in line]
    marks = 0
    for line in lines[:5]:
        for method, shown in zip(report["methods"], line[2:], strict=True):
            on_page = rows[method][line[0].strip("| ")]
            assert ("▲" in on_page or "▼" in on_page) == ("\\*" in shown), (line, on_page)
            marks += "\\*" in shown
    beyond = [of for of in (*report["cells"], *report["means"]) if of["beyond_chance"]]
    assert marks == len(beyond) > sum(of["beyond_chance"] or 0 for of in report["cells"])


@pytest.mark.parametrize("seeds", [(0, 1), (0, 1, 2), (0, 1, 2, 3, 4)])
def test_intervals_say_what_they_are_conditional_on_and_two_seeds_have_none(seeds, tmp_path):
    report = sample_report(seeds=seeds)
    if len(seeds) < 3:
        for of in (*report["cells"], *report["means"]):
            of |= dict.fromkeys(("difference", "interval", "p", "beyond_chance"))
    text, tables = render(report, tmp_path)
    for told in (" ".join(text.split()), markdown(report)):
        given = "one sample of training rows and one set of teachers" in told
        assert given == ("one cell in twenty" in told) == (len(seeds) > 2)
        assert ("Three seeds find fewer" in told) == (len(seeds) == 3)
        assert "one in twelve" not in told
    shown = " ".join(cell for row in tables["score-table"] for cell in row)
    assert ("▲" in shown or "▼" in shown) == (len(seeds) > 2)
    assert ("need at least three seeds" in text) == (len(seeds) < 3)


def test_a_method_with_some_seeds_says_how_many(tmp_path):
    report = sample_report()
    report["cells"][1]["scores"][2] = None
    rows = score_rows(render(report, tmp_path)[1])
    assert "2 of 3 seeds" in rows["single"]["cola"]


def test_a_sweep_of_which_nothing_is_done_has_a_page(tmp_path):
    report = sample_report(tasks=("sst2",), methods=METHODS[:2])
    for method in METHODS[:2]:
        take_away(report, "sst2", method, "missing", "")
    report["ceilings"] = []
    text, tables = render(report, tmp_path)
    assert score_rows(tables)["single"] == {"mean": "–", "sst2": "not run"}
    assert "There is nothing to compare" in text
    assert not list(tmp_path.glob("*.svg"))


def test_a_sweep_without_the_reference_has_scores_and_no_differences(tmp_path):
    report = sample_report(methods=METHODS[1:3])
    for of in (*report["cells"], *report["means"]):
        of |= dict.fromkeys(("difference", "interval", "beyond_chance"))
    text, _ = render(report, tmp_path)
    assert "There is nothing to compare" in text
    assert [path.name for path in tmp_path.glob("*.svg")] == ["cost.svg"]


def test_published_figures_are_marked_and_two_dev_splits_share_a_row(tmp_path):
    report = sample_report(tasks=("mnli", "sst2"))
    assert "Published" not in render(report, tmp_path)[0]
    for score in (0.8277, 0.831):
        report["published"].append(
            {"task": "mnli", "who": "SEAD h256", "metric": "accuracy", "score": score}
        )
    report["published"].append(
        {"task": "sst2", "who": "BERT-base", "metric": "accuracy", "score": 0.932}
    )
    for of in report["published"]:
        of["note"] = "selected on dev, single run"
    text, tables = render(report, tmp_path)
    assert "Selected on dev, single run. These figures cannot be compared row by row" in " ".join(
        text.split()
    )
    head, mnli, sst2 = tables["published-table"]
    assert head == ["task", "metric", "SEAD h256", "BERT-base", "best of this sweep"]
    assert mnli[:4] == ["mnli", "accuracy", "0.8277 / 0.8310", "–"]
    best = max((c for c in report["cells"] if c["task"] == "sst2"), key=lambda c: c["mean"])
    assert sst2 == ["sst2", "accuracy", "–", "0.9320", f"{best['mean']:.4f} {best['method']}"]


HOSTILE = '$x_1$ & <script>alert("1")</script>'


def test_hostile_names_are_text(tmp_path):
    report = sample_report()
    take_away(report, "sst2", "single", "failed", HOSTILE)
    for of in (*report["cells"], *report["means"], *report["failed"]):
        if of["method"] == "single":
            of["method"] = HOSTILE
    report["methods"][1] = HOSTILE
    report["command"].append(f"student={HOSTILE}\udcff")
    report["ceilings"][0]["who"] = HOSTILE
    text, tables = render(report, tmp_path)
    assert text.count("<script") == 1, "the page's own"
    assert "alert(" in text
    assert f"failed: {HOSTILE}" in tables["undone-table"][1]
    for picture in tmp_path.glob("*.svg"):
        ElementTree.parse(picture)
    assert "$x_1$" in text.partition("<svg")[2].partition("</svg>")[0]


def test_the_page_asks_for_nothing_outside_itself(tmp_path):
    text, _ = render(sample_report(), tmp_path)
    assert not re.findall(r"\b(?:src|srcset|action)=|@import|<link", text)
    targets = re.findall(r'href="([^"]*)"|url\(([^)]*)\)', text)
    assert targets
    assert all((one or other).startswith("#") for one, other in targets)


def test_the_same_report_makes_the_same_files(tmp_path):
    report = sample_report()
    for name in ("one", "other"):
        render_page(report, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["cost.svg", "differences.svg", "report.html"]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_pictures_are_read_aloud_and_take_the_pages_colours(tmp_path):
    text, _ = render(sample_report(), tmp_path)
    drawings = re.findall(r"<svg (.*?)</svg>", text, flags=re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:
        assert re.match(r'role="img" aria-label="[^"]{40,}"', drawing)
        assert "var(--ink, " in drawing
    # the files beside the page stand alone
    assert "var(" not in (tmp_path / "differences.svg").read_text("utf-8")


def test_names_beside_the_cost_plot_do_not_overlap():
    apart = spread_out([0.0, 0.0, 0.1, 5.0], step=1.0)
    assert all(b - a >= 1.0 - 1e-9 for a, b in pairwise(apart))
    assert sum(apart) == pytest.approx(5.1)
    assert spread_out([0.0, 2.0], step=1.0) == [0.0, 2.0]
