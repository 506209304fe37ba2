"""The table of teachers' memory in docs/placement.md is what the models' own tensors make."""

import math
from pathlib import Path

import pytest
from small import CPU, load_teachers, save_teacher
from transformers import AutoConfig

from sead_dist.models.sequence_classifier import build_teacher, outline
from sead_dist.teachers.placement import TEACHER_SHARE, held_bytes
from sead_dist.teachers.sharding import layers_of
from sead_dist.teachers.teacher import weight_bytes

PAGE = Path(__file__).parents[2] / "docs" / "placement.md"
GB = 10**9
TEACHERS = {
    "BERT-base": ("bert", {}),
    "BERT-large": (
        "bert",
        {
            "hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096,
            "num_attention_heads": 16,
        },
    ),
    "DeBERTa-v2-xxlarge": (
        "deberta-v2",
        {
            "hidden_size": 1536, "num_hidden_layers": 48, "intermediate_size": 6144,
            "num_attention_heads": 24, "relative_attention": True, "position_buckets": 256,
            "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False, "type_vocab_size": 0, "conv_kernel_size": 3,
        },
    ),
    "XLM-RoBERTa-XL": ("xlm-roberta-xl", {}),
    "XLM-RoBERTa-XXL": (
        "xlm-roberta-xl",
        {
            "hidden_size": 4096, "num_hidden_layers": 48, "intermediate_size": 16384,
            "num_attention_heads": 32,
        },
    ),
}  # fmt: skip


def counted(kind: str, fields: dict) -> tuple[int, int, int]:
    """From the tensors: parameters without embeddings of words; those; and what is whole at once
    during a sharded forward: all that is in no layer, the largest layer and the next."""
    model = outline(AutoConfig.for_model(kind, **fields))
    words = model.get_input_embeddings().weight.numel()
    layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)]
    total = sum(p.numel() for p in model.parameters())
    return total - words, words, total - sum(layers) + 2 * max(layers)


def line(name: str) -> str:
    """A row of the table: sizes in GB, and on how many ranks each GPU's half holds it in bf16."""
    parameters, words, at_work = counted(*TEACHERS[name])
    gathered = 2 * at_work
    sizes = [
        weight_bytes(parameters, words, "fp32", None),
        weight_bytes(parameters, words, "bf16", None),
        weight_bytes(parameters, words, "bf16", "int8"),
        gathered,
    ]
    cells = [
        name,
        f"{(parameters + words) / 10**6:,.0f} M",
        *(f"{size / GB:.2f}" for size in sizes),
    ]
    for memory in (16, 24, 80):
        room = TEACHER_SHARE * memory * GB
        ranks = 1
        if sizes[1] > room:
            ranks = math.ceil(sizes[1] / (room - gathered))
            assert held_bytes(sizes[1], "sharded", ranks) + gathered <= room
        cells.append(str(ranks))
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("name", TEACHERS)
def test_the_table_of_teachers_memory_is_what_their_tensors_make(name):
    assert line(name) in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_bytes_counted_for_a_teacher_are_those_of_its_tensors(tmp_path, dtype):
    (teacher,) = load_teachers([f"{{path: {save_teacher(tmp_path / 't')}, dtype: {dtype}}}"])
    model = build_teacher(teacher.entry, dtype, CPU, False)
    assert teacher.bytes == sum(parameter.nbytes for parameter in model.parameters())
