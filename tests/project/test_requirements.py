"""What the package imports is what its setup.cfg asks for."""

import ast
import re
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
# parts of a package that is asked for, in the version that it pins
PARTS = {"pydantic_core": "pydantic"}


def named(requirements):
    """The normalised names of requirement lines."""
    lines = (line.strip() for line in requirements.splitlines())
    return {plain(re.split(r"[<>=!~;\[ ]", line)[0]) for line in lines if line}


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_package_that_is_imported_is_asked_for():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    asked = named(setup["options"]["install_requires"])
    for extra in setup["options.extras_require"].values():
        asked |= named(extra)
    known, lacking = packages_distributions(), {}
    for path in (ROOT / "sead_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for top in {name.partition(".")[0] for name in names}:
                if top == "sead_dist" or top in sys.stdlib_module_names:
                    continue
                # what is not installed here is known by its own name
                given = {PARTS.get(top, top), *known.get(top, [])}
                if not asked & set(map(plain, given)):
                    lacking.setdefault(top, path.name)
    assert lacking == {}
