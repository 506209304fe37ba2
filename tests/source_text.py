"""What the package's own source says, for tests that hold a rule of it."""

import ast
from collections.abc import Collection, Iterator
from pathlib import Path

import sead_dist


def comparisons(names: Collection[str], attribute: str | None = None) -> Iterator[str]:
    """`file:line` of each comparison with one of these names; of one side that is `.attribute`,
    where that is given."""
    for path, tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Compare):
                continue
            sides = (node.left, *node.comparators)
            named = [side for side in sides if isinstance(side, ast.Attribute)]
            if attribute is not None and attribute not in [side.attr for side in named]:
                continue
            if any(isinstance(of, ast.Constant) and of.value in names for of in ast.walk(node)):
                yield f"{path}:{node.lineno}"


def trees() -> Iterator[tuple[str, ast.Module]]:
    """(`package/file.py`, its syntax tree) of each module."""
    package = Path(sead_dist.__file__).parent
    for path in sorted(package.rglob("*.py")):
        yield str(path.relative_to(package)), ast.parse(path.read_text("utf-8"))
