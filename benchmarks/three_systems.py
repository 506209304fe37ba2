"""Three systems on the same teachers, student, rows and epochs: ours, TextBrewer, a bare loop.

Every run starts from folders on disk (rows, teachers, the student's first weights) and ends when
the student's final weights are saved: reading the rows, tokenising, loading models, the teachers'
forwards and training are timed; importing, and scoring the selection split, are not. All use
AdamW, one learning-rate schedule, batches of 32, KL at temperature 2 with alpha 0.5, and as many
threads. bf16 means bf16 teachers and autocast for the student, for all.

- ours: the parts of `sead-dist distill` in its order, teacher_validation=off, a new store for
  each run. What it does beyond (scores, predictions, plots, the card) stands in its own column.
- textbrewer: MultiTeacherDistiller 0.2.1.post1, random batches padded to their longest row.
- textbrewer-cache: the same with its cache of teacher logits, which keeps the first epoch's
  batches for all epochs.
- bare: a hand-written loop, each teacher prediction once in batches of like length, random
  batches padded to their longest row for the student.

Targets, the other's time over ours: the bare loop 1.2 and 1.4 in fp32 at 3 and 10 epochs, 1.2 and
1.15 in bf16; TextBrewer without its cache 5 and 9 in fp32; and no lower score.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from inputs import (
    alone,
    data_folder,
    finetuned_teachers,
    minilm,
    random_classifier,
    run_config,
    tokenizer_folder,
)
from peers import Setting, run_bare, run_textbrewer, score
from result_file import common_arguments, set_threads, spread, table, write_result

from sead_dist.data.splits import load_examples
from sead_dist.data.tasks import load_task
from sead_dist.runs.distillation import make_trainer
from sead_dist.runs.prepared_teachers import prepare_teachers
from sead_dist.runs.results import conclude
from sead_dist.runs.setup import build
from sead_dist.runtime.distributed import StopFlag
from sead_dist.training.evaluation import EvalResult

TARGETS = {  # the other's time over ours
    ("bare", "fp32", 3): 1.2,
    ("bare", "fp32", 10): 1.4,
    ("bare", "bf16", 3): 1.2,
    ("bare", "bf16", 10): 1.15,
    ("textbrewer", "fp32", 3): 5.0,
    ("textbrewer", "fp32", 10): 9.0,
}


def run_ours(setting: Setting) -> dict[str, float]:
    """`distill`, with the time of each of its parts."""
    config = run_config(
        {
            "data.path": setting.data,
            "teachers": setting.teachers,
            "teacher_precision": setting.precision,
            "student": setting.student,
            "precision": setting.precision,
            "num_train_epochs": setting.epochs,
            "seed": setting.seed,
            "global_batch_size": setting.batch,
            "max_length": setting.max_length,
            "learning_rate": setting.learning_rate,
            "warmup_steps": setting.warmup,
            "weight_decay": setting.weight_decay,
            "max_grad_norm": setting.max_grad_norm,
            "temperature": setting.temperature,
            "alpha": setting.alpha,
            "teacher_validation": "off",
            "ensemble": "mean_logits",
            # the student's final weights, as the peers keep theirs
            "final_checkpoint": "last",
            "eval_steps": 1_000_000,
            "store": setting.folder / "store",
            "output_dir": setting.folder / "run",
        }
    )
    began, clock = time.perf_counter(), time.time()
    selecting: list[float] = []
    with ExitStack() as stack:
        setup = build(config, alone(), stack, StopFlag())
        state = setup.checkpointer.resume(setup.engine, setup.log, setup.batches.total_steps)
        weights_N = prepare_teachers(setup)
        trainer = make_trainer(setup, weights_N)
        built_s = time.perf_counter() - began

        def select(step: int) -> EvalResult:
            at = time.perf_counter()
            result = trainer.select(step)
            selecting.append(time.perf_counter() - at)
            return result

        state = replace(trainer, select=select).run(state)
        trained_s = time.perf_counter() - began
        conclude(setup, state, weights_N, show_table=False)
    whole_s = time.perf_counter() - began
    weights = setting.folder / "run" / "model" / "model.safetensors"
    saved_s = weights.stat().st_mtime - clock
    return {
        "seconds": saved_s - sum(selecting),
        "built_s": built_s,
        "teachers_s": state.totals["wait_s"],
        "steps_s": state.totals["train_s"] - state.totals["wait_s"],
        "other_in_loop_s": trained_s - built_s - state.totals["train_s"] - sum(selecting),
        "saved_s": saved_s - trained_s,
        "beyond_s": whole_s - saved_s + sum(selecting),
    }


def textbrewer(setting: Setting) -> dict[str, float]:
    return run_textbrewer(setting, cache=False)


def textbrewer_cache(setting: Setting) -> dict[str, float]:
    return run_textbrewer(setting, cache=True)


SYSTEMS: dict[str, Callable[[Setting], dict[str, float]]] = {
    "ours": run_ours,
    "bare": run_bare,
    "textbrewer-cache": textbrewer_cache,
    "textbrewer": textbrewer,
}


def write_rows(path: Path, texts: list[str], labels: list[int]) -> Path:
    lines = [f"{text}\t{label}" for text, label in zip(texts, labels, strict=True)]
    path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n", encoding="utf-8")
    return path


def prepare(args: argparse.Namespace, work: Path, rows: int) -> tuple[Setting, Path]:
    """The job, with the rows that ours will train on as a file for the peers; selection's file."""
    data = data_folder(work / f"data-{rows}", rows, args.smoke)
    tokenizer = tokenizer_folder(work / "tokenizer", data)
    if minilm() is None or args.smoke:
        print("the teachers have random weights: the times are valid, the scores mean nothing")
        teachers = [
            random_classifier(work / f"{args.random_shape}-{n}", args.random_shape, tokenizer, n)
            for n in range(args.teachers)
        ]
    else:
        taught = data_folder(work / "teacher-data", args.teacher_rows, False, seed=1)
        runs = finetuned_teachers(work / "teachers", taught, args.teachers, args.layers, 1)
        teachers = [run / "model" for run in runs]
    config = run_config({"data.path": data, "output_dir": work / "unused"})
    examples = load_examples(config, load_task("sst2"))
    train, selection = (
        write_rows(data / f"{name}-part.txt", part.texts_a, part.labels_B.tolist())
        for name, part in (("train", examples.train), ("selection", examples.selection))
    )
    student = random_classifier(work / f"student-{args.student}", args.student, tokenizer, 0)
    return Setting(data, train, teachers, student, "fp32", 1, 0, work), selection


def measure(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """One record for each system, precision, epochs and seed; systems interleaved."""
    if not args.smoke:  # first use of kernels and lazy imports, not counted
        small, _ = prepare(args, work, 100)
        for system in args.systems:
            SYSTEMS[system](replace(small, folder=Path(tempfile.mkdtemp(dir=work))))
    job, selection = prepare(args, work, args.rows)
    records = []
    for precision in args.precision:
        for epochs in args.epochs:
            for seed in range(args.repeat):
                for system in args.systems if seed % 2 else args.systems[::-1]:
                    folder = Path(tempfile.mkdtemp(dir=work))
                    setting = replace(
                        job, precision=precision, epochs=epochs, seed=seed, folder=folder
                    )
                    figures = SYSTEMS[system](setting)
                    model = folder / "run" / "model" if system == "ours" else folder / "model"
                    figures["score"] = score(model, job.student, selection, job.max_length)
                    key = {"system": system, "precision": precision, "epochs": epochs}
                    records.append({**key, "seed": seed, **figures})
                    print(records[-1], flush=True)
    return records


def report(records: list[dict[str, Any]], args: argparse.Namespace) -> str:
    rows = []
    for precision in args.precision:
        for epochs in args.epochs:
            found = {
                system: [
                    record
                    for record in records
                    if (record["system"], record["precision"], record["epochs"])
                    == (system, precision, epochs)
                ]
                for system in args.systems
            }
            for system, mine in found.items():
                seconds = [record["seconds"] for record in mine]
                ratios = [
                    record["seconds"] / ours["seconds"]
                    for record, ours in zip(mine, found["ours"], strict=True)
                ]
                scores = [record["score"] for record in mine]
                target = TARGETS.get((system, precision, epochs))
                reached = "yes" if target and statistics.median(ratios) >= target else "no"
                beyond = [record["beyond_s"] for record in mine if "beyond_s" in record]
                rows.append(
                    [
                        system,
                        precision,
                        epochs,
                        spread(seconds),
                        "1" if system == "ours" else spread(ratios),
                        f"{target} ({reached})" if target else "",
                        f"{statistics.mean(scores):.4f} ± {statistics.pstdev(scores):.4f}",
                        f"{statistics.median(beyond):.1f}" if beyond else "",
                    ]
                )
    columns = ["system", "precision", "epochs", "seconds", "its time / ours"]
    columns += ["at least (reached)", "selection accuracy", "beyond, s"]
    return table(columns, rows)


def main() -> None:
    parser = common_arguments(__doc__, rows=1200, repeat=3)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3, 10])
    parser.add_argument("--teachers", type=int, default=3)
    parser.add_argument("--layers", default="[1,2,4,5]", help="of the pretrained encoder: teachers")
    parser.add_argument("--teacher-rows", type=int, default=6000, help="to fine-tune teachers on")
    parser.add_argument("--random-shape", default="L4-H384", help="teachers without the encoder")
    parser.add_argument("--student", default="L2-H128", help="shape, random first weights")
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.repeat, args.epochs = 100, 1, [1]
        args.random_shape = args.student = "L1-H32"
    set_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        records = measure(args, args.work or Path(temporary))
    about = (__doc__ or "").partition("\n\n")[2].strip()
    text = (
        f"{about}\n\n{args.teachers} teachers of {args.random_shape.split('-')[0]} layers and 384 "
        f"units, student {args.student} with new weights, {args.rows} rows of SST-2 of which a "
        f"tenth is the selection split, {args.repeat} seeds, which are also the interleaved "
        f"repetitions: median (least-most).\n\n{report(records, args)}"
    )
    name = "_".join(["three_systems", *args.precision])
    write_result(name, "Three systems on one job", text, records, args)


if __name__ == "__main__":
    main()
