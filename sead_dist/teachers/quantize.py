"""Teachers whose weights are kept in 8 bits, through torchao (the extra `quantize`).

torchao is imported where it is used: Transformers imports it too wherever it is installed, which
takes over a second, and most runs need neither.
"""

import importlib.metadata
import importlib.util

from transformers import PreTrainedModel

from sead_dist.errors import UserError


def check_quantize(teacher: str) -> None:
    """Raises UserError where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            f"teacher {teacher}: quantization=int8 needs torchao, which is not installed; "
            "pip install 'sead-dist[quantize]', or leave weights out"
        )


def quantize(model: PreTrainedModel) -> None:
    """Keep the weights of all linear layers in int8 with a scale per output row; embeddings, norms,
    biases and arithmetic keep their dtype. In place."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def quantizer() -> str:
    """What quantises, for the numerics class."""
    return f"int8 torchao {importlib.metadata.version('torchao')}"
