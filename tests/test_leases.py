"""Who works on which clip: one at a time, whatever dies, stalls or comes at the same time."""

import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spatialprobe.engine.files.durable import StoreFull
from spatialprobe.engine.processes.leases import Leases, key_of

QUICK = {"beat": 0.02, "patience": 0.3}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "leases"


def wait_for(condition, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


HOLD = """
import sys, time
from pathlib import Path
from spatialprobe.engine.processes.leases import Leases
leases = Leases(Path(sys.argv[1]), beat=0.02, session=sys.argv[2])
for clip in sys.argv[3:]:
    print(leases.claim(clip, most_deaths=9), flush=True)
time.sleep(600)
"""


def hold(folder, *clips: str, session: str = "") -> subprocess.Popen:
    """A process that holds clips until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), session, *clips], stdout=subprocess.PIPE, text=True
    )
    process.answers = [process.stdout.readline().strip() for _ in clips]
    return process


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_clip_has_one_holder_and_is_free_again_when_given_back(folder):
    a, b = Leases(folder, **QUICK), Leases(folder, **QUICK)
    assert a.claim("x/1") == 0
    assert (b.claim("x/1"), b.claim("x/2")) == (None, 0)
    assert (a.holds("x/1"), b.holds("x/1"), b.holds("x/2")) == (True, False, True)
    a.release("x/1")
    assert not a.holds("x/1")
    assert b.claim("x/1") == 0
    a.close()
    assert folder.exists()
    b.close()
    assert not folder.exists()  # the last one out clears away


def claim_all(folder, clips: int, out) -> None:
    leases = Leases(folder)
    got = []
    for clip in range(clips):
        if leases.claim(f"clip{clip}") is not None:
            got.append(clip)
    out.put(got)
    time.sleep(1)  # the others may be at it yet
    leases.close()


def test_of_many_processes_at_once_one_gets_each_clip(folder):
    spawn = multiprocessing.get_context("fork")
    out = spawn.Queue()
    processes = [spawn.Process(target=claim_all, args=(folder, 300, out)) for _ in range(6)]
    for process in processes:
        process.start()
    got = [out.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(clip for of_one in got for clip in of_one) == list(range(300))
    assert not folder.exists()


def test_a_killed_holders_clips_are_free_at_once_on_its_machine_and_count_its_death(folder):
    mine = Leases(folder, **QUICK)
    other = hold(folder, "a", "b")
    assert other.answers == ["0", "0"]
    assert mine.claim("a", 9) is None  # seen alive
    kill(other)
    assert mine.claim("a") is None  # a suspect, which was not asked for
    assert mine.claim("a", 9) == 1
    mine.release("a")
    assert mine.claim("b", 9) == 1
    mine.close()
    assert not folder.exists()


def test_who_was_dead_before_is_no_reason_to_suspect_a_clip(folder):
    kill(hold(folder, "a"))
    late = Leases(folder, **QUICK)
    assert late.claim("a") == 0
    late.close()
    assert not folder.exists()


def test_deaths_are_counted_on_within_a_session_also_by_who_comes_late(folder):
    first = hold(folder, "a", session="s")
    kill(first)
    second = hold(folder, "a", session="s")
    assert second.answers == ["1"]
    kill(second)
    third = Leases(folder, session="s", **QUICK)
    assert third.claim("a", 1) is None
    assert third.claim("a", 9) == 2
    third.close()
    assert not folder.exists()


def test_a_stopped_holder_loses_its_clips_after_patience_and_finds_out(folder, monkeypatch):
    """As from another machine, whose locks tell nothing: only the counter does."""
    there = Leases(folder, **QUICK)
    here = Leases(folder, **QUICK)
    here._machine = "another"
    assert there.claim("a") == 0
    looks = time.monotonic() + 1.0
    while time.monotonic() < looks:  # much longer than the patience: it beats
        assert here.claim("a", 9) is None
        time.sleep(0.01)
    monkeypatch.setattr(there, "_write", lambda fd: None)  # the heart stalls
    start = time.monotonic()
    wait_for(lambda: here.claim("a", 9) == 1)
    assert time.monotonic() - start >= QUICK["patience"] * 0.9
    assert (there.holds("a"), here.holds("a")) == (False, True)
    there.release("a")  # not its own any more
    assert here.holds("a")
    assert Leases(folder, **QUICK).claim("a", 9) is None
    here.release("a")
    assert there.claim("a") == 0


def test_what_the_observer_slept_through_is_no_stall(folder, monkeypatch):
    there, here = Leases(folder, beat=600), Leases(folder, beat=0.02, patience=5)
    here._machine = "another"
    assert there.claim("a") == 0
    assert here.claim("a", 9) is None
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 1e6)
    assert here.claim("a", 9) is None  # one look after a long sleep: the other may have slept as long
    monkeypatch.undo()
    for leases in (there, here):
        leases.close()


@pytest.mark.parametrize("apart", [-1e9, 1e9])
def test_clocks_of_day_do_not_matter(folder, monkeypatch, apart):
    there = Leases(folder, **QUICK)
    assert there.claim("a") == 0
    of_day, of_day_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: of_day() + apart)
    monkeypatch.setattr(time, "time_ns", lambda: of_day_ns() + int(apart * 1e9))
    here = Leases(folder, **QUICK)
    here._machine = "another"
    until = time.monotonic() + 1
    while time.monotonic() < until:
        assert here.claim("a", 9) is None
        for name in (f"{key_of('a')}.0", f"holder-{there.token}"):
            os.utime(folder / name, (0, 0))  # nor what the files' times say
    there.close()
    assert here.claim("a") == 0
    here.close()


def test_a_clock_of_day_that_is_set_while_a_holder_is_watched_does_not_matter(folder, monkeypatch):
    there, here = Leases(folder, beat=600), Leases(folder, beat=0.1, patience=5)
    here._machine = "another"
    assert there.claim("a") == 0
    hours = itertools.count(10**10, 3600)
    monkeypatch.setattr(time, "time", lambda: float(next(hours)))
    monkeypatch.setattr(time, "time_ns", lambda: next(hours) * 10**9)
    assert {here.claim("a", 9) for _ in range(100)} == {None}
    for leases in (there, here):
        leases.close()


def test_a_holder_whose_file_was_cleared_away_while_it_was_stopped_comes_back(folder):
    mine = Leases(folder, **QUICK)
    (folder / f"holder-{mine.token}").unlink()
    wait_for((folder / f"holder-{mine.token}").exists)
    assert mine.claim("a") == 0
    other = Leases(folder, **QUICK)
    assert other.claim("a", 9) is None
    for leases in (mine, other):
        leases.close()
    assert not folder.exists()


def test_a_lease_torn_in_the_making_is_taken_over_after_patience(folder):
    mine = Leases(folder, **QUICK)
    (folder / f"{key_of('a')}.0").touch()
    assert mine.claim("a", 9) is None
    wait_for(lambda: mine.claim("a") == 0)
    mine.close()
    assert not folder.exists()


def test_an_abandoned_lease_counts_as_a_death(folder):
    failing, mine = Leases(folder, **QUICK), Leases(folder, **QUICK)
    assert failing.claim("a") == 0
    assert mine.claim("a", 9) is None
    failing.close(abandon=True)
    assert mine.claim("a", 9) == 1
    mine.close()
    assert not folder.exists()


def race(folder, clips: int, rounds: int, seed: int, held: str) -> None:
    """Claims, marks what it holds in `held` with O_EXCL (two holders of one clip would collide), gives back."""
    import random

    rng, leases = random.Random(seed), Leases(folder, beat=0.05, patience=30)
    for _ in range(rounds):
        clip = f"clip{rng.randrange(clips)}"
        if leases.claim(clip, 10**6) is not None:
            mark = Path(held) / clip
            try:
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                os._exit(3)
            if rng.random() < 0.02:
                mark.unlink()
                os._exit(0)  # as if killed, with the lease in place
            time.sleep(rng.random() * 0.001)
            mark.unlink()
            leases.release(clip)
    leases.close()


def test_no_clip_has_two_holders_while_processes_come_die_and_take_over(folder, tmp_path):
    fork = multiprocessing.get_context("fork")
    (tmp_path / "held").mkdir()
    running, started = [], 0
    while started < 40 or running:
        for process in [p for p in running if not p.is_alive()]:
            process.join()
            assert process.exitcode == 0, "two holders of one clip"
            running.remove(process)
        if len(running) < 5 and started < 40:
            process = fork.Process(target=race, args=(folder, 4, 200, started, str(tmp_path / "held")))
            process.start()
            running.append(process)
            started += 1
        time.sleep(0.002)
    last = Leases(folder)
    for clip in range(4):
        assert last.claim(f"clip{clip}", 10**6) is not None
    last.close()
    assert not folder.exists()


def test_a_stopped_process_on_this_machine_is_taken_over_and_resumes_without_harm(folder):
    mine, other = Leases(folder, **QUICK), hold(folder, "a")
    assert mine.claim("a", 9) is None
    os.kill(other.pid, signal.SIGSTOP)
    wait_for(lambda: mine.claim("a", 9) == 1)
    os.kill(other.pid, signal.SIGCONT)
    time.sleep(0.1)
    assert mine.holds("a")
    kill(other)
    mine.close()
    assert not folder.exists()


def test_a_full_disk_says_so(folder, monkeypatch):
    mine, write = Leases(folder, beat=600), os.write

    def full(fd, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StoreFull, match=r"No space left on device: 0\.000 MB needed"):
        mine.claim("a")
    monkeypatch.setattr(os, "write", write)
    assert mine.claim("a") == 0  # nothing half made was left
    mine.close()


def test_a_lease_whose_answer_was_lost_on_the_way_is_its_makers(folder, monkeypatch):
    """A network file system that asks its server again may say that there is one: the one it has just made."""
    mine, link = Leases(folder, **QUICK), os.link

    def lost(source, target):
        link(source, target)
        raise FileExistsError(17, "File exists", target)

    monkeypatch.setattr(os, "link", lost)
    assert mine.claim("a") == 0
    monkeypatch.undo()
    assert (mine.holds("a"), Leases(folder, **QUICK).claim("a", 9)) == (True, None)
    mine.close()


def test_leases_need_no_hard_links_and_outlive_the_file_they_are_links_to(folder, monkeypatch):
    mine, other = Leases(folder, **QUICK), Leases(folder, **QUICK)
    assert mine.claim("linked") == 0
    (folder / f".lease-{mine.token}").unlink()  # as whoever thought this process dead clears away
    assert (mine.claim("again"), other.claim("linked", 9), other.claim("again", 9)) == (0, None, None)

    def refused(source, target):
        raise PermissionError(1, "Operation not permitted", target)

    monkeypatch.setattr(os, "link", refused)
    assert (mine.claim("made"), other.claim("made", 9), other.claim("linked", 9)) == (0, None, None)
    for leases in (mine, other):
        leases.close()
    assert not folder.exists()


def test_a_lease_is_known_where_every_name_of_a_file_has_a_number_of_its_own(folder, monkeypatch):
    """As on some FUSE mounts and on CIFS with noserverino."""
    monkeypatch.setattr(os.path, "samestat", lambda a, b: False)
    mine, other = Leases(folder, **QUICK), Leases(folder, **QUICK)
    assert (mine.claim("a"), other.claim("a", 9), mine.holds("a")) == (0, None, True)
    for leases in (mine, other):
        leases.close()
    assert not folder.exists()


def test_a_process_whose_folder_was_cleared_away_while_it_was_stopped_goes_on(folder):
    mine = Leases(folder, beat=600)
    assert mine.claim("a") == 0
    shutil.rmtree(folder)  # as by the last of others, to whom it seemed to be gone
    assert not mine.holds("a")
    mine.release("a")
    assert mine.claim("b") == 0
    other = Leases(folder, **QUICK)
    assert (other.claim("b", 9), other.claim("a")) == (None, 0)
    for leases in (mine, other):
        leases.close()
    assert not folder.exists()
