"""A folder of lifted clips, `lift.json` and one `<clip id>.sft` per clip.

objects.<name>: the arrays of the object table (objects.py). Of its V views points [V, H, W, 3] in the lifted frame,
NaN where depth is not known (left out with points "none"), instance_masks uint16 [V, H, W], extrinsic float32
[V, 3, 4] (lifted frame to camera) and intrinsic float32 [V, 3, 3]. The table's words are in the header.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from spatialprobe.engine.files.clipfile import Entry, read_header
from spatialprobe.engine.files.spec_folder import SUFFIX, ClipFolder
from spatialprobe.engine.lifting.lift import Lifted
from spatialprobe.engine.lifting.objects import SHAPES, ObjectTable
from spatialprobe.engine.types import FrameSelection

__all__ = ["POINT_DTYPES", "SPEC", "SUFFIX", "LiftFolder", "LiftSpec", "file_tensors", "read_spec", "read_table"]

SPEC = "lift.json"
POINT_DTYPES = {"float16": torch.float16, "float32": torch.float32, "none": None}


@dataclass(frozen=True)
class LiftSpec:
    """What changes a value of a lifted clip. A folder holds clips of one spec."""

    data: str  # folder of the labels that masks were taken from
    depth: str  # folder of the labels that depth was taken from, which may be the same
    frames: FrameSelection  # the labels' cut; `query` says which frames were lifted, if they have depth and a pose
    metric: bool  # whether lengths are metres
    up: tuple[float, float, float] | None  # of the labels' world; None: the floor was looked for
    names: str | None = None  # file of the objects' names, if not the labels' own
    intrinsic_size: tuple[int, int] | None = None  # (H, W) of the images that the data's intrinsics are of
    points: str = "float16"  # key of POINT_DTYPES
    versions: dict[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        if self.points not in POINT_DTYPES:
            raise ValueError(f"points must be one of {', '.join(POINT_DTYPES)}, got {self.points!r}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "LiftSpec":
        raw = json.loads(text)
        tuples = {name: raw[name] and tuple(raw[name]) for name in ("up", "intrinsic_size")}
        return cls(**raw | {"frames": FrameSelection(**raw["frames"])} | tuples)


def read_spec(path: Path) -> LiftSpec:
    """Raises ValueError for a file that holds something else."""
    try:
        return LiftSpec.from_json(path.read_text())
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not the spec of a folder of lifted clips: {error}") from error


class LiftFolder(ClipFolder[LiftSpec]):
    NAME, WHAT, READ = SPEC, "lifted clips", staticmethod(read_spec)


def file_tensors(lifted: Lifted, masks: np.ndarray) -> dict[str, Tensor]:  # masks [V, H, W]
    """The tensors of a clip's file."""
    table = lifted.table
    tensors = {f"objects.{name}": torch.from_numpy(x) for name, x in table.arrays().items()}
    tensors["instance_masks"] = torch.from_numpy(masks.astype(np.uint16))
    tensors["extrinsic"] = torch.from_numpy(np.linalg.inv(table.poses)[:, :3].astype(np.float32))
    tensors["intrinsic"] = torch.from_numpy(table.intrinsic.astype(np.float32))
    return tensors | ({} if lifted.points is None else {"points": lifted.points})


def table_words(table: ObjectTable) -> dict[str, Any]:
    """What of a table is no array, for the header."""
    return {
        "tags": list(table.tags),
        "metric": table.metric,
        "gravity": table.gravity,
        "floor": table.floor,
        "size": list(table.size),
    }


def read_table(path: Path | str) -> ObjectTable:
    """The object table of a clip's file, of which nothing else is read. Raises ValueError for a file of other things.

    The checksum, which is of the whole file, is not checked.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            header = read_header(file)
            arrays = {name: _read(file, header.entries[f"objects.{name}"], SHAPES[name][0]) for name in SHAPES}
        words = header.provenance
        return ObjectTable(
            words["clip"],
            tuple(words["size"]),
            words["metric"],
            words["gravity"],
            words["floor"],
            tuple(words["tags"]),
            **arrays,
        )
    except LookupError as error:
        raise ValueError(f"{path} is no lifted clip: it has no {error.args[0]}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(file: BinaryIO, entry: Entry, dtype: str) -> np.ndarray:
    if torch.empty(0, dtype=entry.dtype).numpy().dtype != dtype:
        raise ValueError(f"wanted {dtype}, got {entry.dtype}")
    file.seek(entry.start)
    return np.frombuffer(bytearray(file.read(entry.nbytes)), dtype).reshape(entry.shape)
