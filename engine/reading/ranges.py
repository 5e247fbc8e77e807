"""Byte ranges of a file into memory: on this machine by parallel positional reads, past the page cache if it is cold.

What the bytes mean is not known here.
"""

import ctypes
import fcntl
import mmap
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np

from spatialprobe.engine.files.clipfile import BadFile

Piece = tuple[int, np.ndarray]  # offset in the file, and the uint8 array to fill from there

HEAD = 1 << 17  # bytes read on opening: header, rows and, of a pooled store with few layers, all token statistics
SPAN = 1 << 21  # bytes of one read: 2 MB in 4 threads reach a local disk's sequential speed
GAP = 1 << 15  # bytes between two pieces that are read with them: a read of its own would take longer
MOST_PIECES = 500  # of one read; the kernel takes 1024 buffers
THREADS = 8  # a disk needs 4, file systems behind a network more
LEAST_DIRECT = 1 << 18  # bytes; less is not worth leaving the page cache for
PAGE = 4096  # direct reads begin and end at multiples of it; no device here needs more


class ByteFile(Protocol):
    """An open file, of one content until it is closed. For one thread at a time."""

    name: str
    size: int  # bytes
    start: bytes  # the first HEAD bytes, all if there are fewer

    def read(self, pieces: Sequence[Piece]) -> None:
        """Fills every piece. Raises BadFile where the file has become shorter, OSError if it cannot be read."""
        ...

    def close(self) -> None: ...


def spans(pieces: Sequence[Piece], *, gap: int, longest: int) -> list[list[Piece]]:
    """Pieces grouped into reads, in file order: neighbours together, long ones cut into equal parts."""
    cut = chain.from_iterable(_cut(piece, longest) for piece in pieces)
    found: list[list[Piece]] = []
    for offset, into in sorted(cut, key=lambda piece: piece[0]):
        if found and len(found[-1]) < MOST_PIECES:
            begin, end = extent(found[-1])
            if 0 <= offset - end <= gap and offset + len(into) - begin <= longest:
                found[-1].append((offset, into))
                continue
        found.append([(offset, into)])
    return found


def _cut(piece: Piece, longest: int) -> list[Piece]:
    offset, into = piece
    length = -(-len(into) // max(1, -(-len(into) // longest)))
    return [(offset + at, into[at : at + length]) for at in range(0, len(into), length)] if length else []


def extent(span: list[Piece]) -> tuple[int, int]:
    """First byte of a span, and the one after its last."""
    return span[0][0], span[-1][0] + len(span[-1][1])


class LocalFile:
    """A file of this machine, held open: one that takes its name later is another file.

    What the page cache has is copied from there. The rest is read around it (O_DIRECT), which takes half the CPU time
    and leaves the cache to others, unless `direct` is False or the file system cannot.
    """

    def __init__(self, path: Path, *, direct: bool = True):
        self.name = str(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(self._fd)
            self.size = status.st_size
            # The kernel tells owners and writers alone what is cached; others would always be told that all is.
            self._ask_cache = status.st_uid == os.geteuid() or os.access(path, os.W_OK)
            self._direct = direct and hasattr(os, "O_DIRECT")
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead into rows that nobody wants
            self.start = os.pread(self._fd, HEAD, 0)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._fd)

    def read(self, pieces: Sequence[Piece]) -> None:
        todo = spans(pieces, gap=GAP, longest=SPAN)
        if not todo:
            return
        one = self._read_direct if self._leave_cache(todo) else self._read_cached
        if len(todo) == 1:
            one(todo[0])
            return
        reads = [_readers(os.getpid()).submit(one, span) for span in todo]
        wait(reads)  # all of them, also after an error: they write to the caller's memory
        for read in reads:
            read.result()

    def _leave_cache(self, todo: list[list[Piece]]) -> bool:
        """Puts the file into the mode that its next reads need, and says whether that is the direct one."""
        places = [extent(span) for span in todo]
        enough = sum(end - begin for begin, end in places) >= LEAST_DIRECT
        direct = self._direct and enough and not (self._ask_cache and self._cached([begin for begin, _ in places]))
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~getattr(os, "O_DIRECT", 0)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | (os.O_DIRECT if direct else 0))
        except OSError:  # tmpfs and some network file systems have no direct reads
            self._direct = direct = False
        return direct

    def _cached(self, offsets: list[int]) -> bool:
        """Whether the page cache has the pages at all of these offsets."""
        size, found = os.fstat(self._fd).st_size, ctypes.c_ubyte()
        if max(offsets) >= size:
            return True  # the file has become shorter, and reading will say so
        with mmap.mmap(self._fd, size, prot=mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            base = view.ctypes.data
            del view  # it keeps the mapping open
            for offset in offsets:
                page = ctypes.c_void_p(base + offset // mmap.PAGESIZE * mmap.PAGESIZE)
                if _libc().mincore(page, ctypes.c_size_t(1), ctypes.byref(found)) or not found.value & 1:
                    return False
        return True

    def _read_cached(self, span: list[Piece]) -> None:
        begin, end = extent(span)
        buffers, at = [], begin
        for offset, into in span:
            if offset > at:
                buffers.append(_scratch(offset - at))
            buffers.append(into)
            at = offset + len(into)
        self._must_be(os.preadv(self._fd, buffers, begin), end - begin, begin)

    def _read_direct(self, span: list[Piece]) -> None:
        begin, end = extent(span)
        first = begin // PAGE * PAGE
        buffer = _scratch(-(-(end - first) // PAGE) * PAGE)
        self._must_be(os.preadv(self._fd, [buffer], first), end - first, first)
        for offset, into in span:
            into[:] = buffer[offset - first : offset - first + len(into)]

    def _must_be(self, got: int, wanted: int, begin: int) -> None:
        if got < wanted:
            raise BadFile(f"truncated while it was read: {got} of {wanted} bytes from byte {begin}")


@lru_cache(1)
def _readers(pid: int) -> ThreadPoolExecutor:
    """This process's threads for reading; a forked child has none of its parent's."""
    return ThreadPoolExecutor(THREADS, "pread")


@lru_cache(1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


_of_thread = threading.local()


def _scratch(nbytes: int) -> np.ndarray:
    """Memory of this thread that begins at a page and is used for one read at a time.

    It is shared memory, because a direct read into private memory gets lost where another thread forks meanwhile (see
    open(2)); and therefore a forked child must not use its parent's.
    """
    mine = getattr(_of_thread, "scratch", None)
    if mine is None or mine[0] != os.getpid() or len(mine[1]) < nbytes:
        fresh = np.frombuffer(mmap.mmap(-1, max(nbytes, SPAN + 2 * PAGE), flags=mmap.MAP_SHARED), np.uint8)
        mine = _of_thread.scratch = os.getpid(), fresh
    return mine[1][:nbytes]
