"""Teachers with 8-bit weights. R requested examples, C classes."""

import importlib.util

import numpy as np
import pytest
from small import answers_of, load_teachers, make_source, save_teacher, small_split

from sead_dist.errors import UserError
from sead_dist.teachers.placement import check_placements
from sead_dist.teachers.validation import measure_drift

SPLIT = small_split(40)
ABSENT = importlib.util.find_spec("torchao") is None


def needs_torchao(test):
    skip = pytest.mark.skipif(ABSENT, reason="torchao is not installed: make test-quantize")
    return pytest.mark.quantize(skip(test))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("t") / "one", num_hidden_layers=2)


def int8(folder, **more):
    keys = {"path": folder, "quantization": "int8", **more}
    return f"{{{', '.join(f'{key}: {value}' for key, value in keys.items())}}}"


def test_int8_without_torchao_is_refused_in_one_line_that_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"quantization=int8 needs torchao.*sead-dist\[quantize\]"):
        load_teachers([int8(folder)])


@needs_torchao
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_invariant_03_an_int8_prediction_has_the_same_bits_in_any_company(folder, tmp_path, dtype):
    (teacher,) = load_teachers([int8(folder, dtype=dtype)])
    found = []
    for name, parts in (("whole", [range(40)]), ("parts", [[3], range(7), range(40)])):
        source = make_source([teacher], tmp_path / name, tmp_path / "run")
        found.append(answers_of(source, SPLIT, parts)[-1][0])
        source.close()
    np.testing.assert_array_equal(*found)


@needs_torchao
def test_an_int8_teacher_is_close_to_itself_smaller_and_of_another_class(folder, tmp_path):
    whole, reduced = load_teachers([folder, int8(folder)])
    assert whole.key.fingerprint == reduced.key.fingerprint
    assert '"weights": "int8 torchao' in reduced.key.numerics
    assert reduced.bytes < 0.5 * whole.bytes
    source = make_source([reduced], tmp_path / "st", tmp_path / "run")
    (drift,) = measure_drift(source, SPLIT)
    assert drift is not None
    assert 0 < drift.largest < 0.2
    source.close()


@needs_torchao
def test_an_int8_teacher_cannot_be_sharded(folder):
    teachers = load_teachers([int8(folder)])
    with pytest.raises(UserError, match="quantization=int8 cannot be split over ranks"):
        check_placements(teachers, ["sharded"])
