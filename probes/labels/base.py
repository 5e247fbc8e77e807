"""What is known about the frames of a clip beside its features, one interface for every dataset.

Conventions of everything read: a frame is a frame of the features' window; camera coordinates are OpenCV's (x right, y
down, z forward); pixel coordinates are those of the clip's label images, centres at whole numbers; lengths are metres
where `metric`, else of a scale that each clip has for itself (DL3DV, and what was lifted with it).
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spatialprobe.engine.clips.decode import load_clip
from spatialprobe.engine.types import ClipRef, FrameSelection, check_clip_id

LABELS = {  # name -> dtype, shape of S frames, meaning
    "tag_pixel_counts": (torch.int32, "S K", "pixels of each of K classes in each frame"),
    "instance_masks": (torch.int32, "S H W", "id of the object at each pixel, the same in all frames; 0 is none"),
    "depth": (torch.float32, "S H W", "distance along the camera's z axis"),
    "points": (torch.float32, "S H W 3", "world coordinates of each pixel"),
    "confidence": (torch.float32, "S H W", "how far depth and points are to be trusted"),
    "extrinsic": (torch.float32, "S 3 4", "world-to-camera: x_camera = R x_world + t"),
    "intrinsic": (torch.float32, "S 3 3", "pixels"),
    "images": (torch.uint8, "S 3 H W", "RGB"),
    "relations": (
        torch.float32,
        "S P 4",
        "P questions of each frame: relation, an index into `relation_names`, -1 in rows that ask nothing; id of the "
        "object it is asked of; id of the other one, or 0; answer: 1 or 0 for yes or no, a length, or 0 .. 12 hours",
    ),
}
FREE = ("H", "W", "P")  # sizes that a dataset chooses
SPLITS = ("train", "val")
_ONE_HEADER = Lock()  # numpy parses headers as Python literals, which Python 3.11 fails at in two threads (#106905)
MIN_TAG_PIXELS, MIN_TAG_FRAMES = 200, 2  # of a whole clip, for a class to count as present (the study's)


class Labels(ABC):
    """The labels of a dataset's clips. Cheap to make; files are opened by `read`, and only for the frames asked for."""

    names: tuple[str, ...]  # keys of LABELS that this dataset has
    class_names: tuple[str, ...] = ()  # [K], if it has tag_pixel_counts
    relation_names: tuple[str, ...] = ()  # of what relations may ask
    selection: FrameSelection = FrameSelection()  # its start and stride say which source frame is which label's
    metric: bool = True  # whether lengths are metres
    up: tuple[float, float, float] | None = None  # of the world that extrinsic is of, where it is known
    cameras_of: Path | None = None  # folder of the labels that extrinsic was taken from, if not made by these
    identity_is_no_pose: bool = False  # whether a frame without a pose has the identity

    def __init__(self, root: str | Path):
        self.root = Path(root)

    @abstractmethod
    def ids(self, split: str | None = None) -> list[str]:
        """Ids of the clips that have labels, sorted; of all, or of "train" or "val" where the dataset says which."""

    @abstractmethod
    def path(self, clip_id: str) -> Path:
        """The file or folder of a clip's labels."""

    @abstractmethod
    def _frames(self, path: Path) -> int:
        """How many frames of the window have labels."""

    @abstractmethod
    def _read(self, path: Path, frames: list[int], wanted: Sequence[str]) -> dict[str, Tensor]:
        """The labels `wanted`, unchecked, of frames that are there."""

    def frames(self, clip_id: str) -> int:
        """How many frames of the window have labels, from the first on. Raises as `read` does."""
        with self._explained(clip_id) as path:
            return self._frames(path)

    def read(self, clip_id: str, frames: Sequence[int], wanted: Sequence[str]) -> dict[str, Tensor]:
        """The labels `wanted` of S frames of the window, as LABELS says. Only these frames are read or decoded.

        Raises FileNotFoundError for a clip without labels, ValueError for a name or frame that is not there and for a
        file that is damaged or holds something else; all but the name's say which clip and file.
        """
        if unknown := sorted(set(wanted) - set(self.names)):
            raise ValueError(f"{self.root} has no {', '.join(unknown)}; it has {', '.join(self.names)}")
        with self._explained(clip_id) as path:
            there = self._frames(path)
            if not len(frames):
                raise ValueError("at least 1 frame must be asked for, got none")
            if outside := [f for f in frames if not 0 <= f < there]:
                raise ValueError(f"frames {outside} are not there: it has {there}")
            read = self._read(path, list(frames), wanted)
            _check(read, len(frames), len(self.class_names))
        return {name: read[name] for name in wanted}

    def object_names(self, clip_id: str) -> dict[int, str]:
        """What the objects of instance_masks are called, by their ids; of some or none where that is not known."""
        return {}

    def padded(self, clip_id: str) -> int:
        """Frames at the end of the window that repeat the last one of the clip."""
        return 0

    @contextmanager
    def _explained(self, clip_id: str) -> Iterator[Path]:
        """The path of a clip's labels, with errors that name the clip and the path."""
        path = self.path(check_clip_id(clip_id))
        if not path.exists():
            raise FileNotFoundError(f"clip {clip_id} has no labels: {path} does not exist")
        try:
            yield path
        except (ValueError, OSError, EOFError, SafetensorError) as error:  # EOFError: numpy's, of an empty file
            raise ValueError(f"clip {clip_id}: labels in {path}: {str(error).strip()}") from error


def _check(read: dict[str, Tensor], frames: int, classes: int) -> None:
    """Raises ValueError unless each label is what LABELS says and images of one clip have one size."""
    sizes: dict[str, int] = {"S": frames, "K": classes}
    for name, x in read.items():
        dtype, dims, _ = LABELS[name]
        known = {"S": frames} if name == "images" else sizes  # images may be larger than maps of them
        wanted = [int(d) if d.isdigit() else known.get(d, d) for d in dims.split()]
        fits = x.ndim == len(wanted) and all(d in (n, *FREE) for d, n in zip(wanted, x.shape, strict=True))
        if x.dtype != dtype or not fits or 0 in x.shape:
            shape = ", ".join(map(str, wanted))
            raise ValueError(f"{name} must be {dtype} [{shape}], got {x.dtype} {list(x.shape)}")
        if name in ("extrinsic", "intrinsic") and not x.isfinite().all():
            raise ValueError(f"{name} is not finite")
        known |= {d: n for d, n in zip(dims.split(), x.shape, strict=True) if d in FREE}


def presence_rates(labels: Labels, ids: Iterable[str]) -> Tensor:  # float64 [K]
    """Of these clips, the share in which each class is present: 200 pixels in at least 2 frames of the whole clip.

    What the study's `train_pos_rate` holds, for its head, middle and tail classes.
    """
    present = []
    for clip_id in ids:
        counts = labels.read(clip_id, range(labels.frames(clip_id)), ("tag_pixel_counts",))["tag_pixel_counts"]
        present.append((counts.sum(0) >= MIN_TAG_PIXELS) & ((counts > 0).sum(0) >= MIN_TAG_FRAMES))
    if not present:
        raise ValueError("rates of presence need at least 1 clip, got none")
    return torch.stack(present).double().mean(0)


# -- what the datasets' files have in common --------------------------------------------------------------------------


def split_ids(root: Path, split: str) -> list[str]:
    """ "<group>/<clip>" of every pair in `root`/{split}.json, in its order. Raises ValueError for anything else."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    listing = root / f"{split}.json"
    try:
        pairs = json.loads(listing.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{listing} does not exist, so which clips are in {split} is not known") from None
    except ValueError as error:
        raise ValueError(f"{listing}: not JSON: {error}") from error
    if not isinstance(pairs, list):
        raise ValueError(f"{listing}: wanted a list of [group, clip], got {type(pairs).__name__}")
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise ValueError(f"{listing}: wanted [group, clip], got {pair!r}")
    return [check_clip_id("/".join(pair)) for pair in pairs]


def read_names(file: Path, key: str, pair: Callable[[dict], tuple[int, str]]) -> dict[int, str]:
    """Names by id of the entries below `key` in a JSON file; none where it is missing. Raises ValueError for others."""
    try:
        pairs = [pair(entry) for entry in json.loads(file.read_text(encoding="utf-8-sig"))[key]]
    except FileNotFoundError:
        return {}
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file.name} must list named objects below {key}: {error!r}") from error
    if wrong := [p for p in pairs if not (isinstance(p[0], int) and p[0] > 0 and isinstance(p[1], str) and p[1])]:
        raise ValueError(f"{file.name} must have ids from 1 and names, got {wrong[0]}")
    return dict(pairs)


def mapped_array(path: Path) -> np.ndarray:
    """An .npy file, of which nothing but the header is read."""
    with _ONE_HEADER:
        return np.load(path, mmap_mode="r")


def read_array(path: Path, frames: list[int], dtype: str) -> np.ndarray:
    """These frames of an .npy file [F, ...]. Raises ValueError for another dtype."""
    array = mapped_array(path)
    if array.dtype != np.dtype(dtype) or array.ndim < 2:
        raise ValueError(f"{path.name} must be {dtype} [F, ...], got {array.dtype} {list(array.shape)}")
    if len(array) <= max(frames):
        raise ValueError(f"{path.name} has {len(array)} frames, frame {max(frames)} is wanted")
    return array[frames]


class TensorFile:
    """Single frames of the tensors [F, ...] in a safetensors file."""

    def __init__(self, path: Path):
        self._file = safe_open(path, "pt")
        self.keys = set(self._file.keys())
        self.metadata = self._file.metadata() or {}

    def shape(self, name: str) -> list[int]:
        self._must_hold(name)
        return self._file.get_slice(name).get_shape()

    def whole(self, name: str) -> Tensor:  # [F, ...]
        self._must_hold(name)
        return self._file.get_tensor(name)

    def frames(self, name: str, frames: list[int]) -> Tensor:  # [S, ...]
        self._must_hold(name)
        part = self._file.get_slice(name)
        if not part.get_shape() or part.get_shape()[0] <= max(frames):
            raise ValueError(f"{name} is {part.get_shape()}, frame {max(frames)} is wanted")
        return torch.cat([part[f : f + 1] for f in frames])

    def _must_hold(self, name: str) -> None:
        if name not in self.keys:
            raise ValueError(f"it has no {name}; it holds {', '.join(sorted(self.keys))}")


def read_images(ref: ClipRef, frames: list[int]) -> Tensor:  # uint8 [S, 3, H, W]
    """These frames of a video or a folder of images."""
    needed = sorted(set(frames))
    images = load_clip(ref, FrameSelection(), tuple(needed)).frames
    return images[[needed.index(f) for f in frames]]


def world_to_camera(pose: Tensor) -> Tensor:  # camera-to-world [S, 4, 4] -> float64 [S, 3, 4]
    """The inverse of rigid poses."""
    turn, centre = pose[:, :3, :3].double().mT, pose[:, :3, 3:].double()
    return torch.cat([turn, -turn @ centre], dim=2)
