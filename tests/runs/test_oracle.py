"""An independent oracle: a plain PyTorch loop over the same rows ends with the same student, and
so does Transformers' own Trainer.

The loop shares no line with the package's training code. It takes the order of the rows and the
seed of the projections from the package, and does all else by hand: tokens, forward, loss, AdamW,
schedule, clipping. Hidden states are the model's own, and queries, keys and values are made of them.

Shapes: B rows, C classes, L tokens, H width, A heads.
"""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from small import ALONE, save_teacher, sentences, words, write_task
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from sead_dist.config.load import load_config
from sead_dist.data.order import epoch_order
from sead_dist.data.splits import load_examples
from sead_dist.data.tasks import load_task
from sead_dist.runs.distillation import distill, finetune
from sead_dist.training.engine import micro_batch_seed

STEPS, BATCH, RATE, DECAY, CLIP, SEED = 5, 8, 1e-3, 0.1, 0.5, 3
# two of five steps rise; TinyBERT's first stage has two, of the second's three one rises
WARM, UNTIL, WARM_LATE = 2, 2, 1
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# each case: the run's own keys
CASES = {
    "cross-entropy": {},
    "kl": {"temperature": 3.0, "alpha": 0.7},
    "mse": {"loss": "mse", "alpha": 0.6},
    "regression": {"alpha": 0.6},
    "distilbert": {"method": "distilbert", "teacher": "b", "student_init": "own", "alpha": 0.5},
    "tinybert": {"method": "tinybert", "teacher": "b"},
    "minilm": {"method": "minilm", "teacher": "b", "alpha": 0.5, "feature_loss_weight": 2.0},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, teachers (`b` wider and deeper, with the student's heads) and the student's start."""
    root = tmp_path_factory.mktemp("oracle")
    write_task(root / "classes")
    (root / "scores").mkdir()
    texts = sentences(80, seed=3)
    for name, pairs in (("train", range(30)), ("dev", range(30, 40))):
        lines = ["sentence1\tsentence2\tscore"]
        lines += [f"{texts[2 * n]}\t{texts[2 * n + 1]}\t{n % 6}" for n in pairs]
        (root / "scores" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    for names, labels in (("classes", ("negative", "positive")), ("scores", ("score",))):
        save_teacher(root / names / "a", seed=1, labels=labels)
        save_teacher(root / names / "b", seed=2, labels=labels, hidden_size=64, num_hidden_layers=3)
        save_teacher(root / names / "start", labels=labels, num_hidden_layers=2, **STILL)
    return root


def words_of(place: Path, case: str, output: Path) -> list[str]:
    data = place / ("scores" if case == "regression" else "classes")
    start = data / "start"
    keys = {
        "max_steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": 2, "learning_rate": RATE,
        "weight_decay": DECAY, "max_grad_norm": CLIP, "warmup_steps": WARM / STEPS, "seed": SEED, "method": "mean",
        "final_checkpoint": "last", "lr_scheduler_type": "linear", "save_steps": 0, "student__path": start, "student__shape": "null", "student__tokenizer": "null", "max_length": 48, **CASES[case],
    }  # fmt: skip
    teachers = [data / "a", data / "b"]
    if case == "regression":
        keys["task"] = "stsb"
    if case == "cross-entropy":
        keys, teachers = {**keys, "encoders": f"[{start}]", "student__path": "null"}, []
    return words(data, teachers, output, place / "store", **keys)


def run_case(world, given: list[str]) -> Path:
    config = load_config(given)
    if config.encoders:
        return finetune(config, world, show_table=False)[0]
    return distill(config, world, show_table=False)


def run_all(world, givens):
    for given in givens:
        run_case(world, given)


def model_in(folder: Path) -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(folder)


def inside(model, batch):
    """Logits, hidden states, and of each layer its queries, keys and values."""
    out = model(**batch, output_hidden_states=True)
    maps = [
        [getattr(layer.attention.self, name)(states) for name in ("query", "key", "value")]
        for layer, states in zip(model.bert.encoder.layer, out.hidden_states, strict=False)
    ]
    return out.logits, out.hidden_states, maps


def scores_of(left_BLH, right_BLH, heads):
    parts = [one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (left_BLH, right_BLH)]
    return parts[0] @ parts[1].transpose(-1, -2) / parts[0].shape[-1] ** 0.5


def feature_by_hand(case, student, feature_teacher, mask_BL, projections):
    """The mean over rows of the loss over layer outputs; each row by itself, without its padding."""
    (_, own, own_maps), (_, their, their_maps) = student, feature_teacher
    losses = []
    for row, length in enumerate(mask_BL.sum(1).tolist()):
        mine = [states[row, :length] for states in own]
        theirs = [states[row, :length] for states in their]
        maps_S, maps_T = (
            [[one[row : row + 1, :length] for one in maps] for maps in both]
            for both in (own_maps, their_maps)
        )
        if case == "distilbert":
            seen = F.cosine_similarity(mine[-1] @ projections["hidden"].T, theirs[-1], dim=-1)
            losses.append((1 - seen).mean())
        elif case == "tinybert":
            loss = F.mse_loss(mine[0] @ projections["embeddings"].T, theirs[0])
            for layer, follows in ((1, 2), (2, 3)):  # of two layers and three: ceil(m * 3 / 2)
                loss = loss + F.mse_loss(mine[layer] @ projections["hidden"].T, theirs[follows])
                loss = loss + F.mse_loss(
                    scores_of(*maps_S[layer - 1][:2], 2), scores_of(*maps_T[follows - 1][:2], 2)
                )
            losses.append(loss)
        else:
            loss = 0.0
            for left, right in ((0, 1), (2, 2)):
                p = scores_of(maps_T[-1][left], maps_T[-1][right], 2).softmax(-1)
                q = scores_of(maps_S[-1][left], maps_S[-1][right], 2).softmax(-1)
                loss = loss + (p * (p.log() - q.log())).sum(-1).mean()
            losses.append(loss)
    return torch.stack(losses).mean()


def loss_by_hand(case, step, student, feature_teacher, said_NBC, labels_B, mask_BL, projections):
    """The mean loss of a global batch."""
    keys, logits_BC = CASES[case], student[0]
    if case == "tinybert" and step < UNTIL:
        return feature_by_hand(case, student, feature_teacher, mask_BL, projections)
    if case == "regression":
        hard = ((logits_BC[:, 0] - labels_B) ** 2).mean()
    else:
        hard = F.cross_entropy(logits_BC, labels_B)
    if case == "cross-entropy":
        return hard
    mean_BC = said_NBC.mean(0) if feature_teacher is None else feature_teacher[0]
    if case in ("mse", "regression"):
        soft = ((logits_BC - mean_BC) ** 2).mean()
    else:
        T = 1.0 if case == "tinybert" else keys.get("temperature", 2.0)
        p_BC, q_BC = (mean_BC / T).softmax(-1), (logits_BC / T).softmax(-1)
        soft = T**2 * (p_BC * (p_BC.log() - q_BC.log())).sum(-1).mean()
    if case == "tinybert":
        return soft
    loss = keys["alpha"] * soft + (1 - keys["alpha"]) * hard
    if case in ("distilbert", "minilm"):
        feature = feature_by_hand(case, student, feature_teacher, mask_BL, projections)
        loss = loss + keys.get("feature_loss_weight", 1.0) * feature
    return loss


def projections_by_hand(case):
    """As the run's seed draws them, [teacher's width, student's width]."""
    names = {"distilbert": ["hidden"], "tinybert": ["embeddings", "hidden"]}.get(case, [])
    generator = torch.Generator().manual_seed(micro_batch_seed(SEED, -1, -1))
    drawn = {name: torch.empty(64, 32).normal_(0, 0.02, generator=generator) for name in names}
    return {name: nn.Parameter(weight) for name, weight in drawn.items()}


def optimizers_by_hand(case, model, projections):
    """(optimizer, first step, share of the rate at each step): of all that is taught from the start,
    and of TinyBERT's head, which begins later."""
    named = [*model.named_parameters(), *projections.items()]
    late = {n for n, _ in named if case == "tinybert" and ("pooler" in n or "classifier" in n)}
    rises = [k / WARM if k < WARM else (STEPS - k) / (STEPS - WARM) for k in range(STEPS)]
    slower = [min(1, (k - UNTIL + 1) / (WARM_LATE + 1)) for k in range(STEPS)]
    found = []
    for names, first, shares in (
        ({n for n, _ in named} - late, 0, rises),
        (late, UNTIL, [a * b for a, b in zip(rises, slower, strict=True)]),
    ):
        groups = [
            {"params": [p for n, p in named if n in names and (p.ndim > 1) == wide], "weight_decay": d}
            for wide, d in ((True, DECAY), (False, 0.0))
        ]  # fmt: skip
        if names:
            found.append((torch.optim.AdamW(groups, lr=RATE), first, shares))
    return found


def by_hand(place: Path, case: str, output: Path) -> dict[str, torch.Tensor]:
    """The student's weights after five steps of a plain loop."""
    config = load_config(words_of(place, case, output))
    data = place / ("scores" if case == "regression" else "classes")
    rows = load_examples(config, load_task(config.task)).train
    tokenizer = AutoTokenizer.from_pretrained(data / "start")
    model = model_in(data / "start").train()
    teachers = [model_in(data / name).eval() for name in "ab"]
    follows = case in ("distilbert", "tinybert", "minilm")
    projections = projections_by_hand(case)
    optimizers = optimizers_by_hand(case, model, projections)
    parameters = [*model.parameters(), *projections.values()]
    order = [r for e in range(2) for r in epoch_order(len(rows.labels_B), SEED, e, BATCH)]
    for step, rows_B in enumerate(order[:STEPS]):
        rows_B = rows_B[rows_B >= 0]
        texts = [[t[n] for n in rows_B] for t in (rows.texts_a, rows.texts_b) if t is not None]
        batch = tokenizer(*texts, padding=True, return_tensors="pt")
        labels_B = torch.tensor(rows.labels_B[rows_B])
        with torch.no_grad():
            said_NBC = torch.stack([teacher(**batch).logits for teacher in teachers])
            feature_teacher = inside(teachers[1], batch) if follows else None
        student = inside(model, batch)
        loss = loss_by_hand(
            case, step, student, feature_teacher, said_NBC, labels_B.to(student[0].dtype)
            if case == "regression" else labels_B, batch["attention_mask"], projections,
        )  # fmt: skip
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        for optimizer, first, shares in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATE * shares[step]
            if step >= first:
                optimizer.step()
        for parameter in parameters:
            parameter.grad = None
    return model.state_dict()


def compare(run: Path, expected: dict[str, torch.Tensor], start: Path) -> None:
    found, before = (load_file(folder / "model.safetensors") for folder in (run / "model", start))
    assert set(found) == set(expected)
    moved = {name: (found[name] - before[name]).abs().max() for name in found}
    assert max(moved.values()) > RATE
    for name, weight in found.items():
        off = (weight - expected[name]).abs()
        # a bias of keys changes no softmax: its gradient is rounding, which Adam makes as large as any
        if not name.endswith("key.bias"):
            assert off.max() < 2e-5, (name, float(off.max()))


@pytest.mark.parametrize("case", CASES)
def test_a_plain_loop_by_hand_ends_with_the_same_student(tmp_path, place, case):
    run = run_case(ALONE, words_of(place, case, tmp_path / "run"))
    data = place / ("scores" if case == "regression" else "classes")
    compare(run, by_hand(place, case, tmp_path / "run"), data / "start")


class OurOrder:
    """A sampler that goes the way of a run, epoch by epoch."""

    def __init__(self, count):
        self.count, self.epoch = count, -1

    def __len__(self):
        return self.count

    def __iter__(self):
        self.epoch += 1
        rows_B = epoch_order(self.count, SEED, self.epoch, BATCH).reshape(-1)
        return iter(rows_B[rows_B >= 0].tolist())


class InOurOrder(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return OurOrder(len(self.train_dataset))


@pytest.mark.parametrize("case", ["cross-entropy", "regression"])
def test_transformers_trainer_given_the_order_of_the_rows_ends_with_the_same_student(
    tmp_path, place, case
):
    """Two epochs, each with an incomplete last batch; some steps are clipped, others are not."""
    most = {"cross-entropy": 6.0, "regression": 50.0}[case]
    given = words_of(place, case, tmp_path / "run")
    given += ["method=finetune", "max_steps=null", "num_train_epochs=2", "warmup_steps=0.25"]
    given.append(f"max_grad_norm={most}")
    run, config = run_case(ALONE, given), load_config(given)
    start = place / ("scores" if case == "regression" else "classes") / "start"
    rows = load_examples(config, load_task(config.task)).train
    assert len(rows) % BATCH
    tokenizer = AutoTokenizer.from_pretrained(start)
    texts_b = rows.texts_b or [None] * len(rows)
    encoded = [
        {**tokenizer(one, other), "label": label}
        for one, other, label in zip(rows.texts_a, texts_b, rows.labels_B.tolist(), strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"), use_cpu=True, num_train_epochs=2,
        per_device_train_batch_size=BATCH, learning_rate=RATE, warmup_steps=0.25,
        lr_scheduler_type="linear", weight_decay=DECAY, max_grad_norm=most,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = InOurOrder(
        model_in(start),
        arguments,
        train_dataset=encoded,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    compare(run, trainer.model.state_dict(), start)


@pytest.mark.slow
def test_two_ranks_end_with_the_student_of_the_plain_loop(tmp_path, place):
    givens = {case: words_of(place, case, tmp_path / case) for case in CASES}
    run_ranks(2, tmp_path / "ranks", run_all, list(givens.values()), timeout_s=300.0)
    for case in CASES:
        run = tmp_path / case / ("teacher-0" if case == "cross-entropy" else "")
        data = place / ("scores" if case == "regression" else "classes")
        compare(run, by_hand(place, case, tmp_path / case), data / "start")
