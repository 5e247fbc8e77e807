"""The bytes of one clip's file: a safetensors file whose header carries a checksum of the whole file.

Knows nothing of specs and stores. Writes its own bytes, because it hashes while it writes, copies no tensor, orders the
header the same way every time, and asks the disk before it says done.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

SUFFIX = ".safetensors"
METADATA_KEY = "spatialprobe"  # the one metadata entry of a header; its value is provenance as JSON
CHUNK = 1 << 22  # bytes hashed and written at a time, a multiple of every item size
SMALL = 1 << 16  # bytes of a file that is put together in memory and written by one call
MAX_HEADER = 1 << 24  # bytes; a longer header is damage
TAGS = {
    "I64": torch.int64,
    "F64": torch.float64,
    "I32": torch.int32,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "BOOL": torch.bool,
}
_TAG_OF = {dtype: tag for tag, dtype in TAGS.items()}
_NO_CHECKSUM = b"0" * 64  # stands in the header while the rest of the file is hashed


class BadFile(ValueError):
    """Not a whole clip file. The message is one line without the path."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    entries: dict[str, Entry]  # in file order, without gaps, ending at the end of the file
    provenance: dict[str, Any]
    raw: bytes  # everything before the first tensor


def write_file(path: Path, tensors: dict[str, Tensor], provenance: dict[str, Any]) -> int:
    """Writes a new file, to the disk itself, and returns its size in bytes. Equal arguments give equal bytes.

    Tensors are on the CPU; one that is not contiguous is copied, alone. `provenance` gets a "checksum": SHA-256 of the
    whole file with 64 zeros in the checksum's place.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    own = {key: value for key, value in provenance.items() if key != "checksum"}  # another file's, taken over with it
    rest = json.dumps(own, sort_keys=True, allow_nan=False)[1:]
    text = f'{{"checksum": "{_NO_CHECKSUM.decode()}"{", " if own else ""}{rest}'  # first, so that its place is found
    header, offset = {"__metadata__": {METADATA_KEY: text}}, 0
    for name in order:
        x = tensors[name]
        header[name] = {"dtype": _TAG_OF[x.dtype], "shape": list(x.shape), "data_offsets": [offset, offset + x.nbytes]}
        offset += x.nbytes
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)
    raw = struct.pack("<Q", len(packed)) + packed
    data = (memoryview(tensors[name].contiguous().flatten().view(torch.uint8).numpy()) for name in order)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        if len(raw) + offset <= SMALL:
            body = b"".join(data)
            digest = hashlib.sha256(raw + body).hexdigest().encode()
            _write_all(fd, raw.replace(_NO_CHECKSUM, digest, 1) + body)
        else:
            _write_hashing(fd, raw, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    return len(raw) + offset


def _write_hashing(fd: int, raw: bytes, data: Iterable[memoryview]) -> None:
    digest = hashlib.sha256(raw)
    _write_all(fd, raw)
    for view in data:
        for at in range(0, len(view), CHUNK):
            digest.update(view[at : at + CHUNK])
            _write_all(fd, view[at : at + CHUNK])
    if os.pwrite(fd, digest.hexdigest().encode(), raw.index(_NO_CHECKSUM)) != len(_NO_CHECKSUM):
        raise OSError("short write of a checksum")


def _write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(fd, view) :]


def read_header(file: BinaryIO) -> Header:
    """Reads and checks the header of an open file, and leaves it at the first tensor. Raises BadFile."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise BadFile(f"truncated: {size} bytes cannot hold a header")
    length = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER or 8 + length > size:
        raise BadFile(f"damaged or truncated: header of {length} bytes in a file of {size}")
    packed = file.read(length)
    try:
        header = json.loads(packed)
        provenance = json.loads(header.pop("__metadata__")[METADATA_KEY])
        entries = {name: _entry(value, 8 + length) for name, value in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise BadFile("the header is damaged, or another program's") from None
    checksum = provenance.get("checksum") if isinstance(provenance, dict) else None
    if not (isinstance(checksum, str) and len(checksum) == 64 and checksum.isascii()):
        raise BadFile("the header is damaged, or another program's")
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    edges = [8 + length, *(edge for e in entries.values() for edge in (e.start, e.stop)), size]
    if any(a != b for a, b in list(pairwise(edges))[::2]):
        raise BadFile(f"damaged or truncated: the tensors end at byte {edges[-2]} of {size}")
    return Header(entries, provenance, prefix + packed)


def _entry(value: dict, data_start: int) -> Entry:
    dtype, shape, (start, stop) = TAGS[value["dtype"]], value["shape"], value["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError("numbers of a header must not be negative")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor's bytes do not fit its shape")
    return Entry(dtype, tuple(shape), data_start + start, data_start + stop)


def is_whole(path: Path) -> bool:
    """Whether a file of `write_file` is there, unchanged."""
    try:
        with path.open("rb") as file:
            header = read_header(file)
            digest = expected_checksum(header)
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except (FileNotFoundError, BadFile):
        return False
    return digest.hexdigest() == header.provenance["checksum"]


def expected_checksum(header: Header) -> "hashlib._Hash":
    """The hash of a file's header, to be continued with its data and compared with the header's checksum."""
    return hashlib.sha256(header.raw.replace(header.provenance["checksum"].encode(), _NO_CHECKSUM, 1))


def clip_files(folder: Path | str) -> Iterator[tuple[str, os.DirEntry]]:
    """Clip files below a folder, with their names relative to it, in no order."""
    for name, entry in all_files(folder):
        if entry.name.endswith(SUFFIX) and not entry.name.startswith("."):
            yield name, entry


def all_files(folder: Path | str, prefix: str = "") -> Iterator[tuple[str, os.DirEntry]]:
    """Everything below a folder that is no folder, also through symbolic links."""
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:  # a store that was killed before its first clip
        return
    with entries:
        for entry in entries:
            if entry.is_dir():
                yield from all_files(entry.path, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name, entry
