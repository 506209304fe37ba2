"""The report of a sweep as Markdown, and its files in OUTPUT/report."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sead_dist.config.mistakes import as_yaml
from sead_dist.runtime.console import table
from sead_dist.runtime.files import written_aside
from sead_dist.runtime.run_log import write_json

COSTS = (
    *("labelled rows", "unlabelled rows", "steps"),
    *("seconds of training", "teacher forwards needed"),
)
SHARES = ["task", "method", "over", "its ensemble", "share", "best teacher", "share of that"]
SHARES_SAY = (
    "Share: what the method has over the arm without teachers, as a part of what its own run's "
    "ensemble has over that arm, and of what the best of its teachers has. Means over the seeds "
    "that both have. Above 100% the student is better than what it is held against. There is no "
    "gap where that is no better than the arm without teachers. The best teacher is the best on "
    "these very rows. A share has no interval: of a small gap it says little."
)
# the mark behind a mean whose difference from the reference is larger than chance
BEYOND = "\\*"


def write_sweep_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write report.json and report.md into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", report)
    with written_aside(folder / "report.md") as aside:
        aside.write_text(markdown(report), encoding="utf-8")


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report, a pure function of report.json."""
    cost = [[c["task"], c["method"], *costs(c)] for c in report["cells"]]
    parts = [
        f"# {title(report)}",
        f"`{shlex.join(report['command'])}` (of absolute paths the last part)",
        ran(report),
        *section("Arms", ["name", "method", "keys of its own"], arms(report)),
        "## Scores",
        table(["task", "metric", *report["methods"]], scores(report, BEYOND, metric=True)),
        how_to_read(report),
        *section(
            f"Differences from {report['reference']}",
            ["task", "method", "difference", "95% interval", "p", "p, Holm"],
            differences(report),
        ),
        *holm_words(report),
        "The same as a page: [report.html](report.html); its plots: "
        "[differences](differences.svg), [score against time](cost.svg).",
        *section("What the teachers reach", ["task", "who", "score"], report["ceilings"]),
        *section("Share of the gap that is kept", SHARES, gap_shares(report)),
        *([SHARES_SAY] if gap_shares(report) else []),
        "## Cost",
        table(["task", "method", *COSTS], cost),
        f"Rows: those that a run of the method has. {equal_steps(report)}",
        "Seconds: of one run's training, median over seeds, without waiting for teachers. Teacher "
        "forwards: rows that teachers answered for all runs of the method, computed or read from "
        "the store, where each prediction is computed once for all methods.",
        *section(
            "Published figures",
            ["task", "who", "metric", "score", "note"],
            report["published"],
        ),
        # a report of an earlier version has none
        *section("Remarks", ["task", "method", "seeds", "remark"], report.get("remarks", ())),
        *section("Failed", ["task", "method", "seed", "reason"], report["failed"]),
        *section("Not run yet", ["task", "method", "seed"], report["missing"]),
        *section("Does not apply", ["task", "method", "reason"], report["not_applicable"]),
    ]
    return "\n\n".join(parts) + "\n"


def title(report: Mapping[str, Any]) -> str:
    """The report's heading."""
    mark = " (selected on dev)" if report["selected_on_dev"] else ""
    return f"Sweep: {report['title']}{mark}"


def ran(report: Mapping[str, Any]) -> str:
    """Seeds, ranks, device and versions, as a sentence."""
    made = report["made_with"]
    names = [f"{name} {made[name]}" for name in ("sead_dist", "torch", "transformers")]
    seeds = ", ".join(map(str, report["seeds"]))
    return f"Seeds {seeds}; ranks: {report['ranks']}; {made['device']}; {', '.join(names)}."


def scores(report: Mapping[str, Any], mark: str, metric: bool = False) -> list[list[object]]:
    """A row for each task: mean ± spread of every method; the last row is over all tasks."""
    found = {(c["task"], c["method"]): c for c in report["cells"]}
    rows: list[list[object]] = []
    for task in report["tasks"]:
        cells = [found.get((task["name"], method)) for method in report["methods"]]
        first = [task["name"], task["metric"]] if metric else [task["name"]]
        rows.append([*first, *(score(cell, mark) for cell in cells)])
    if len(report["tasks"]) > 1:
        first = ["mean", ""] if metric else ["mean"]
        rows.append([*first, *(over_tasks(of, mark) for of in report["means"])])
    return rows


def score(cell: Mapping[str, Any] | None, mark: str) -> str:
    """A cell of the table: mean ± spread over seeds, and the mark where it is beyond chance."""
    if cell is None or cell["mean"] is None:
        return "-"
    spread = "" if cell["spread"] is None else f" ± {cell['spread']:.4f}"
    return f"{cell['mean']:.4f}{spread}{mark if cell['beyond_chance'] else ''}"


def over_tasks(mean: Mapping[str, Any], mark: str) -> str:
    """A cell of the table's last row: the mean over tasks."""
    if mean["score"] is None:
        return "-"
    return f"{mean['score']:.4f}{mark if mean['beyond_chance'] else ''}"


def means_over(report: Mapping[str, Any]) -> str:
    """Which tasks the means are over; nothing where there is one task."""
    names = [task["name"] for task in report["tasks"]]
    if len(names) < 2:
        return ""
    if not report["mean_tasks"]:
        return "No task has a score of every method, so there is no mean over tasks."
    left = [name for name in names if name not in report["mean_tasks"]]
    shared = ", ".join(report["mean_tasks"])
    told = f"Means are over the tasks that every method with a score has: {shared}."
    return f"{told} Left out: {', '.join(left)}." if left else told


def arms(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for each arm; no rows where no arm has keys of its own."""
    if not any(of["keys"] for of in report["arms"]):
        return []
    return [
        {
            "name": of["name"],
            "method": of["method"],
            "keys of its own": ", ".join(
                f"{key}={value if isinstance(value, str) else as_yaml(value)}"
                for key, value in of["keys"].items()
            ),
        }
        for of in report["arms"]
    ]


def chance_of(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What an interval and a mark say, as (name, sentences); nothing where there is neither."""
    if len(report["seeds"]) < 3 or report["reference"] is None:
        return []
    three = (
        " Three seeds find fewer of the true differences than five."
        if len(report["seeds"]) < 5
        else ""
    )
    return [
        (
            "Interval",
            f"the 95% interval of the difference from {report['reference']} over the same seeds: "
            "dev rows and seeds as crossed random effects, Student's t. It is conditional on one "
            "sample of training rows and one set of teachers: other samples and teachers would "
            "vary more.",
        ),
        (
            "Larger than chance",
            "the interval leaves out 0. Where nothing differs, one cell in twenty is marked by "
            "luck (3% to 7% in simulations), each taken by itself: one mark among many says "
            f"little.{three}",
        ),
    ]


def how_to_read(report: Mapping[str, Any]) -> str:
    """What the table's figures and marks say."""
    if len(report["seeds"]) < 2:
        return " ".join(
            [
                "Single runs: one seed tells nothing of the spread, so none is given, and no "
                "difference is called larger than chance.",
                means_over(report),
            ]
        ).strip()
    chosen = "" if report["selected_on_dev"] else ", which nothing was chosen by"
    told = [f"Mean ± standard deviation over seeds, on the official dev split{chosen}."]
    told.append(means_over(report))
    if len(report["seeds"]) < 3:
        told.append("Two seeds hardly tell a spread: no difference is called larger than chance.")
    elif report["reference"] is not None:
        told.append(f"{BEYOND}: the difference from {report['reference']} is larger than chance.")
        told += [f"{name}: {words}" for name, words in chance_of(report)]
    return " ".join(part for part in told if part)


def section(head: str, columns: list[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A heading and a table of these keys; nothing where there are no rows."""
    if not rows:
        return []
    return [f"## {head}", table(columns, [[row[column] for column in columns] for row in rows])]


def gap_shares(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for each task, arm with teachers and arm without. A report of an earlier version has no
    rows."""
    return [
        dict(
            zip(
                SHARES,
                (
                    *(of["task"], of["method"], of["over"]),
                    *(f"{of['ensemble']:.4f}", told_share(of["of_ensemble"])),
                    *(f"{of['best']:.4f}", told_share(of["of_best"])),
                ),
                strict=True,
            )
        )
        for of in report.get("shares", ())
    ]


def told_share(share: float | None) -> str:
    """A share of a gap as a percentage."""
    return "no gap" if share is None else f"{share:.0%}"


def holm_words(report: Mapping[str, Any]) -> list[str]:
    """What the two columns of p say; nothing where there is none."""
    if not any(row["p, Holm"] for row in differences(report)):
        return []
    return [
        "p: of each comparison taken by itself. p, Holm: of all comparisons of the tasks together; "
        "it is made of a p that is too small at no level, and so is larger at few seeds."
    ]


def differences(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each task and method, and for each method over all tasks."""
    over = [{**of, "task": "mean", "p": None} for of in report["means"] if of["tasks"] > 1]
    return [
        {
            "task": of["task"],
            "method": of["method"],
            "difference": f"{of['difference']:+.4f}",
            "95% interval": f"{of['interval'][0]:+.4f} to {of['interval'][1]:+.4f}",
            "p": None if of["p"] is None else f"{of['p']:.3f}",
            "p, Holm": None if of.get("p_holm") is None else f"{of['p_holm']:.3f}",
        }
        for of in (*report["cells"], *over)
        if of["difference"] is not None
    ]


def costs(cell: Mapping[str, Any]) -> list[object]:
    """The cells of the columns COSTS: "-" where no run is finished."""
    seconds = None if cell["seconds"] is None else f"{cell['seconds']:.1f}"
    found = (cell["labelled_rows"], cell["unlabelled_rows"], cell["steps"], seconds)
    return [*("-" if one is None else one for one in found), cell["teacher_forwards"]]


def equal_steps(report: Mapping[str, Any]) -> str:
    """Whether all methods took the same number of steps, and which took more than their own."""
    if not report["equal_steps"]:
        return "Steps: each method took those that its own rows make (equal_steps=off)."
    more = [
        f"{of['method']} on {of['task']} {of['own_steps']}"
        for of in report["cells"]
        if of["own_steps"] is not None
    ]
    own = f"; by their own rows they would be fewer: {', '.join(more)}" if more else ""
    return f"Steps: all methods of a task take as many as the longest (equal_steps=on){own}."
