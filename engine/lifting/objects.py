"""What is known about the objects of one clip once it is lifted to 3D: plain arrays, checked where they are made.

N objects, V views (frames of the window that were lifted), K sampled pixels per view. Lengths are metres where
`metric`, else of an unknown scale.

The lifted frame is right-handed with z up. Its origin lies below the first view's camera, on the floor where one was
found (else at the camera's height), and +y is where the first view looks, seen from above: x is to the right of it.
Cameras are OpenCV's (x right, y down, z forward); whole pixel coordinates are pixel centres.
"""

from dataclasses import dataclass, fields
from typing import Literal, get_args

import numpy as np

MARKS = frozenset("<>[]{}|")  # of which tokenizers and templates make tokens; no object's name has them
Gravity = Literal["poses", "floor", "camera"]  # where "up" is from; camera: only that the first view is held upright

SHAPES = {  # of an ObjectTable's arrays: name -> dtype, shape
    "frames": ("int64", "V"),
    "poses": ("float64", "V 4 4"),
    "intrinsic": ("float64", "V 3 3"),
    "ids": ("int64", "N"),
    "centre": ("float64", "N 3"),
    "extent": ("float64", "N 3"),
    "yaw": ("float64", "N"),
    "complete": ("bool", "N 3"),
    "pixels": ("int64", "N V"),
    "whole": ("float64", "N V"),
    "nearest": ("float64", "N V"),
    "box": ("float64", "N V 4"),
    "sample_pixels": ("int64", "V K 2"),
    "sample_points": ("float64", "V K 3"),
    "sample_ids": ("int64", "V K"),
}


@dataclass(frozen=True, eq=False)
class ObjectTable:
    """The objects of a clip, their boxes in the lifted frame, and how each view sees them."""

    clip: str
    size: tuple[int, int]  # (H, W) pixels of the views
    metric: bool  # whether lengths are metres
    gravity: Gravity
    floor: float | None  # share of the points below the camera that lie on the floor plane; None: there is no floor
    tags: tuple[str, ...]  # [N] what each object is called; several may be called the same
    frames: np.ndarray  # [V] frame of the window
    poses: np.ndarray  # [V, 4, 4] camera to lifted frame
    intrinsic: np.ndarray  # [V, 3, 3] pixels
    ids: np.ndarray  # [N] of the masks, from 1
    centre: np.ndarray  # [N, 3] of the box
    extent: np.ndarray  # [N, 3] full lengths of the box along its own x (the longer horizontal side), y and z (up)
    yaw: np.ndarray  # [N] radians about z from the frame's x to the box's x, in [-pi/2, pi/2)
    complete: np.ndarray  # [N, 3] whether the object was seen to end at both ends of that axis, with no part hidden
    pixels: np.ndarray  # [N, V] pixels of the object
    whole: np.ndarray  # [N, V] share of its outline where the object itself ends, not the image or something nearer
    nearest: np.ndarray  # [N, V] from the camera's centre to the nearest point seen; inf where there is none
    box: np.ndarray  # [N, V, 4] first u, first v, last u, last v of its pixels; NaN where there is none
    sample_pixels: np.ndarray  # [V, K, 2] (u, v) of pixels drawn away from edges of depth
    sample_points: np.ndarray  # [V, K, 3] their points in the lifted frame
    sample_ids: np.ndarray  # [V, K] the object each lies on, 0 for none

    def __post_init__(self):
        sizes = {"N": len(self.tags), "V": len(self.frames), "K": self.sample_ids.shape[-1]}
        for name, (dtype, dims) in SHAPES.items():
            x, wanted = getattr(self, name), tuple(int(d) if d.isdigit() else sizes[d] for d in dims.split())
            if x.dtype != dtype or x.shape != wanted:
                raise ValueError(
                    f"clip {self.clip}: {name} must be {dtype} {list(wanted)}, got {x.dtype} {list(x.shape)}"
                )
        if self.gravity not in get_args(Gravity):
            raise ValueError(f"clip {self.clip}: gravity must be one of {', '.join(get_args(Gravity))}")
        if len(set(self.ids.tolist())) < len(self.ids) or (self.ids < 1).any():
            raise ValueError(f"clip {self.clip}: object ids must be distinct and from 1, got {self.ids.tolist()}")
        for tag in self.tags:
            if not tag.strip() or not tag.isprintable() or set(tag) & MARKS:
                raise ValueError(
                    f"clip {self.clip}: objects must be called by printable words without {' '.join(sorted(MARKS))} "
                    f"(chats of questions have tokens like <image>), got {tag!r}"
                )
        for name in ("poses", "intrinsic", "centre", "extent", "yaw", "sample_points"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"clip {self.clip}: {name} is not finite")

    @property
    def upright(self) -> bool:
        """Whether "up" is known, so that heights and levels mean something."""
        return self.gravity != "camera"

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, as SHAPES lists them."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name in SHAPES}
