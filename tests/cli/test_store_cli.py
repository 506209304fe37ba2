"""`sead-dist store ls | verify | compact | rm`, as a person sees it, on the store of a real run."""

import re
import shutil

import pytest

from sead_dist.cli import store as storecli
from sead_dist.cli.commands import parser
from sead_dist.errors import RunError, UserError
from sead_dist.store.maintenance import list_store
from sead_dist.store.store import StoreFolder, TeacherKey


@pytest.fixture(scope="module")
def filled(words, distil, tmp_path_factory):
    """A store that a run of two teachers has filled."""
    root = tmp_path_factory.mktemp("kept")
    distil(words(root / "run", "max_steps=1", f"store={root / 'store'}"))
    return root / "store"


@pytest.fixture
def store(filled, tmp_path):
    return shutil.copytree(filled, tmp_path / "store")


@pytest.fixture
def said(capsys):
    """What `store VERB ...` prints."""

    def run(verb, *words):
        capsys.readouterr()
        storecli.run(parser().parse_args(["store", verb, *map(str, words)]))
        return capsys.readouterr().out

    return run


def blocks(store):
    return sorted(store.glob("values/*/*.safetensors"))


def test_ls_shows_teachers_tasks_and_splits(store, said, teachers):
    out = said("ls", "--store", store)
    rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    shown = {(row[0].strip()[-2:], row[2].strip(), row[3].strip(), row[4].strip()) for row in rows}
    assert {("/a", "grammar", "selection", "40"), ("/b", "grammar", "validation", "100")} <= shown
    assert all(re.fullmatch(r"\d+[smh]", row[7].strip()) for row in rows)
    assert all(row[6].strip().endswith(("B", "bytes")) for row in rows)


def test_the_default_store_is_that_of_the_environment(store, said, monkeypatch):
    monkeypatch.setenv("SEAD_DIST_STORE", str(store))
    assert str(store) in said("verify")


def test_verify_counts_what_is_whole(store, said):
    assert f"{len(blocks(store))} blocks and" in said("verify", "--store", store)


def test_verify_names_a_bad_block_and_exits_with_3(store, cli):
    bad = blocks(store)[0]
    content = bytearray(bad.read_bytes())
    content[-1] ^= 1
    bad.write_bytes(content)
    result = cli("store", "verify", "--store", store)
    assert result.returncode == 3
    assert bad.name in result.stdout
    assert result.stderr.count("\n") == 1
    assert bad.name in result.stderr
    assert bad.exists()


def test_verify_repair_moves_a_bad_block_out_of_use(store, said):
    bad = blocks(store)[0]
    bad.write_bytes(bad.read_bytes()[:-8])
    with pytest.raises(RunError, match=bad.name):
        said("verify", "--store", store)
    assert "1 bad file moved to quarantine/" in said("verify", "--store", store, "--repair")
    assert not bad.exists()
    assert "1 bad file in" in said("ls", "--store", store)


def test_compact_merges_and_keeps_every_example(store, said):
    before = {(row.folder, row.task, row.split): row.num_rows for row in list_store(store).rows}
    out = said("compact", "--store", store)
    assert re.search(r"\d+ blocks merged into \d+", out)
    after = list_store(store).rows
    assert {(row.folder, row.task, row.split): row.num_rows for row in after} == before
    assert all(row.num_blocks == 1 for row in after)


def test_rm_prints_first_and_removes_with_yes(store, said, teachers):
    held = blocks(store)
    out = said("rm", "--store", store, "--teacher", teachers[0])
    assert "nothing is removed without --yes" in out
    assert blocks(store) == held
    out = said("rm", "--store", store, "--teacher", teachers[0], "--yes")
    assert "removed" in out
    assert {row.teacher for row in list_store(store).rows} == {str(teachers[1])}


def test_rm_keeps_what_a_run_that_uses_it_holds(store, said, teachers):
    row = next(row for row in list_store(store).rows if row.teacher == str(teachers[0]))
    key = TeacherKey(row.fingerprint, row.numerics, row.teacher, 2)
    with StoreFolder(store).hold("/runs/live", [key]):
        out = said("rm", "--store", store, "--task", "grammar", "--yes")
        assert f"kept: {teachers[0]}, grammar validation: /runs/live uses it now" in out
        assert "has begun to use" not in out  # known before the deed, not only during it
        assert "in use by /runs/live" in said("ls", "--store", store)
    assert {row.teacher for row in list_store(store).rows} == {str(teachers[0])}


def test_rm_by_age_and_size(store, said):
    assert "nothing to remove" in said("rm", "--store", store, "--older-than", "1d", "--yes")
    assert "nothing to remove" in said("rm", "--store", store, "--keep", "1GB", "--yes")
    said("rm", "--store", store, "--keep", "0 kB", "--yes")
    assert blocks(store) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no condition for what to remove; give --teacher, --task, --older-than or --keep"),
        (["--teacher", "nobody"], "no teacher 'nobody' is in the store; it holds"),
        (["--task", "gramar"], "did you mean 'grammar'?"),
        (["--older-than", "soon"], "--older-than 'soon' is not a number with a unit of s, m, h"),
        (["--keep", "10"], "--keep '10' is not a number with a unit of B, kB"),
    ],
)
def test_rm_refuses_what_it_does_not_understand(options, message, store, said):
    with pytest.raises(UserError, match=message):
        said("rm", "--store", store, *options)


def test_a_folder_that_is_no_store_is_refused(said, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a prediction store; give the folder that the key"):
        said("ls", "--store", tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        said("verify", "--store", tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_sizes_and_ages_are_read_and_written():
    assert storecli.parse_age("90m") == 5400
    assert storecli.parse_age("1.5 d") == 129600
    assert storecli.parse_size("1.5GB") == 1_500_000_000
    assert storecli.parse_size("80GiB") == 80 * 2**30
    assert [storecli.age(s) for s in (-5, 59, 61, 7200, 200_000)] == ["0s", "59s", "1m", "2h", "2d"]


def test_predictions_are_exported_and_imported(store, said, tmp_path):
    out, other = tmp_path / "carried", tmp_path / "other"
    assert f"{out}: " in said("export", out, "--store", store, "--task", "grammar")
    assert f"{len(blocks(store))} blocks copied" in said("import", out, "--store", other)
    assert "already there" in said("import", out, "--store", other)
    rows = [sum(row.num_rows for row in list_store(folder).rows) for folder in (store, other)]
    assert rows[0] == rows[1] > 0


def test_an_export_that_leaves_bad_blocks_out_says_so(store, said, tmp_path):
    bad = blocks(store)[0]
    bad.write_bytes(bad.read_bytes()[:-8])
    with pytest.raises(RunError, match="1 bad block left out; a run that needs these predictions"):
        said("export", tmp_path / "carried", "--store", store)
