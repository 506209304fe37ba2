"""The check of ranks, by the hands of a clock of our own."""

import json
from dataclasses import asdict

import pytest

from sead_dist.config.schema import HeartbeatConfig
from sead_dist.runtime.distributed import StopFlag
from sead_dist.runtime.heartbeat import ENDED, Beat, Heartbeat, Peer, StopRequestedError

LIMITS = HeartbeatConfig(timeout_s=10.0, hang_timeout_s=100.0)


@pytest.fixture
def heartbeat(tmp_path):
    """Rank 0 of three, at time 0 of its clock, in a run."""
    made = Heartbeat(0, 3, None, LIMITS)
    made.run, made.stop = tmp_path, StopFlag()
    made.moved_at = made.read_at = made.fetched_at = 0.0
    for peer in made.peers.values():
        peer.changed_at = peer.moved_at = 0.0
    return made


def beat(heartbeat, rank, count, moves=0, place=0, doing="training, step 3", stop=None):
    sign = Beat(f"node{rank}", 100 + rank, count, moves, place, doing, stop)
    heartbeat.fetched[str(rank)] = json.dumps(asdict(sign))
    heartbeat.fetched_at = 1e9


def test_a_rank_that_gives_no_sign_of_life_is_named_with_its_node_and_what_it_did(heartbeat):
    beat(heartbeat, 1, 1)
    beat(heartbeat, 2, 1)
    heartbeat.read_signs(1.0)
    heartbeat.read_signs(5.0)
    beat(heartbeat, 1, 2)
    heartbeat.read_signs(9.0)
    assert heartbeat.end_reason(10.9) is None
    line = heartbeat.end_reason(11.1)
    assert line.startswith("rank 2 (process 102 on node2) has given no sign of life for 10 s")
    assert "it was at: training, step 3" in line


def test_other_ranks_without_a_sign_of_life_are_counted_in_the_same_line(heartbeat):
    assert "; the same holds for rank 2; it was" in heartbeat.end_reason(10.6)
    heartbeat.peers[3] = Peer(None, 0.0, 0.0)
    assert "; the same holds for ranks 2, 3; it was" in heartbeat.end_reason(10.6)


def test_a_rank_that_never_started_is_named(heartbeat):
    for now in (3.0, 6.0, 9.0):
        beat(heartbeat, 1, int(now))
        heartbeat.read_signs(now)
    assert heartbeat.end_reason(9.9) is None
    assert heartbeat.end_reason(10.6).startswith("rank 2 has given no sign of life")
    assert "not yet started" in heartbeat.end_reason(10.6)


def test_when_none_moves_the_rank_that_is_behind_the_others_hangs(heartbeat):
    heartbeat.place = 8
    for now in range(0, 200, 5):
        for rank, place in ((1, 7), (2, 8)):
            beat(heartbeat, rank, now, moves=3, place=place)
        heartbeat.read_signs(float(now))
        expected = (
            None if now <= 100 else "rank 1 (process 101 on node1) hangs: no rank has made progress"
        )
        found = heartbeat.end_reason(float(now))
        assert (found is None) == (expected is None), now
        assert found is None or found.startswith(expected)


def test_a_rank_that_works_on_while_others_wait_is_no_hang(heartbeat):
    for now in range(0, 1000, 5):
        beat(heartbeat, 1, now, moves=now // 50)
        beat(heartbeat, 2, now)
        heartbeat.read_signs(float(now))
        assert heartbeat.end_reason(float(now)) is None


def test_a_rank_that_ended_without_an_error_is_not_lost(heartbeat):
    beat(heartbeat, 1, 1)
    beat(heartbeat, 2, 1)
    heartbeat.read_signs(1.0)
    for rank in (1, 2):
        heartbeat.fetched[str(rank)] = ENDED
    heartbeat.read_signs(2.0)
    assert heartbeat.end_reason(50.0) is None


def test_a_stop_that_was_asked_of_another_rank_stops_this_one(heartbeat):
    heartbeat.progress_or_stop("teacher a")
    beat(heartbeat, 1, 1, stop=12)
    heartbeat.read_signs(1.0)
    assert heartbeat.stop.signal == 12
    with pytest.raises(StopRequestedError):
        heartbeat.progress_or_stop("teacher a")


def test_an_observer_that_was_suspended_itself_counts_again(heartbeat):
    beat(heartbeat, 1, 1)
    beat(heartbeat, 2, 1)
    heartbeat.read_signs(1.0)
    heartbeat.read_signs(500.0)
    assert heartbeat.end_reason(500.0) is None
    heartbeat.read_signs(504.0)
    heartbeat.read_signs(508.0)
    assert heartbeat.end_reason(510.1).startswith("rank 1 ")


def test_before_a_run_only_life_counts_and_no_progress(heartbeat):
    heartbeat.run = None
    for now in range(0, 200, 5):
        for rank in (1, 2):
            beat(heartbeat, rank, now)
        heartbeat.read_signs(float(now))
        assert heartbeat.end_reason(float(now)) is None
    line = heartbeat.end_reason(205.1)
    assert line.startswith("rank 1 (process 101 on node1) has given no sign of life")
    assert "checkpoint" not in line


def test_where_the_store_does_not_answer_it_is_rank_0_that_is_named(heartbeat):
    heartbeat.rank, heartbeat.peers[0] = 1, heartbeat.peers.pop(1)
    heartbeat.fetched_at = 0.0
    heartbeat.read_signs(4.0)
    heartbeat.read_signs(8.0)
    assert heartbeat.silent_ranks(10.1, 10.0) == [0]
    heartbeat.fetched_at = 8.0
    assert heartbeat.silent_ranks(10.1, 10.0) == [2, 0]


def test_the_end_is_told_once_whatever_breaks_because_of_it(heartbeat, monkeypatch, capsys):
    class EndedError(Exception):
        pass

    def ended(code):
        raise EndedError(code)

    monkeypatch.setattr("sead_dist.runtime.heartbeat.os._exit", ended)
    monkeypatch.setattr("sead_dist.runtime.heartbeat.time.sleep", lambda _s: None)
    monkeypatch.setattr(heartbeat, "_send_end_reason", lambda _line: None)
    for line in ("rank 1 hangs", "rank 1 is gone"):
        with pytest.raises(EndedError, match="3"):
            heartbeat.end(line, [1])
    assert capsys.readouterr().err == "sead-dist: rank 1 hangs\n"
    assert (heartbeat.run / "log.txt").read_text().count("rank 1") == 1
