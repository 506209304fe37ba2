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
SHARES_NOTE = (
    "Share: the method's gain over the arm without teachers, divided by the gain of the ensemble "
    "of the method's own runs over that arm. Share of that: the same, divided by the gain of the "
    "best of its teachers. Gains are means over the seeds that both arms have. Above 100% the "
    "student is better than the ensemble or the teacher. There is no gap where the ensemble or the "
    "teacher is no better than the arm without teachers. The best teacher is the best on these dev "
    "rows. A share has no interval, and the share of a small gap is uncertain."
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
        f"`{shlex.join(report['command'])}` (absolute paths are cut to their last part)",
        run_line(report),
        *section("Arms", ["name", "method", "keys of its own"], arms(report)),
        "## Scores",
        table(["task", "metric", *report["methods"]], scores(report, BEYOND, metric=True)),
        score_notes(report),
        *section(
            f"Differences from {report['reference']}",
            ["task", "method", "difference", "95% interval", "p", "p, Holm"],
            differences(report),
        ),
        *holm_note(report),
        "The same as a page: [report.html](report.html); its plots: "
        "[differences](differences.svg), [score against time](cost.svg).",
        *section("Scores of the teachers", ["task", "who", "score"], report["ceilings"]),
        *section("Share of the gap that is kept", SHARES, gap_shares(report)),
        *([SHARES_NOTE] if gap_shares(report) else []),
        "## Cost",
        table(["task", "method", *COSTS], cost),
        f"Rows: the training rows of one run, without copies. {equal_steps(report)}",
        "Seconds: of one run's training, median over seeds, without waiting for teachers. Teacher "
        "forwards: the teacher predictions that all runs of the method needed, computed or read "
        "from the store. Each prediction is computed once for all methods.",
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


def run_line(report: Mapping[str, Any]) -> str:
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
    scored = {of["method"] for of in report["cells"] if of["mean"] is not None}
    every = "every method" + " that has any" * (len(scored) < len(report["methods"]))
    if not report["mean_tasks"]:
        return f"No task has a score of {every}, so there is no mean over tasks."
    left = [name for name in names if name not in report["mean_tasks"]]
    shared = ", ".join(report["mean_tasks"])
    line = f"Means are over the tasks that have a score of {every}: {shared}."
    return f"{line} Left out: {', '.join(left)}." if left else line


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


def chance_notes(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The meaning of intervals and marks, as (name, sentences); nothing where there is neither."""
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
            "sample of training rows and one set of teachers: with other samples and teachers the "
            "difference would vary more.",
        ),
        (
            "Larger than chance",
            "the interval does not contain 0. Where methods do not differ, about one cell in "
            "twenty is marked by chance (3% to 7% in simulations). So one mark among many is weak "
            f"evidence.{three}",
        ),
    ]


def score_notes(report: Mapping[str, Any]) -> str:
    """The meaning of the table's figures and marks."""
    if len(report["seeds"]) < 2:
        return " ".join(
            [
                "Single runs: one seed has no spread over seeds, so none is given, and no "
                "difference is called larger than chance.",
                means_over(report),
            ]
        ).strip()
    chosen = "" if report["selected_on_dev"] else ", on which nothing was selected"
    lines = [f"Mean ± standard deviation over seeds, on the official dev split{chosen}."]
    lines.append(means_over(report))
    if len(report["seeds"]) < 3:
        lines.append("A spread of two seeds is unsure: no difference is called larger than chance.")
    elif report["reference"] is not None:
        lines.append(f"{BEYOND}: the difference from {report['reference']} is larger than chance.")
        lines += [f"{name}: {words}" for name, words in chance_notes(report)]
    return " ".join(line for line in lines if line)


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
                    *(f"{of['ensemble']:.4f}", share_text(of["of_ensemble"])),
                    *(f"{of['best']:.4f}", share_text(of["of_best"])),
                ),
                strict=True,
            )
        )
        for of in report.get("shares", ())
    ]


def share_text(share: float | None) -> str:
    """A share of a gap as a percentage."""
    return "no gap" if share is None else f"{share:.0%}"


def holm_note(report: Mapping[str, Any]) -> list[str]:
    """The meaning of the two columns of p; nothing where they are empty."""
    if not any(row["p, Holm"] for row in differences(report)):
        return []
    return [
        "p: for each comparison by itself. p, Holm: corrected for all comparisons of the tasks "
        "together. The correction starts from a more cautious p, which is larger at few seeds. The "
        "p of a single comparison is made for the 5% level, and is too small far below it."
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
        return (
            "Steps: each method took the number that its own keys and rows give (equal_steps=off)."
        )
    more = [
        f"{of['method']} on {of['task']} {of['own_steps']}"
        for of in report["cells"]
        if of["own_steps"] is not None
    ]
    own = f" Fewer by their own rows: {', '.join(more)}." if more else ""
    return f"Steps: all methods of a task take as many as the longest one (equal_steps=on).{own}"
