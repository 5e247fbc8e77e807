"""Looks into a store: a summary from the headers, or every byte again and what is wrong with it. Repairs nothing."""

from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch

from spatialprobe.engine.files.clipfile import (
    CHUNK,
    SUFFIX,
    BadFile,
    all_files,
    clip_files,
    expected_checksum,
    read_header,
)
from spatialprobe.engine.files.durable import dead_runs
from spatialprobe.engine.files.failures import read_failures
from spatialprobe.engine.files.schema import mismatches, row_mismatches
from spatialprobe.engine.types import check_clip_id, tensor_name

if TYPE_CHECKING:
    from spatialprobe.engine.store import FeatureStore

NOT_FINITE = {  # without the sign bit, the least bit pattern that is infinite or not a number
    torch.float32: 0x7F80_0000,
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float8_e4m3fn: 0x7F,
}


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds, as its files' headers say."""

    clips: int
    bytes: int
    shapes: dict[str, dict[tuple[int, ...], int]]  # name of a feature tensor -> shape -> clips
    padded: int  # clips with repeated frames
    failed: int  # clips without a file, whose last attempt failed
    damaged: int  # clips whose header cannot be read; `verify` says why


def summarize(store: "FeatureStore") -> StoreInfo:
    """Reads every header of a store."""
    shapes: dict[str, Counter] = {tensor_name(*key): Counter() for key in store.spec.tensors()}
    clips = size = padded = damaged = 0
    for _, found in clip_files(store.clips):
        clips += 1
        size += found.stat().st_size
        try:
            with Path(found.path).open("rb") as file:
                header = read_header(file)
            here = {name: header.entries[name].shape for name in shapes}
            padded += bool(header.provenance["padded"])
        except (BadFile, LookupError, OSError):
            damaged += 1
            continue
        for name, shape in here.items():
            shapes[name][shape] += 1
    plain = {name: dict(counter) for name, counter in shapes.items()}
    return StoreInfo(clips, size, plain, padded, len(store.failures()), damaged)


def reread(store: "FeatureStore", threads: int, progress: Callable[[int], object]) -> list[str]:
    """Problems of a store, one line each. A thread holds 4 MB."""
    names = sorted(name for name, _ in all_files(store.clips))
    problems: list[list[str]] = []
    with ThreadPoolExecutor(threads, "verify") as pool:
        waiting: deque = deque()
        for name in chain(names, [None] * 2 * threads):  # the Nones only push the last results out
            if name is not None:
                waiting.append(pool.submit(_check, store, name))
            if waiting and (name is None or len(waiting) > 2 * threads):
                problems.append(waiting.popleft().result())
                progress(1)
    _, torn = read_failures(store.root / "failed.jsonl")
    left = [run for run in dead_runs(store.root / "tmp") if any(run.glob("*.part"))]
    return [
        *chain.from_iterable(problems),
        *(f"failed.jsonl: line {number} is torn; its clip counts as never tried" for number in torn),
        *(f"tmp/{run.name}: left by a killed run; the next run removes it" for run in left),
    ]


def _check(store: "FeatureStore", name: str) -> list[str]:
    """Problems of one file below `clips`."""
    try:
        if not name.endswith(SUFFIX):
            raise BadFile("not a clip file")
        with (store.clips / name).open("rb") as file:
            lines = _check_clip(store, check_clip_id(name.removesuffix(SUFFIX)), file)
    except OSError as error:
        lines = [f"cannot be read: {error.strerror}"]
    except ValueError as error:
        lines = [str(error)]
    return [f"clips/{name}: {line}" for line in lines]


def _check_clip(store: "FeatureStore", clip_id: str, file: BinaryIO) -> list[str]:
    header = read_header(file)
    digest = expected_checksum(header)
    buffer = bytearray(min(CHUNK, max((entry.nbytes for entry in header.entries.values()), default=0)))
    lines = []
    for name, entry in header.entries.items():
        finite, left = True, entry.nbytes
        while left:
            size = file.readinto(memoryview(buffer)[: min(CHUNK, left)])
            if not size or size % entry.dtype.itemsize:
                raise BadFile("truncated while it was read")
            digest.update(memoryview(buffer)[:size])
            finite = finite and _finite(memoryview(buffer)[:size], entry.dtype)
            left -= size
        if not finite:
            lines.append(f"{name} is not finite")
    if digest.hexdigest() != header.provenance["checksum"]:
        return ["damaged: the checksum does not match, some of its bytes have changed"]
    for key, wanted in (("spec", store.spec_hash), ("clip", clip_id)):
        if header.provenance.get(key) != wanted:
            return [f"foreign: it was written for {key} {header.provenance.get(key)!r}, not {wanted!r}"]
    wrong = mismatches(store.spec, header.entries)
    if not wrong:
        file.seek(header.entries["rows"].start)
        rows = torch.frombuffer(bytearray(file.read(header.entries["rows"].nbytes)), dtype=torch.int64)
        first = tensor_name(*store.spec.tensors()[0])
        wrong = row_mismatches(rows, header.provenance, header.entries[first].shape[0])
    return wrong + lines


def _finite(data: memoryview, dtype: torch.dtype) -> bool:
    """By the bits: numpy does it in one thread per file, where torch would start more of its own."""
    if dtype not in NOT_FINITE:
        return True
    x = np.frombuffer(data, dtype=f"u{dtype.itemsize}")
    return int((x & (2 ** (8 * dtype.itemsize - 1) - 1)).max()) < NOT_FINITE[dtype]
