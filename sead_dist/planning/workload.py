"""What a run still has to do, and how long that takes at known rates.

Shapes: N teachers, W ranks, R rows of one request to the teachers, B rows of the training split, S
steps of an epoch, M micro-batches of a step, G rows of a global batch, U unique examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from transformers import PretrainedConfig

from sead_dist.config.automatic import epoch_steps, patience_steps
from sead_dist.config.schema import RunConfig
from sead_dist.data.augmentation import run_rows
from sead_dist.data.examples import ExampleSet, entries, sample, subset
from sead_dist.data.order import cut_into_micro_batches, epoch_order
from sead_dist.data.splits import RunExamples
from sead_dist.models.inputs import ModelInputs
from sead_dist.models.pretrained import load_model_config
from sead_dist.models.start import repair_facts, repair_teacher
from sead_dist.objectives.ensemble import unseen
from sead_dist.objectives.weightings import WEIGHTINGS, Known
from sead_dist.runs.baseline import baseline_steps, needs_own_baseline, own_baseline
from sead_dist.runs.chosen_keys import steps_of
from sead_dist.runs.repair import read_text, repair_config, repaired_path
from sead_dist.runs.requests import has_answer_NB, seen_examples
from sead_dist.runtime.run_log import noted
from sead_dist.store.store import StoreFolder
from sead_dist.teachers.inference import cut_into_batches, padded_length, rows_for
from sead_dist.teachers.packing import SIZES, size_for
from sead_dist.teachers.placement import deal
from sead_dist.teachers.rates import COST_TOKENS, STEP_FORWARDS, Rate, operations
from sead_dist.teachers.teacher import Teacher
from sead_dist.teachers.validation import is_scored

# so many rows are tokenised, and so many steps cut into micro-batches; the rest counts as alike
SAMPLE = 4000
SAMPLE_STEPS = 1000


@dataclass(frozen=True)
class Work:
    """The work that a run still has. requests_N: for each teacher the tokens of the rows that it
    has to compute, one array for each request. lengths_SM, rows_SM: padded length and rows of the
    micro-batches of an epoch or of its first steps. steps, examples: those still to be trained.
    choices: text rows of an example. row_cost: the cost of a row in a step; in the run's own steps
    it is 1. least_steps: the steps after which early stopping may end the run, None where it
    cannot. before: what is trained before, by name.
    """

    requests_N: list[list[np.ndarray]]
    lengths_SM: np.ndarray
    rows_SM: np.ndarray
    steps: int
    examples: int
    choices: int
    row_cost: float = 1.0
    least_steps: int | None = None
    before: dict[str, "Work"] = field(default_factory=dict)

    @property
    def passes(self) -> int:
        """Teacher forwards, counted in rows."""
        return sum(len(rows) for requests in self.requests_N for rows in requests)


def spread(lengths: np.ndarray, count: int) -> np.ndarray:
    """`count` lengths, distributed like `lengths`, ascending."""
    places = (np.arange(count) + 0.5) / max(count, 1) * len(lengths)
    return np.asarray(np.sort(lengths)[places.astype(np.int64)])


def sampled_lengths(inputs: ModelInputs, examples: ExampleSet) -> np.ndarray:
    """Tokens of each of up to SAMPLE examples."""
    return inputs.tokens(sample(examples, SAMPLE, 0)).lengths_B()


def needed_share(
    config: RunConfig, teachers: Sequence[Teacher], train: ExampleSet, passes: int
) -> list[float]:
    """The part of the training rows that need each teacher, over so many passes. Where
    `single` chooses only after the validation, the costliest is taken for the chosen one."""
    if not teachers:
        return []
    names = [teacher.name for teacher in teachers]
    known = Known(
        given=[teacher.entry.weight for teacher in teachers],
        chosen=None if config.teacher is None else names.index(config.teacher),
        sizes=[teacher.parameters for teacher in teachers],
        names=names,
    )
    return WEIGHTINGS[config.ensemble].shares(known, passes, train.routes_B)


def make_work(
    config: RunConfig,
    task: str,
    examples: RunExamples,
    inputs: ModelInputs,
    all_teachers: Sequence[Teacher],
    store: StoreFolder | None,
    done: int = 0,
) -> Work:
    """The work of a run that has done `done` steps. Files of predictions have no work, and neither
    have predictions that the store holds (None: it holds none). A run may need a part of the
    rows only. Then the rows in the store are taken to be of that part. This is so where this run
    was cut off, and not where another run needed other rows."""
    train, total = examples.train, steps_of(config, examples)
    epoch = -(-len(train) // config.global_batch_size)
    needed_N = np.array(needed_share(config, all_teachers, train, -(-total // epoch)))
    requests_N: list[list[np.ndarray]] = [[] for _ in all_teachers]
    counted: dict[tuple[tuple[str, int], str], np.ndarray] = {}
    for split in (train, examples.selection, *examples.official.values()):
        ids_U2, _ = entries(split.ids_B2)
        needed_NU, share_N = np.ones((len(all_teachers), len(ids_U2)), bool), np.ones(len(needed_N))
        if split is train:
            needed_NU &= needed_N[:, None] > 0
            share_N = needed_N * min(1.0, total / epoch)
            seen_NU = seen_examples(config, all_teachers, ids_U2) if all_teachers else None
            needed_NU = needed_NU if seen_NU is None else unseen(needed_NU, seen_NU)
        for n, teacher in enumerate(all_teachers):
            if teacher.file is not None:
                continue
            needed, present = round(int(needed_NU[n].sum()) * share_N[n]), 0
            if store is not None:
                accept_any = config.store.accept == "any"
                table = store.table(teacher.key, ids_U2, task, split.split, "a plan", accept_any)
                present = int(table.present_U[needed_NU[n]].sum())
            missing = max(0, needed - present)
            key = (teacher.inputs.key, split.split)
            if missing and key not in counted:
                counted[key] = sampled_lengths(teacher.inputs, split)
            parts = -(-missing // config.prefetch_rows)
            sizes = [missing // parts + (part < missing % parts) for part in range(parts)]
            requests_N[n] += [spread(counted[key], size) for size in sizes]
    least = None
    if config.early_stopping_patience is not None:
        each = patience_steps(epoch_steps(config, examples.labelled_rows, len(train)))
        # the first evaluation has no earlier loss to compare with
        least = min(total, (config.early_stopping_patience + 1) * each)
    own = training_work(config, sampled_lengths(inputs, train), len(train), total - done)
    pairs = zip(requests_N, all_teachers, strict=True)
    return replace(
        own,
        requests_N=[of for of, teacher in pairs if teacher.file is None],
        choices=train.choices,
        least_steps=least,
    )


def training_work(config: RunConfig, lengths: np.ndarray, rows: int, steps: int) -> Work:
    """The work of `steps` steps (below 0: none) on `rows` rows, distributed like `lengths`."""
    order_SG = epoch_order(rows, config.seed, 0, config.global_batch_size)
    parts = config.global_batch_size // config.micro_batch_size
    shapes = micro_batch_shapes(order_SG[:SAMPLE_STEPS], spread(lengths, rows), parts)
    steps = max(0, steps)
    return Work([], *shapes, steps, round(steps * rows / len(order_SG)), 1)


def work_before(
    config: RunConfig,
    examples: RunExamples,
    inputs: ModelInputs,
    all_teachers: Sequence[Teacher],
    student: PretrainedConfig,
) -> dict[str, Work]:
    """What a run trains before its own steps: the repair of its start, where none is kept, and the
    fine-tuned student that it is compared with. Raises UserError where no repair is possible."""
    found: dict[str, Work] = {}
    if config.repair.text is not None:
        path, trust = repaired_path(config, repair_facts(config)), config.trust_remote_code
        if not path.is_file():
            own, text = repair_config(config, path.parent), read_text(Path(config.repair.text))
            lengths = sampled_lengths(inputs, text)
            repair = training_work(own, lengths, len(text), config.repair.steps)
            # a step of the repair also has a forward of the whole model
            whole = load_model_config(repair_teacher(config), trust)
            step = STEP_FORWARDS * operations(student, COST_TOKENS, trust)
            cost = 1 + operations(whole, COST_TOKENS, trust) / step
            found["repair"] = replace(repair, row_cost=cost / examples.train.choices)
    total, labelled = steps_of(config, examples), examples.labelled_rows
    rows_N = has_answer_NB(all_teachers, examples.selection).sum(1) if all_teachers else []
    scored = any(map(is_scored, all_teachers, rows_N))
    with noted():
        makes_baseline = scored and needs_own_baseline(config, examples, total)
    if makes_baseline:
        own = own_baseline(config)
        lengths = sampled_lengths(inputs, subset(examples.train, np.arange(labelled)))
        rows = run_rows(own, labelled, 0)
        found["baseline"] = training_work(own, lengths, rows, baseline_steps(config, examples))
    return found


def micro_batch_shapes(
    order_SG: np.ndarray, lengths_B: np.ndarray, parts: int
) -> tuple[np.ndarray, np.ndarray]:
    """(lengths_SM, rows_SM): padded length and rows of each micro-batch of these steps. One that
    gets no rows holds a single filler of the shortest length."""
    shape = (len(order_SG), parts)
    lengths_SM, rows_SM = np.full(shape, lengths_B.min()), np.ones(shape, np.int64)
    for step, rows_G in enumerate(order_SG):
        lengths_G = lengths_B[rows_G[rows_G >= 0]]
        micro_batches = cut_into_micro_batches(np.arange(len(lengths_G)), lengths_G, parts)
        for micro, rows_B in enumerate(micro_batches):
            if len(rows_B):
                lengths_SM[step, micro] = lengths_G[rows_B[0]]
                rows_SM[step, micro] = len(rows_B)
    return lengths_SM, rows_SM


def store_bytes(work: Work, teachers: Sequence[Teacher]) -> int:
    """What the passes add to the store: 4 bytes for each class of a prediction."""
    return sum(
        4 * teacher.key.classes * sum(map(len, requests))
        for teacher, requests in zip(teachers, work.requests_N, strict=True)
    )


def batch_shapes(
    teacher: Teacher, requests: Sequence[np.ndarray], device: str
) -> tuple[list[int], list[int]]:
    """(padded lengths, rows) of the batches into which these rows will be cut. For a pack they are
    the mean length of the rows, and how many rows of that length fill the pack."""
    lengths_P: list[int] = []
    rows_P: list[int] = []
    for tokens_R in requests:
        if teacher.cut.pack_from is not None:
            mean, total = max(1, round(tokens_R.mean())), int(tokens_R.sum())
            sizes = [SIZES[-1]] * (total // SIZES[-1])
            sizes += [size_for(total % SIZES[-1], 1, teacher.cut.pack_from)]
            lengths_P += [mean] * len(sizes)
            rows_P += [size // mean for size in sizes]
            continue
        cut = teacher.cut
        for part, length in cut_into_batches(tokens_R, device, cut.longest, cut.padding):
            lengths_P.append(length)
            rows_P.append(rows_for(len(part), length, device, teacher.cut.free_rows))
    return lengths_P, rows_P


def teachers_seconds(
    work: Work,
    teachers: Sequence[Teacher],
    rates_N: Sequence[Rate],
    share_NW: np.ndarray,
    device: str,
) -> float:
    """Seconds until the last rank has computed its share, loading included."""

    def of_rank(rank: int) -> float:
        spent = 0.0
        for n, requests in enumerate(work.requests_N):
            own = [rows[deal(share_NW[n], len(rows)) == rank] for rows in requests]
            own = [rows for rows in own if len(rows)]
            if own:
                lengths_P, rows_P = batch_shapes(teachers[n], own, device)
                batches_s = rates_N[n].seconds(lengths_P, work.choices * np.array(rows_P))
                spent += rates_N[n].once_s + batches_s
        return spent

    size = share_NW.shape[1]
    # equal shares are equal work
    equal = bool((share_NW == 1 / size).all())
    return max((of_rank(rank) for rank in range(1 if equal else size)), default=0.0)


def training_seconds(work: Work, rate: Rate, size: int) -> float:
    """Seconds of the student's steps. In every turn all ranks wait for the slowest micro-batch.
    What ranks send each other is not in it."""
    steps, micro_batches = work.lengths_SM.shape
    turns = -(-micro_batches // size)
    spent_SM = np.zeros((steps, turns * size))
    rows_s_SM = work.row_cost * rate.row_s(work.lengths_SM) * work.rows_SM
    spent_SM[:, :micro_batches] = rows_s_SM + rate.batch_s
    epoch_s = float(spent_SM.reshape(-1, size).max(axis=1).sum())
    shapes = set(zip(work.lengths_SM.flat, work.rows_SM.flat, strict=True))
    first_s = rate.shape_s * len(shapes) if work.steps else 0.0
    return work.steps * (epoch_s / int(steps) + rate.once_s) + first_s


def bound(
    work: Work,
    teachers: Sequence[Teacher],
    rates_N: Sequence[Rate],
    rate: Rate,
    size: int,
    device: str,
) -> float:
    """The most examples/s that these rates allow on `size` ranks, on which teachers and student
    take turns: size / (1 / student's rate + sum of 1 / teacher's rate). Every batch counts as full,
    every rank as busy, and no batch as the first of its shape."""
    spent = 0.0
    for teacher, teacher_rate, requests in zip(teachers, rates_N, work.requests_N, strict=True):
        for tokens_R in requests:
            padded_R = tokens_R
            if teacher.cut.pack_from is None:
                longest = max(teacher.cut.longest, 2)
                padded_R = np.minimum(padded_length(tokens_R, device), longest)
            full_R = teacher.cut.full_rows(padded_R, device)
            each_R = work.choices * teacher_rate.row_s(padded_R)
            spent += float(np.sum(each_R + teacher_rate.batch_s / full_R))
    lengths = work.lengths_SM.reshape(-1)
    steady = replace(rate, shape_s=0.0)
    epoch_s = steady.seconds(lengths, work.rows_SM.reshape(-1))
    spent += work.steps * epoch_s / len(work.lengths_SM)
    return work.examples / max(spent / size + work.steps * rate.once_s, 1e-12)
