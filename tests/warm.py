"""What a process forked for tests begins with: everything is imported, and nothing was computed.

A process that has run backward cannot be forked, and a fresh one takes seconds to import.
"""

import gc
import importlib
import os

MODULES = (
    *("sead_dist.cli.commands", "sead_dist.runs.distillation", "sead_dist.runs.pool_worker"),
    *("sead_dist.planning.table", "sead_dist.runs.prediction", "sead_dist.sweep.run"),
    *("transformers.models.bert.modeling_bert", "transformers.models.bert.tokenization_bert"),
    *("sklearn.metrics", "matplotlib.figure", "matplotlib.backends.backend_agg"),
    *("pyarrow.dataset", "deepspeed", "torch.profiler", "torch.distributed.fsdp"),
    # what these libraries import when they are first called
    *("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject.auto_ep_layer"),
    *("torch.distributed.algorithms.ddp_comm_hooks.default_hooks", "rich._emoji_codes"),
    *("torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook", "multiprocessing.popen_fork"),
    *("transformers.modeling_layers", "pytest", "small", "pictures", "self_checks"),
)


def warm_up() -> None:
    """Import all, outside of the collector: a forked process then shares the pages of what is here
    for as long as it does not change it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    gc.disable()
    for name in MODULES:
        importlib.import_module(name)
    import pictures
    import pytest
    import self_checks

    pictures.keep_blanks(pytest.MonkeyPatch())
    self_checks.make_once(pytest.MonkeyPatch())
    gc.freeze()
    gc.enable()


warm_up()
