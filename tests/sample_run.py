"""A finished run directory, made up, as the report's tests read it."""

import json
import math

import numpy as np
import yaml

from sead_dist.reporting.report import write_predictions
from sead_dist.runtime.run_log import write_json

RESULTS = {
    "eval_accuracy": 0.9266,
    "eval_runtime": 1.3676,
    "eval_samples_per_second": 637.636,
    "eval_steps_per_second": 20.475,
    "eval_loss": 0.2503,
    "eval_samples": 872,
}
CONFIG = {
    "task": "sst2",
    "output_dir": "/home/somebody/runs/out",
    "seed": 1,
    "student": {"path": "microsoft/xtremedistil-l6-h256-uncased", "shape": None},
    "teachers": [{"path": "/home/somebody/teachers/teacher-0"}, {"path": "org/teacher@abc"}],
    "ensemble": "mean_probabilities",
    "temperature": 2.0,
    "alpha": 0.75,
    "learning_rate": 3e-5,
    "tracker": {"hub_token": "plainsecret", "apiKey": "plainsecret", "note": "hf_abcdefghijklmnop"},
}


def softmax(logits_BC):
    exp_BC = np.exp(logits_BC - logits_BC.max(axis=1, keepdims=True))
    return exp_BC / exp_BC.sum(axis=1, keepdims=True)


def make_predictions(run, split, rows=400, classes=2):
    generator = np.random.default_rng(0)
    truth_BC = generator.normal(size=(rows, classes)) * 2
    labels_B = (truth_BC + generator.gumbel(size=truth_BC.shape)).argmax(axis=1)
    student_BC = (truth_BC * 1.6 + generator.normal(size=truth_BC.shape) * 0.5).astype(np.float32)
    ids_B2 = generator.integers(-(2**63), 2**63 - 1, size=(rows, 2))
    write_predictions(
        run / "predictions" / f"{split}.parquet", ids_B2, labels_B, student_BC, softmax(truth_BC)
    )


def make_run(run, steps=400):
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    generator = np.random.default_rng(1)
    records = []
    for step in range(5, steps + 1, 5):
        soft, hard = (a * math.exp(-step / 120) + 0.1 * generator.random() for a in (1.2, 0.6))
        record = {"event": "train", "step": step, "loss_soft": soft, "loss_hard": hard}
        records.append({**record, "loss": 0.75 * soft + 0.25 * hard})
        if step % 50 == 0:
            score = {"accuracy": 0.92 - 0.3 * math.exp(-step / 90)}
            records.append({"event": "eval", "step": step, "split": "selection", "metrics": score})
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    teachers = [("teacher-0", 0.9312), ("teacher-1", 0.9289)]
    split = {
        "teachers": [{"name": n, "metrics": {"accuracy": s}} for n, s in teachers],
        "ensemble": {"accuracy": 0.9346},
        "student": {"accuracy": 0.9266},
    }
    selection = {**split, "student": {"accuracy": 0.9412}}
    write_json(
        run / "scores.json",
        {
            "metric": "accuracy",
            "splits": {"validation": split, "selection": selection},
            "selected_on": "held_out",
        },
    )
    write_json(run / "eval_results.json", RESULTS)
    validation = {
        "metric": "accuracy",
        "constant_score": 0.5579,
        "passed": True,
        "better_order": None,
    }
    write_json(
        run / "teacher_validation.json",
        [
            {
                **validation,
                "name": name,
                "score": score,
                "truncated_rows": 3 * n,
                "dev_texts_in_training": 2,
            }
            for n, (name, score) in enumerate(teachers)
        ],
    )
    write_json(
        run / "teacher_manifest.json",
        [
            {
                "name": name,
                "path": path,
                "revision": revision,
                "weights_sha256": f"{n}a" * 32,
                "labels": ["negative", "positive"],
                "placement": "partitioned",
                "parameters": 109483778,
            }
            for n, (name, path, revision) in enumerate(
                [
                    ("teacher-0", "/home/somebody/teachers/teacher-0", None),
                    ("teacher-1", "org/teacher", "abcdef0123456789"),
                ]
            )
        ],
    )
    write_json(
        run / "run_summary.json",
        {
            "steps": steps,
            "examples_per_second": 412.5,
            "teacher_forwards": 134698,
            "store_hits": 269396,
            "teacher_wait_s": 3.25,
            "padding_waste": 0.0412,
            "peak_memory_bytes": [2**30, 2**29],
            "world_size": 2,
            "placement": "partitioned",
        },
    )
    write_json(run / "environment.json", {"python": "3.11.7", "versions": {"torch": "2.13.0"}})
    make_predictions(run, "validation")
    return run


def change(path, **values):
    write_json(path, {**json.loads(path.read_text()), **values})
