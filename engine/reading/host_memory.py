"""CPU tensors whose memory is used again: the kernel takes longer to hand out fresh pages than a disk to fill them.

Filling 300 MB for the first time costs several times the CPU time of filling it again.
"""

import math
import mmap
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

LEAST = 1 << 20  # bytes; smaller tensors are the allocator's
IDLE = 1 << 30  # bytes of this process that may wait to be used again

_idle: deque[memoryview] = deque()  # oldest first; only atomic operations, for whoever drops a tensor adds to it


def host_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU, of memory that an earlier tensor of as many bytes has left, where there is some.

    Memory is left when the last tensor that uses it goes; nobody has to give it back. It begins at a page.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LEAST:
        return torch.empty(tuple(shape), dtype=dtype)
    block = _take(nbytes)
    lent = np.frombuffer(block, np.uint8)  # torch holds this array as long as any tensor uses its memory
    weakref.finalize(lent, _idle.append, block).atexit = False
    return torch.from_numpy(lent).view(dtype).view(tuple(shape))


def _take(nbytes: int) -> memoryview:
    """The block left last that fits, or a new one. The oldest ones beyond IDLE are let go."""
    found, others, size = None, [], 0
    with suppress(IndexError):  # no more; other threads may be taking, too
        while True:
            block = _idle.pop()
            if found is None and len(block) == nbytes:
                found = block
            elif size + len(block) <= IDLE:
                others.append(block)
                size += len(block)
    _idle.extendleft(others)
    if found is not None:
        return found
    return memoryview(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
