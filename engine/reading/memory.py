"""Features of one clip that are in memory, read like those of a clip that is on disk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from spatialprobe.engine.reading.rows import Key, StoredRows, row_numbers


def each(rows: StoredRows, fn: Callable[[Tensor], Tensor]) -> StoredRows:
    """`fn` of every tensor that is there."""
    return StoredRows(**{name: None if x is None else fn(x) for name, x in vars(rows).items()})


def copy_rows(x: Tensor, rows: Sequence[int], out: Tensor) -> None:  # [T, ...], [R] -> [R, ...]
    """out[i] = x[rows[i]], from any device to any other, without a copy between."""
    for i, row in enumerate(rows):
        out[i].copy_(x[row], non_blocking=True)


@dataclass
class MemoryClip:
    """An `OpenClip` of tensors; any number of threads may read it, `out` may be on any device."""

    clip_id: str
    name: str  # where the features came from, for messages
    rows: list[int]  # [F], the row that sees frame f of the window, -1 if none
    features: dict[Key, StoredRows]

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.features.values())

    def shape(self, key: Key) -> tuple[int, int, int, int]:
        """(T, H, W, C) of a layer and step. Raises ValueError for one that is not there."""
        return tuple(self._at(key).data.shape)

    def read(
        self, keys: Sequence[Key], rows: Sequence[int], *, out: dict[Key, StoredRows] | None = None
    ) -> dict[Key, StoredRows]:
        """Copies rows of several layers and steps, in the order asked for.

        Raises ValueError, naming the clip, for a key or row that is not there, -1 too.
        """
        read, rows = {}, row_numbers(rows)
        for key in keys:
            here, length = self._at(key), self.shape(key)[0]
            if wrong := [row for row in rows if not 0 <= row < length]:
                raise ValueError(f"clip {self.clip_id}: {self.name} has rows 0 .. {length - 1}, got {wrong}")
            if out is None:
                read[key] = each(here, lambda x: x[rows])
                continue
            read[key] = out[key]
            for name, x in vars(here).items():
                if x is not None:
                    copy_rows(x, rows, getattr(out[key], name))
        return read

    def _at(self, key: Key) -> StoredRows:
        if key not in self.features:
            raise ValueError(f"clip {self.clip_id}: {self.name} has {', '.join(map(str, self.features))}, not {key}")
        return self.features[key]
