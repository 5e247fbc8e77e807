"""Counts the bytes of live tensors while code runs, also of those on the meta device, which have shapes and no memory.

With weights on the meta device a model's pass costs no memory, and no time but Python's, and its peak is that of the
real pass but for what kernels allocate inside. Small tensors of data (token ids, grids) stay real, because models read
them.

Under inference mode torch hands over whole composite operations, like `group_norm`, which may copy its input first:
those are taken apart here, so that what they make on the way is counted too.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

META = torch.device("meta")
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
ONE_KERNEL = (torch.ops.aten._fused_rms_norm.default,)  # on a GPU, though torch has a composite of it for elsewhere
GROUPED_MM = torch.ops.aten._grouped_mm.default
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


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
        on_meta = any(x.is_meta for x in leaves)
        if func is ATTENTION and on_meta and not only_math():
            with self:
                return _attention(*args, **kwargs)
        if func not in ONE_KERNEL and _is_composite(func):
            with self:
                return func._op_dk(COMPOSITE, *args, **kwargs)
        if func is GROUPED_MM and on_meta:
            out = args[0].new_empty(len(args[0]), args[1].shape[-1])  # torch's own takes bfloat16 alone, kernels do not
        else:
            out = func(*args, **kwargs)
        self.see(out)
        return out


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE)


def only_math() -> bool:
    """Whether every fused kernel of attention is switched off, so that its scores are tensors."""
    cuda = torch.backends.cuda
    return not (cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled())


def _attention(
    query: Tensor,  # [..., N, D]
    key: Tensor,
    value: Tensor,  # [..., M, E]
    mask: Tensor | None = None,
    *args: Any,
    attn_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:  # [..., N, E]
    """As a fused kernel has it: no scores, but a logarithm for each query, and a mask of True and False as numbers.

    The meta device has no such kernel, and would write all scores out.
    """
    mask = mask if attn_mask is None else attn_mask
    held = [query.new_empty(query.shape[:-1], dtype=torch.float32)]
    if mask is not None and mask.dtype == torch.bool:
        held.append(mask.new_empty(mask.shape, dtype=query.dtype))
    if query.shape[-1] == value.shape[-1]:
        return torch.empty_like(query)  # its layout too: what follows may or may not have to copy
    return query.new_empty(*query.shape[:-1], value.shape[-1])


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
