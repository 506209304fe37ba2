"""What the package does in one place: printing, ending the process, renaming files, YAML."""

import ast

import pytest
from source_text import trees


def names_of(tree: ast.Module) -> set[str]:
    """The dotted names (`sys.stdout`) and the plain names that are called."""
    dotted = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return dotted | {func.id for func in calls if isinstance(func, ast.Name)}


# the heartbeat of several ranks, the task of a SLURM job and a bar in a notebook
PRINTS = {
    *("runtime/heartbeat.py", "slurm/submit.py", "launcher.py"),
    "runtime/console.py",
}
# a lease is taken over by a rename
RENAMES = {"runtime/files.py", "store/layout.py", "teachers/pool.py"}


@pytest.mark.parametrize(
    ("names", "places"),
    [
        ({"print", "sys.stdout", "sys.stderr", "sys.exit", "os._exit", "SystemExit"}, PRINTS),
        ({"os.replace", "os.rename", "os.fsync", "shutil.move"}, RENAMES),
        (
            {"yaml.load", "yaml.safe_load", "yaml.full_load", "yaml.dump", "yaml.safe_dump"},
            {"config/yaml_text.py"},
        ),
    ],
)
def test_is_done_in_one_place(names, places):
    found = {path for path, tree in trees() if names & names_of(tree)}
    assert {path for path in found if not path.startswith("cli/")} == places
