"""The published figures name tasks, splits and metrics that the product has."""

from sead_dist.data.tasks import TASKS
from sead_dist.sweep.published import FIGURES, WIDTHS, sead_figures

PUBLISHED_TASKS = ("sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "stsb", "wnli")


def test_every_figure_is_of_a_split_and_metric_that_its_task_has():
    for figure in FIGURES:
        task = TASKS[figure.task]
        assert figure.split in task.splits, figure
        assert figure.metric in task.metrics, figure
        assert 0.5 < figure.score < 1, figure


def test_sixteen_checkpoints_have_figures_under_all_metrics_of_their_task():
    for name in PUBLISHED_TASKS:
        splits = [split for split in TASKS[name].splits if split != "train"]
        wanted = {(split, metric) for split in splits for metric in TASKS[name].metrics}
        for width in WIDTHS:
            found = {(figure.split, figure.metric) for figure in sead_figures(name, width)}
            assert found == wanted, (name, width)
    assert {f.task for f in FIGURES} == set(PUBLISHED_TASKS)
    assert sead_figures("cola", 256) == []


def test_the_seed_cards_own_figure_is_there():
    (figure,) = sead_figures("sst2", 256)
    assert figure.score == 0.9266
