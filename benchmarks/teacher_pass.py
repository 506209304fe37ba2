"""The teachers' pass over an empty store, against a bare loop of the same forwards.

Ours is `StoredSource` in a world of one: look-up, forwards at fixed padded lengths, blocks written
to disk with their checksums, and the answer in the order of the request. The bare loop forwards the
same unique examples in batches sorted by length, padded to their longest row, and keeps the logits
in memory; the better of its batch sizes counts. Models are loaded and rows tokenised before, for
both. Target: at least 90% of the bare loop's examples per second.
"""

import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from inputs import alone, laid_out, random_classifier, run_config
from result_file import common_arguments, set_threads, spread, table, write_result
from transformers import PreTrainedModel

from sead_dist.data.order import Split
from sead_dist.runs.setup import build
from sead_dist.runtime.distributed import StopFlag
from sead_dist.teachers.base import Request
from sead_dist.teachers.whole import load_whole

TARGET = 0.9
BATCH_SIZES = (32, 64)


@torch.inference_mode()
def bare_seconds(model: PreTrainedModel, split: Split, rows: int) -> float:
    """Forward every unique example in batches of `rows`, longest first."""
    began = time.perf_counter()
    lengths_B = split.tokens.lengths_B()
    order_U = split.row_U[np.argsort(-lengths_B[split.row_U], kind="stable")]
    logits_BC = torch.zeros(len(split), 2)
    for start in range(0, len(order_U), rows):
        rows_R = order_U[start : start + rows]
        inputs = split.tokens.pad(rows_R, int(lengths_B[rows_R].max()))
        logits_BC[torch.from_numpy(rows_R)] = model(**inputs).logits.float()
    return time.perf_counter() - began


def one_turn(words: dict[str, object]) -> dict[str, float]:
    """Examples per second of ours and of the bare loop at each batch size."""
    with ExitStack() as stack:
        setup = build(run_config(words), alone(), stack, StopFlag())
        source, split = setup.source, setup.splits.train
        assert source is not None
        for n, teacher in enumerate(setup.teachers):
            source.models[n] = load_whole(teacher, setup.world.device, False, {})
        asked = Request(split, np.arange(len(split.ids_U2)), None, "the pass")
        pairs = len(split.ids_U2) * len(setup.teachers)

        def ours() -> float:
            began = time.perf_counter()
            source.submit(asked).result()
            return time.perf_counter() - began

        # a small pass first: kernels and memory are set up in neither's time
        for model in source.models.values():
            with torch.inference_mode():
                model(**split.tokens.pad(np.arange(8), 16))
        rates: dict[str, float] = {}
        models = list(source.models.values())
        for size in BATCH_SIZES:
            rates[f"bare-{size}"] = pairs / sum(bare_seconds(m, split, size) for m in models)
        rates["ours"] = pairs / ours()
        return rates


def main() -> None:
    parser = common_arguments(__doc__, rows=13400, repeat=3)
    parser.add_argument(
        "--teachers",
        nargs="+",
        default=["L4-H128", "L6-H256", "L6-H384"],
        help="shapes of the teachers, whose weights are random",
    )
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.repeat, args.teachers = 300, 1, ["L4-H128"]
    set_threads(args.threads)
    raw: list[dict[str, object]] = []
    rows = []
    with laid_out(args) as (work, data, tokenizer):
        student = random_classifier(work / "student", "L2-H128", tokenizer, 0)
        for shape in args.teachers:
            teacher = random_classifier(work / shape, shape, tokenizer, 1)
            for precision in args.precision:
                turns = []
                for _ in range(args.repeat):
                    turn_folder = Path(tempfile.mkdtemp(dir=work))
                    words: dict[str, object] = {
                        "data.path": data,
                        "student": student,
                        "teachers": [teacher],
                        "teacher_precision": precision,
                        "store": turn_folder / "store",
                        "output_dir": turn_folder / "run",
                    }
                    turns.append(one_turn(words))
                raw += [{"teacher": shape, "precision": precision, **turn} for turn in turns]
                best = max(
                    (f"bare-{n}" for n in BATCH_SIZES),
                    key=lambda name: statistics.median(turn[name] for turn in turns),
                )
                ratios = [turn["ours"] / turn[best] for turn in turns]
                rows.append(
                    [
                        shape,
                        precision,
                        statistics.median(turn["ours"] for turn in turns),
                        statistics.median(turn[best] for turn in turns),
                        best.removeprefix("bare-"),
                        spread(ratios),
                        "yes" if statistics.median(ratios) >= TARGET else "no",
                    ]
                )
    columns = ["teacher", "precision", "ours, examples/s", "bare loop, examples/s"]
    columns += ["its batch", "ours / bare", f">= {TARGET}"]
    text = (
        f"{args.rows} rows of SST-2 before a tenth is held out; {args.repeat} interleaved "
        f"repetitions, each over a new store; median (least-most).\n\n{table(columns, rows)}"
    )
    write_result("teacher_pass", "The teachers' pass against a bare loop", text, raw, args)


if __name__ == "__main__":
    main()
