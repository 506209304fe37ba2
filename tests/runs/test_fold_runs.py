"""Teachers that leave a fold of the rows out, and the student that hears of a row only those that
were not trained on it."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from ranks import run_ranks
from small import ALONE, model_bytes, read, run_distill, save_teacher, words

from sead_dist.config.load import load_config
from sead_dist.errors import UserError
from sead_dist.runs.distillation import distill, finetune
from sead_dist.runs.pool_worker import teach
from sead_dist.teachers.teacher import TRAINED_ROWS

LABELLED, SELECTION, DEV = 54, 6, 20


@pytest.fixture(scope="module")
def teachers(tiny_data, tmp_path_factory):
    """Three teachers with two folds: the first and the third leave out the same one."""
    given = words(tiny_data, [], tmp_path_factory.mktemp("t") / "teachers", max_steps=5, folds=2)
    shape = tiny_data / "student.yaml"
    return finetune(load_config([*given, f"encoders=[{shape},{shape},{shape}]"]), ALONE)


def trained_ids(run) -> set[tuple[int, int]]:
    from safetensors.numpy import load_file

    return set(map(tuple, load_file(run / "model" / TRAINED_ROWS)["ids_U2"].tolist()))


def left_out_ids(run) -> set[tuple[int, int]]:
    table = pq.read_table(run / "predictions" / "left_out.parquet").to_pydict()
    assert len(table["predicted_label"]) == len(table["text_a"])
    names = [name for name in table if name.startswith("id")]
    columns = [np.array([str(one) for one in table[name]]) for name in names]
    return set(zip(*columns, strict=True))


def test_every_row_is_left_out_once_and_predicted_by_a_teacher_that_never_saw_it(teachers):
    first, second, third = (trained_ids(run) for run in teachers)
    assert first == third
    assert len(first | second) == LABELLED
    assert not first & second
    assert len(left_out_ids(teachers[0]) | left_out_ids(teachers[1])) == LABELLED
    assert not left_out_ids(teachers[0]) & left_out_ids(teachers[1])
    assert "fold 0, left out: accuracy" in (teachers[0] / "log.txt").read_text()


def test_a_student_hears_of_a_row_only_teachers_that_were_not_trained_on_it(
    tiny_data, teachers, tmp_path
):
    run = distill(load_config(words(tiny_data, teachers, tmp_path / "run")), ALONE)
    done = read(run / "run_summary.json")
    halves = [len(trained_ids(one)) for one in teachers]
    pairs = halves[1] * 2 + halves[0]
    assert done["teacher_forwards"] == pairs + 3 * (SELECTION + DEV)
    said = (run / "log.txt").read_text()
    assert f"teacher-0 {halves[0]}, teacher-1 {halves[1]}, teacher-2 {halves[2]} of 54; 54 " in said
    # the rows of fold 0 are taught by the first and the third alone
    alone = distill(
        load_config(words(tiny_data, [teachers[0], teachers[2]], tmp_path / "two", max_steps=1)),
        ALONE,
    )
    assert "; 27 rows have teachers" in (alone / "log.txt").read_text()


def test_text_is_asked_of_all_and_a_teacher_that_says_nothing_of_its_rows_of_everything(
    tiny_data, teachers, tmp_path
):
    silent = save_teacher(tmp_path / "silent")
    given = words(
        tiny_data,
        [teachers[1], silent],
        tmp_path / "run",
        unlabeled__path=tiny_data / "unlabeled.tsv",
    )
    done = read(distill(load_config(given), ALONE) / "run_summary.json")
    pairs = LABELLED + (LABELLED - len(trained_ids(teachers[1]))) + 2 * done["unlabelled_rows"]
    # nothing is asked twice, and an epoch of the labelled rows sees not all of the text
    assert done["unlabelled_rows"] == 20
    assert done["teacher_forwards"] <= pairs + 2 * (SELECTION + DEV)


def test_a_row_has_one_teacher_whatever_that_one_was_trained_on(tiny_data, teachers, tmp_path):
    """And the log says so: `single`, `random` and `routed` do not go by folds."""
    given = words(tiny_data, teachers, tmp_path / "run", ensemble="single", max_steps=2)
    log = (distill(load_config(given), ALONE) / "log.txt").read_text()
    assert (
        "WARNING: ensemble=single has one teacher for a row, and uses it also on rows that it"
        in log
    )
    assert "rows have teachers" not in log


@pytest.mark.slow
def test_ranks_and_a_store_change_nothing(tiny_data, teachers, tmp_path):
    one = distill(load_config(words(tiny_data, teachers, tmp_path / "one", max_steps=4)), ALONE)
    store = tmp_path / "other"
    given = words(
        tiny_data, teachers, tmp_path / "two", store, max_steps=4, placement="partitioned"
    )
    run_ranks(2, tmp_path / "ranks", run_distill, given)
    done = [read(tmp_path / name / "run_summary.json") for name in ("one", "two")]
    asked = [of["teacher_forwards"] + of["store_hits"] for of in done]
    assert asked[0] == asked[1]
    again = distill(load_config(words(tiny_data, teachers, tmp_path / "three", max_steps=4)), ALONE)
    assert read(again / "run_summary.json")["teacher_forwards"] == 0
    assert model_bytes(again) == model_bytes(one)


def test_a_worker_of_the_pool_computes_what_the_student_asks_and_no_more(
    tiny_data, teachers, tmp_path
):
    one = distill(load_config(words(tiny_data, teachers, tmp_path / "one")), ALONE)
    given = words(tiny_data, teachers, tmp_path / "two", tmp_path / "pool", placement="pool")
    teach(load_config(given), "1/1", ALONE)
    two = distill(load_config(given), ALONE)
    done = [read(run / "run_summary.json") for run in (one, two)]
    assert (done[1]["teacher_forwards"], done[1]["store_hits"]) == (0, done[0]["teacher_forwards"])
    journal = next(tmp_path.glob("two/**/rank-0.jsonl")).read_text().splitlines()
    assert sum(json.loads(line)["rows"] for line in journal) == done[0]["teacher_forwards"]
    assert model_bytes(two) == model_bytes(one)


def test_a_run_that_goes_on_with_other_rows_left_out_is_refused(tiny_data, teachers, tmp_path):
    mine = [shutil.copytree(one, tmp_path / one.name) for one in teachers]
    given = words(tiny_data, mine, tmp_path / "run", max_steps=4, keep_training_state="true")
    run = distill(load_config(given), ALONE)
    (run / "run_summary.json").unlink()
    (mine[0] / "model" / TRAINED_ROWS).unlink()
    with pytest.raises(UserError, match="trained_rows of teacher 1 was "):
        distill(load_config(given), ALONE)


def test_a_damaged_list_of_rows_is_named(tiny_data, teachers, tmp_path):
    mine = shutil.copytree(teachers[0], tmp_path / "mine")
    (mine / "model" / TRAINED_ROWS).write_bytes(b"nothing")
    with pytest.raises(UserError, match=TRAINED_ROWS):
        distill(load_config(words(tiny_data, [mine], tmp_path / "run")), ALONE)


def test_more_folds_than_rows_and_a_fold_that_there_is_not_are_refused(tiny_data, tmp_path):
    given = words(tiny_data, [], tmp_path / "t", folds=400)
    with pytest.raises(UserError, match="fold 0 has 0; lower folds, or give more rows"):
        finetune(load_config([*given, f"encoders=[{tiny_data / 'student.yaml'}]"]), ALONE)
    with pytest.raises(UserError, match="fold=2 does not exist: the last fold is 1"):
        load_config(["task=sst2", "output_dir=o", "folds=2", "fold=2"])
