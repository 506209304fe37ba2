"""State of the process that a run changes: random state, environment, loggers and switches of the
libraries. A call from Python restores all of it afterwards.
"""

import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from sead_dist.runtime.distributed import World


@contextmanager
def as_before() -> Iterator[None]:
    """Restore all of this state after the block, even where the block raises. (Signal handlers are
    not a part of it: `StopFlag.listening` restores them.) Within the block tensors are made as in a
    fresh process."""
    with ExitStack() as stack:
        for part in (_environment, _random_state, _torch_switches, _transformers_output, _loggers):
            stack.enter_context(part())
        stack.enter_context(_fresh_torch())
        stack.enter_context(warnings.catch_warnings())
        yield


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update({k: v for k, v in before.items() if os.environ.get(k) != v})


@contextmanager
def _random_state() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    # a GPU that is not in use yet has no state of the caller's
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if on_gpu else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _torch_switches() -> Iterator[None]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
        cudnn.deterministic, cudnn.benchmark = flags


@contextmanager
def _fresh_torch() -> Iterator[None]:
    """Gradients are on, and new tensors are fp32 and on the CPU, whatever the caller has set."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        try:
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def _transformers_output() -> Iterator[None]:
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        else:
            transformers_logging.disable_progress_bar()


@contextmanager
def _loggers() -> Iterator[None]:
    """Restore levels, handlers and filters of all loggers there are, and the level up to which
    `logging.disable` silences all of them."""
    named = logging.root.manager.loggerDict.values()
    loggers = [logging.root, *(one for one in named if isinstance(one, logging.Logger))]
    before = [
        (one, one.level, list(one.handlers), list(one.filters), one.propagate, one.disabled)
        for one in loggers
    ]
    off = logging.root.manager.disable
    try:
        yield
    finally:
        logging.disable(off)
        for one, level, handlers, filters, propagate, disabled in before:
            one.setLevel(level)
            one.handlers[:], one.filters[:] = handlers, filters
            one.propagate, one.disabled = propagate, disabled


def keeps_record(record: logging.LogRecord) -> bool:
    """A filter of DeepSpeed's logger: False for the line that it logs on a CPU as soon as
    Accelerate imports it."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


def quiet_libraries(world: World) -> None:
    """Silence what repeats a run's own output: Transformers' reports of new heads and its bars,
    a line of DeepSpeed, and tqdm's bars on other ranks than 0. `as_before` restores all of it."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").addFilter(keeps_record)
    if not world.is_main:
        os.environ.setdefault("TQDM_DISABLE", "1")
