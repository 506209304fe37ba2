"""What README and pages point at is there: links, headings, files, commands and keys."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from sead_dist.cli.commands import parse
from sead_dist.config.schema import RunConfig, Section, SweepConfig

ROOT = Path(__file__).parents[2]
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
)
# pages of results keep the commands and the file names of the day
KEPT = tuple(page for page in PAGES if "results" in page.relative_to(ROOT).parts)
CURRENT = tuple(page for page in PAGES if page not in KEPT)
SOURCES = (".py", ".yaml", ".j2", ".sh", ".sbatch")
# headings of docs/troubleshooting.md that quote what another program prints
FOREIGN = ("unrecognized arguments:", "You can't use use_cpu and use_deepspeed together")
# what stands for a value in a quoted message
VALUE = re.compile(
    r"\.\.\.|\bprocess N\b|\bN runs\b|"
    r"\b(?:[A-Z]+(?:_\d)?|\d+|None|bf16|finetune|forward|max_steps|mpirun|nan|srun)\b"
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def named(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page):
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


def anchors(page):
    """The names by which a page's headings are linked, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in headings}


def missing_links(page):
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


def missing_files(page):
    """Python files and pages that a page names by a path, and that are not there."""
    paths = re.findall(r"(?<![\w/.-])((?:[\w-]+/)+[\w-]+\.(?:py|md|yaml|sbatch))", prose(page))
    tops = (ROOT, ROOT / "sead_dist", page.parent)
    shown = [path for path in paths if re.match("sead_dist|docs|tests|launch|configs|bench", path)]
    shown += [path for path in paths if path.endswith(".py")]
    # NAME stands for any name
    shown = [path for path in shown if "NAME" not in path]
    return [path for path in shown if not any((top / path).exists() for top in tops)]


def missing_names(page):
    """Names that a page says to be in a Python file (`NAME` in `FILE`, or `NAME` (`FILE`)), and that
    are not in it."""
    missing = []
    places = re.findall(r"`([\w.]+)`\s(?:\(|in\s)`((?:[\w-]+/)+\w+\.py)`", prose(page))
    for name, path in places:
        tops = (top / path for top in (ROOT, ROOT / "sead_dist"))
        file = next((found for found in tops if found.exists()), None)
        source = "" if file is None else file.read_text("utf-8")
        missing += [(name, path)] * any(
            not re.search(rf"\b{part}\b", source) for part in name.split(".")
        )
    return missing


def command_lines(page):
    """The `sead-dist` lines of a page's code, each as its words, without variables' values."""
    code = [body for _, body in FENCE.findall(page.read_text("utf-8"))]
    code += re.findall(r"^    (sead-dist .*)$", prose(page), flags=re.MULTILINE)
    lines = "\n".join(code).replace("\\\n", " ").splitlines()
    words = [
        shlex.split(line.partition(" sead_dist ")[2]) for line in lines if " -m sead_dist " in line
    ]
    words += [
        shlex.split(line, comments=True)[1:] for line in lines if line.startswith("sead-dist ")
    ]
    return [line for line in words if "..." not in line]


def headings_of_messages():
    """The messages of the program that head a part of docs/troubleshooting.md."""
    heads = re.findall(r"^\*\*(.*?)\*\*", prose(ROOT / "docs" / "troubleshooting.md"), re.M | re.S)
    quotes = [" ".join(quote.split()) for head in heads for quote in re.findall(r"`([^`]+)`", head)]
    return [one for one in quotes if one.count(" ") > 1 and not one.startswith(FOREIGN)]


def strings_of_the_source():
    """Every string of the package's code, a line each. Formatted values are left out."""
    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "sead_dist").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return "\n".join(" ".join(text.split()) for text in texts if isinstance(text, str))


def keys_of(section, prefix=""):
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from keys_of(field.annotation, f"{prefix}{name}.")


@named(PAGES)
def test_every_relative_link_resolves(page):
    assert missing_links(page) == []


@named(CURRENT)
def test_files_that_a_page_names_are_there(page):
    assert missing_files(page) == []


@named(CURRENT)
def test_names_that_a_page_places_in_a_file_are_there(page):
    assert missing_names(page) == []


def test_pages_that_the_source_names_are_there():
    folders = [ROOT / name for name in ("sead_dist", "tests", "benchmarks", "configs", "launch")]
    files = [path for top in folders for path in top.rglob("*") if path.suffix in SOURCES]
    for path in (*files, ROOT / "Makefile", ROOT / "setup.cfg"):
        for name in re.findall(r"(?<![\w/])docs/[\w/.-]*\w", path.read_text("utf-8")):
            # `docs/results/` may be named before a benchmark has written there
            assert (ROOT / name).exists() or name.startswith("docs/results/"), f"{path}: {name}"


@named(CURRENT)
def test_command_lines_are_understood(page):
    known = {*keys_of(RunConfig), *keys_of(SweepConfig)}
    for line in command_lines(page):
        words = getattr(parse(line), "words", [])
        keys = {word.partition("=")[0] for word in words if "=" in word}
        assert keys <= known, line


def test_messages_that_head_a_part_of_troubleshooting_are_in_the_code():
    source, quotes = strings_of_the_source(), headings_of_messages()
    assert len(quotes) > 20
    missing = {
        (quote, part)
        for quote in quotes
        for part in (part.strip(" ,;:()'") for part in VALUE.split(quote))
        if part not in source
    }
    assert missing == set()


def test_readme_fits_its_length():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 300


def test_architecture_names_every_file_once():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8").split("## Files")[1]
    rows = re.findall(r"^\| `([\w/]+\.py)` \|", text, flags=re.MULTILINE)
    package = ROOT / "sead_dist"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    assert len(rows) == len(set(rows))
    assert set(rows) == {name for name in files if not Path(name).name.startswith("__")}


def test_every_decision_is_in_the_index():
    folder = ROOT / "docs" / "decisions"
    listed = re.findall(
        r"^\| \[\d{4}\]\((\d{4}-[\w-]+\.md)\)", (folder / "README.md").read_text(), re.M
    )
    assert listed == sorted(path.name for path in folder.glob("0*.md"))
    for name in listed:
        text = (folder / name).read_text("utf-8")
        assert text.startswith(f"# {name[:4]}: ")
        parts = [text.index(f"\n## {part}\n") for part in ("Context", "Decision", "Consequence")]
        assert parts == sorted(parts), name
