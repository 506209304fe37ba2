"""Folders that some node does not see are found at the start. Two ranks play two nodes: each has a
name, and a working folder, of its own."""

import os
from pathlib import Path

from ranks import try_ranks

from sead_dist.errors import UserError
from sead_dist.runtime.distributed import check_shared


def look(world, folders, names, apart, patience_s=0.3):
    import sead_dist.runtime.distributed

    sead_dist.runtime.distributed.SHOWN_LATE_S = patience_s
    os.environ["SLURMD_NODENAME"] = names[world.rank]
    here = Path(folders["own"]) / (str(world.rank) if apart else "both")
    here.mkdir(parents=True, exist_ok=True)
    os.chdir(here)
    check_shared(world, {"output_dir": Path(folders["shared"]), "store": Path("store")})


def outcomes(tmp_path, names, apart):
    folders = {"shared": str(tmp_path / "out"), "own": str(tmp_path / "own")}
    return try_ranks(2, tmp_path / "ranks", look, folders, names, apart)


def test_a_folder_that_one_node_does_not_see_is_named_on_every_rank(tmp_path):
    for error in outcomes(tmp_path, ["n1", "n2"], apart=True):
        assert isinstance(error, UserError)
        assert str(error).startswith(
            "store=store: a file that node n1 wrote there is missing on node n2"
        )
    # and nothing is left of the look
    assert list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / "own" / "0" / "store").exists()


def test_folders_that_all_nodes_see_pass_and_keep_no_trace(tmp_path):
    assert outcomes(tmp_path, ["n1", "n2"], apart=False) == [None, None]
    for folder in (tmp_path / "out", tmp_path / "own" / "both" / "store"):
        assert list(folder.iterdir()) == []


def test_ranks_of_one_node_write_nothing(tmp_path):
    assert outcomes(tmp_path, ["n1", "n1"], apart=True) == [None, None]
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "out").write_text("a file")
    for error in outcomes(tmp_path, ["n1", "n2"], apart=False):
        assert isinstance(error, UserError)
        assert "output_dir=" in str(error)
        assert "cannot be written" in str(error)
