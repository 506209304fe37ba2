"""Teachers that read packs, whole and split over ranks. The kernel is a stand-in: PyTorch's runs on
GPUs alone (tests/gpu).

N teachers, R requested examples, C classes.
"""

from dataclasses import replace

import numpy as np
import pytest
from packs import SIZES, stand_in_for_packs
from ranks import run_ranks
from small import answers_of, load_teachers, make_source, save_teacher, small_split

SPLIT = small_split(21)
# some rows, all rows, one row: fewer than there are ranks
PARTS = ([0, 2, 4, 6, 8], list(range(20)), [20])


def answers(world, folders, root, placement, packed):
    """logits_NRC of each request on this rank, and how often its models were asked."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in_for_packs(patch)
        teachers = load_teachers(folders, world)
        if packed:
            teachers = [replace(t, cut=replace(t.cut, pack_from=SIZES[0])) for t in teachers]
        source = make_source(
            teachers, root / "st", root / "run", world, [placement] * len(teachers)
        )
        found, shapes = [], set()
        for entries_R in PARTS:
            found += answers_of(source, SPLIT, [entries_R])
            for model in source.models.values():
                model.register_forward_pre_hook(
                    lambda _m, _a, given: shapes.add(tuple(given["input_ids"].shape)),
                    with_kwargs=True,
                )
        source.close()
        return found, shapes


@pytest.mark.parametrize(
    ("size", "placement"), [(1, "colocated"), (2, "partitioned"), (2, "sharded")]
)
def test_packed_teachers_with_a_stand_in_kernel_say_on_ranks_what_padded_ones_say(
    tmp_path, size, placement
):
    folders = [
        save_teacher(tmp_path / kind, kind, seed=n) for n, kind in enumerate(("bert", "roberta"))
    ]
    ((expected, _),) = run_ranks(
        1, tmp_path / "p", answers, folders, tmp_path / "padded", "colocated", False
    )
    for found, shapes in run_ranks(
        size, tmp_path / "r", answers, folders, tmp_path / "packed", placement, True
    ):
        assert shapes == {(1, SIZES[0])}
        for answer, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(answer, wanted, rtol=1e-4, atol=1e-4)
