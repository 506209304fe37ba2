"""What libraries print, and a run does not want."""

import logging
import os

from transformers.utils import logging as transformers_logging

from sead_dist.runtime.distributed import World


def is_news(record: logging.LogRecord) -> bool:
    """Not what DeepSpeed says on every CPU, as soon as Accelerate imports it."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


def quiet_libraries(world: World) -> None:
    """Transformers' reports of new heads and its progress bars say nothing a run does not."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").addFilter(is_news)
    if not world.is_main:
        os.environ.setdefault("TQDM_DISABLE", "1")
