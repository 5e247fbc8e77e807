"""What is made of a point, and what is asked of labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from spatialprobe.engine.pointmaps.encode import MAX_BANDS, channel_names
from spatialprobe.engine.types import FrameSelection

FRAMES = {  # what coordinates are relative to
    "world": "the labels' world",
    "first": "the camera of the window's first frame",
    "camera": "each frame's own camera",
}
UNITS = {
    "metres": "metres",
    "clip": "the mean distance of the clip's points from the cameras that see them",
}
LAYER = 0  # the name of the one tensor of a store of points


class PointLabels(Protocol):
    """Labels with "points" and "confidence", and "extrinsic" where cameras matter: see `probes.labels`."""

    root: Path
    names: tuple[str, ...]
    metric: bool  # whether lengths are metres
    selection: FrameSelection  # its start and stride say which source frame is which label's

    def ids(self) -> list[str]: ...

    def read(self, clip_id: str, frames: Sequence[int], wanted: Sequence[str]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class PointOptions:
    """All of it is in the store's spec."""

    bands: int = 6  # of wavelengths 2 pi / 2^k units: 6.28 to .196
    frame: str = "world"  # of FRAMES
    unit: str = "metres"  # of UNITS

    def __post_init__(self):
        if not 0 <= self.bands <= MAX_BANDS:
            raise ValueError(f"bands must be 0 .. {MAX_BANDS}, got {self.bands}")
        for name, value, table in (("frame", self.frame, FRAMES), ("unit", self.unit, UNITS)):
            if value not in table:
                raise ValueError(f"{name} must be one of {', '.join(table)}, got {value!r}")

    @property
    def channels(self) -> int:
        return len(channel_names(self.bands))

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels that are read."""
        return ("points", "confidence") + (() if (self.frame, self.unit) == ("world", "metres") else ("extrinsic",))
