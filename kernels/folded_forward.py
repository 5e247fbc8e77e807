"""The folded product of `folded_linear.py`, with all that follows on it."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from spatialprobe.kernels.folded_linear import (
    L2_NORM_EPS,
    LAUNCHES,
    QUANTISED,
    VALUES,
    addresses,
    columns_of,
    exact,
    find_columns,
    find_features,
    find_rows,
    fold,
    matmul,
    rows_of,
    through_cublas,
    warps_for,
)
from spatialprobe.kernels.launch import cast, launch_for

_L2_NORM_EPS = tl.constexpr(L2_NORM_EPS)


@triton.jit
def _finish(
    z, token, N, column, inside, y_ptr, z_ptr, GELU: tl.constexpr, NORMALIZE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Stores what follows on the product: z for the backward pass if wanted, and its activation, normalised."""
    start = tl.cast(token, tl.int64) * N  # and 32 bits from there: 64 for every value would not fit the registers
    at = tl.arange(0, z.shape[0])[:, None] * N + column[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + start + at, cast(z, z_ptr.dtype.element_ty), inside)
    if GELU:
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    if NORMALIZE:
        heads = tl.reshape(z, [z.shape[0], z.shape[1] // PADDED, PADDED])
        gain = 1.0 / tl.maximum(tl.sqrt_rn(tl.sum(heads * heads, 2)), _L2_NORM_EPS)
        z = tl.reshape(heads * gain[:, :, None], z.shape)
    tl.store(y_ptr + start + at, cast(z, y_ptr.dtype.element_ty), inside)


@triton.jit
def _product_kernel(
    x_ptr, table_ptr, w_ptr, sums_ptr, shift_ptr, scale_ptr, mean_ptr, rstd_ptr, y_ptr, z_ptr,
    rows, stride, heads, width, C, eps,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, STORED: tl.constexpr, GELU: tl.constexpr, NORMALIZE: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program makes [BLOCK_M, BLOCK_N] of one tensor's output. Column tiles of the same rows run side by side."""
    tiles = tl.cdiv(heads * PADDED, BLOCK_N)
    tile, g = tl.program_id(0) % tiles, tl.program_id(1)
    rows, first = find_rows(table_ptr, rows)
    x_ptr, stride = find_features(table_ptr, x_ptr, stride, UNIT, ALIGN)
    start_row = tl.program_id(0) // tiles * BLOCK_M
    row = start_row + tl.arange(0, BLOCK_M)
    live = row < rows
    column, inside = find_columns(tile, heads, width, PADDED, BLOCK_N)
    channel = tl.arange(0, BLOCK_C)
    of_group = tl.cast(g, tl.int64) * heads * width + column
    x_at = x_ptr + row.to(tl.int64)[:, None] * stride + channel[None, :]
    w_at = w_ptr + of_group[None, :] * C + channel[:, None]
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    power = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, C, BLOCK_C):
        here = channel < C - start
        x = exact(tl.load(x_at + start, live[:, None] & here[None, :], 0.0))
        w = exact(tl.load(w_at + start, inside[None, :] & here[:, None], 0.0))
        product = tl.dot(x, w, product, input_precision="ieee")
        if not STORED:  # means and squared deviations of blocks, merged (Chan et al. 1983)
            values = x.to(tl.float32)
            count = tl.minimum(C - start, BLOCK_C).to(tl.float32)
            block_mean = tl.sum(values, 1) / count
            off = tl.where(here[None, :], values - block_mean[:, None], 0.0)
            away = block_mean - mean
            share = count / (start + count)
            power += tl.sum(off * off, 1) + away * away * (start * share)
            mean += away * share
    token = first + row
    scale = tl.full([BLOCK_M], 1.0, tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + token, live, 1.0)
    if STORED:  # of the values, which are scale times what was multiplied
        mean = tl.load(mean_ptr + token, live, 0.0)
        rstd = tl.load(rstd_ptr + token, live, 0.0)
        gain = rstd * scale
        offset = rstd * mean
    else:  # LayerNorm(scale * q) is LayerNorm(q) with eps / scale^2
        gain = 1.0 / tl.sqrt_rn(power / C + eps / (scale * scale))
        offset = gain * mean
        if tile == 0:
            tl.store(mean_ptr + token, mean * scale, live)
            tl.store(rstd_ptr + token, gain / scale, live)
    sums = tl.load(sums_ptr + of_group, inside, 0.0)
    shift = tl.load(shift_ptr + of_group, inside, 0.0)
    z = product * gain[:, None] - offset[:, None] * sums[None, :] + shift[None, :]
    both = live[:, None] & inside[None, :]
    _finish(z, first + start_row, heads * width, column, both, y_ptr, z_ptr, GELU, NORMALIZE, PADDED)


@triton.jit
def _epilogue_kernel(
    product_ptr, sums_ptr, shift_ptr, mean_ptr, rstd_ptr, y_ptr, z_ptr, rows, heads, width,
    GELU: tl.constexpr, NORMALIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What `_product_kernel` does after its product, for one [rows, N] in memory, which without sums is z already."""
    tiles = tl.cdiv(heads * PADDED, BLOCK_N)
    column, inside = find_columns(tl.program_id(0) % tiles, heads, width, PADDED, BLOCK_N)
    start_row = tl.program_id(0) // tiles * BLOCK_M
    row = start_row + tl.arange(0, BLOCK_M)
    live = row < rows
    at = row.to(tl.int64)[:, None] * (heads * width) + column[None, :]
    both = live[:, None] & inside[None, :]
    z = tl.load(product_ptr + at, both, 0.0).to(tl.float32)
    if sums_ptr is not None:
        rstd = tl.load(rstd_ptr + row, live, 0.0)
        offset = rstd * tl.load(mean_ptr + row, live, 0.0)
        sums = tl.load(sums_ptr + column, inside, 0.0)
        shift = tl.load(shift_ptr + column, inside, 0.0)
        z = z * rstd[:, None] - offset[:, None] * sums[None, :] + shift[None, :]
    _finish(z, start_row, heads * width, column, both, y_ptr, z_ptr, GELU, NORMALIZE, PADDED)


def forward(
    x: Sequence[Tensor],  # G of [M, C], channels at stride 1
    weight: Tensor,  # [G, H, D, C]
    bias: Tensor | None,  # [G, H, D]
    gamma: Tensor | None,  # [G, H, C]
    beta: Tensor | None,  # [G, H, C]
    scale: Tensor | None,  # float32 [T]
    mean: Tensor | None,  # float32 [T]
    rstd: Tensor | None,  # float32 [T]
    eps: float,
    gelu: bool,
    normalize: bool,
    out_dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [T, H, D], [T], [T], [T, H, D]
    """Output, mean and rstd where they were not given, and, with `keep`, z before GELU and normalisation."""
    groups, heads, width, channels = weight.shape
    device, tokens = x[0].device, sum(map(len, x))
    launch = launch_for(LAUNCHES, device)
    folded, shift = fold(*(None if t is None else t.float() for t in (weight, bias, gamma, beta)))
    # contiguous: folding keeps the strides of the caller's weight and bias, and kernels count on none
    folded = folded.to(torch.bfloat16 if x[0].dtype in QUANTISED else x[0].dtype).flatten(1, 2).contiguous()
    sums, shift = folded.sum(-1, dtype=torch.float32), shift.flatten(1).contiguous()
    scale, mean, rstd = (None if t is None else t.contiguous() for t in (scale, mean, rstd))
    y = torch.empty(tokens, heads, width, dtype=out_dtype, device=device)
    z = torch.empty(tokens if keep and (gelu or normalize) else 0, heads, width, dtype=out_dtype, device=device)
    made = [torch.empty(tokens if mean is None else 0, dtype=torch.float32, device=device) for _ in range(2)]
    after = {"GELU": gelu, "NORMALIZE": normalize}
    if mean is not None and through_cublas(x[0], heads * width, launch.cublas):
        # float16 could overflow where the correction has yet to bring it down
        dtype = torch.bfloat16 if x[0].dtype == out_dtype == torch.bfloat16 else torch.float32
        for g, (one, rows) in enumerate(zip(x, rows_of(x), strict=True)):
            product = matmul(one, folded[g].T, dtype)
            _epilogue(product, sums[g], shift[g], mean[rows], rstd[rows], y[rows], z[rows], **after)
        return y, *made, z
    tile = launch.float32 if x[0].dtype == torch.float32 else launch.tile
    apart = normalize and triton.next_power_of_2(width) > tile.columns  # no tile holds a head's columns
    columns = columns_of(heads, width, normalize and not apart, tile.columns)
    known = made if mean is None else (mean, rstd)
    target = torch.empty(tokens, heads, width, dtype=torch.float32, device=device) if apart else y
    grid = (columns.pop("tiles") * triton.cdiv(max(map(len, x)), tile.rows), groups)
    found, features = addresses(x, launch)
    with torch.cuda.device_of(x[0]):
        _product_kernel[grid](
            w_ptr=folded, sums_ptr=sums, shift_ptr=shift, scale_ptr=scale, mean_ptr=known[0], rstd_ptr=known[1],
            y_ptr=target, z_ptr=z if len(z) and not apart else None, C=channels, eps=eps, STORED=mean is not None,
            BLOCK_M=tile.rows, BLOCK_C=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
            **columns, **found, **features, **({"GELU": False, "NORMALIZE": False} if apart else after),
        )  # fmt: skip
    if apart:
        _epilogue(target, None, None, None, None, y, z, **after)
    return y, *made, z


def _epilogue(product, sums, shift, mean, rstd, y, z, GELU, NORMALIZE) -> None:
    rows, heads, width = y.shape
    columns = columns_of(heads, width, NORMALIZE, 128)
    block_m = max(VALUES // columns["BLOCK_N"], 1)
    with torch.cuda.device_of(y):
        _epilogue_kernel[(columns.pop("tiles") * triton.cdiv(rows, block_m),)](
            product, sums, shift, mean, rstd, y, z if len(z) else None, rows, GELU=GELU, NORMALIZE=NORMALIZE,
            BLOCK_M=block_m, num_warps=warps_for(block_m * columns["BLOCK_N"]), **columns,
        )  # fmt: skip
