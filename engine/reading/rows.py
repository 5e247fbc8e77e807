"""Rows of features as they are stored, and what every place that holds features lets a reader do.

A source is a folder (`FeatureStore`), a store elsewhere (`RemoteStore`), a dump of the research code (`PublishedDump`),
or anything else with these methods. How rows become values, batches or labels is not known here.
"""

import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from spatialprobe.engine.reading.host_memory import host_empty
from spatialprobe.engine.types import FeatureSpec

Key = tuple[int, int | None]  # (layer, step), as in FeatureSpec.tensors()


@dataclass
class StoredRows:
    """R rows of one layer (and step). `data * scale` is the value where there is a scale, else `data` is."""

    data: Tensor  # [R, H, W, C], store dtype
    mean: Tensor  # float32 [R, H, W], over C of the values
    rstd: Tensor  # float32 [R, H, W], 1 / sqrt(variance over C + 1e-6) of the values
    scale: Tensor | None = None  # float32 [R, H, W], where the dtype is quantised

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int, int], dtype: torch.dtype, *, scaled: bool = False, pinned: bool = False
    ) -> "StoredRows":  # shape: (R, H, W, C)
        """Rows without values on the CPU, to be given to `OpenClip.read` as `out`, in memory that is used again.

        `scaled`: with a scale per token. `pinned`: page-locked, for copies to a CUDA device that overlap its work.
        """
        make = partial(torch.empty, pin_memory=True) if pinned else host_empty  # torch, too, reuses pinned memory
        return cls(make(shape, dtype=dtype), *(make(shape[:3], dtype=torch.float32) for _ in range(2 + scaled)))

    def part(self, start: int, stop: int) -> "StoredRows":
        """Rows start .. stop - 1, as views: of a batch's buffer, what one clip is read into."""
        return StoredRows(**{name: None if x is None else x[start:stop] for name, x in vars(self).items()})

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in vars(self).values() if x is not None)


def row_numbers(rows: Sequence[int]) -> list[int]:
    """Plain numbers of a list, an array or a tensor of whole numbers."""
    return [operator.index(row) for row in rows]


class OpenClip(Protocol):
    """One clip, open for reading: the same content until it is closed, whatever an extractor writes meanwhile.

    For one thread at a time.
    """

    clip_id: str
    name: str  # of the file or files, for messages
    rows: list[int]  # [F], the row that sees frame f of the window, -1 if none

    def shape(self, key: Key) -> tuple[int, int, int, int]:
        """(T, H, W, C) of a layer and step. Raises ValueError for one that is not there."""
        ...

    def read(
        self, keys: Sequence[Key], rows: Sequence[int], *, out: dict[Key, StoredRows] | None = None
    ) -> dict[Key, StoredRows]:
        """Rows of several layers and steps, in the order asked for. What is returned is the caller's own.

        A row may be asked for twice; it is read once. `out` holds, for each key, contiguous CPU tensors of the right
        shape and dtype to read into; they are returned. Raises ValueError, naming file and clip, for a key or row that
        is not there (-1 too) and for a damaged file.
        """
        ...


class FeatureSource(Protocol):
    """Features of one FeatureSpec, by clip id. For any number of threads; may be pickled."""

    spec: FeatureSpec
    spec_hash: str

    def ids(self) -> list[str]:
        """Ids of the clips that are there, sorted."""
        ...

    def open_clip(self, clip_id: str, *, check: bool = False) -> AbstractContextManager[OpenClip]:
        """`with source.open_clip(id) as clip: clip.read(keys, rows)`: one open, and one reading of the header.

        `check` compares the whole file with its checksum first. Raises FileNotFoundError for a clip that is not there,
        ValueError, naming file and clip, for a file that is damaged or holds something else.
        """
        ...
