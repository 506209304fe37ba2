"""What the package does in one place: printing, ending the process, renaming files, YAML; and what
its packages say that others use."""

import ast
import re

import pytest
from source_text import trees


def names_of(tree: ast.Module) -> set[str]:
    """The dotted names (`sys.stdout`) and the plain names that are called."""
    dotted = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    plain = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    return dotted | plain | {"Path.rename" for call in calls if renames_path(call)}


def renames_path(call: ast.Call) -> bool:
    """Whether it is `path.rename(other)` or `path.replace(other)`: one place alone is given, while
    a text, a table and a time are replaced by more, or by name."""
    named = isinstance(call.func, ast.Attribute) and call.func.attr in ("rename", "replace")
    return named and len(call.args) == 1 and not call.keywords


def test_a_path_that_is_renamed_is_found_by_any_name():
    for line, found in (
        ("folder.replace(aside)", True),
        ("(root / name).rename(other)", True),
        ("text.replace('a', 'b')", False),
        ("data.rename(columns=str)", False),
        ("replace(config, seed=1)", False),
    ):
        assert ("Path.rename" in names_of(ast.parse(line))) is found


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
        ({"os.replace", "os.rename", "os.fsync", "shutil.move", "Path.rename"}, RENAMES),
        (
            {"yaml.load", "yaml.safe_load", "yaml.full_load", "yaml.dump", "yaml.safe_dump"},
            {"config/yaml_text.py"},
        ),
    ],
)
def test_is_done_in_one_place(names, places):
    found = {path for path, tree in trees() if names & names_of(tree)}
    assert {path for path in found if not path.startswith("cli/")} == places


def test_each_package_says_which_of_its_names_others_use():
    modules = {path: tree for path, tree in trees() if path.count("/") == 1}
    packages = {path.split("/")[0]: tree for path, tree in modules.items() if "__init__" in path}
    assert len(packages) > 12
    for package, tree in packages.items():
        first, _, others = (ast.get_docstring(tree) or "").partition("\n\n")
        assert first.endswith("."), package
        assert others.startswith("Others use `"), package
        of_it = {path: of for path, of in modules.items() if path.startswith(f"{package}/")}
        defined = {
            node.name
            for of in of_it.values()
            for node in of.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        named = set(re.findall(r"`(\w+)`", others))
        assert named <= defined, package
        # a name of a function and a module of that name would hide each other
        assert named & {path.split("/")[1].removesuffix(".py") for path in of_it} == set()
