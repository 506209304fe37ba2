"""The report.json of a sweep, made up: for tests of what is drawn and written from it."""

import random

from sead_dist.sweep.results import shared_tasks

METRICS = {
    "cola": "matthews",
    "sst2": "accuracy",
    "mrpc": "accuracy",
    "stsb": "pearson",
    "qqp": "accuracy",
    "mnli": "accuracy",
    "qnli": "accuracy",
    "rte": "accuracy",
    "wnli": "accuracy",
    "boolq": "accuracy",
    "cb": "accuracy",
    "copa": "accuracy",
    "wic": "accuracy",
}
METHODS = (
    "finetune",
    "single",
    "mean",
    "confidence",
    "entropy",
    "random",
    "routed",
    "distilbert",
    "tinybert",
    "minilm",
    "sead",
)


def make_cell(task, method, seeds, chance):
    base = 0.6 + 0.02 * list(METRICS).index(task)
    gain = 0.0 if method == "finetune" else chance.gauss(0.01, 0.015)
    scores = [base + gain + chance.gauss(0, 0.004) for _ in seeds]
    mean = sum(scores) / len(scores)
    cell = {"task": task, "method": method, "scores": scores, "mean": mean, "spread": None}
    cell |= {"difference": None, "interval": None, "p": None, "beyond_chance": None}
    if len(seeds) > 1:
        cell["spread"] = (sum((s - mean) ** 2 for s in scores) / (len(seeds) - 1)) ** 0.5
        if method != "finetune":
            low, high = gain - 0.012, gain + 0.014
            beyond = low > 0 or high < 0
            cell |= {"difference": gain, "interval": [low, high], "beyond_chance": beyond}
            cell["p"] = 0.02 if beyond else 0.4
    forwards = {"finetune": 0, "single": 1000}.get(method, 3000)
    slower = {"tinybert": 31.5, "minilm": 24.25}.get(method, 12.0 + METHODS.index(method) / 4)
    cell |= {"seconds": slower, "teacher_forwards": forwards * len(seeds), "steps": 320}
    unlabelled = 0 if method == "finetune" else 600
    cell |= {"own_steps": None, "labelled_rows": 900, "unlabelled_rows": unlabelled}
    return cell


def sample_report(tasks=("cola", "sst2", "stsb"), methods=METHODS[:4], seeds=(0, 1, 2)):
    """A report without failures or published figures; a test puts in what it is about."""
    chance = random.Random(7)
    cells = [make_cell(task, method, seeds, chance) for task in tasks for method in methods]
    return {
        "title": f"{len(tasks)} tasks, {len(methods)} methods, {len(seeds)} seeds",
        "command": ["sead-dist", "sweep", f"tasks=[{','.join(tasks)}]", "student=L6-H256-A8"],
        "made_with": {
            "sead_dist": "0.4.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "device": "cpu",
        },
        "ranks": 1,
        "seeds": list(seeds),
        "methods": list(methods),
        "reference": "finetune",
        "arms": [{"name": name, "method": name, "keys": {}} for name in methods],
        "equal_steps": True,
        "selected_on_dev": False,
        "tasks": [
            {
                "name": task,
                "metric": METRICS[task],
                "dev_rows": 872,
                "train_rows": 900,
                "constant": 0.0 if METRICS[task] in ("matthews", "pearson") else 0.5092,
            }
            for task in tasks
        ],
        "cells": cells,
        "mean_tasks": shared_tasks(cells),
        "means": [make_mean(method, cells, shared_tasks(cells)) for method in methods],
        "ceilings": [
            {"task": task, "who": who, "score": score}
            for task in tasks
            for who, score in (("teacher-0", 0.8711), ("teacher-1", 0.8822), ("ensemble", 0.8933))
        ],
        "published": [],
        "failed": [],
        "missing": [],
        "not_applicable": [],
    }


def make_mean(method, cells, shared):
    own = [c for c in cells if c["method"] == method and c["task"] in shared]
    scores = [cell["mean"] for cell in own if cell["mean"] is not None]
    mean = {"method": method, "score": None, "tasks": len(scores)}
    mean |= dict.fromkeys(("difference", "interval", "beyond_chance"))
    if scores:
        mean["score"] = sum(scores) / len(scores)
    if scores and own[0]["difference"] is not None:
        value = sum(cell["difference"] for cell in own) / len(own)
        low, high = value - 0.006, value + 0.006
        mean |= {"difference": value, "interval": [low, high], "beyond_chance": low > 0 or high < 0}
    return mean


def take_away(report, task, method, kind, reason):
    """Leave the runs of one task and method out, as `kind` ("failed", "missing" or
    "not_applicable") would."""
    cell = next(c for c in report["cells"] if (c["task"], c["method"]) == (task, method))
    if kind == "not_applicable":
        report["cells"].remove(cell)
        report[kind].append({"task": task, "method": method, "reason": reason})
    else:
        nothing = ("mean", "spread", "difference", "interval", "p", "beyond_chance", "seconds")
        cell |= dict.fromkeys((*nothing, "steps", "labelled_rows", "unlabelled_rows"))
        cell |= {"scores": [None] * len(report["seeds"]), "teacher_forwards": 0}
        of = {"task": task, "method": method}
        why = {"reason": reason} if kind == "failed" else {}
        report[kind] += [{**of, "seed": seed, **why} for seed in report["seeds"]]
    shared = report["mean_tasks"] = shared_tasks(report["cells"])
    report["means"] = [make_mean(m, report["cells"], shared) for m in report["methods"]]
