"""Gradients of the folded product of `folded_linear.py` in the parameters; the features get none."""

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
    Launch,
    addresses,
    columns_of,
    exact,
    find_columns,
    find_features,
    find_rows,
    matmul,
    rows_of,
    through_cublas,
    warps_for,
)
from spatialprobe.kernels.launch import cast, launch_for

_L2_NORM_EPS = tl.constexpr(L2_NORM_EPS)


@triton.jit
def _upstream_kernel(
    dy_ptr, z_ptr, table_ptr, scale_ptr, mean_ptr, rstd_ptr, unit_ptr, s_ptr, peak_ptr, db_ptr, v_ptr,
    rows, heads, width, chunk, GELU: tl.constexpr, NORMALIZE: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """S = rstd dZ, times the token's scale, and over a chunk of rows the sums of dZ and of S times the mean.

    With `peak_ptr` it makes the largest |S| of each column over the chunk instead.
    """
    tiles = tl.cdiv(heads * PADDED, BLOCK_N)
    part, g = tl.program_id(0) // tiles, tl.program_id(1)
    rows, first = find_rows(table_ptr, rows)
    column, inside = find_columns(tl.program_id(0) % tiles, heads, width, PADDED, BLOCK_N)
    of_group = g * heads * width + column
    unit = tl.full([BLOCK_N], 1.0, tl.float32)
    if unit_ptr is not None:
        unit = tl.load(unit_ptr + of_group, inside, 1.0)
    db = tl.zeros([BLOCK_N], tl.float32)
    v = tl.zeros([BLOCK_N], tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, rows), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        live = row < rows
        token = first + row
        base = (first + start) * heads * width  # and 32 bits from there: 64 for every value would not fit the registers
        at = tl.arange(0, BLOCK_M)[:, None] * (heads * width) + column[None, :]
        both = live[:, None] & inside[None, :]
        dz = tl.load(dy_ptr + base + at, both, 0.0).to(tl.float32)
        if z_ptr is not None:
            z = tl.load(z_ptr + base + at, both, 0.0).to(tl.float32)
            bell = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
            if NORMALIZE:
                heads_y = tl.reshape(z * bell if GELU else z, [BLOCK_M, BLOCK_N // PADDED, PADDED])
                heads_dz = tl.reshape(dz, heads_y.shape)
                norm = tl.sqrt_rn(tl.sum(heads_y * heads_y, 2))
                gain = 1.0 / tl.maximum(norm, _L2_NORM_EPS)
                along = tl.where(norm > _L2_NORM_EPS, tl.sum(heads_dz * heads_y, 2) * gain * gain, 0.0)
                dz = tl.reshape((heads_dz - heads_y * along[:, :, None]) * gain[:, :, None], dz.shape)
            if GELU:
                dz *= bell + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
        mean = tl.load(mean_ptr + token, live, 0.0)
        gain = tl.load(rstd_ptr + token, live, 0.0)
        if scale_ptr is not None:  # x is scale times what is multiplied, and so is its mean
            scale = tl.load(scale_ptr + token, live, 1.0)
            mean, gain = mean / scale, gain * scale
        s = dz * gain[:, None] * unit[None, :]
        if peak_ptr is not None:
            v = tl.maximum(v, tl.max(tl.abs(s), 0))
        else:
            s = cast(s, s_ptr.dtype.element_ty)
            tl.store(s_ptr + base + at, s, both)
            db += tl.sum(dz, 0)
            v += tl.sum(s.to(tl.float32) * mean[:, None], 0)
    at = tl.cast(part, tl.int64) * tl.num_programs(1) * heads * width + of_group
    if peak_ptr is not None:
        tl.store(peak_ptr + at, v, inside)
    else:
        tl.store(db_ptr + at, db, inside)
        tl.store(v_ptr + at, v, inside)


@triton.jit
def _gradient_kernel(
    s_ptr, x_ptr, table_ptr, out_ptr, rows, stride, N, C, chunk,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program makes [BLOCK_N, BLOCK_C] of S^T x over one chunk of one tensor's rows, for all chunks to be summed.

    x's side is the first of the product: tensor cores want 64 or 128 of it, and columns may be few.
    """
    tiles = tl.cdiv(N, BLOCK_N)
    g, part = tl.program_id(1), tl.program_id(2)
    rows, first = find_rows(table_ptr, rows)
    x_ptr, stride = find_features(table_ptr, x_ptr, stride, UNIT, ALIGN)
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.program_id(0) // tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, rows), BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        live = row < rows
        x_at = x_ptr + row[None, :] * stride + channel[:, None]
        x = exact(tl.load(x_at, live[None, :] & (channel < C)[:, None], 0.0))
        s_at = s_ptr + (first + row)[:, None] * N + column[None, :]
        s = exact(tl.load(s_at, live[:, None] & (column < N)[None, :], 0.0))
        total = tl.dot(x, s, total, input_precision="ieee")
    base = (tl.cast(part, tl.int64) * tl.num_programs(1) + g) * N
    at = (base + column)[None, :] * C + channel[:, None]
    tl.store(out_ptr + at, total, (channel < C)[:, None] & (column < N)[None, :])


def backward(
    dy: Tensor,  # [T, H, D]
    x: Sequence[Tensor],  # G of [M, C], channels at stride 1
    weight: Tensor,  # [G, H, D, C]
    gamma: Tensor | None,  # [G, H, C]
    beta: Tensor | None,  # [G, H, C]
    scale: Tensor | None,  # float32 [T]
    mean: Tensor,  # float32 [T]
    rstd: Tensor,  # float32 [T]
    z: Tensor,  # [T, H, D], or none of them without GELU and normalisation
    gelu: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # float32 [G, H, D, C], [G, H, D], [G, H, C], [G, H, C]
    """Gradients of weight, bias, gamma and beta, by one product: with S = rstd dZ and G = S^T (x - mean),

    dW = gamma G + db beta^T,  db = sum of dZ,  dgamma = sum over D of W G,  dbeta = W^T db.
    """
    groups, heads, width, _ = weight.shape
    scale, mean, rstd = (None if t is None else t.contiguous() for t in (scale, mean, rstd))
    launch = launch_for(LAUNCHES, x[0].device)
    s, unit, db, v = _upstream(dy.contiguous(), x, scale, mean, rstd, z, launch, gelu, normalize)
    if through_cublas(x[0], heads * width, launch.cublas_backward):
        product = torch.stack([matmul(s[rows].T, one, torch.float32) for one, rows in zip(x, rows_of(x), strict=True)])
    else:
        product = _summed_products(s, x, launch)
    g = ((product - v[..., None]) / unit[..., None]).view(weight.shape)
    db = db.view(groups, heads, width)
    w = weight.float()
    dweight = g if gamma is None else g * gamma.float()[..., None, :]
    if beta is not None:
        dweight = dweight + db[..., None] * beta.float()[..., None, :]
    dgamma = g.new_empty(0) if gamma is None else (w * g).sum(-2)
    dbeta = g.new_empty(0) if beta is None else (w * db[..., None]).sum(-2)
    return dweight, db, dgamma, dbeta


def _upstream(dy, x, scale, mean, rstd, z, launch, gelu, normalize) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S [T, N] in the dtype of the product and times unit [G, N], the unit, db [G, N], and S^T mean [G, N]."""
    tokens, heads, width = dy.shape
    columns, n = columns_of(heads, width, normalize, 128), heads * width
    block_m = max(VALUES // columns["BLOCK_N"], 1)
    parts = max(triton.cdiv(max(map(len, x)), 8 * block_m), 1)
    grid = (columns.pop("tiles") * parts, len(x))
    common = columns | addresses(x, launch)[0] | {"GELU": gelu, "NORMALIZE": normalize, "chunk": 8 * block_m}
    common |= {"z_ptr": z if len(z) else None, "BLOCK_M": block_m, "num_warps": warps_for(block_m * columns["BLOCK_N"])}
    partial = lambda: torch.empty(parts, len(x), n, dtype=torch.float32, device=dy.device)  # noqa: E731
    tensors = {"dy_ptr": dy, "scale_ptr": scale, "mean_ptr": mean, "rstd_ptr": rstd}
    nothing = dict.fromkeys(("unit_ptr", "s_ptr", "peak_ptr", "db_ptr", "v_ptr"))
    with torch.cuda.device_of(dy):
        unit = torch.ones(len(x), n, dtype=torch.float32, device=dy.device)
        if x[0].dtype == torch.float16:
            # float16 holds no number under 6e-8, and gradients are often smaller: powers of 2 bring columns near 2^14
            peak = partial()
            _upstream_kernel[grid](**tensors, **common, **nothing | {"peak_ptr": peak})
            unit = torch.ldexp(unit, (14 - torch.frexp(peak.amax(0)).exponent).clamp(-126, 126))
        s = torch.empty(tokens, n, dtype=torch.bfloat16 if x[0].dtype in QUANTISED else x[0].dtype, device=dy.device)
        db, v = partial(), partial()
        made = {"unit_ptr": unit, "s_ptr": s, "db_ptr": db, "v_ptr": v}
        _upstream_kernel[grid](**tensors, **common, **nothing | made)
    return s, unit, db.sum(0), v.sum(0)


def _summed_products(s: Tensor, x: Sequence[Tensor], launch: Launch) -> Tensor:  # [T, N] -> float32 [G, N, C]
    """S^T x of every tensor, always summed in the same order."""
    n, channels = s.shape[1], x[0].shape[1]
    tile = launch.float32 if x[0].dtype == torch.float32 else launch.tile
    block_n = min(max(triton.next_power_of_2(n), 16), tile.columns)
    tiles, rows = triton.cdiv(n, block_n) * triton.cdiv(channels, tile.rows), max(map(len, x))
    steps = triton.cdiv(rows, tile.depth)
    parts = min(max(launch.programs // (tiles * len(x)), 1), max(steps // 4, 1))
    out = torch.empty(parts, len(x), n, channels, dtype=torch.float32, device=s.device)
    found, features = addresses(x, launch)
    with torch.cuda.device_of(s):
        _gradient_kernel[tiles, len(x), parts](
            s_ptr=s, out_ptr=out, N=n, C=channels, chunk=triton.cdiv(steps, parts) * tile.depth,
            BLOCK_M=tile.depth, BLOCK_N=block_n, BLOCK_C=tile.rows, num_warps=tile.warps, num_stages=tile.stages,
            **found, **features,
        )  # fmt: skip
    return out.sum(0)
