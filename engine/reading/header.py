"""The header of any safetensors file, from its bytes: which tensors lie where. Whose file it is is not known here."""

import json
import struct
from itertools import pairwise

from spatialprobe.engine.files.clipfile import MAX_HEADER, TAGS, BadFile, Entry


def header_size(start: bytes, size: int) -> int:
    """Bytes before the first tensor of a file of `size` bytes that begins with `start`. Raises BadFile."""
    if len(start) < 8:
        raise BadFile(f"truncated: {size} bytes cannot hold a header")
    length = struct.unpack("<Q", start[:8])[0]
    if length > MAX_HEADER or 8 + length > size:
        raise BadFile(f"damaged or truncated: header of {length} bytes in a file of {size}")
    return 8 + length


def parse_header(raw: bytes, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors in file order and metadata, of everything before the first tensor. Raises BadFile.

    Tensors must follow each other without gaps and end where the file of `size` bytes does.
    """
    try:
        header = json.loads(raw[8:])
        metadata = header.pop("__metadata__", {})
        entries = {name: _entry(value, len(raw)) for name, value in header.items()}
        entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
        if not all(type(x) is str for item in metadata.items() for x in item):
            raise ValueError("metadata must be text")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise BadFile("the header is damaged, or another program's") from None
    edges = [len(raw), *(edge for e in entries.values() for edge in (e.start, e.stop)), size]
    if any(a != b for a, b in list(pairwise(edges))[::2]):
        raise BadFile(f"damaged or truncated: the tensors end at byte {edges[-2]} of {size}")
    return entries, metadata


def _entry(value: dict, data_start: int) -> Entry:
    dtype, shape, (start, stop) = TAGS[value["dtype"]], value["shape"], value["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError("numbers of a header must not be negative")
    nbytes = dtype.itemsize
    for n in shape:
        nbytes *= n
    if stop - start != nbytes:
        raise ValueError("a tensor's bytes do not fit its shape")
    return Entry(dtype, tuple(shape), data_start + start, data_start + stop)
