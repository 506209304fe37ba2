"""A whole teacher on one device, ready for use.

For a small teacher `from_pretrained` spends more time on making the modules than on reading the
weights. So teachers of one shape are copies of one empty model, filled from their files.
"""

import copy
import json
from collections.abc import MutableMapping

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from sead_dist.errors import UserError
from sead_dist.models.inputs_check import CheckRows, check_teacher, reset_attention
from sead_dist.models.pretrained import NO_EFFECT
from sead_dist.models.sequence_classifier import build_teacher
from sead_dist.teachers.inference import quantize
from sead_dist.teachers.packing import use_packs
from sead_dist.teachers.sharding import by_file, empty_model, tensor_files
from sead_dist.teachers.teacher import Teacher


def load_whole(
    teacher: Teacher,
    device: torch.device,
    trust_remote_code: bool,
    empty: MutableMapping[str, PreTrainedModel],
    rows: CheckRows | None = None,
) -> PreTrainedModel:
    """The teacher in eval mode, without gradients, in its dtype on its device, with 8-bit weights
    or packs where its entry or its cut has them.

    empty: models without memory, by shape; a missing one is added. rows: rows of the run to try the
    model on (None: fixed texts). Raises UserError where its weights cannot be read, or its logits
    depend on the batch.
    """
    model = None if trust_remote_code else _filled(teacher, device, empty)
    if model is None:  # Transformers reads older files and other names too
        model = build_teacher(teacher.entry, teacher.dtype, device, trust_remote_code)
    model.config.pad_token_id = teacher.config.pad_token_id
    reset_attention(model)
    if teacher.entry.quantization is not None:
        quantize(model)
    # an 8-bit model is compared with itself alone; the drift report compares it with fp32
    rows = rows or teacher.inputs.probe_rows(device)
    check_teacher(model, rows, teacher.cut.padding, teacher.name)
    # packs give what padded batches give, as packing.packs_from has checked
    if teacher.cut.pack_from is not None:
        use_packs(model)
    return model


def _filled(
    teacher: Teacher, device: torch.device, empty: MutableMapping[str, PreTrainedModel]
) -> PreTrainedModel | None:
    """A copy of the empty model with this teacher's weights. None where its files do not hold each
    weight under its own name, or the model treats some weights in a special way."""
    if getattr(teacher.config, "quantization_config", None) is not None:
        return None
    facts = {name: fact for name, fact in teacher.config.to_dict().items() if name not in NO_EFFECT}
    shape = json.dumps([facts, teacher.dtype], sort_keys=True, default=str)
    if shape not in empty:
        empty[shape] = empty_model(teacher, trust_remote_code=False)
    outline = empty[shape]
    tied = len(list(outline.named_parameters(remove_duplicate=False))) > len(
        list(outline.named_parameters())
    )
    special = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    if tied or any(getattr(outline, name, None) for name in special):
        return None
    try:
        files = tensor_files(teacher, outline)
        model = copy.deepcopy(outline)
        for name, file, stored in by_file(files):
            _put(model, name, file.get_tensor(stored), device)
    except (UserError, SafetensorError, OSError):
        return None  # Transformers gives the error where it fails too
    return model.to(device).eval().requires_grad_(False)


def _put(model: PreTrainedModel, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Give a parameter or a buffer its values in memory of its own. A tensor mapped from a file may
    lie at any address, and bits depend on its alignment."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    before = getattr(owner, leaf)
    values = torch.empty(before.shape, dtype=before.dtype, device=device).copy_(tensor)
    if isinstance(before, nn.Parameter):
        values = nn.Parameter(values, requires_grad=False)
    setattr(owner, leaf, values)
