"""Distil an ensemble of N teachers into one small student for language understanding.

From Python: `import sead_dist as sd` (docs/python.md). Each name is imported at its first use.
"""

import os
import random
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sead_dist.api import (
        Run,
        distill,
        distillation_loss,
        evaluate,
        finetune,
        load_config,
        predict,
        soft_targets,
    )
    from sead_dist.config.schema import RunConfig
    from sead_dist.data.kinds import register_task_kind
    from sead_dist.data.tasks import TaskSpec
    from sead_dist.errors import RunError, UserError
    from sead_dist.objectives.losses import register_loss
    from sead_dist.objectives.weightings import register_ensemble
    from sead_dist.runs.stored import PredictionStore
    from sead_dist.teachers.kinds import register_teacher

__version__ = "0.1.0"
__all__ = [
    "PredictionStore",
    "Run",
    "RunConfig",
    "RunError",
    "TaskSpec",
    "UserError",
    "__version__",
    "distill",
    "distillation_loss",
    "evaluate",
    "finetune",
    "load_config",
    "predict",
    "register_ensemble",
    "register_loss",
    "register_task_kind",
    "register_teacher",
    "soft_targets",
]
# names of `__all__` that are not listed here come from sead_dist.api
_ELSEWHERE = {
    "PredictionStore": "sead_dist.runs.stored",
    "RunConfig": "sead_dist.config.schema",
    "RunError": "sead_dist.errors",
    "TaskSpec": "sead_dist.data.tasks",
    "UserError": "sead_dist.errors",
    "register_ensemble": "sead_dist.objectives.weightings",
    "register_loss": "sead_dist.objectives.losses",
    "register_task_kind": "sead_dist.data.kinds",
    "register_teacher": "sead_dist.teachers.kinds",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    state, variables = random.getstate(), dict(os.environ)
    try:
        return getattr(import_module(_ELSEWHERE.get(name, "sead_dist.api")), name)
    finally:
        # libraries draw numbers, and set and remove variables, when they are imported
        random.setstate(state)
        for variable in set(os.environ) - set(variables):
            del os.environ[variable]
        os.environ.update(variables)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
