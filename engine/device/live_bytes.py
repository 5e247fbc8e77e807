"""Counts the bytes of live tensors while code runs, also of those on the meta device, which have shapes and no memory.

With weights on the meta device a model's pass costs milliseconds and no memory, and its peak is that of the real pass
but for what kernels allocate inside. Small tensors of data (token ids, grids) stay real, because models read them.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

META = torch.device("meta")


class LiveBytes(TorchDispatchMode):
    """`live` bytes of the tensors it has seen that are still there, and their `peak`."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def see(self, *tensors: Any) -> None:
        """Counts tensors that were made before."""
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place in self._known:
            return
        self._known.add(place)
        nbytes = storage.nbytes()
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, place, nbytes)

    def _freed(self, place: int, nbytes: int) -> None:
        self._known.discard(place)
        self.live -= nbytes

    @contextmanager
    def phase(self, peaks: dict[str, int], name: str) -> Iterator[None]:
        """Notes the peak of the code inside, all that is live with it."""
        self.peak = self.live
        yield
        peaks[name] = max(peaks.get(name, 0), self.peak)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func.overloadpacket in (torch.ops.aten.to, torch.ops.aten._to_copy) and _is_data(args[0]):
            args, kwargs = tree_map(lambda x: args[0].device if isinstance(x, torch.device) else x, (args, kwargs))
        elif any(x.is_meta for x in leaves) and not all(x.is_meta for x in leaves):
            args, kwargs = _all_on_meta(func, args, kwargs)
        out = func(*args, **kwargs)
        self.see(out)
        return out


def _is_data(x: Tensor) -> bool:
    return not x.is_meta and not x.is_floating_point()


def _all_on_meta(func: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of an operation, its real tensors replaced by their shapes. A mask becomes the places it names."""
    if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default):
        places: list[Tensor | None] = []
        for index in args[1]:
            real_mask = index is not None and index.dtype == torch.bool and not index.is_meta
            places += list(index.nonzero(as_tuple=True)) if real_mask else [index]
        args = (args[0], places, *args[2:])
    return tree_map(_on_meta, (args, kwargs))


def _on_meta(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META) if isinstance(x, Tensor) else x
