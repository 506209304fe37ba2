"""Fine-tuning by this package against Transformers' Trainer, with the same settings.

Both start from one folder and train on the training rows of a run of ours. Both have the same
global batch, epochs, learning rate, linear schedule, warm-up, weight decay, clipping, maximum
length, dropout rates of the model, and for a seed the head that the start lacks. Each has its own
order of rows and its own dropout. Ours is `distill` with method=finetune and final_checkpoint=last.
Ours cuts a global batch into micro-batches, Trainer does not. Trainer's `predict` scores the final
weights of both on the official dev split. "scored apart" is the largest difference of the package's
own score of the same weights from that. Seconds are those of the training loop. The systems run in
turns, in one process.

Shapes: B rows, C classes.
"""

import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inputs import alone, laid_out, minilm, random_classifier
from result_file import common_arguments, set_threads, spread, table, write_result
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from sead_dist.cli.exits import lines_shown
from sead_dist.config.load import load_config
from sead_dist.config.schema import RunConfig
from sead_dist.data.examples import ExampleSet
from sead_dist.data.splits import load_examples
from sead_dist.data.tasks import TaskSpec, compute_metrics, load_task
from sead_dist.models.sequence_classifier import width
from sead_dist.runs.distillation import distill
from sead_dist.training.evaluation import mean_loss

SYSTEMS = ("ours", "Trainer")


@dataclass(frozen=True)
class Job:
    """One task. config: the run of ours, its seed and output folder still to be set."""

    config: RunConfig
    task: TaskSpec
    train: ExampleSet
    dev: ExampleSet

    @property
    def start(self) -> str:
        return str(self.config.student.path)


@dataclass(frozen=True)
class Found:
    """What one training came to. apart: by how much our own score of it differs."""

    task: str
    system: str
    seed: int
    score: float
    loss: float
    seconds: float
    apart: float


def read_job(name: str, data: Path, start: Path, words: Sequence[str]) -> Job:
    """The rows as a run of ours reads and splits them."""
    fixed = [
        *(
            name,
            f"data.path={data}",
            "method=finetune",
            f"student={start}",
            "final_checkpoint=last",
        ),
        *(
            "global_batch_size=32",
            "lr_scheduler_type=linear",
            "warmup_steps=0.1",
            "weight_decay=0.01",
        ),
        *("max_grad_norm=1.0", "precision=fp32", "output_dir=unset"),
        # nothing but the last step is looked at or saved
        *("eval_steps=1000000", "save_steps=0"),
    ]
    config = load_config([*fixed, *words])
    task = load_task(config.task)
    with lines_shown():
        examples = load_examples(config, task)
    return Job(config, task, examples.train, next(iter(examples.official.values())))


def encoded(job: Job, part: ExampleSet) -> list[dict[str, Any]]:
    """The rows as a person's script gives them to Trainer."""
    tokenizer = AutoTokenizer.from_pretrained(job.start)
    rows = tokenizer(
        part.texts_a, part.texts_b, truncation=True, max_length=job.config.max_length
    )  # fmt: skip
    return [
        {**{key: rows[key][at] for key in rows}, "label": label}
        for at, label in enumerate(part.labels_B.tolist())
    ]


def trainer_of(job: Job, model: PreTrainedModel, seed: int, folder: Path) -> Trainer:
    config = job.config
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            seed=seed,
            per_device_train_batch_size=config.global_batch_size,
            per_device_eval_batch_size=config.global_batch_size,
            num_train_epochs=config.num_train_epochs,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=encoded(job, job.train),
        data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(job.start)),
    )


def scored(job: Job, trainer: Trainer) -> tuple[float, float]:
    """(the task's first metric, mean loss) of the dev split, by Trainer."""
    logits_BC = trainer.predict(encoded(job, job.dev)).predictions.reshape(len(job.dev), -1)
    metrics = compute_metrics(job.task, logits_BC, job.dev)
    return metrics[job.task.metrics[0]], mean_loss(job.task.task_kind, logits_BC, job.dev.labels_B)


def run_ours(job: Job, seed: int, folder: Path) -> Found:
    config = job.config.model_copy(update={"seed": seed, "output_dir": str(folder)})
    distill(config, alone(), show_table=False)
    summary = json.loads((folder / "run_summary.json").read_text(encoding="utf-8"))
    own = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    score, loss = scored(job, trainer_of(job, model, seed, folder / "scored"))
    said = own["splits"][job.dev.split]["student"][job.task.metrics[0]]
    return Found(
        job.task.name, "ours", seed, score, loss, summary["train_s"], abs(said - score)
    )  # fmt: skip


def run_trainer(job: Job, seed: int, folder: Path) -> Found:
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        job.start, num_labels=width(job.task), problem_type=job.task.task_kind.problem_type
    )
    trainer = trainer_of(job, model, seed, folder)
    seconds = trainer.train().metrics["train_runtime"]
    return Found(job.task.name, "Trainer", seed, *scored(job, trainer), seconds, 0.0)


def measure(job: Job, seeds: int, work: Path) -> list[Found]:
    found = []
    for seed in range(seeds):
        for system in SYSTEMS if seed % 2 else SYSTEMS[::-1]:
            folder = work / f"{job.task.name}-{system}-{seed}"
            found.append((run_ours if system == "ours" else run_trainer)(job, seed, folder))
            print(found[-1], flush=True)
    return found


def mean_and_deviation(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def difference(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Of the means, with its standard error; the seeds of the two are independent."""
    variances = [statistics.variance(values) / len(values) for values in (ours, theirs)]
    gap = statistics.mean(ours) - statistics.mean(theirs)
    return f"{gap:+.4f} ± {sum(variances) ** 0.5:.4f}"


def rows_of_table(job: Job, found: Sequence[Found]) -> list[list[object]]:
    by_system = {
        system: [one for one in found if (one.task, one.system) == (job.task.name, system)]
        for system in SYSTEMS
    }
    rows: list[list[object]] = []
    for system, runs in by_system.items():
        rows.append(
            [
                f"{job.task.name}, {job.task.metrics[0]}: {system}",
                mean_and_deviation([run.score for run in runs]),
                mean_and_deviation([run.loss for run in runs]),
                spread([run.seconds for run in runs]),
                f"{max(run.apart for run in runs):.4f}" if system == "ours" else "",
            ]
        )
    ours, theirs = by_system["ours"], by_system["Trainer"]
    rows.append(
        [
            "ours less Trainer ± standard error",
            difference([run.score for run in ours], [run.score for run in theirs]),
            difference([run.loss for run in ours], [run.loss for run in theirs]),
            "",
            "",
        ]
    )
    return rows


def main() -> None:
    parser = common_arguments(__doc__, rows=1000, repeat=5)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "mrpc"])
    parser.add_argument("--start", type=Path, help="folder; default: the extra's encoder")
    parser.add_argument("--shape", help="such as L1-H64: new weights, with the start's tokeniser")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", default="1e-4")
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.repeat, args.epochs, args.tasks = 100, 2, 1, ["sst2"]
        args.start, args.shape = None, "L1-H32"
    set_threads(args.threads)
    found: list[Found] = []
    lines: list[list[object]] = []
    with laid_out(args) as (work, small, tokenizer):
        start = args.start or minilm()
        if args.shape is not None:
            start = random_classifier(work / args.shape, args.shape, args.start or tokenizer, 0)
        if start is None:
            sys.exit("give --start DIR, or pip install 'sead-dist[benchmark]'")
        words = [f"data.max_train_examples={args.rows}", f"num_train_epochs={args.epochs}"]
        words += [f"learning_rate={args.learning_rate}"]
        for name in args.tasks:
            data = small if args.smoke else Path(os.environ["SEAD_DIST_DATA"]) / name
            job = read_job(name, data, start, words)
            found += measure(job, args.repeat, work)
            lines += rows_of_table(job, found)
    columns = ["task, metric, system", "dev score", "dev loss", "seconds", "scored apart"]
    about = (__doc__ or "").partition("\n\n")[2].partition("\n\nShapes")[0]
    text = (
        f"{about}\n\n{args.rows} rows before a tenth is held out, {args.epochs} epochs at "
        f"{args.learning_rate}, {args.repeat} seeds: mean ± standard deviation over the seeds; "
        f"seconds: median (least-most).\n\n{table(columns, lines)}"
    )
    raw = [asdict(one) for one in found]
    write_result("against_trainer", "Fine-tuning against Transformers' Trainer", text, raw, args)


if __name__ == "__main__":
    main()
