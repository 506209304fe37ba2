"""How often a student is scored decides which one is kept where the best is: then a resume may not
change it, and else it may."""

import pytest
from small import ALONE, read, words, write_task

from sead_dist.config.load import load_config
from sead_dist.errors import UserError
from sead_dist.runs.checks import nothing_to_do
from sead_dist.runs.claim import already_finished
from sead_dist.runs.distillation import distill
from sead_dist.runtime.distributed import StopFlag

KEYS = {"method": "finetune", "max_steps": 6, "save_steps": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("scoring") / "data")


def begin(data, run, **keys):
    """A run that is stopped after its first step."""
    stop = StopFlag()
    stop.signal = 15
    distill(load_config(words(data, [], run, **KEYS, **keys)), ALONE, stop=stop)
    assert not (run / "run_summary.json").is_file()


def go_on(data, run, **keys):
    return distill(load_config(words(data, [], run, **KEYS, **keys)), ALONE)


def test_a_run_that_keeps_the_best_is_not_scored_at_other_steps_on_a_resume(data, tmp_path):
    best = {"final_checkpoint": "best", "eval_steps": 2}
    begin(data, tmp_path / "run", **best)
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    for other in (3, "null"):
        with pytest.raises(UserError) as caught:
            go_on(data, tmp_path / "run", **{**best, "eval_steps": other})
        assert str(caught.value) == (
            f"output_dir={tmp_path / 'run'} holds a run that keeps the best of the students that it "
            f"scores: eval_steps was 2, is {other}, with which other students are scored; give "
            "eval_steps=2 to resume it, or another output_dir"
        )
    assert {path: path.read_bytes() for path in before} == before
    run = go_on(data, tmp_path / "run", **best)
    assert read(run / "run_summary.json")["steps"] == 6
    # nor is a finished one taken for what would have kept another
    other = load_config(words(data, [], run, **KEYS, **{**best, "eval_steps": 3}))
    with pytest.raises(UserError, match="eval_steps was 2, is 3"):
        nothing_to_do(other)


def test_a_finished_run_whose_rows_are_the_hubs_is_compared_by_what_it_chose(tmp_path):
    """Its rows are not read again: that there were enough to choose the best by, it has noted."""
    data = write_task(tmp_path / "data", rows=1020)
    keys = {"method": "finetune", "max_steps": 2, "eval_steps": 2, "selection__fraction": 0.5}
    given = words(data, [], tmp_path / "run", **keys, final_checkpoint="auto")
    run = distill(load_config(given), ALONE)
    assert read(run / "run_summary.json")["chosen"]["final_checkpoint"] == "best"
    hub = [*given, "data.path=null"]
    assert already_finished(load_config(hub))
    with pytest.raises(UserError, match="eval_steps was 2, is 3, with which other students"):
        already_finished(load_config([*hub, "eval_steps=3"]))


def test_a_run_that_keeps_the_average_may_be_scored_at_other_steps(data, tmp_path):
    begin(data, tmp_path / "run", eval_steps=2)
    run = go_on(data, tmp_path / "run", eval_steps=3)
    assert read(run / "run_summary.json")["steps"] == 6
