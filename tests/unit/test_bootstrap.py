"""The paired bootstrap: right metrics on every draw, no false alarms, real effects found."""

import numpy as np
import pytest
from scipy.special import expit

from sead_dist import bootstrap, metrics
from sead_dist.bootstrap import compare, draw_units, resampled_scores, rescorer, units_of
from sead_dist.metrics import Answer


class Rows:
    """What a metric reads of an example set."""

    def __init__(self, labels_B, groups_B=None, answers=None):
        self.labels_B = np.asarray(labels_B)
        self.groups_B = None if groups_B is None else np.asarray(groups_B)
        self.answers = answers


def drawn_rows(rows: Rows, times_U: np.ndarray):
    """The same draw, row by row: (row numbers, the rows), a group drawn twice being two groups."""
    units_B = units_of(rows)
    numbers, groups = [], []
    for unit, times in enumerate(times_U.astype(int)):
        for _ in range(times):
            inside = np.flatnonzero(units_B == unit)
            groups += [len(set(groups))] * len(inside)
            numbers += inside.tolist()
    answers = None if rows.answers is None else [rows.answers[n] for n in numbers]
    grouped = None if rows.groups_B is None else groups
    return numbers, Rows(rows.labels_B[numbers], grouped, answers)


def cases():
    random = np.random.default_rng(0)
    two, three = random.integers(2, size=40), random.integers(3, size=40)
    groups = np.repeat(np.arange(10), 4)[random.permutation(40)]
    names = ["paris", "rome", "oslo"]
    answers = [Answer(names[n % 3], (names[n % 2],)) for n in range(40)]
    plain, real = Rows(two), Rows(random.normal(size=40).round(1))
    yield from (("classification", name, plain, 2) for name in ("accuracy", "f1", "f1_macro"))
    yield "classification", "matthews_correlation", plain, 2
    yield from (
        ("classification", name, Rows(three), 4)
        for name in ("accuracy", "f1_macro", "matthews_correlation")
    )
    yield from (("regression", name, real, 1) for name in ("pearson", "spearmanr"))
    for name in ("f1_a", "exact_match", "accuracy"):
        yield "classification", name, Rows(two, groups), 2
    for name in ("exact_match", "f1"):
        yield "classification", name, Rows(two, groups, answers), 2


@pytest.mark.parametrize(("kind", "name", "rows", "classes"), list(cases()))
def test_every_metric_of_a_draw_is_the_official_one_of_its_rows(kind, name, rows, classes):
    logits_BC = np.random.default_rng(1).normal(size=(40, classes)).astype(np.float32)
    logits_BC = logits_BC.round(1)  # ties, as ranks know them
    times_RU = next(draw_units(int(units_of(rows).max()) + 1, seed=3))[:20]
    got_R = rescorer(name, kind, logits_BC, rows)(times_RU)
    for got, times_U in zip(got_R, times_RU, strict=True):
        numbers, some = drawn_rows(rows, times_U)
        want = metrics.compute([name], kind, logits_BC[numbers], some)[name]
        assert got == pytest.approx(want, abs=1e-9)


def test_a_draw_has_as_many_units_as_there_are_and_every_table_is_bounded(monkeypatch):
    monkeypatch.setattr(bootstrap, "CHUNK", 700)
    tables = list(draw_units(100, seed=0))
    assert [len(table) for table in tables] == [7] * 285 + [5]
    assert all((table.sum(axis=1) == 100).all() for table in tables)
    again = np.concatenate(list(draw_units(100, seed=0)))
    assert (np.concatenate(tables) == again).all()


def judge(labels_B, method_SBC, reference_SBC, seed=0):
    """The difference in accuracy of two methods, runs of one seed at the same place."""
    rows = Rows(labels_B)
    found = []
    for logits_SBC in (method_SBC, reference_SBC):
        scores_S = [float((logits_BC.argmax(1) == labels_B).mean()) for logits_BC in logits_SBC]
        scores_SR = resampled_scores("accuracy", "classification", logits_SBC, rows, seed)
        found.append((scores_S, scores_SR))
    (method_S, method_SR), (reference_S, reference_SR) = found
    return compare(method_S, reference_S, method_SR, reference_SR, seed)


def runs(random, labels_B, skill, seeds, seed_spread=0.1):
    """Logits of runs: rows are hard or easy for all, and every seed has its luck."""
    hardness_B = random.normal(size=len(labels_B))
    return [
        simulated(random, labels_B, hardness_B, skill + seed_spread * random.normal())
        for _ in range(seeds)
    ]


def simulated(random, labels_B, hardness_B, skill):
    right_B = random.random(len(labels_B)) < expit(skill + 2 * hardness_B)
    said_B = np.where(right_B, labels_B, 1 - labels_B)
    return np.eye(2, dtype=np.float32)[said_B]


def test_equal_predictions_differ_by_nothing():
    random = np.random.default_rng(0)
    labels_B = random.integers(2, size=300)
    logits_SBC = runs(random, labels_B, 1.0, 3)
    found = judge(labels_B, logits_SBC, logits_SBC)
    assert (found.value, found.interval, found.p) == (0.0, (0.0, 0.0), 1.0)
    assert not found.beyond_chance


def test_a_planted_effect_is_found_and_has_its_sign():
    random = np.random.default_rng(0)
    labels_B = random.integers(2, size=1000)
    worse, better = runs(random, labels_B, 0.5, 5), runs(random, labels_B, 1.3, 5)
    found = judge(labels_B, better, worse)
    assert found.beyond_chance
    assert found.interval[0] < found.value < found.interval[1]
    assert found.p < 0.01
    assert judge(labels_B, worse, better).interval[1] < 0


def test_where_nothing_differs_about_one_in_twenty_is_called_a_difference(monkeypatch):
    """Rows and seeds both vary; hardness is of the row, so that pairing matters."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", 300)
    random = np.random.default_rng(0)
    called = 0
    for trial in range(200):
        labels_B = random.integers(2, size=200)
        hardness_B = random.normal(size=200)
        pair = [
            [simulated(random, labels_B, hardness_B, 1.0 + 0.3 * random.normal()) for _ in range(5)]
            for _ in range(2)
        ]
        called += judge(labels_B, *pair, seed=trial).beyond_chance
    assert 2 <= called <= 26


def test_rows_are_paired():
    """The same hard rows fall to both methods: paired, a difference of few rows is no accident."""
    random = np.random.default_rng(0)
    labels_B = random.integers(2, size=400)
    wrong_B = random.random(400) < 0.4
    base_B = np.where(wrong_B, 1 - labels_B, labels_B)
    mended_B = base_B.copy()
    mended_B[np.flatnonzero(wrong_B)[:12]] = labels_B[np.flatnonzero(wrong_B)[:12]]
    reference, method = ([np.eye(2, dtype=np.float32)[said_B]] * 3 for said_B in (base_B, mended_B))
    found = judge(labels_B, method, reference)
    assert found.beyond_chance
    # broken: the method's rows in another order than the labels and the reference have
    other = random.permutation(400)
    rows, mixed = Rows(labels_B), Rows(labels_B[other])
    method_SR = resampled_scores(
        "accuracy", "classification", [of[other] for of in method], mixed, 0
    )
    reference_SR = resampled_scores("accuracy", "classification", reference, rows, 0)
    scores = [float((of.argmax(1) == labels_B).mean()) for of in (method[0], reference[0])]
    broken = compare([scores[0]] * 3, [scores[1]] * 3, method_SR, reference_SR, 0)
    assert broken.value == pytest.approx(found.value)
    assert not broken.beyond_chance


def test_seeds_are_paired_and_their_spread_counts():
    """Five seeds whose luck differs much; the method adds the same to each."""
    random = np.random.default_rng(0)
    labels_B = random.integers(2, size=400)
    place_B = random.permutation(400)

    def right(rows):
        said_B = np.where(place_B < rows, labels_B, 1 - labels_B)
        return np.eye(2, dtype=np.float32)[said_B]

    lucks = [200, 240, 280, 320, 360]
    reference = [right(luck) for luck in lucks]
    method = [right(luck + 12) for luck in lucks]
    assert judge(labels_B, method, reference).beyond_chance
    # broken: the same runs, their seeds mixed up
    assert not judge(labels_B, [method[n] for n in (3, 0, 4, 1, 2)], reference).beyond_chance


def test_two_seeds_that_disagree_are_no_difference():
    labels_B = np.zeros(500, int)

    def right(share):
        said_B = (np.arange(500) >= 500 * share).astype(int)
        return np.eye(2, dtype=np.float32)[said_B]

    found = judge(labels_B, [right(0.9), right(0.7)], [right(0.75), right(0.75)])
    assert found.value == pytest.approx(0.05)
    assert not found.beyond_chance


def test_examples_of_a_group_are_drawn_together():
    """Fifty groups of ten rows that are all right or all wrong: as uncertain as fifty rows."""
    random = np.random.default_rng(0)
    groups_B = np.repeat(np.arange(50), 10)
    labels_B = np.repeat(random.integers(2, size=50), 10)
    wrong_B = np.repeat(random.random(50) < 0.3, 10)
    logits_BC = np.eye(2, dtype=np.float32)[np.where(wrong_B, 1 - labels_B, labels_B)]
    spread = {
        name: resampled_scores("accuracy", "classification", [logits_BC], rows, 0).std()
        for name, rows in (("whole", Rows(labels_B, groups_B)), ("alone", Rows(labels_B)))
    }
    assert spread["whole"] == pytest.approx(spread["alone"] * np.sqrt(10), rel=0.1)
