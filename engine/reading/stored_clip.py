"""One clip's file of a store, open for reading rows of it, wherever its bytes are."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Self

import numpy as np

from spatialprobe.engine.files.clipfile import BadFile
from spatialprobe.engine.files.schema import mismatches
from spatialprobe.engine.reading.ranges import ByteFile
from spatialprobe.engine.reading.row_bytes import (
    check_bytes,
    damage_named,
    must_have_rows,
    must_hold,
    place_for,
    read_clip_header,
    read_pieces,
    repeat_rows,
    row_pieces,
)
from spatialprobe.engine.reading.rows import Key, StoredRows, row_numbers
from spatialprobe.engine.types import FeatureSpec, tensor_name


class StoredClip:
    """An `OpenClip`. Takes over `file` and closes it, also if the clip turns out to be damaged or another's.

    The header must be of this clip and spec. `check` compares the whole file with its checksum.
    """

    def __init__(self, file: ByteFile, clip_id: str, spec: FeatureSpec, spec_hash: str, *, check: bool = False):
        self.clip_id, self.name, self._file, self._spec = clip_id, file.name, file, spec
        try:
            with damage_named(clip_id, file.name):
                header = read_clip_header(file)
                for key, wanted in (("spec", spec_hash), ("clip", clip_id)):
                    if (got := header.provenance.get(key)) != wanted:
                        raise ValueError(f"clip {clip_id}: {file.name} is foreign: of {key} {got!r}, not {wanted!r}")
                if wrong := mismatches(spec, header.entries):
                    raise BadFile("; ".join(wrong))
                if check:
                    check_bytes(file, header)
                self._entries = header.entries
                self.rows = self._read_rows_vector()
        except BaseException:
            file.close()
            raise

    def _read_rows_vector(self) -> list[int]:
        entry = self._entries["rows"]
        rows = np.empty(entry.shape, np.int64)
        read_pieces(self._file, [(entry.start, rows.view(np.uint8))])
        length = self._entries[tensor_name(*self._spec.tensors()[0])].shape[0]
        if rows.min() < -1 or rows.max() >= length:
            raise BadFile(f"rows must be -1 .. {length - 1}, got {rows.tolist()}")
        return rows.tolist()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def shape(self, key: Key) -> tuple[int, int, int, int]:
        """(T, H, W, C) of a layer and step. Raises ValueError for one that is not there."""
        must_hold(self._spec, key, f"clip {self.clip_id}: {self.name}")
        return self._entries[tensor_name(*key)].shape

    def read(
        self, keys: Sequence[Key], rows: Sequence[int], *, out: dict[Key, StoredRows] | None = None
    ) -> dict[Key, StoredRows]:
        """As `OpenClip.read` says: only these rows are fetched, those of all keys at once."""
        found, pieces, rows = {}, [], row_numbers(rows)
        for key in dict.fromkeys(keys):
            name, shape = tensor_name(*key), self.shape(key)
            must_have_rows(rows, shape[0], f"clip {self.clip_id}: {self.name}")
            found[key] = place_for(rows, shape, self._spec, None if out is None else out[key])
            for part, x in vars(found[key]).items():
                if x is not None:
                    pieces += row_pieces(self._entries[name if part == "data" else f"{name}.{part}"], rows, x)
        with damage_named(self.clip_id, self.name):
            read_pieces(self._file, pieces)
        for x in chain.from_iterable(vars(stored).values() for stored in found.values()):
            if x is not None:
                repeat_rows(rows, x)
        return found
