"""What a model is fed is decided in `models/inputs.py`, by what it is made of, and nowhere else."""

import ast
from collections.abc import Iterator

from source_text import trees

OWNERS = {"models/inputs.py", "models/inputs_check.py", "data/tokens.py"}
# a language model is fed a prompt and words, which no classifier is
PROMPTED = {"teachers/language_model.py", "teachers/prompts.py"}
# ask a tokeniser what it is, or for words of a table: no model is fed by it
NOT_FED = {"models/pretrained.py", "data/neighbors.py"}
# the id of a new model's config, before there is anything to feed
NEW_CONFIG = {"models/student.py": {"pad_token_id"}}
SETTINGS = {
    *("padding_side", "pad_token_id", "pad_token_type_id", "truncation_side"),
    *("model_input_names", "model_max_length"),
}
PARTS = {
    *("tokenize", "make_split", "rows_alone", "padded", "padding_of", "probed_padding"),
    *("real_rows", "fitting_length", "OFFSET_POSITIONS", "INPUT_RULES"),
}
# a split's tokens are made where a split is; the versions of all rules are kept together
DEFINES = {
    "data/order.py": {"tokenize"},
    **{key: {"INPUT_RULES"} for key in ("training/identity.py", "models/start.py")},
}


def is_tokenizer(node: ast.expr) -> bool:
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
    return name == "tokenizer"


def found(names: set[str]) -> Iterator[tuple[str, str]]:
    """(file, what) of each call of a tokeniser, setting of one and import of these names."""
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and is_tokenizer(node.func):
                yield path, "a call"
            if isinstance(node, ast.Attribute) and is_tokenizer(node.value):
                yield path, node.attr if node.attr in SETTINGS else ""
            if isinstance(node, ast.ImportFrom):
                yield from ((path, each.name) for each in node.names if each.name in names)


def test_no_other_module_makes_or_sets_what_a_model_is_fed():
    told = {(path, what) for path, what in found(PARTS) if what}
    assert {path for path, _ in told} >= OWNERS
    elsewhere = {
        (path, what)
        for path, what in told
        if path not in OWNERS | NOT_FED | PROMPTED
        and what not in NEW_CONFIG.get(path, set()) | DEFINES.get(path, set())
    }
    assert elsewhere == set()
