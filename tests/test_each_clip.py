"""The pass over clips of `targets`, `lift` and `points`: what becomes of clips when memory, a lease or a clip fails.

test_several_runs.py has runs of several processes.
"""

import errno
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

import pytest
import torch

from spatialprobe.engine.files.durable import StoreFull
from spatialprobe.engine.files.failures import read_failures
from spatialprobe.engine.pipeline.each_clip import Lost, each_clip
from spatialprobe.engine.pipeline.outcomes import Report
from spatialprobe.engine.pipeline.timing import Clock
from spatialprobe.engine.processes.leases import Leases
from spatialprobe.engine.targets.folder import TargetFolder, TargetSpec
from spatialprobe.engine.types import ClipError, ClipRef, FrameSelection, ShortClip


def run(root: Path, load, clips=range(5), *, write=None, short="pad") -> tuple[TargetFolder, Report]:
    """Makes a file of what `load` returns, a number, for each clip."""
    folder = TargetFolder(root, TargetSpec("teacher", "content:0", FrameSelection(short=short), None))
    refs = [ClipRef(f"clip{i}", "/nowhere") for i in clips]
    write = write or (lambda ref, made: folder.write(ref.id, {"x": torch.tensor(made)}, {}))
    return folder, each_clip(refs, folder, load, write, clock=Clock(torch.device("cpu")), loaders=1, writers=1)


def number(ref: ClipRef) -> int:
    return int(ref.id.removeprefix("clip"))


def failures(folder: TargetFolder) -> dict[str, tuple[str, str]]:
    records, torn = read_failures(folder.root / "failed.jsonl")
    assert not torn
    return {clip_id: (record["stage"], record["reason"]) for clip_id, record in records.items()}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "MemoryError"),  # as Python's own, which says nothing
        (MemoryError("no room for 3 GB\nat all"), "no room for 3 GB"),
        (torch.OutOfMemoryError("CUDA out of memory\nat all"), "CUDA out of memory"),
    ],
)
def test_without_memory_the_run_ends_and_says_so(tmp_path, error, told):
    def load(ref):
        if ref.id == "clip2":
            raise error
        return number(ref)

    folder, report = run(tmp_path, load)
    assert folder.ids() == ["clip0", "clip1"]
    assert (report.written, report.failed, report.stopped) == (2, 0, told)
    assert failures(folder) == {}
    assert not (tmp_path / "leases").exists()


def test_a_lost_clip_is_recorded_with_one_line_and_the_run_goes_on(tmp_path):
    lost = {
        "clip1": Lost.by("read", ValueError()),
        "clip3": Lost.by("lift", OSError("no such file\nor folder")),
        "clip4": Lost.by("lift", ClipError("too short")),
    }
    folder, report = run(tmp_path, lambda ref: lost.get(ref.id, 0))
    assert folder.ids() == ["clip0", "clip2"]
    assert failures(folder) == {
        "clip1": ("read", "ValueError"), "clip3": ("lift", "no such file"), "clip4": ("lift", "too short"),
    }  # fmt: skip
    assert (report.asked, report.written, report.failed, report.stopped) == (5, 2, 3, "")


def test_a_short_clip_is_skipped_where_that_was_asked_for(tmp_path):
    lost = {"clip1": Lost.by("read", ShortClip("window of 2 frames, got 1"))}
    folder, report = run(tmp_path, lambda ref: lost.get(ref.id, 0), short="skip")
    assert (report.written, report.skipped, report.failed) == (4, 1, 0)
    assert failures(folder) == {}


@pytest.mark.parametrize(("error", "loads_for"), [(KeyboardInterrupt(), 1.5), (RuntimeError("a bug"), 0)])
def test_nothing_is_under_way_when_a_run_has_ended(tmp_path, error, loads_for):
    """Two clips are being written and one is loaded when the one before it ends the run."""
    ended, begun, done = Event(), [], []

    def load(ref):
        if ref.id == "clip2":
            ended.set()
            raise error
        begun.append(("load", ref.id))
        if ref.id == "clip3":
            time.sleep(loads_for)
        done.append(("load", ref.id))
        return number(ref)

    def write(ref, made):
        begun.append(("write", ref.id))
        assert ended.wait(60)
        time.sleep(0.3)
        done.append(("write", ref.id))

    if isinstance(error, KeyboardInterrupt):
        _, report = run(tmp_path, load, write=write)
        assert (report.interrupted, report.stopped, report.written) == (True, "", 2)
        assert report.timing["stages"]["wait for loaders"]["seconds"] > 0
    else:
        with pytest.raises(RuntimeError, match="a bug"):
            run(tmp_path, load, write=write)
    assert sorted(done) == sorted(begun)
    assert {("write", "clip0"), ("write", "clip1")} <= set(done)


@pytest.mark.parametrize(("error", "told"), [(KeyboardInterrupt(), ""), (MemoryError("no room"), "no room; ")])
def test_a_clip_that_may_not_be_written_while_a_run_ends_is_said(tmp_path, error, told):
    ended = Event()

    def load(ref):
        if ref.id == "clip2":
            ended.set()
            raise error

    def write(ref, made):
        assert ended.wait(60)
        if ref.id == "clip0":
            raise PermissionError(errno.EACCES, "Permission denied", ref.id)

    _, report = run(tmp_path, load, write=write)
    assert (report.written, report.failed, report.interrupted) == (1, 0, not told)
    assert report.stopped == f"{told}[Errno 13] Permission denied: 'clip0'"


def test_loaders_wait_for_writers(tmp_path):
    """While the first clip is written two more are given to the writer, and a loader is ahead of them by one."""
    loads, seen = [], []

    def load(ref):
        loads.append(ref.id)
        return 0

    def write(ref, made):
        end = time.monotonic() + 20
        while len(loads) < 4 and time.monotonic() < end:
            time.sleep(0.01)
        if not seen:
            time.sleep(0.2)
        seen.append(len(loads))

    _, report = run(tmp_path, load, range(20), write=write)
    assert seen[0] == 4
    assert report.written == 20


def test_a_clip_that_is_written_is_not_kept_while_the_next_one_loads(tmp_path):
    made, written, kept = [], Event(), []

    def load(ref):
        if ref.id == "clip1":
            assert written.wait(60)
            end = time.monotonic() + 10
            while made[0]() is not None and time.monotonic() < end:
                time.sleep(0.01)
            kept.append(made[0]())
        clip = {ref.id}
        made.append(weakref.ref(clip))
        return clip

    run(tmp_path, load, write=lambda ref, clip: written.set())
    assert kept == [None]


def test_what_fails_elsewhere_after_the_start_has_failed_here_too(tmp_path, monkeypatch):
    """Also between the start of a run and its first look at who works on what."""
    ids, loads = TargetFolder.ids, []

    def listed(self):
        self.record_failure("clip3", "read", "too dark")
        return ids(self)

    monkeypatch.setattr(TargetFolder, "ids", listed)
    _, report = run(tmp_path, lambda ref: loads.append(ref.id) or 0)
    assert loads == ["clip0", "clip1", "clip2", "clip4"]
    assert report.failures == {"clip3": "read: too dark"}


def test_what_failed_in_the_other_run_is_not_tried_again_and_has_failed_here_too(tmp_path):
    both, loads = Barrier(2, timeout=60), []

    def load(ref):
        loads.append(ref.id)
        if len(loads) <= 2:  # a clip each
            both.wait()
        return Lost.by("read", ClipError("too dark")) if ref.id in ("clip0", "clip3") else number(ref)

    with ThreadPoolExecutor(2) as pool:
        (folder, one), (_, other) = pool.map(lambda _: run(tmp_path, load, range(9)), range(2))
    assert sorted(loads) == [f"clip{i}" for i in range(9)]
    told = {"clip0": "read: too dark", "clip3": "read: too dark"}
    assert one.failures == other.failures == told
    assert len((tmp_path / "failed.jsonl").read_text().splitlines()) == 2
    for mine, theirs in ((one, other), (other, one)):
        assert (mine.asked, mine.present, mine.failed, mine.elsewhere) == (9, 0, 2, theirs.written)
        assert mine.written + mine.elsewhere == 7
    assert len(folder.ids()) == 7


def test_a_clip_that_was_taken_over_is_not_written_but_looked_at_again(tmp_path, monkeypatch):
    holds, asked, loads = Leases.holds, Counter(), Counter()

    def lost_once(self, clip_id):
        asked[clip_id] += 1
        return not (clip_id == "clip1" and asked[clip_id] == 1) and holds(self, clip_id)

    def load(ref):
        loads[ref.id] += 1
        return loads[ref.id]

    monkeypatch.setattr(Leases, "holds", lost_once)
    folder, report = run(tmp_path, load)
    assert loads == {"clip0": 1, "clip1": 2, "clip2": 1, "clip3": 1, "clip4": 1}
    assert (report.written, report.elsewhere, report.failed) == (5, 0, 0)
    assert len(folder.ids()) == 5


def test_without_room_for_leases_the_run_ends_and_says_so(tmp_path, monkeypatch):
    def full(self):
        raise StoreFull(errno.ENOSPC, "no room", str(self.folder))

    monkeypatch.setattr(Leases, "_enter", full)
    folder, report = run(tmp_path, number)
    assert (report.asked, report.written, report.failed) == (5, 0, 0)
    assert "no room" in report.stopped
    assert folder.ids() == []


def test_clips_in_a_folder_called_leases_stay_there(tmp_path):
    folder, report = run(tmp_path, lambda ref: 0, ["0", "1"])
    inside = ClipRef("leases/a", "/nowhere")
    folder.write(inside.id, {"x": torch.tensor(1)}, {})
    _, report = run(tmp_path, number)
    assert (report.written, report.present) == (3, 2)
    assert folder.ids() == ["clip0", "clip1", "clip2", "clip3", "clip4", inside.id]
    assert [path.name for path in (tmp_path / "leases").iterdir()] == ["a.sft"]
