"""The pass over clips of `targets`, `lift` and `points`: what becomes of clips when memory or a clip fails."""

import pytest
import torch

from spatialprobe.engine.each_clip import Lost, each_clip
from spatialprobe.engine.timing import Clock
from spatialprobe.engine.types import ClipError, ClipRef


class Place:
    """What is written to, in memory."""

    def __init__(self):
        self.written, self.failed = {}, {}

    def ids(self) -> list[str]:
        return list(self.written)

    def record_failure(self, clip_id: str, stage: str, reason: str) -> None:
        self.failed[clip_id] = (stage, reason)


def run(load, count: int = 5):
    place, refs = Place(), [ClipRef(f"clip{i}", "/nowhere") for i in range(count)]
    write = lambda ref, made: place.written.__setitem__(ref.id, made)  # noqa: E731
    return place, each_clip(refs, place, load, write, clock=Clock(torch.device("cpu")), loaders=1, writers=1)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "MemoryError"),  # as Python's own, which says nothing
        (MemoryError("no room for 3 GB\nat all"), "no room for 3 GB"),
    ],
)
def test_without_memory_the_run_ends_and_says_so(error, told):
    def load(ref):
        if ref.id == "clip2":
            raise error
        return ref.id.upper()

    place, report = run(load)
    assert place.written == {"clip0": "CLIP0", "clip1": "CLIP1"}
    assert (report.written, report.failed, report.stopped) == (2, 0, told)
    assert place.failed == {}


def test_a_lost_clip_is_recorded_with_one_line_and_the_run_goes_on():
    lost = {
        "clip1": Lost.by("read", ValueError()),
        "clip3": Lost.by("lift", OSError("no such file\nor folder")),
        "clip4": Lost.by("lift", ClipError("too short")),
    }
    place, report = run(lambda ref: lost.get(ref.id, ref.id))
    assert place.written == {"clip0": "clip0", "clip2": "clip2"}
    assert place.failed == {
        "clip1": ("read", "ValueError"), "clip3": ("lift", "no such file"), "clip4": ("lift", "too short"),
    }  # fmt: skip
    assert (report.asked, report.written, report.failed, report.stopped) == (5, 2, 3, "")
