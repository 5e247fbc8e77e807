"""Headers and rows of an open safetensors file: where they lie, and reading them into tensors.

Which tensors a file should hold, and what it is called, is not known here.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from spatialprobe.engine.files.clipfile import CHUNK, METADATA_KEY, BadFile, Entry, Header, expected_checksum
from spatialprobe.engine.files.schema import quantised
from spatialprobe.engine.reading.header import header_size, parse_header
from spatialprobe.engine.reading.ranges import ByteFile, Piece
from spatialprobe.engine.reading.rows import Key, StoredRows
from spatialprobe.engine.types import STORE_DTYPES, FeatureSpec, tensor_name


@contextmanager
def damage_named(clip_id: str, name: str) -> Iterator[None]:
    """Errors of reading that say whose file it is."""
    try:
        yield
    except BadFile as error:
        raise ValueError(f"clip {clip_id}: {name} is damaged: {error}") from None
    except OSError as error:
        raise OSError(error.errno, f"clip {clip_id}: {error.strerror or error}", name) from error


def read_clip_header(file: ByteFile) -> Header:
    """The header of a clip file that `write_file` wrote. Raises BadFile."""
    entries, metadata, raw = read_any_header(file)
    try:
        provenance = json.loads(metadata[METADATA_KEY])
        checksum = provenance["checksum"]
        if len(checksum) != 64 or not checksum.isascii():
            raise ValueError("a checksum has 64 letters")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise BadFile("the header is damaged, or another program's") from None
    return Header(entries, provenance, raw)


def read_any_header(file: ByteFile) -> tuple[dict[str, Entry], dict[str, str], bytes]:
    """Tensors, metadata and bytes of a safetensors header. Raises BadFile."""
    raw = np.empty(header_size(file.start, file.size), np.uint8)
    read_pieces(file, [(0, raw)])
    return *parse_header(raw.tobytes(), file.size), raw.tobytes()


def check_bytes(file: ByteFile, header: Header) -> None:
    """Reads the whole file. Raises BadFile if its checksum is not the header's."""
    digest, buffer = expected_checksum(header), np.empty(CHUNK, np.uint8)
    for at in range(len(header.raw), file.size, CHUNK):
        chunk = buffer[: file.size - at]
        read_pieces(file, [(at, chunk)])
        digest.update(chunk)
    if digest.hexdigest() != header.provenance["checksum"]:
        raise BadFile("the checksum does not match, some of its bytes have changed")


def read_pieces(file: ByteFile, pieces: Sequence[Piece]) -> None:
    """Fills pieces from what came with the opening of the file, and the others by reading."""
    left = []
    for offset, into in pieces:
        if offset + len(into) <= len(file.start):
            into[:] = np.frombuffer(file.start, np.uint8, len(into), offset)
        else:
            left.append((offset, into))
    if left:
        file.read(left)


# -- rows of a tensor -----------------------------------------------------------------------------------------------


def must_hold(spec: FeatureSpec, key: Key, who: str) -> None:
    if key not in (there := spec.tensors()):
        raise ValueError(f"{who} has {', '.join(tensor_name(*k) for k in there)}, not {tensor_name(*key)}")


def must_have_rows(rows: Sequence[int], length: int, who: str) -> None:
    if wrong := [row for row in rows if not 0 <= row < length]:
        unseen = "; -1 stands for frames that no row sees" if -1 in wrong else ""
        raise ValueError(f"{who} has rows 0 .. {length - 1}, got {wrong}{unseen}")


def place_for(
    rows: Sequence[int], shape: tuple[int, int, int, int], spec: FeatureSpec, out: StoredRows | None
) -> StoredRows:  # shape: (T, H, W, C)
    """Where rows are read into: `out` if it fits, or new memory. Raises ValueError."""
    dtype, scaled, shape = STORE_DTYPES[spec.dtype], quantised(spec), (len(rows), *shape[1:])
    if out is None:
        return StoredRows.empty(shape, dtype, scaled=scaled)
    for part, x in vars(out).items():
        if (part != "scale" or scaled) != (x is not None):
            raise ValueError(f"out must have {'a' if scaled else 'no'} {part} for {spec.dtype}")
        wanted = (dtype, shape) if part == "data" else (torch.float32, shape[:3])
        if x is not None and ((x.dtype, tuple(x.shape)) != wanted or x.device.type != "cpu" or not x.is_contiguous()):
            got = f"{x.dtype} {list(x.shape)} on {x.device}" + " not contiguous" * (not x.is_contiguous())
            raise ValueError(f"out's {part} must be contiguous {wanted[0]} {list(wanted[1])} on the CPU, got {got}")
    return out


def row_pieces(entry: Entry, rows: Sequence[int], x: Tensor) -> list[Piece]:  # x: [R, ...]
    """What to read of a tensor so that x[i] is its row rows[i], each row once: at the first i that wants it."""
    if not entry.nbytes or not rows:
        return []
    nbytes, into = entry.nbytes // entry.shape[0], x.flatten().view(torch.uint8).numpy().reshape(len(rows), -1)
    return [(entry.start + row * nbytes, into[i]) for i, row in enumerate(rows) if row not in rows[:i]]


def repeat_rows(rows: Sequence[int], x: Tensor) -> None:  # x: [R, ...]
    """Fills the places of rows that were wanted, and read, before."""
    first: dict[int, int] = {}
    for i, row in enumerate(rows):
        if (j := first.setdefault(row, i)) != i:
            x[i] = x[j]
