"""Makes the files of this folder with the package of commit b2c3d08: `python make.py` in a copy of it.

    git worktree add OLD b2c3d08 && cp make.py OLD && cd OLD && python make.py FOLDER

Everything is named relative to FOLDER, so that a test can copy it anywhere.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from sead_dist.grammar import LABELS, grammar_tokenizer, write_grammar_task
from submitit.helpers import DelayedSubmission
from transformers import BertConfig, BertForSequenceClassification, BertModel

from sead_dist.cli import attempt_recipe
from sead_dist.launcher import Launch

SIZES = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
WORDS = [
    "task=task/task.yaml", "data.path=task", "teachers=[teacher]", "student=start", "gate=off",
    "epochs=2", "store=store", "select.fraction=0.2", "watch.silent_s=600",
]  # fmt: skip


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    write_grammar_task(Path("task"), 0, 100, 20, 0, label_noise=0.0)
    tokenizer = grammar_tokenizer()
    config = BertConfig(vocab_size=len(tokenizer), initializer_range=0.3, **SIZES)
    torch.manual_seed(0)
    BertModel(config).save_pretrained("start")
    config.id2label, config.label2id = dict(enumerate(LABELS)), {n: i for i, n in enumerate(LABELS)}
    BertForSequenceClassification(config).save_pretrained("teacher")
    for place in ("start", "teacher"):
        tokenizer.save_pretrained(place)
    command = [sys.executable, "-m", "sead_dist"]
    subprocess.run([*command, "distill", *WORDS, "output_dir=finished"], check=True)
    running = subprocess.Popen(
        [
            *command,
            "distill",
            *WORDS,
            "epochs=2000",
            "checkpoint.every_steps=3",
            "output_dir=killed",
        ]
    )
    while not any(Path("killed/checkpoints").glob("step-*[0-9]")):
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    sweep = {
        "tasks": ["task/task.yaml"], "methods": ["finetune"], "seeds": 1, "data.path": "task",
        "teachers": ["teacher"], "student": "start", "gate": "off", "epochs": 1, "store": "store",
        "output_dir": "sweep",
    }  # fmt: skip
    lines = {key: yaml.safe_dump(value, default_flow_style=True) for key, value in sweep.items()}
    words = [f"{key}={line.splitlines()[0]}" for key, line in lines.items()]
    subprocess.run([*command, "sweep", *words], check=True)
    pickles()
    for left in [*Path().rglob("plots"), *Path().rglob("report"), *Path().rglob("live")]:
        shutil.rmtree(left)
    for lock in Path().rglob("*.lock"):
        lock.unlink()


def pickles() -> None:
    """Two jobs as submitit kept them: one that had not started, one with a checkpoint."""
    for name, own in (
        ("waiting", ("store=new-store", "micro_batch=16", "epochs=1")),
        ("killed", ("store=store", "epochs=2000", "checkpoint.every_steps=3")),
    ):
        words = tuple(word for word in WORDS if not word.startswith("store="))
        launch = Launch(
            attempt_recipe,
            "distill",
            (*words, *own, f"output_dir={name}"),
            (name,),
            f"{name}/.slurm",
        )
        DelayedSubmission(launch).dump(Path(f"{name}.pkl"))


main(Path(sys.argv[1]))
