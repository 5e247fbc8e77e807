"""Kills, full disks and rivals: what a store holds is whole, and what a dead process left is cleared away.

Run as a script, this file is the process that is killed, or that runs out of room.
"""

import errno
import fcntl
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from spatialprobe.engine.files import durable
from spatialprobe.engine.files.durable import (
    RunFolder,
    StoreFull,
    append_line,
    publish_first,
    room_for,
    write_text,
    write_whole,
)
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import FeatureSpec, FrameSelection


def small_spec(seed=0) -> FeatureSpec:
    return FeatureSpec("qwen3_vl", "content:0", (1,), seed=seed, frames=FrameSelection(window=2))


def clip(value: float, channels: int = 64):
    x = torch.full((2, 16, 32, channels), float(value), dtype=torch.float16)
    token = torch.full((2, 16, 32), float(value))
    provenance = {"grid": [2, 16, 32], "rows_kept": [0, 1], "padded": 0}
    return {"layer1": x, "layer1.mean": token, "layer1.rstd": token}, torch.tensor([0, 1]), provenance


def run_script(work: str, *args) -> dict:
    """Runs one of the functions below in a process of its own, and returns the JSON it prints."""
    command = [sys.executable, __file__, work, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def forked(work, *args) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work(*args)
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize("removed", range(9))
def test_a_run_killed_while_it_removes_a_dead_ones_files_leaves_nothing_for_good(removed, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    dead, unlink, calls = tmp_path / "tmp/run-dead", os.unlink, []
    (dead / "of a library").mkdir(parents=True)
    for name in ("lock", "of a library/file", *(f"1-{i}.part" for i in range(7))):
        (dead / name).touch()

    def killed_in_between(*args, **kwargs):
        if len(calls) == removed:
            raise Killed
        calls.append(args)
        unlink(*args, **kwargs)

    monkeypatch.setattr(os, "unlink", killed_in_between)
    with pytest.raises(Killed):
        RunFolder(tmp_path / "tmp")
    monkeypatch.undo()
    assert sum(path.is_file() for path in dead.rglob("*")) == 9 - removed
    RunFolder(tmp_path / "tmp").close()
    assert not (tmp_path / "tmp").exists()


# -- kill -9 --------------------------------------------------------------------------------------------------------

CLIPS = 40


def write_what_is_missing(root: Path) -> None:
    store = FeatureStore.create(root, small_spec())
    ids = [f"{i % 3}/{i}" for i in range(CLIPS)]
    done = set(store.ids())
    todo = [i for i in range(CLIPS) if ids[i] not in done]

    def writer(mine):
        for i in mine:
            store.write(ids[i], *clip(i, channels=256))
            store.record_failure(f"failed/{i}", "decode", "x" * 200)

    threads = [threading.Thread(target=writer, args=(todo[k::2],)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def kill_many_times(root: str) -> dict:
    """Kills a process that writes, until 25 kills have struck, starting again from nothing when all is written."""
    rng, found, round_, kills, left, done = random.Random(0), [], 0, 0, 0, []
    while kills < 25:
        store_root = Path(root) / str(round_)
        pid = forked(write_what_is_missing, store_root)
        time.sleep(rng.uniform(0.005, 0.12))
        os.kill(pid, signal.SIGKILL)
        struck = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        kills += struck
        left += len(list(store_root.glob("tmp/run-*/*.part")))
        if (store_root / "spec.json").exists():
            store = FeatureStore.open(store_root)
            found += [p for p in store.verify(threads=1) if not p.startswith(("tmp/run-", "failed.jsonl: line"))]
            done.append(len(store))
        if not struck:
            round_ += 1
    for i in range(round_ + 1):
        write_what_is_missing(Path(root) / str(i))
    return {"kills": kills, "left": left, "found": found, "done": done, "rounds": round_ + 1}


def test_kill_9_at_any_moment_leaves_whole_files_and_the_next_run_ends_the_same(tmp_path):
    report = run_script("kill_many_times", tmp_path)
    assert report["kills"] == 25
    assert report["found"] == []
    assert report["left"] >= 5, "the kills did not strike while files were written"
    assert len(set(report["done"])) >= 5, "the kills did not strike at different moments"
    write_what_is_missing(tmp_path / "reference")
    reference = FeatureStore.open(tmp_path / "reference")
    for i in range(report["rounds"]):
        store = FeatureStore.open(tmp_path / str(i))
        assert [p for p in store.verify() if "is torn" not in p] == []
        assert not (store.root / "tmp").exists()
        assert store.ids() == reference.ids()
        assert all(store.path(name).read_bytes() == reference.path(name).read_bytes() for name in store.ids())


def test_a_file_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    store = FeatureStore.create(tmp_path / "s", small_spec())
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(str(Path(f"/proc/self/fd/{fd}").readlink())) or fsync(fd))
    monkeypatch.setattr(Path, "replace", lambda a, b: events.append((str(a), str(b))) or replace(a, b))
    store.write("new/folder/x", *clip(1))
    (temp, final) = next(event for event in events if isinstance(event, tuple))
    assert final == str(store.path("new/folder/x"))
    at = events.index((temp, final))
    assert temp in events[:at]
    clips = str(store.clips)
    assert {clips, f"{clips}/new"} <= set(events[:at])  # the new folders' names
    assert f"{clips}/new/folder" in events[at:]


def test_texts_and_lines_reach_the_disk_before_anybody_goes_on(tmp_path, monkeypatch):
    events = []
    fsync, link = os.fsync, Path.hardlink_to
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(str(Path(f"/proc/self/fd/{fd}").readlink())) or fsync(fd))
    monkeypatch.setattr(Path, "hardlink_to", lambda a, b: events.append((str(a), str(b))) or link(a, b))
    temp, final = tmp_path / "temp", tmp_path / "final"
    write_text(temp, "first")
    publish_first(temp, final)
    append_line(tmp_path / "lines", "one")
    place, told = str(tmp_path), str(temp)
    assert events == [told, (str(final), told), place, str(tmp_path / "lines")]
    with pytest.raises(FileExistsError):
        write_text(final, "second")
    assert final.read_text() == "first"


@pytest.mark.parametrize("links", [True, False])
def test_of_two_first_files_the_first_stays_also_where_there_are_no_links(tmp_path, monkeypatch, links):
    def no_links(self, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", no_links)
    for text in ("first", "second"):
        write_text(tmp_path / text, text)
        publish_first(tmp_path / text, tmp_path / "final")
        assert [path.name for path in tmp_path.iterdir()] == ["final"]
        assert (tmp_path / "final").read_text() == "first"


def test_a_link_that_fails_otherwise_is_an_error(tmp_path, monkeypatch):
    def broken(self, target):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "hardlink_to", broken)
    write_text(tmp_path / "temp", "text")
    with pytest.raises(OSError, match="Input/output error"):
        publish_first(tmp_path / "temp", tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["temp"]


def test_threads_share_the_syncs_of_a_folder_that_begin_after_they_came(tmp_path, monkeypatch):
    """Of three threads the second and third come while the first one's sync runs: one more is enough, and is needed."""
    events, let = [], threading.Event()

    def sync(path: Path) -> None:
        events.append("begin")
        if events.count("begin") == 1:
            assert let.wait(60)
        events.append("end")

    def come(name: str) -> None:
        durable.sync_folder(tmp_path)
        events.append(name)

    def wait_for(what) -> None:
        end = time.monotonic() + 60
        while not what() and time.monotonic() < end:
            time.sleep(0.001)
        assert what()

    monkeypatch.setattr(durable, "_sync_folder", sync)
    threads = [threading.Thread(target=come, args=(name,)) for name in ("first", "other", "other")]
    threads[0].start()
    wait_for(lambda: events == ["begin"])
    for thread in threads[1:]:
        thread.start()
    wait_for(lambda: durable._folder_syncs[str(tmp_path)].wanted == 3)
    let.set()
    for thread in threads:
        thread.join(60)
    events.remove("first")  # whenever it is woken
    assert events == ["begin", "end", "begin", "end", "other", "other"]
    durable.sync_folder(tmp_path)
    assert events.count("end") == 3


def test_a_forked_child_waits_for_no_sync_of_its_parents(tmp_path):
    with durable._folder_syncs_lock:  # as another thread's, at the moment of the fork
        pid = forked(durable.sync_folder, tmp_path)
    end, done = time.monotonic() + 20, (0, 0)
    while not done[0] and time.monotonic() < end:
        time.sleep(0.01)
        done = os.waitpid(pid, os.WNOHANG)
    if not done[0]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert done == (pid, 0)


# -- temporary files ------------------------------------------------------------------------------------------------


def test_only_dead_runs_are_cleared_away(tmp_path):
    def hold(ready: int) -> None:
        store = FeatureStore.create(tmp_path / "s", small_spec())
        store.run.file().write_bytes(b"half")
        os.write(ready, b"1")
        signal.pause()

    read, write = os.pipe()
    holders = [forked(hold, write), forked(hold, write)]
    try:
        assert os.read(read, 1) == os.read(read, 1) == b"1"
        store = FeatureStore.create(tmp_path / "s", small_spec())
        assert len(list((tmp_path / "s" / "tmp").glob("run-*/*.part"))) == 2
        assert store.verify() == []
        os.kill(holders[0], signal.SIGKILL)
        os.waitpid(holders.pop(0), 0)
        (problem,) = store.verify()
        assert problem.startswith("tmp/run-")
        assert problem.endswith("left by a killed run; the next run removes it")
        FeatureStore.create(tmp_path / "s", small_spec())
        assert len(list((tmp_path / "s" / "tmp").glob("run-*/*.part"))) == 1
        assert store.verify() == []
    finally:
        for pid in holders:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_forked_child_shares_the_folder_and_does_not_take_it_along(tmp_path):
    run = RunFolder(tmp_path / "tmp")
    names = {run.file().name}

    def child() -> None:
        (tmp_path / "name").write_text(run.file().name)
        run.close()

    os.waitpid(forked(child), 0)
    assert (tmp_path / "name").read_text() not in names | {run.file().name}
    assert run.path.is_dir()
    run.close()
    assert not (tmp_path / "tmp").exists()


def test_folders_that_are_not_runs_stay(tmp_path):
    for name in ("tmp/run-mine/data", "tmp/other"):
        (tmp_path / name).mkdir(parents=True)
    RunFolder(tmp_path / "tmp").close()
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.name != "lock") == [
        "tmp",
        "tmp/other",
        "tmp/run-mine",
        "tmp/run-mine/data",
    ]


def test_what_a_kill_left_before_its_lock_is_cleared_away_but_not_where_locks_do_not_work(tmp_path, monkeypatch):
    """A run's folder is empty between its making and its lock's, which is guarded by a lock: if there are any."""

    def failing(number: int):
        def flock(fd, operation):
            raise OSError(number, os.strerror(number))

        return flock

    (tmp_path / "tmp" / "run-begun").mkdir(parents=True)
    (tmp_path / "tmp" / "run-file").write_text("no folder at all")
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", failing(errno.ENOLCK))
        RunFolder(tmp_path / "tmp").close()
        assert (tmp_path / "tmp" / "run-begun").exists()
        patch.setattr(fcntl, "flock", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):
            RunFolder(tmp_path / "tmp")
    RunFolder(tmp_path / "tmp").close()
    assert [path.name for path in (tmp_path / "tmp").iterdir() if path.name != "lock"] == ["run-file"]


def test_a_run_that_ended_since_the_listing_is_not_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [self / "run-gone"])
    assert durable.dead_runs(tmp_path) == []


@pytest.mark.parametrize("remade", [False, True])
def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch, remade):
    path, flock, asked = tmp_path / "tmp" / "lock", fcntl.flock, []

    def late(fd, operation):
        if not asked:  # the last one out removes the file between its opening and its lock
            path.unlink()
            if remade:
                path.touch()
        asked.append(operation)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with durable._locked(path) as works, path.open() as other:
        assert works
        assert len(asked) == 2
        with pytest.raises(BlockingIOError):
            flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_run_whose_file_is_gone_clears_away_the_rest(tmp_path, monkeypatch):
    """Its lock goes last, for without it a folder with files in it is nobody's."""
    other, gone, unlink = RunFolder(tmp_path / "tmp"), [], Path.unlink
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    run = RunFolder(tmp_path / "tmp")
    files = [run.file() for _ in range(3)]
    for file in files:
        file.write_bytes(b"half")

    def watched(self, missing_ok=False):
        gone.append(self.name)
        if self == files[1]:
            unlink(self)  # by another process, between the listing and now
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    path = run.path
    run.close()
    assert not path.exists()
    assert sorted(gone[:3]) == sorted(file.name for file in files)
    assert gone[3:] == ["lock"]
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert (tmp_path / "tmp" / "lock").exists()  # the other's
    other.close()
    assert not (tmp_path / "tmp").exists()


# -- rivals ---------------------------------------------------------------------------------------------------------


def race(root: str) -> dict:
    """Many times: 6 processes make one store at once, with two specs, and write the same clips."""
    outcomes = []
    for i in range(5):
        store_root = Path(root) / str(i)
        start = time.monotonic() + 0.05

        def rival(seed: int, store_root=store_root, start=start) -> None:
            time.sleep(max(0.0, start - time.monotonic()))
            try:
                store = FeatureStore.create(store_root, small_spec(seed), {"seed": seed})
            except ValueError as error:
                os._exit(3 if "features of another spec" in str(error) else 4)
            for k in range(3):
                store.write(f"c{k}", *clip(k))
                store.record_failure(f"f{os.getpid()}-{k}", "decode", "r" * 500)

        pids = {forked(rival, k % 2): k % 2 for k in range(6)}
        codes = [[], []]
        for _ in pids:
            pid, status = os.wait()
            codes[pids[pid]].append(os.waitstatus_to_exitcode(status))
        store = FeatureStore.open(store_root)
        outcomes.append([store.spec.seed, codes, store.verify(threads=1), store.ids(), len(store.failures())])
    return {"outcomes": outcomes}


def test_of_two_specs_at_once_one_wins_and_the_other_is_refused(tmp_path):
    for winner, codes, problems, ids, failures in run_script("race", tmp_path)["outcomes"]:
        assert codes[winner] == [0, 0, 0]
        assert codes[1 - winner] == [3, 3, 3]
        assert (problems, ids, failures) == ([], ["c0", "c1", "c2"], 9)


def test_failures_of_many_threads_are_all_there(tmp_path):
    store = FeatureStore.create(tmp_path / "s", small_spec())

    def record(k: int) -> None:
        for i in range(20):
            store.record_failure(f"{k}/{i}", "decode", "x" * (1 + 100 * i))

    threads = [threading.Thread(target=record, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: len(r["reason"]) for name, r in store.failures().items()} == {
        f"{k}/{i}": 1 + 100 * i for k in range(6) for i in range(20)
    }


# -- no room, and memory --------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_stops_with_a_clear_line_and_loses_nothing(small_disk):
    store = FeatureStore.create(small_disk / "s", small_spec())
    (small_disk / "other").write_bytes(bytes(200_000))

    def write_until_full() -> None:
        for i in range(99):
            store.write(f"a/{i}", *clip(i))

    with pytest.raises(StoreFull) as caught:
        write_until_full()
    error, full_at, free = caught.value, len(store), os.statvfs(small_disk)
    assert full_at >= 3
    assert (error.errno, error.filename) == (errno.ENOSPC, str(store.path(f"a/{full_at}")))
    free = free.f_bavail * free.f_frsize
    assert f"{2 * 16 * 32 * (64 * 2 + 8) / 1e6:.3f} MB needed, {free / 1e6:.3f} MB free" in str(error)
    assert len(str(error).splitlines()) == 1
    assert not list(small_disk.rglob("*.part"))
    assert store.verify() == []

    (small_disk / "filler").write_bytes(bytes(free))
    with pytest.raises(StoreFull, match=r"failed\.jsonl"):
        store.record_failure("c", "decode", "x" * 10_000)
    with pytest.raises(StoreFull, match=r"MB free"):
        FeatureStore.create(small_disk / "t", small_spec())
    for name in ("other", "filler"):
        (small_disk / name).unlink()
    store.write(f"a/{full_at}", *clip(full_at))
    assert len(store) == full_at + 1
    assert [p for p in store.verify() if "is torn" not in p] == []


def test_a_page_that_does_not_fit_is_named_and_leaves_nothing(small_disk):
    page = small_disk / "page.html"
    with pytest.raises(StoreFull, match=r"2\.000 MB needed, .* MB free: '.*/page\.html'"):
        write_whole(page, "x" * 2_000_000)
    assert list(small_disk.iterdir()) == []


def test_only_errors_of_no_room_are_full_disks_and_the_innermost_names_its_file(tmp_path):
    with pytest.raises(FileNotFoundError), room_for(tmp_path / "a", 1):
        (tmp_path / "b").read_bytes()
    with pytest.raises(StoreFull) as caught, room_for(tmp_path / "a", 1), room_for(tmp_path / "b", 2_000_000):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    assert "Disk quota exceeded: 2.000 MB needed" in str(caught.value)
    assert caught.value.filename == str(tmp_path / "b")


def test_a_line_that_did_not_fit_whole_is_no_room_and_stays_alone(tmp_path, monkeypatch):
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:4]))
        with pytest.raises(StoreFull, match=r"No space left on device: 0\.000 MB needed"):
            append_line(tmp_path / "lines", "a line")
    append_line(tmp_path / "lines", "another")
    assert (tmp_path / "lines").read_text() == "a li\nanother\n"


def write_much_then_too_much(root: str) -> dict:
    store = FeatureStore.create(root, small_spec())
    store.write("small", *clip(1))
    large, rows, provenance = clip(1)
    large["layer1"] = torch.ones((2, 16, 32, 40_000), dtype=torch.float16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = store.write("large", large, rows, provenance)
    extra = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    try:
        store.write("larger", large, rows, provenance)
    except StoreFull as error:
        message = str(error)
    parts = len(list(Path(root).rglob("*.part")))
    return {"copies": extra / size, "message": message, "parts": parts, "problems": store.verify()}


def test_writing_copies_no_tensor_and_a_file_size_limit_is_no_room(tmp_path):
    report = run_script("write_much_then_too_much", tmp_path / "s")
    assert report["copies"] < 0.1
    assert "File too large: 81.928 MB needed" in report["message"]
    assert report["message"].endswith("/s/clips/larger.safetensors'")
    assert (report["parts"], report["problems"]) == (0, [])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))  # noqa: T201
