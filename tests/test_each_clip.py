"""The pass over clips of `targets`, `lift` and `points`: what becomes of clips when memory, a lease or a clip fails.

test_several_runs.py has runs of several processes.
"""

import errno
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from spatialprobe.engine.durable import StoreFull
from spatialprobe.engine.each_clip import Lost, each_clip
from spatialprobe.engine.failures import read_failures
from spatialprobe.engine.processes.leases import Leases
from spatialprobe.engine.report import Report
from spatialprobe.engine.targets.folder import TargetFolder, TargetSpec
from spatialprobe.engine.timing import Clock
from spatialprobe.engine.types import ClipError, ClipRef, FrameSelection


def run(root: Path, load, clips=range(5)) -> tuple[TargetFolder, Report]:
    """Makes a file of what `load` returns, a number, for each clip."""
    folder = TargetFolder(root, TargetSpec("teacher", "content:0", FrameSelection(), None))
    refs = [ClipRef(f"clip{i}", "/nowhere") for i in clips]
    write = lambda ref, made: folder.write(ref.id, {"x": torch.tensor(made)}, {})  # noqa: E731
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
