"""A probe's input layer on frozen features: LayerNorm(C), Linear(C -> D), and what may follow, in one pass over them.

P probes on the same features, or on as many feature tensors, share the pass. Nothing here knows what a probe learns.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from spatialprobe.kernels import folded_backward, folded_forward
from spatialprobe.kernels.folded_linear import L2_NORM_EPS, QUANTISED, fold
from spatialprobe.kernels.launch import Impl, use_triton

Activation = Literal["gelu"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6  # of LayerNorm, as in the stored reciprocal deviations


# -- what is called ---------------------------------------------------------------------------------------------------


def probe_input(
    x: Tensor,  # [..., C], as stored: float32, float16, bfloat16, float8_e4m3fn or int8; frozen
    weight: Tensor,  # [D, C]
    bias: Tensor | None = None,  # [D]
    gamma: Tensor | None = None,  # [C], LayerNorm's weight; None is 1
    beta: Tensor | None = None,  # [C], LayerNorm's bias; None is 0
    *,
    scale: Tensor | None = None,  # float32 [...]: x * scale is the value; float8_e4m3fn and int8 must have it
    mean: Tensor | None = None,  # float32 [...], of the values over C, as stored with them
    rstd: Tensor | None = None,  # float32 [...], 1 / sqrt(variance + eps); mean and rstd come together
    eps: float = EPS,  # of LayerNorm; unused where rstd has one in it
    activation: Activation | None = None,  # exact GELU
    normalize: bool = False,  # divide by the L2 norm over D, at least 1e-12
    out_dtype: torch.dtype | None = None,  # None: autocast's where it is on, else the weight's, as of nn.Linear
    impl: Impl = "auto",
) -> Tensor:  # [..., D]
    """`definition`'s value, by one product that reads the features once and makes no normalised copy of them.

    Differentiable in weight, bias, gamma and beta, by one product more. What is multiplied is decided by the dtype of
    `x`, not by autocast. In Triton, features as they are stored: 16-bit ones with weights rounded to their dtype (which
    |gamma W| must suit in float16), quantised ones with weights rounded to bfloat16, and float32 ones in IEEE float32,
    never TF32; sums are float32; there is no second derivative. In torch, features converted once to float32 (float64
    if x or the weight is), with weights as they are. Tokens are copied first, unless they lie at one stride with
    channels at stride 1.

    Raises ValueError for an x, scale, mean or rstd that wants a gradient, shapes, dtypes and devices that do not fit,
    quantised features without a scale, a mean without rstd, and for an impl that cannot run.
    """
    _check_shapes(weight, bias, gamma, beta, "[D, C]", 2)
    ours = (None if t is None else t[None, None] for t in (weight, bias, gamma, beta))
    (y,) = _project([x], *ours, [scale], [mean], [rstd], eps, activation, normalize, out_dtype, impl)
    return y.reshape(*x.shape[:-1], len(weight))


def grouped_probe_input(
    x: Tensor | Sequence[Tensor],  # [..., C] for all probes, or P of them, of one dtype and C, lengths may differ
    weight: Tensor,  # [P, D, C]
    bias: Tensor | None = None,  # [P, D]
    gamma: Tensor | None = None,  # [P, C]
    beta: Tensor | None = None,  # [P, C]
    *,
    scale: Tensor | Sequence[Tensor] | None = None,  # like x, without C
    mean: Tensor | Sequence[Tensor] | None = None,
    rstd: Tensor | Sequence[Tensor] | None = None,
    eps: float = EPS,
    activation: Activation | None = None,
    normalize: bool = False,  # each probe's D by itself
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor | list[Tensor]:  # [..., P, D], or P of [..., D]
    """`probe_input` of P probes: on one tensor by one product, on P tensors by one launch, or by P of cuBLAS.

    Everything else, and what raises ValueError, is as in `probe_input`.
    """
    _check_shapes(weight, bias, gamma, beta, "[P, D, C]", 3)
    shared = isinstance(x, Tensor)
    if not shared and len(x) != len(weight):
        raise ValueError(f"x must be a tensor or {len(weight)} of them, one per probe, got {len(x)}")
    xs = [x] if shared else list(x)
    stats = []
    for name, given in (("scale", scale), ("mean", mean), ("rstd", rstd)):
        of_each = [given] * len(xs) if given is None or isinstance(given, Tensor) else list(given)
        if given is not None and (isinstance(given, Tensor) != shared or len(of_each) != len(xs)):
            raise ValueError(f"{name} must be as x is, a tensor or one per probe, got {type(given).__name__}")
        stats.append(of_each)
    ours = (None if t is None else t[None] if shared else t[:, None] for t in (weight, bias, gamma, beta))
    ys = _project(xs, *ours, *stats, eps, activation, normalize, out_dtype, impl)
    if shared:
        return ys[0].reshape(*x.shape[:-1], *weight.shape[:2])
    return [y.reshape(*one.shape[:-1], weight.shape[1]) for y, one in zip(ys, xs, strict=True)]


def _check_shapes(weight, bias, gamma, beta, wanted: str, ndim: int) -> None:
    if weight.ndim != ndim or 0 in weight.shape:
        raise ValueError(f"weight must be {wanted} and not empty, got {list(weight.shape)}")
    *probes, width, channels = weight.shape
    for name, given, last in (("bias", bias, width), ("gamma", gamma, channels), ("beta", beta, channels)):
        if given is not None and list(given.shape) != [*probes, last]:
            raise ValueError(f"{name} must be {[*probes, last]} for this weight, got {list(given.shape)}")


def _project(
    xs: list[Tensor], weight, bias, gamma, beta, scales, means, rstds, eps, activation, normalize, out_dtype, impl
) -> list[Tensor]:  # G of [M, H, D]
    """The probes on G tensors with H on each: their parameters have [G, H] in front."""
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(f"activation must be None or one of {', '.join(get_args(Activation))}, got {activation!r}")
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    triton, kind = use_triton(impl, xs[0]), weight.device.type
    floats = FLOATS if triton else (*FLOATS, torch.float64)
    for name, given in (("weight", weight), ("bias", bias), ("gamma", gamma), ("beta", beta)):
        if given is not None and (given.dtype not in floats or given.device != weight.device):
            wanted = f"one of {', '.join(map(str, floats))} on {weight.device}"
            raise ValueError(f"{name} must be {wanted}, got {given.dtype} on {given.device}")
    for features in zip(xs, scales, means, rstds, strict=True):
        _check_features(*features, xs[0].dtype, (*floats, *QUANTISED), weight)
    if out_dtype is not None and out_dtype not in floats:
        raise ValueError(f"out_dtype must be one of {', '.join(map(str, floats))}, got {out_dtype}")
    if out_dtype is None:
        out_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    how = (eps, activation == "gelu", normalize, out_dtype)
    with torch.autocast(kind, enabled=False):
        if triton:
            return _in_triton(xs, weight, bias, gamma, beta, *map(_joined, (scales, means, rstds)), *how)
        ours = zip(*(t if t is not None else [None] * len(xs) for t in (weight, bias, gamma, beta)), strict=True)
        theirs = zip(xs, scales, means, rstds, strict=True)
        return [_in_torch(x, *mine, *stats, *how) for mine, (x, *stats) in zip(ours, theirs, strict=True)]


def _check_features(x, scale, mean, rstd, dtype, dtypes, weight) -> None:
    if x.ndim == 0 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x must be [..., {weight.shape[-1]}] for this weight, got {list(x.shape)}")
    if x.dtype not in dtypes or x.dtype != dtype:
        raise ValueError(f"x must be one of {', '.join(map(str, dtypes))}, the same for all, got {x.dtype}")
    if (x.dtype in QUANTISED) != (scale is not None):
        raise ValueError(f"scale must be given for quantised features and no others, got {x.dtype} and {type(scale)}")
    if (mean is None) != (rstd is None):
        raise ValueError("mean and rstd must be given together, got one of them")
    for name, given in (("x", x), ("scale", scale), ("mean", mean), ("rstd", rstd)):
        if given is None:
            continue
        if torch.is_grad_enabled() and given.requires_grad:
            raise ValueError(f"features are frozen and get no gradient, but {name} requires one")
        if given.device != weight.device:
            raise ValueError(f"{name} must be on the weight's {weight.device}, got {given.device}")
        if name != "x" and (given.shape != x.shape[:-1] or given.dtype not in (torch.float32, torch.float64)):
            raise ValueError(f"{name} must be float32 {list(x.shape[:-1])}, got {given.dtype} {list(given.shape)}")


# -- the definition, and the form of it that is fast without a kernel -------------------------------------------------


def definition(
    x: Tensor,  # [..., C]
    weight: Tensor,  # [D, C]
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    eps: float = EPS,
    activation: Activation | None = None,
    normalize: bool = False,
) -> Tensor:  # [..., D]
    """The specification: one operation after the other, in the dtype of `weight`."""
    values = x.to(weight.dtype) if scale is None else x.to(weight.dtype) * scale[..., None]
    if mean is None:
        variance, mean = torch.var_mean(values, -1, correction=0)
        rstd = (variance + eps).rsqrt()
    normed = (values - mean[..., None]) * rstd[..., None]
    normed = normed if gamma is None else normed * gamma
    normed = normed if beta is None else normed + beta
    y = F.linear(normed, weight, bias)
    y = F.gelu(y) if activation == "gelu" else y
    return F.normalize(y, dim=-1, eps=L2_NORM_EPS) if normalize else y


def _in_torch(
    x, weight, bias, gamma, beta, scale, mean, rstd, eps, gelu, normalize, out_dtype
) -> Tensor:  # [..., C], [H, D, C], [H, D], [H, C], [H, C], [...], [...], [...] -> [M, H, D]
    """`folded_linear`'s form in plain torch: one product for all heads, and the rest on [M, H * D].

    Against LayerNorm and Linear it saves passes over [M, C]; autograd keeps the features in float32, and no other copy.
    What is differentiated is torch's own, so vmap, double gradients and compiled graphs work as anywhere.
    """
    dtype = torch.promote_types(weight.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    scale, mean, rstd = (None if t is None else t.reshape(-1, 1).to(dtype) for t in (scale, mean, rstd))
    if mean is None:  # of what is multiplied: LayerNorm(scale * q) is LayerNorm(q) with eps / scale^2
        mean = rows.mean(-1, keepdim=True)
        power = torch.linalg.vector_norm(rows - mean, dim=-1, keepdim=True).square()  # var_mean is slow on the CPU
        gain = (power / rows.shape[1] + (eps if scale is None else eps / scale.square())).rsqrt()
        offset = gain * mean
    else:
        gain, offset = rstd if scale is None else rstd * scale, rstd * mean
    folded, shift = fold(*(None if t is None else t.to(dtype) for t in (weight, bias, gamma, beta)))
    folded = folded.flatten(0, 1)
    sums = folded.detach().sum(-1)  # rounding left them; their derivative is 0
    y = (rows @ folded.T * gain - offset * sums + shift.flatten()).unflatten(1, weight.shape[:2])
    y = F.gelu(y) if gelu else y
    return (F.normalize(y, dim=-1, eps=L2_NORM_EPS) if normalize else y).to(out_dtype)


# -- Triton, as torch sees it -----------------------------------------------------------------------------------------

_forward = torch.library.custom_op("spatialprobe::probe_input", folded_forward.forward, mutates_args=())
_backward = torch.library.custom_op("spatialprobe::probe_input_backward", folded_backward.backward, mutates_args=())


def _in_triton(xs, weight, bias, gamma, beta, scale, mean, rstd, eps, gelu, normalize, out_dtype) -> list[Tensor]:
    rows = [x.reshape(-1, x.shape[-1]) for x in xs]
    rows = [x if x.stride(1) == 1 else x.contiguous() for x in rows]
    given = [t for t in (weight, bias, gamma, beta) if t is not None]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    y, *_ = _forward(rows, weight, bias, gamma, beta, scale, mean, rstd, eps, gelu, normalize, out_dtype, keep)
    return list(y.split([len(x) for x in rows]))


def _joined(stats: list[Tensor | None]) -> Tensor | None:  # G of [...] -> float32 [T]
    if stats[0] is None:
        return None
    flat = [t.reshape(-1).float() for t in stats]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


@_forward.register_fake
def _(x, weight, bias, gamma, beta, scale, mean, rstd, eps, gelu, normalize, out_dtype, keep):
    tokens = sum(one.shape[0] for one in x)
    made = [weight.new_empty(tokens if mean is None else 0, dtype=torch.float32) for _ in range(2)]
    z = tokens if keep and (gelu or normalize) else 0
    return (
        weight.new_empty(tokens, *weight.shape[1:3], dtype=out_dtype),
        *made,
        weight.new_empty(z, *weight.shape[1:3], dtype=out_dtype),
    )


@_backward.register_fake
def _(dy, x, weight, gamma, beta, scale, mean, rstd, z, gelu, normalize):
    groups, heads, width, channels = weight.shape
    of_channels = [(0,) if t is None else (groups, heads, channels) for t in (gamma, beta)]
    shapes = (weight.shape, (groups, heads, width), *of_channels)
    return tuple(weight.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, gamma, beta, scale, mean, rstd, _, ctx.gelu, ctx.normalize, _, _ = inputs
    _, made_mean, made_rstd, z = output
    stats = (made_mean, made_rstd) if mean is None else (mean, rstd)
    ctx.save_for_backward(weight, gamma, beta, scale, *stats, z, *x)
    ctx.set_materialize_grads(False)  # of outputs that only the backward pass reads
    ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias, gamma, beta)]


def _gradients(ctx, dy, *_):
    weight, gamma, beta, scale, mean, rstd, z, *x = ctx.saved_tensors
    made = _backward(dy, x, weight, gamma, beta, scale, mean, rstd, z, ctx.gelu, ctx.normalize)
    grads = [None if dtype is None else t.to(dtype) for t, dtype in zip(made, ctx.dtypes, strict=True)]
    return [None] * len(x), *grads, *[None] * 8


_forward.register_autograd(_gradients, setup_context=_save)
