"""The nouns of the engine: plain data, checked where it is made. Nothing here imports a model library.

F frames of a clip's window, T feature rows, H x W token grid, C channels, B clips in a batch, K noise steps.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

STORE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,  # with one scale per token
    "int8": torch.int8,  # with one scale per token
}
COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

COMPILE = ("none", "blocks", "graphs")  # torch.compile of each block; graphs: CUDA graphs too
ATTENTION = ("sdpa", "math", "flash", "efficient", "cudnn", "flash3", "flash4")  # sdpa: whichever torch picks
PRECISION = ("full", "fp8")  # of the blocks' linear layers; full: the compute dtype

Short = Literal["pad", "error", "skip"]


class ClipError(ValueError):
    """One clip cannot be extracted; the run goes on. The message is one line, for `failed.jsonl`."""


class ShortClip(ClipError):
    """The clip has fewer frames than its window, and `short` forbids padding."""


def first_line(error: BaseException) -> str:
    """What an error says, for records of one line; its name where it says nothing, as Python's own MemoryError does."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


class Refused(RuntimeError):
    """The model cannot be run in the way that was asked for. The message is one line that says why."""


@lru_cache(maxsize=1024)  # every stage of a clip's life asks
def check_clip_id(clip_id: str) -> str:
    """Returns `clip_id`, or raises ValueError: an id becomes a path below the store, so it must stay there."""
    if not clip_id.isprintable() and any(0xD800 <= ord(c) < 0xE000 for c in clip_id):
        raise ValueError(f"clip id must be UTF-8, got {clip_id!r}: rename the file, or name the clip in a list file")
    parts = clip_id.split("/")
    if any(p.endswith((".safetensors", ".sft")) for p in parts):  # such a folder would stand where a clip's file goes
        raise ValueError(f"clip id must have no part that ends in .safetensors or .sft, got {clip_id!r}")
    if not clip_id or any(p in ("", ".", "..") or p.startswith(".") for p in parts):
        raise ValueError(f"clip id must be a relative path without empty, '.' or hidden parts, got {clip_id!r}")
    if any(c in clip_id for c in "\\\0\n\r") or any(len(p.encode()) > 200 for p in parts):
        raise ValueError(f"clip id must have no backslash, NUL or newline and parts of <= 200 bytes, got {clip_id!r}")
    return clip_id


@dataclass(frozen=True)
class ClipRef:
    """Where a clip lives. Cheap to list, hash and send to a worker; nothing is opened before it is decoded."""

    id: str  # unique in a store; becomes the file name, may hold "/"
    source: str  # a video file, or a folder of images in name order
    frames: tuple[str, ...] = ()  # instead of all of `source`: these image files, in time order
    start_idx: int | None = None  # first frame of the window, where the layout knows it (DL3DV)

    def __post_init__(self):
        check_clip_id(self.id)
        if self.start_idx is not None and self.start_idx < 0:
            raise ValueError(f"clip {self.id}: start_idx must be a frame number from 0, got {self.start_idx}")


@dataclass(frozen=True)
class FrameSelection:
    """Which source frames make the window, and which frames of the window are wanted.

    Frame j of the window is source frame `first + j * stride`; `start` says where `first` is.
    """

    window: int | None = None  # F; None takes every frame from `start` on
    start: str | int = "start"  # "start", "center", "start_idx" (the ref's own), or a source frame number
    stride: int = 1
    query: str = ":"  # wanted frames of the window, as comma-separated indices and slices: "0,1:76:4"
    short: Short = "pad"  # a source shorter than the window: repeat its last frame, fail the clip, or skip it

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 frame, got {self.window}")
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1, got {self.stride}")
        if isinstance(self.start, int):
            if self.start < 0:
                raise ValueError(f"start must be a frame number from 0, got {self.start}")
        elif self.start not in ("start", "center", "start_idx"):
            raise ValueError(f"start must be 'start', 'center', 'start_idx' or a frame number, got {self.start!r}")
        if self.short not in get_args(Short):
            raise ValueError(f"short must be one of {', '.join(get_args(Short))}, got {self.short!r}")
        longest = 1 + max(map(int, re.findall(r"[0-9]+", self.query)), default=0)  # frames that the query names
        parse_query(self.query, self.window or min(longest, 1_000_000))


def parse_query(query: str, window: int) -> tuple[int, ...]:
    """Frames of a window that `query` names, ascending: "0,1:76:4" -> (0, 1, 5, ..., 73).

    Slices are Python's and end at the window; a single index beyond it is an error.
    """
    chosen: set[int] = set()
    for part in query.replace(" ", "").split(","):
        try:
            numbers = [int(p) if p else None for p in part.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) == 1 and numbers[0] is not None:
            if not 0 <= numbers[0] < window:
                raise ValueError(f"query frame {numbers[0]} is outside the window of {window} frames")
            chosen.add(numbers[0])
        elif len(numbers) in (2, 3) and all(n is None or n >= 0 for n in numbers) and numbers[2:] != [0]:
            chosen.update(range(window)[slice(*numbers)])
        else:
            raise ValueError(f"query must be frame numbers and slices like '0,1:76:4', got {query!r}")
    if not chosen:
        raise ValueError(f"query {query!r} selects none of the window's {window} frames")
    return tuple(sorted(chosen))


@dataclass
class Clip:
    """A decoded window, or the S frames of it that the model is shown."""

    id: str
    frames: Tensor  # uint8 [S, 3, Hi, Wi], RGB; may be a view of channels-last memory
    index: Tensor  # int64 [S], source frame of each frame; padding repeats the last one
    padded: int = 0  # how many frames at the end of the window are repeats
    window: int = 0  # F; 0 stands for S, all of them

    def __post_init__(self):
        self.window = self.window or len(self.frames)
        if self.frames.dtype != torch.uint8 or self.frames.ndim != 4 or self.frames.shape[1] != 3:
            got = f"{self.frames.dtype} {tuple(self.frames.shape)}"
            raise ValueError(f"clip {self.id}: frames must be uint8 [F, 3, H, W], got {got}")
        if self.index.shape != (len(self.frames),):
            raise ValueError(f"clip {self.id}: index must be [{len(self.frames)}], got {tuple(self.index.shape)}")


@dataclass(frozen=True)
class FeatureSpec:
    """What a store holds. Equal specs mean interchangeable features: anything that changes a stored value is a field.

    `layer` i is the output of block i, counted from 0. `step` is an index into the model's noise schedule, noisiest
    first; the timestep and sigma it stands for are in every file's provenance.
    """

    family: str  # adapter, e.g. "wan"
    weights: str  # "content:<hash>" of a local checkpoint, "hub:<repo>@<commit>" of one from the Hub
    layers: tuple[int, ...]
    steps: tuple[int, ...] = ()  # empty for models without noise
    merge_steps: bool = False  # store the mean over steps instead of each
    seed: int = 0  # of the noise, drawn per (seed, clip id, step)
    frames: FrameSelection = field(default_factory=FrameSelection)
    pool: tuple[int, int] | None = None  # token grid (H, W) after average pooling; None keeps the model's
    dtype: str = "float16"  # key of STORE_DTYPES
    compute_dtype: str = "bfloat16"  # key of COMPUTE_DTYPES
    device: str = "cuda"  # device type; kernels differ in the last bits
    offload: str = "none"  # "host", "spread": the prompt is then embedded on the CPU
    compile: str = "none"  # of COMPILE; compiled blocks round otherwise
    attention: str = "sdpa"  # of ATTENTION, in the blocks
    precision: str = "full"  # of PRECISION
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # the family's own: prompt, size, tiling ...
    versions: dict[str, str] = field(default_factory=dict, hash=False)  # libraries whose release changes values

    def __post_init__(self):
        for name, values in (("layers", self.layers), ("steps", self.steps)):
            if list(values) != sorted(set(values)) or any(v < 0 for v in values):
                raise ValueError(f"{name} must be ascending, distinct and not negative, got {values}")
        if not self.layers:
            raise ValueError("layers must name at least one block")
        for name, value, table in (
            ("dtype", self.dtype, STORE_DTYPES),
            ("compute_dtype", self.compute_dtype, COMPUTE_DTYPES),
            ("compile", self.compile, COMPILE),
            ("attention", self.attention, ATTENTION),
            ("precision", self.precision, PRECISION),
        ):
            if value not in table:
                raise ValueError(f"{name} must be one of {', '.join(table)}, got {value!r}")
        if self.merge_steps and not self.steps:
            raise ValueError("merge_steps needs steps to merge, got none")
        if self.pool is not None and (len(self.pool) != 2 or min(self.pool) < 1):
            raise ValueError(f"pool must be two positive numbers, H and W, got {self.pool}")

    def to_json(self) -> str:
        """Canonical text: equal specs give equal text."""
        return json.dumps(asdict(self), sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "FeatureSpec":
        raw = json.loads(text)
        unknown = set(raw) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"spec has fields this version does not know: {', '.join(sorted(unknown))}")
        raw["frames"] = FrameSelection(**raw["frames"])
        for name in ("layers", "steps", "pool"):
            raw[name] = None if raw[name] is None else tuple(raw[name])
        return cls(**raw)

    def tensors(self) -> list[tuple[int, int | None]]:
        """(layer, step) of every stored tensor; step is None where there is none or they are merged."""
        steps = (None,) if self.merge_steps or not self.steps else self.steps
        return [(layer, step) for layer in self.layers for step in steps]


def tensor_name(layer: int, step: int | None = None) -> str:
    """Name of a feature tensor in a store's file: "layer20" or "layer20/step749"."""
    return f"layer{layer}" if step is None else f"layer{layer}/step{step}"


@dataclass
class Features:
    """One clip's features of one layer (and step), with the map from the window's frames to rows."""

    data: Tensor  # [T, H, W, C]
    rows: Tensor  # int64 [F]; row of `data` that sees frame f of the window, -1 if none does

    def __post_init__(self):
        if self.data.ndim != 4:
            raise ValueError(f"data must be [T, H, W, C], got {tuple(self.data.shape)}")
        if self.rows.ndim != 1 or int(self.rows.min()) < -1 or int(self.rows.max()) >= len(self.data):
            raise ValueError(f"rows must be [F] with values -1 .. {len(self.data) - 1}, got {self.rows.tolist()}")

    def at(self, frames: Tensor) -> Tensor:  # int64 [S] -> [S, H, W, C]
        """Features that see these frames of the window. Raises KeyError for a frame that no row sees."""
        return self.data[rows_of(self.rows.tolist(), frames.tolist())]


def rows_of(rows: list[int], frames: Sequence[int]) -> list[int]:
    """The rows that see these frames of the window. Raises KeyError for a frame that is not in it or that none sees."""
    unseen = [f for f in frames if not 0 <= f < len(rows) or rows[f] < 0]
    if unseen:
        raise KeyError(f"no feature row sees frames {unseen}")
    return [rows[f] for f in frames]


@dataclass(frozen=True)
class Plan:
    """What a model does with a window of F frames: pure geometry, known without weights. Equal plans share batches."""

    frames: int  # F
    shown: tuple[int, ...]  # frames of the window that the model is given
    size: tuple[int, int]  # (height, width) in pixels of the model's input
    grid: tuple[int, int, int]  # (T, H, W) tokens that come out
    rows: tuple[int, ...]  # [F], row that sees frame f, -1 if none
    passes: int = 1  # times that the blocks run, their tokens one after the other: parts of the window on their own

    def wanted_rows(self, query: tuple[int, ...]) -> tuple[int, ...]:
        """Rows that see at least one frame of `query`, ascending. Raises ValueError if a frame has none.

        Of a query that is the whole window all rows are wanted, also those that stand for no frame.
        """
        unseen = [f for f in query if self.rows[f] < 0]
        if unseen:
            seen = [f for f, row in enumerate(self.rows) if row >= 0]
            raise ValueError(f"no feature row sees frames {unseen}; rows see {seen}")
        if len(query) == self.frames:
            return tuple(range(self.grid[0]))
        return tuple(sorted({self.rows[f] for f in query}))
