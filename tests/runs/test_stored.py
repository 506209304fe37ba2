"""`sd.PredictionStore`: a teacher's kept predictions of rows, by their texts, read alone."""

import numpy as np
import pandas as pd
import pytest
from store_world import EXACT, OTHER, files_of, fill, logits_of, make_key, open_table

import sead_dist as sd
from sead_dist.data.examples import entries, identities
from sead_dist.store.compaction import compact

TEXTS = ["a good film", "a bad film", "the plot", "a good film"]
TASK = "sst2"


@pytest.fixture
def store(tmp_path):
    """Teacher 1 has answered the first two texts, teacher 2 all of them."""
    ids = entries(identities([((text,), ()) for text in TEXTS]))[0]
    first = entries(identities([((text,), ()) for text in TEXTS[:2]]))[0]
    fill(tmp_path / "store", first, make_key(1, classes=2), split="train")
    fill(tmp_path / "store", ids, make_key(2, classes=2), split="validation")
    return tmp_path / "store"


def expected(texts, key):
    return logits_of(identities([((text,), ()) for text in texts]), key)


def test_a_teachers_logits_of_rows_are_those_that_were_kept_and_nan_else(store):
    before = files_of(store)
    kept = sd.PredictionStore(store)
    got = kept.predictions("teacher-1", TEXTS, task=TASK)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(
        got[[0, 1, 3]],
        expected(["a good film", "a bad film", "a good film"], make_key(1, classes=2)),
    )
    assert np.isnan(got[2]).all()
    frame = pd.DataFrame({"sentence": TEXTS, "label": 0})
    key = make_key(2, classes=2)
    for teacher in ("teacher-2", key.fingerprint[:8]):
        got = kept.predictions(teacher, frame, task=TASK)
        np.testing.assert_array_equal(got, expected(TEXTS, key))
    assert files_of(store) == before


def test_a_compacted_store_gives_the_same(store):
    before = sd.PredictionStore(store).predictions("teacher-2", TEXTS, task=TASK)
    compact(store)
    after = sd.PredictionStore(store).predictions("teacher-2", TEXTS, task=TASK)
    np.testing.assert_array_equal(after, before)


def test_its_contents_have_a_row_for_each_teacher_and_split(store, tmp_path, monkeypatch):
    monkeypatch.setenv("SEAD_DIST_STORE", str(store))
    table = sd.PredictionStore().contents()
    assert table[["teacher", "split", "num_rows"]].values.tolist() == [
        ["teacher-1", "train", 2],
        ["teacher-2", "validation", 3],
    ]
    open_table(tmp_path / "empty", np.zeros((1, 2), np.int64), make_key())
    assert list(sd.PredictionStore(tmp_path / "empty").contents().columns) == list(table.columns)


def test_what_is_not_one_teachers_is_refused_in_one_line(store, tmp_path):
    kept = sd.PredictionStore(store)
    for teacher, said in (
        ("teacher-9", "did you mean 'teacher-"),
        ("x", "holds teacher-1, teacher-2"),
    ):
        with pytest.raises(sd.UserError, match=said):
            kept.predictions(teacher, TEXTS, task=TASK)
    with pytest.raises(sd.UserError, match="texts_or_rows is one text"):
        kept.predictions("teacher-1", "a good film", task=TASK)
    ids = entries(identities([(("more",), ())]))[0]
    fill(store, ids, make_key(1, OTHER, classes=2))
    with pytest.raises(sd.UserError, match="kept in several numerics classes; give numerics= one"):
        kept.predictions("teacher-1", TEXTS, task=TASK)
    with pytest.raises(sd.UserError, match="not kept in the numerics class 'none'; give numerics="):
        kept.predictions("teacher-1", TEXTS, task=TASK, numerics="none")
    got = kept.predictions("teacher-1", TEXTS, task=TASK, numerics=EXACT)
    assert not np.isnan(got[:2]).any()
    key = make_key(3, classes=2)  # a second teacher of that name
    twin = type(key)(key.fingerprint, key.numerics, "teacher-2", 2)
    fill(store, ids, twin)
    with pytest.raises(
        sd.UserError, match="2 teachers in the store have the name 'teacher-2'; give"
    ):
        kept.predictions("teacher-2", TEXTS, task=TASK)
    with pytest.raises(sd.UserError, match="does not exist; give the folder of a prediction store"):
        sd.PredictionStore(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
