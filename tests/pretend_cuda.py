"""A CUDA device for machines without one: tensors that say they lie on cuda:0, and are computed by the CPU.

It refuses what a GPU refuses: operands of an operation on two devices, and numbers drawn with another device's
generator. `unpinned` lists copies that were to overlap from memory that is not pinned. It knows nothing of time, of
streams (which order nothing here), of a GPU's rounding, or of what is compiled.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch._dynamo  # its table of torch's functions, made once in a process, is to hold the real ones
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, HOST = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}  # from any device to any other
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}  # by places on the CPU too
ALONE = {"aten::cat", "aten::stack", "aten::mm", "aten::bmm", "aten::addmm", "aten::gather", "aten::index_select"}

unpinned: list[str] = []
_pinned: set[int] = set()  # storages


class OnCuda(Tensor):
    """`held` is the CPU's tensor. To torch's C++ it is on the meta device, for which every build has a guard."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False, **_):
        if isinstance(held, OnCuda) or held.is_meta:  # a library that makes a parameter of a parameter's class
            return torch.nn.Parameter(held, requires_grad)
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.shape, device=torch.device("meta"), **layout)
        made.held = held
        return made

    def __init__(self, *args, **kwargs): ...

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def cpu(self) -> Tensor:
        return self.to(HOST)

    def tolist(self) -> list:
        return self.held.tolist()

    def __repr__(self, **_) -> str:
        return f"{self.held!r} on cuda:0"

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def record_stream(self, stream: "Stream") -> None:
        assert isinstance(stream, Stream)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


# -- operations -------------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """One operation, by the CPU: its result is on cuda:0 if that is asked for, or else if its operands are."""
    name = func._schema.name
    if name in ("aten::_fused_sdp_choice", "aten::_has_compatible_shallow_copy_type"):
        return 0  # attention as it is defined; parameters that move are made anew
    if name == "aten::to":
        return _moved(func, args, kwargs)
    if func is aten.scalar_tensor.default and kwargs.get("device") == torch.device("meta"):
        kwargs = kwargs | {"device": HOST}  # C++ makes numbers where it thinks that tensors are
    elif torch._C._current_autograd_node() is not None:  # and gradients
        args, kwargs = _each(lambda x: CUDA if x == torch.device("meta") else x, torch.device, args, kwargs)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, OnCuda)]
    asked = next((x.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.device)), None)
    if not there and asked != "cuda" and any(x.is_meta for x in tensors):
        return func(*args, **kwargs)
    _must_be_together(func, args, there, [x for x in tensors if not isinstance(x, OnCuda)])
    _note_unpinned(func, args, kwargs, asked)
    args_here, kwargs_here = _each(lambda x: HOST if x.type == "cuda" else x, torch.device, args, kwargs)
    args_here, kwargs_here = _each(lambda x: x.held, OnCuda, args_here, kwargs_here)
    if name == "aten::histc":
        args_here = (args_here[0].float(), *args_here[1:])  # the CPU has it of floats alone
    if kwargs_here.pop("pin_memory", False):
        out = func(*args_here, **kwargs_here)
        _pinned.add(out.untyped_storage()._cdata)
    else:
        out = func(*args_here, **kwargs_here)
    if func is aten.copy_.default:
        return args[0]
    if not (asked == "cuda" or (asked is None and there)):
        return out
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    with torch.inference_mode(False) if views and any(not x.is_inference() for x in there) else nullcontext():
        wrapped = _each(OnCuda, Tensor, out)
    return _written(func, args, kwargs, wrapped) if there and func._schema.is_mutable else wrapped


def _each(fn, kind, *trees):
    """`fn` of every leaf of that kind."""
    made = [
        tree_map(lambda x: fn(x) if isinstance(x, kind) else x, t, is_leaf=lambda x: isinstance(x, Tensor))
        for t in trees
    ]
    return made[0] if len(made) == 1 else made


def _moved(func, args, kwargs) -> Tensor:
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    x, like = given["self"], given.get("other")
    dtype = (like.dtype if like is not None else given.get("dtype")) or x.dtype
    device = like.device if like is not None else x.device if given.get("device") is None else given["device"]
    order = given.get("memory_format") or torch.preserve_format
    if (dtype, device.type) == (x.dtype, x.device.type) and not given.get("copy") and order == torch.preserve_format:
        return x
    how = {"dtype": dtype, "device": device, "non_blocking": bool(given.get("non_blocking")), "memory_format": order}
    return run(aten._to_copy.default, (x,), how)


def _must_be_together(func, args, there, here) -> None:
    """As on a GPU, numbers without dimensions may come from the CPU."""
    if not there or not here or func in COPIES:
        return
    if func in INDEXING:
        fits = isinstance(args[0], OnCuda)
    else:
        fits = all(not x.ndim for x in here) and func._schema.name not in ALONE
    if not fits:
        shapes = [tuple(x.shape) for x in here]
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} found {shapes} on cpu, others not")


def _note_unpinned(func, args, kwargs, asked) -> None:
    target, source = (args[0], args[1]) if func is aten.copy_.default else (None, args[0] if args else None)
    overlaps = args[2] if func is aten.copy_.default and len(args) > 2 else kwargs.get("non_blocking")
    if not overlaps or not isinstance(source, Tensor):
        return
    to_cuda = asked == "cuda" if target is None else isinstance(target, OnCuda)
    if to_cuda != isinstance(source, OnCuda):
        host = source if to_cuda else target
        if host is None or host.untyped_storage()._cdata not in _pinned:
            unpinned.append(f"{func} of {tuple(source.shape)}")


def _written(func, args, kwargs, wrapped):
    """What an operation in place returns: its argument."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    target = {
        next(iter(a.alias_info.before_set), None): given[a.name]  # of a list of tensors none is returned
        for a in func._schema.arguments
        if a.alias_info is not None and a.alias_info.is_write and a.name in given
    }
    own = [target.get(next(iter(r.alias_info.before_set))) if r.alias_info else None for r in func._schema.returns]
    parts = wrapped if len(own) > 1 else (wrapped,)
    out = tuple(new if old is None else old for old, new in zip(own, parts, strict=False))
    return out if len(own) > 1 else out[0] if own else None


# -- calls that C++ would answer by itself ----------------------------------------------------------------------------

_F = torch.nn.functional
LOWER = {_F.linear, _F.scaled_dot_product_attention, Tensor.__matmul__, torch.matmul}  # what autocast rounds, as far
WIDER = {_F.layer_norm, _F.normalize, _F.softplus, Tensor.exp, Tensor.expm1, Tensor.sum}  # as probes call it


class Calls(TorchFunctionMode):
    """Gives "cuda" its number, makes tensors of Python's numbers, checks generators, and rounds as autocast does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        args = tuple(CUDA if isinstance(x, str | torch.device) and str(x) == "cuda" else x for x in args)
        kwargs = {k: CUDA if k == "device" and str(x) == "cuda" else x for k, x in kwargs.items()}
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor) and kwargs.get("device"):
            where = kwargs.pop("device")
            return func(_each(lambda x: x.item(), OnCuda, args[0]), *args[1:], **kwargs).to(where)
        if func is Tensor.new_tensor and isinstance(args[0], OnCuda):
            return torch.tensor(args[1], dtype=args[0].dtype).to(CUDA)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], OnCuda):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            places = tuple(torch.tensor(x) if isinstance(x, list) and x else x for x in places)
            args = (args[0], places, *args[2:])
            if len(args) == 3 and not isinstance(args[2], Tensor):
                args = (*args[:2], torch.tensor(args[2], dtype=args[0].dtype))
        if (generator := kwargs.get("generator")) is not None:
            where = kwargs.get("device") or (args[0].device if isinstance(args[0], Tensor) else HOST)
            if torch.device(where).type != generator.device.type:
                raise RuntimeError(f"Expected a {where} generator, found one of {generator.device}")
        if torch.is_autocast_enabled("cuda") and func in LOWER | WIDER:
            dtype = torch.bfloat16 if func in LOWER else torch.float32
            round_ = lambda x: x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x  # noqa: E731
            args, kwargs = _each(round_, OnCuda, args, kwargs)
        return func(*args, **kwargs)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.__dict__["of"] = CUDA if torch.device(device).type == "cuda" else HOST
        return made

    device = property(lambda self: self.__dict__["of"])


class Stream:
    def __init__(self, device=None): ...

    def wait_stream(self, stream: "Stream") -> None:
        assert isinstance(stream, Stream)

    def wait_event(self, event: "Event") -> None:
        assert event.recorded


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False):
        self.timed, self.recorded = enable_timing, False

    def record(self, stream: Stream | None = None) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded

    def elapsed_time(self, end: "Event") -> float:
        assert self.timed and end.timed and self.recorded and end.recorded  # noqa: PT018
        return 1.0


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """Inside, and in threads that are started inside, there is one CUDA device, of compute capability 9.0."""
    nothing, inside = lambda *args: None, lambda *args: nullcontext()
    answers = {
        "_lazy_init": nothing, "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "is_bf16_supported": lambda *args: True, "get_device_capability": lambda *args: (9, 0),
        "get_device_name": lambda *args: "Pretended GPU", "mem_get_info": lambda *args: (140 << 30, 141 << 30),
        "max_memory_allocated": lambda *args: 1, "reset_peak_memory_stats": nothing, "empty_cache": nothing,
        "set_device": nothing, "synchronize": nothing, "manual_seed_all": nothing, "get_rng_state": nothing,
        "set_rng_state": nothing, "stream": inside, "device": inside, "device_of": inside,
        "current_stream": lambda *args: Stream(), "Stream": Stream, "Event": Event,
    }  # fmt: skip
    start = threading.Thread.run

    def in_thread(self) -> None:
        with Calls(), Operations():
            start(self)

    unpinned.clear()
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(threading.Thread, "run", in_thread)
        with Calls(), Operations():
            yield
