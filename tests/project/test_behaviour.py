"""What `benchmarks/behaviour.py` keeps of runs, and what it tells of two that it kept."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def behaviour():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import behaviour

        yield behaviour
        for name in ("behaviour", "inputs", "result_file"):
            sys.modules.pop(name, None)


@pytest.fixture
def run(tmp_path):
    """A folder as a run leaves it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / ".claim").write_text("a process")
    scores = {"student": {"accuracy": 0.5, "eval_runtime": 3.2}, "seeds": [1, 2]}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    return tmp_path


def test_weights_scores_and_names_of_files_are_kept_and_no_time(behaviour, run):
    kept = behaviour.found_in(run)
    assert kept["files"] == ["model/model.safetensors", "scores.json"]
    assert len(kept["weights"]["model/model.safetensors"]) == 64
    assert kept["scores"] == {"scores.json": {"student": {"accuracy": 0.5}, "seeds": [1, 2]}}


def test_what_differs_is_told_and_a_renamed_file_does_not(behaviour, run):
    before = {"case": behaviour.found_in(run)}
    (run / "scores.json").rename(run / "all_scores.json")
    after = {"case": behaviour.found_in(run)}
    told = list(behaviour.differences(before, after, {}))
    assert told == [
        ["case", "scores.json", "other scores"],
        ["case", "scores.json", "is gone"],
        ["case", "all_scores.json", "is new"],
    ]
    (run / "all_scores.json").rename(run / "scores.json")
    (run / "model").rename(run / "student")
    (run / "student" / "model.safetensors").write_bytes(b"other weights")
    after = {"case": behaviour.found_in(run)}
    names = {"model/model.safetensors": "student/model.safetensors"}
    told = list(behaviour.differences(before, after, names))
    assert told == [["case", "student/model.safetensors", "other weights"]]


def test_the_cases_are_those_of_one_house(behaviour):
    """Ranks, placements, numbers, methods, kinds of task, kills, export and a sweep."""
    assert {"one_rank", "two_ranks", "partitioned", "sharded", "pool", "bf16"} <= set(
        behaviour.CASES
    )
    assert {"random", "routed", "tinybert", "regression", "choice"} <= set(behaviour.CASES)
    assert {"zero2", "killed", "noticed", "export", "sweep"} <= set(behaviour.CASES)
