"""What is kept of a block's output: wanted rows, pooled tokens, summed over noise steps, rounded for the store.

Each noise step's output is read once. The torch definitions are the specification; on CUDA the Triton kernel runs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from spatialprobe.kernels.launch import Impl, cast, launch_for, use_triton

Norm = Literal["none", "layer", "l2"]  # of each token over C; layer is (x - mean) / sqrt(variance + 1e-6)
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTISED_MAX = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
STORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, *QUANTISED_MAX)
LAYER_NORM_EPS = 1e-6
L2_NORM_EPS = 1e-12  # least norm that is divided by, as in torch.nn.functional.normalize
SCALE_MIN = torch.finfo(torch.float32).tiny  # the scale of a token of zeros
MAX_CHANNELS = 16384  # of the Triton kernel, which holds a token in registers
_LAYER_NORM_EPS, _L2_NORM_EPS, _SCALE_MIN = map(tl.constexpr, (LAYER_NORM_EPS, L2_NORM_EPS, SCALE_MIN))


@dataclass
class Finished:
    """Features as they are stored, with what their readers would otherwise compute again."""

    data: Tensor  # [..., C], store dtype
    scale: Tensor | None  # float32 [...], data * scale is the value; None unless quantised
    mean: Tensor  # float32 [...], mean over C of the stored values
    rstd: Tensor  # float32 [...], 1 / sqrt(variance over C + 1e-6) of the stored values
    peak: Tensor  # float32 [...], largest magnitude over C before rounding: inf or NaN where a value was; not stored

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Finished":
        """`fn` of every tensor that is there."""
        return Finished(**{name: None if x is None else fn(x) for name, x in vars(self).items()})

    def named(self, name: str) -> dict[str, Tensor]:
        """As a store's file names them: `name`, `name.mean`, `name.rstd` and, if quantised, `name.scale`."""
        parts = {f"{name}.{part}": getattr(self, part) for part in ("scale", "mean", "rstd")}
        return {name: self.data} | {part: x for part, x in parts.items() if x is not None}


# -- what is called ---------------------------------------------------------------------------------------------------


def accumulate(
    x: Tensor,  # [B, T, H, W, C], or [K, B, T, H, W, C] for K steps at once; any strides, fastest where C's is 1
    rows: tuple[int, ...],  # wanted rows of T, R of them in any order
    grid: tuple[int, int] | None,  # (h, w) after pooling; None keeps H, W
    into: Tensor | None = None,  # float32 [B, R, h, w, C], contiguous, added to in place; None makes one
    *,
    weight: float | Sequence[float] = 1.0,  # of the step; K of them for K steps
    impl: Impl = "auto",
) -> Tensor:
    """Adds `weight` times the wanted rows of `x`, average-pooled as `adaptive_avg_pool2d` does. Returns `into`.

    The mean over K noise steps is K - 1 calls with weight 1/K into one buffer, and `pool_features(..., onto=buffer)`
    for the last step; the K outputs never exist at once. Raises ValueError for shapes, rows, grids and dtypes that do
    not fit, for an `x` that wants a gradient (features are frozen), and, in Triton, for C beyond 16384.
    """
    if into is None:
        data = pool_features(x, rows, grid, dtype=torch.float32, weight=weight, impl=impl).data
        return data.contiguous()  # torch's results have the strides of x, and the steps to come want a plain buffer
    steps, grid, weights = _checked(x, rows, grid, weight, "into", into)
    if use_triton(impl, x):
        _add_pooled(steps, rows, grid, weights, into)
    else:
        for step, step_weight in zip(steps, weights, strict=True):
            into.add_(_average(step, rows, grid), alpha=step_weight)
    return into


def pool_features(
    x: Tensor,  # [B, T, H, W, C], or [K, B, T, H, W, C] for K steps at once; any strides, fastest where C's is 1
    rows: tuple[int, ...],  # wanted rows of T, R of them in any order
    grid: tuple[int, int] | None,  # (h, w) after pooling; None keeps H, W
    *,
    dtype: torch.dtype,  # of the store: float32, bfloat16, float16, float8_e4m3fn or int8
    norm: Norm = "none",
    onto: Tensor | None = None,  # float32 [B, R, h, w, C], contiguous: the sum of the steps before
    weight: float | Sequence[float] = 1.0,  # of the step; K of them for K steps
    impl: Impl = "auto",
) -> Finished:  # of [B, R, h, w, C]; never shares memory with x or onto
    """The wanted rows of `x`, pooled, weighted and added to `onto` as `accumulate` does, normalised and rounded.

    Rounding and statistics are `finish`'s. A token with a value that is not finite has a peak and a mean that are not,
    whatever the dtype, and its data means nothing; so has a token that cannot be normalised, because its squares pass
    float32. Raises ValueError as `accumulate` does, and for another norm or store dtype.
    """
    steps, grid, weights = _checked(x, rows, grid, weight, "onto", onto)
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, got {norm!r}")
    if dtype not in STORE_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, STORE_DTYPES))}, got {dtype}")
    if use_triton(impl, x):
        data, scale, *stats = _pool_and_finish(steps, rows, grid, weights, onto, dtype, norm)
        return Finished(data, scale if dtype in QUANTISED_MAX else None, *stats)
    total = onto
    for step, step_weight in zip(steps, weights, strict=True):
        pooled = _average(step, rows, grid)
        total = pooled * step_weight if total is None else total.add(pooled, alpha=step_weight)
    return finish(_normalised(total, norm), dtype)


def _checked(
    x: Tensor,
    rows: tuple[int, ...],
    grid: tuple[int, int] | None,
    weight: float | Sequence[float],
    name: str,
    total: Tensor | None,  # called `name` by the caller
) -> tuple[Tensor, tuple[int, int], list[float]]:  # [K, B, T, H, W, C], (h, w), K weights
    """The arguments as both implementations take them."""
    if x.ndim not in (5, 6) or 0 in x.shape[-4:]:
        raise ValueError(f"x must be [B, T, H, W, C] or [K, B, T, H, W, C], and not empty, got {tuple(x.shape)}")
    steps = x if x.ndim == 6 else x[None]
    weights = [float(w) for w in weight] if isinstance(weight, Sequence) else [float(weight)]
    if not weights or len(weights) != len(steps):
        raise ValueError(f"weight must be one number for each of the {len(steps)} steps, got {weight}")
    if x.dtype not in INPUT_DTYPES:
        raise ValueError(f"x must be one of {', '.join(map(str, INPUT_DTYPES))}, got {x.dtype}")
    if torch.is_grad_enabled() and (x.requires_grad or (total is not None and total.requires_grad)):
        raise ValueError("features are frozen: pooling has no backward, so its input must not require a gradient")
    batch, length, height, width, channels = steps.shape[1:]
    if not rows or min(rows) < 0 or max(rows) >= length:
        raise ValueError(f"rows must name some of the {length} rows, got {rows}")
    h, w = (height, width) if grid is None else grid
    if not (0 < h <= height and 0 < w <= width):
        raise ValueError(f"grid must not be empty or larger than the {height}x{width} tokens, got {h}x{w}")
    shape = (batch, len(rows), h, w, channels)
    if total is not None and (total.shape != shape or total.dtype != torch.float32 or total.device != x.device):
        got = f"{total.dtype} {tuple(total.shape)} on {total.device}"
        raise ValueError(f"{name} must be float32 {shape} on {x.device}, got {got}")
    if total is not None and not total.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {total.stride()}")
    return steps, (h, w), weights


# -- the definitions --------------------------------------------------------------------------------------------------


def _average(x: Tensor, rows: tuple[int, ...], grid: tuple[int, int]) -> Tensor:
    """[B, T, H, W, C] -> float32 [B, R, h, w, C]; may share memory with x."""
    first, last = rows[0], rows[-1] + 1
    kept = x[:, first:last] if rows == tuple(range(first, last)) else x[:, list(rows)]
    (height, width), (h, w) = x.shape[2:4], grid
    if grid == (height, width):
        return kept.float()
    if height % h == 0 and width % w == 0:  # exact bins: one reduction, no permuted copies
        return kept.unflatten(3, (w, -1)).unflatten(2, (h, -1)).mean((3, 5), dtype=torch.float32)
    maps = kept.flatten(0, 1).float().permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(maps, grid).permute(0, 2, 3, 1).unflatten(0, kept.shape[:2])


def _normalised(x: Tensor, norm: Norm) -> Tensor:  # float32 [..., C]
    if norm == "none":
        return x
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    power = x.square().sum(-1, keepdim=True)
    if norm == "layer":
        size = (power / x.shape[-1] + LAYER_NORM_EPS).sqrt()
    else:
        size = power.sqrt().clamp_min(L2_NORM_EPS)
    return x / size.where(power < math.inf, math.nan)


def finish(x: Tensor, dtype: torch.dtype) -> Finished:
    """Rounds float32 features [..., C] to the store's dtype, with per-token statistics of the rounded values.

    float8_e4m3 and int8 get one scale per token, its largest magnitude over the dtype's largest value. float16 does
    not saturate: a value beyond 65504 becomes infinite, and with it the token's mean, which the caller must refuse.
    """
    peak = x.abs().amax(-1)
    if dtype not in QUANTISED_MAX:
        data, scale = x.to(dtype), None
    else:
        top = QUANTISED_MAX[dtype]
        scale = (peak / top).clamp_min(SCALE_MIN)
        data = (x / scale[..., None]).clamp(-top, top)
        data = (data.round() if dtype == torch.int8 else data).to(dtype)
    return Finished(data, scale, *token_stats(dequantize(data, scale)), peak)


def dequantize(data: Tensor, scale: Tensor | None) -> Tensor:  # [..., C], [...] -> float32 [..., C]
    """The values that stored features stand for."""
    return data.float() if scale is None else data.float() * scale[..., None]


def token_stats(x: Tensor) -> tuple[Tensor, Tensor]:  # [..., C] -> float32 [...], float32 [...]
    """Mean and 1 / sqrt(biased variance + 1e-6) over channels: what LayerNorm(eps=1e-6) needs of each token."""
    variance, mean = torch.var_mean(x.float(), dim=-1, correction=0)
    return mean, (variance + LAYER_NORM_EPS).rsqrt()


# -- Triton -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """How the work of one output token is laid out."""

    values: int  # channels per thread
    in_flight: int  # bytes of input that a thread asks for before it adds
    registers: int  # per thread, at most
    e4m3: bool  # the device converts to float8_e4m3 itself; otherwise `_e4m3_bits` does


# By compute capability. The kernel waits for memory and does little else, so it should ask for much at a time, and have
# another token to ask for while one is being reduced.
# - 32 channels per thread: 8 warps at C=5120, which for a 2x2 bin in bfloat16 ask for all its 40 KB at once.
# - 320 bytes: 5 tokens in bfloat16, so a row of 52 -> 14 in one go, 2 in float32. With 384, some kernels spill.
# - 128 registers: two programs fit an SM at C=5120. Without a limit ptxas holds some kernels to 80, and they spill.
# Registers and spills are of kernels compiled ahead with Triton 3.7. No time is known yet, so the rows differ only in
# what the devices can do.
LAUNCHES = {
    80: Launch(values=32, in_flight=320, registers=128, e4m3=False),
    90: Launch(values=32, in_flight=320, registers=128, e4m3=True),
    100: Launch(values=32, in_flight=320, registers=128, e4m3=True),
}


@torch.library.custom_op("spatialprobe::pool_and_finish", mutates_args=())
def _pool_and_finish(
    x: Tensor,  # [K, B, T, H, W, C]
    rows: Sequence[int],
    grid: Sequence[int],
    weights: Sequence[float],
    onto: Tensor | None,
    dtype: torch.dtype,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # data; scale, empty unless quantised; mean, rstd, peak
    done = _empty(x, rows, grid, dtype)
    _launch(x, rows, grid, weights, onto, done[0], done[1:], norm)
    return done


@_pool_and_finish.register_fake
def _(x, rows, grid, weights, onto, dtype, norm):
    return _empty(x, rows, grid, dtype)


@torch.library.custom_op("spatialprobe::add_pooled", mutates_args=("into",))
def _add_pooled(
    x: Tensor,  # [K, B, T, H, W, C]
    rows: Sequence[int],
    grid: Sequence[int],
    weights: Sequence[float],
    into: Tensor,
) -> None:
    _launch(x, rows, grid, weights, into, into, None, "none")


@_add_pooled.register_fake
def _(x, rows, grid, weights, into):
    return None


def _empty(x: Tensor, rows: Sequence[int], grid: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    tokens = (x.shape[1], len(rows), *grid)
    scales = tokens if dtype in QUANTISED_MAX else (0,)
    data = torch.empty((*tokens, x.shape[-1]), dtype=dtype, device=x.device)
    return data, *(torch.empty(s, dtype=torch.float32, device=x.device) for s in (scales, tokens, tokens, tokens))


def _launch(
    x: Tensor,  # [K, B, T, H, W, C]
    rows: Sequence[int],
    grid: Sequence[int],
    weights: Sequence[float],
    onto: Tensor | None,
    out: Tensor,  # [B, R, h, w, C]
    per_token: Sequence[Tensor] | None,  # scale, mean, rstd, peak; None leaves the sum unfinished
    norm: str,
) -> None:
    steps, batch, _, height, width, channels = x.shape
    if channels > MAX_CHANNELS:
        raise ValueError(f"the Triton kernel takes at most {MAX_CHANNELS} channels, got {channels}; impl='torch' more")
    tokens = batch * len(rows) * grid[0] * grid[1]
    if tokens == 0:
        return
    launch = launch_for(LAUNCHES, x.device)
    block = max(triton.next_power_of_2(channels), 128)
    # Strides in units that the kernel multiplies: so it is known to the compiler that vectors of 16 bytes are aligned.
    strides = [stride if size > 1 else 0 for stride, size in zip(x.stride()[:5], x.shape[:5], strict=True)]
    unit = math.gcd(16, *strides)
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be x's
        _pool_kernel[(tokens,)](
            x, *_on_device(tuple(rows), tuple(weights), x.device), onto,
            out.view(torch.uint8) if out.dtype == torch.float8_e4m3fn and not launch.e4m3 else out,
            *(per_token or (None,) * 4),
            steps, len(rows), height, width, *grid, *(stride // unit for stride in strides),
            x.stride(5) if channels > 1 else 1,
            ONTO=onto is not None, FINISH=per_token is not None, NORM=norm, TOP=QUANTISED_MAX.get(out.dtype, 0.0),
            UNIT=unit, C=channels, BLOCK=block, TALL=_longest_bin(height, grid[0]), WIDE=_longest_bin(width, grid[1]),
            AT_ONCE=launch.in_flight // (launch.values * x.itemsize),
            num_warps=max(block // launch.values // 32, 1), maxnreg=launch.registers,
        )  # fmt: skip


@lru_cache
def _on_device(rows: tuple[int, ...], weights: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept, because every layer of every clip asks for the same."""
    weights_k = torch.tensor(weights, dtype=torch.float32, device=device)
    return torch.tensor(rows, dtype=torch.int32, device=device), weights_k


def _longest_bin(length: int, bins: int) -> int:
    return max(-(-(i + 1) * length // bins) - i * length // bins for i in range(bins))


@triton.jit
def _add_bin(
    acc, token, column, x_ptr, rows_ptr, weights_ptr,
    K, R, H, W, h, w, k_stride, b_stride, t_stride, y_stride, x_stride, c_stride,
    UNIT: tl.constexpr, C: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """`acc` plus each step's weighted mean over the bin of output `token`."""
    i, j = (token // w) % h, token % w
    r, b = (token // (w * h)) % R, token // (w * h * R)
    top, bottom = (i * H) // h, ((i + 1) * H + h - 1) // h
    left, right = (j * W) // w, ((j + 1) * W + w - 1) // w
    share = tl.div_rn(1.0, ((bottom - top) * (right - left)).to(tl.float32))
    row = tl.load(rows_ptr + r)
    inside = column < C
    column = column.to(tl.int64) * c_stride
    for k in range(K):
        image = tl.cast(k, tl.int64) * k_stride + tl.cast(b, tl.int64) * b_stride + tl.cast(row, tl.int64) * t_stride
        total = tl.zeros_like(acc)
        if TALL * WIDE <= AT_ONCE:  # all loads in flight at once
            for dy in tl.static_range(TALL):
                for dx in tl.static_range(WIDE):
                    y, x = top + dy, left + dx
                    offset = (image + tl.cast(y, tl.int64) * y_stride + tl.cast(x, tl.int64) * x_stride) * UNIT
                    value = tl.load(x_ptr + offset + column, inside & (y < bottom) & (x < right), 0.0)
                    total += value.to(tl.float32)
        else:
            for y in range(top, bottom):
                for start in range(left, right, min(WIDE, AT_ONCE)):
                    for dx in tl.static_range(min(WIDE, AT_ONCE)):
                        x = start + dx
                        offset = (image + tl.cast(y, tl.int64) * y_stride + tl.cast(x, tl.int64) * x_stride) * UNIT
                        value = tl.load(x_ptr + offset + column, inside & (x < right), 0.0)
                        total += value.to(tl.float32)
        acc += total * (tl.load(weights_ptr + k) * share)
    return acc


@triton.jit
def _e4m3_bits(x):
    """float32 |x| <= 448 as float8_e4m3, to nearest even: its 8 bits, and their value in float32."""
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # 3 bits of mantissa stay
    unit: tl.constexpr = 12582912.0 / 512  # 1.5 * 2**23 * 2**-9: below 2**-6 the values are multiples of 2**-9
    shifted = size + unit  # their number is in its last bits
    small = size < 0.015625
    code = tl.where(small, shifted.to(tl.int32, bitcast=True) & 15, (bits >> 20) - 960)  # exponents 127 and 7 are 1
    value = tl.where(small, shifted - unit, bits.to(tl.float32, bitcast=True))
    return (code | tl.where(x < 0, 128, 0)).to(tl.uint8), tl.where(x < 0, -value, value)


@triton.jit
def _pool_kernel(
    x_ptr, rows_ptr, weights_ptr, onto_ptr, out_ptr, scale_ptr, mean_ptr, rstd_ptr, peak_ptr,
    K, R, H, W, h, w, k_stride, b_stride, t_stride, y_stride, x_stride, c_stride,
    ONTO: tl.constexpr, FINISH: tl.constexpr, NORM: tl.constexpr, TOP: tl.constexpr,
    UNIT: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One program makes one token of the output: its sum stays in registers until all of it is known."""
    STORED: tl.constexpr = out_ptr.dtype.element_ty
    token = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < C
    at = tl.cast(token, tl.int64) * C + column
    y = tl.zeros([BLOCK], tl.float32)
    if ONTO:
        y = tl.load(onto_ptr + at, inside, 0.0)
    y = _add_bin(
        y, token, column, x_ptr, rows_ptr, weights_ptr,
        K, R, H, W, h, w, k_stride, b_stride, t_stride, y_stride, x_stride, c_stride, UNIT, C, TALL, WIDE,
        AT_ONCE,
    )  # fmt: skip
    if FINISH:
        if NORM == "layer":
            y = tl.where(inside, y - tl.sum(y, 0) / C, 0.0)
            power = tl.sum(y * y, 0)
            y *= 1.0 / tl.where(power < float("inf"), tl.sqrt_rn(power / C + _LAYER_NORM_EPS), float("nan"))
        if NORM == "l2":
            power = tl.sum(y * y, 0)
            y *= 1.0 / tl.where(power < float("inf"), tl.maximum(tl.sqrt_rn(power), _L2_NORM_EPS), float("nan"))
        # As whole numbers magnitudes have the same order, with inf and then NaN on top; a float maximum drops NaN.
        peak = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.float32, bitcast=True)
        tl.store(peak_ptr + token, peak)
        if TOP > 0:
            scale = tl.div_rn(peak, TOP)
            scale = tl.where(scale < _SCALE_MIN, _SCALE_MIN, scale)  # NaN stays
            tl.store(scale_ptr + token, scale)
            q = y * tl.div_rn(1.0, scale)
            q = tl.where(q > -TOP, q, -TOP)  # so does NaN become, which the cast could not take
            q = tl.where(q < TOP, q, TOP)
            if STORED == tl.uint8:
                data, y = _e4m3_bits(q)
            else:
                if STORED == tl.int8:
                    q = (q + 12582912.0) - 12582912.0  # 1.5 * 2**23: to whole numbers, to nearest even
                data = cast(q, STORED)
                y = data.to(tl.float32)
            y *= scale
        else:
            data = cast(y, STORED)
            y = data.to(tl.float32)
        tl.store(out_ptr + at, data, inside)
        mean = tl.sum(y, 0) / C
        y = tl.where(inside, y - mean, 0.0)
        tl.store(mean_ptr + token, mean)
        tl.store(rstd_ptr + token, 1.0 / tl.sqrt_rn(tl.sum(y * y, 0) / C + _LAYER_NORM_EPS))
    else:
        tl.store(out_ptr + at, y, inside)
