"""The pull-push loss over sampled pixels of scenes, forward and backward, without a tensor of all their pairs.

Distances are sums of squared differences in float32, and so is their gradient: through dot products close pairs cancel.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from spatialprobe.kernels.launch import Impl, launch_for, use_triton

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*TRITON_DTYPES, torch.float64)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


# -- what is called ---------------------------------------------------------------------------------------------------


def contrastive_loss(
    embeddings: Tensor,  # [B, P, D], float32, bfloat16 or float16, in torch also float64; any strides
    ids: Tensor,  # [B, P], any integers; int32 is the quickest
    *,
    counts: Tensor | None = None,  # [B], integers: of scene b only the first counts[b] pixels are there
    margin: float = 1.0,  # distance from which on unequal pixels are far enough apart
    pull_weight: float = 1.0,
    push_weight: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:  # float32 scalar, of float64 embeddings float64
    """pull_weight * mean distance of pixels of one id + push_weight * mean of max(0, margin - distance) of others.

    Means are over all ordered pairs of two pixels of one scene, of all scenes together, and 0 where there are none
    (De Brabandere et al. 2017 in the pairwise form of the published study). Memory does not grow with P x P: pairs are
    taken in parts, the largest, in torch on the CPU, the pairs of one scene of up to 2,048 pixels.
    The gradient has the dtype of the embeddings; that of a distance is 0 at distance 0, and that of the hinge is 0 at
    the margin. float32 ends distances at 1.8e19, beyond which they are infinite, and at 1.1e-19, below which they are
    0. An embedding that is not finite makes the loss NaN or infinite.
    Raises ValueError for shapes, dtypes and devices that do not fit, a margin that is not a number from 0 on, and
    counts outside 0 .. P; in Triton on CUDA, where looking would wait for the device, they make both NaN.
    """
    if embeddings.ndim != 3 or 0 in embeddings.shape:
        raise ValueError(f"embeddings must be [B, P, D] and not empty, got {tuple(embeddings.shape)}")
    if embeddings.dtype not in DTYPES:
        raise ValueError(f"embeddings must be one of {', '.join(map(str, DTYPES))}, got {embeddings.dtype}")
    for name, x, shape in (("ids", ids, embeddings.shape[:2]), ("counts", counts, embeddings.shape[:1])):
        if x is None:
            continue
        if x.shape != shape or x.dtype not in INTEGERS or x.device != embeddings.device:
            got = f"{x.dtype} {tuple(x.shape)} on {x.device}"
            raise ValueError(f"{name} must be integers {tuple(shape)} on {embeddings.device}, got {got}")
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin must be a distance from 0 on, got {margin}")
    in_triton = use_triton(impl, embeddings)
    if in_triton and embeddings.dtype not in TRITON_DTYPES:
        raise ValueError(f"in Triton embeddings must have at most 32 bits, got {embeddings.dtype}; impl='torch' does")
    return _loss(embeddings, ids, counts, margin, pull_weight, push_weight, in_triton)[0]


@torch.library.custom_op("spatialprobe::contrastive_loss", mutates_args=())
def _loss(
    embeddings: Tensor,
    ids: Tensor,
    counts: Tensor | None,
    margin: float,
    pull_weight: float,
    push_weight: float,
    in_triton: bool,
) -> tuple[Tensor, Tensor]:  # scalar; float64 [2]: pairs of one id, others, each at least 1 because it divides
    counts = None if counts is None else counts.long().contiguous()
    _check_counts(counts, embeddings.shape[1])
    sums = _sums_in_triton if in_triton else _sums_in_torch
    pull, push, *pairs = sums(embeddings, ids, counts, margin).unbind()
    pairs = torch.stack(pairs).clamp_min(1)
    means = torch.stack([pull, push]) / pairs
    loss = means[0] * pull_weight + means[1] * push_weight
    return loss.to(_working(embeddings)), pairs


@torch.library.custom_op("spatialprobe::contrastive_loss_gradient", mutates_args=())
def _gradient(
    grad: Tensor,
    pairs: Tensor,
    embeddings: Tensor,
    ids: Tensor,
    counts: Tensor | None,
    margin: float,
    pull_weight: float,
    push_weight: float,
    in_triton: bool,
) -> Tensor:
    counts = None if counts is None else counts.long().contiguous()
    gradient = _gradient_in_triton if in_triton else _gradient_in_torch
    return gradient(grad, pairs, embeddings, ids, counts, margin, pull_weight, push_weight)


@_loss.register_fake
def _(embeddings, ids, counts, margin, pull_weight, push_weight, in_triton):
    return embeddings.new_empty((), dtype=_working(embeddings)), embeddings.new_empty(2, dtype=torch.float64)


@_gradient.register_fake
def _(grad, pairs, embeddings, ids, counts, margin, pull_weight, push_weight, in_triton):
    return embeddings.new_empty(embeddings.shape)


def _save(ctx, inputs, output):
    embeddings, ids, counts, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(embeddings, ids, counts, output[1])


def _backward(ctx, grad, _):
    embeddings, ids, counts, pairs = ctx.saved_tensors
    return _gradient(grad, pairs, embeddings, ids, counts, *ctx.settings), *[None] * 6


_loss.register_autograd(_backward, setup_context=_save)


def _working(embeddings: Tensor) -> torch.dtype:
    return torch.float64 if embeddings.dtype == torch.float64 else torch.float32


def _check_counts(counts: Tensor | None, pixels: int) -> None:
    if counts is not None and counts.device.type == "cpu" and not 0 <= int(counts.min()) <= int(counts.max()) <= pixels:
        raise ValueError(f"counts must be 0 .. {pixels} pixels, got {counts.tolist()}")


# -- the definition, in parts of all pairs -----------------------------------------------------------------------------

BLOCK = 2**23  # rows of a block x pixels x D: 32 MB in float32, which the backward pass on CUDA fills
HALF = 2**21  # pairs i < j of a scene that are taken at once on the CPU: 8 MB in float32, 2,048 pixels


@dataclass(frozen=True)
class Part:
    """Pairs of a scene's pixels: of its `rows` with all of them, or each two of all of them once."""

    scene: int
    pixels: Tensor  # [N, D]
    rows: slice | None  # None: each two pixels once, which is much quicker on the CPU: torch's cdist is scalar there
    equal: Tensor  # bool [R, N], or of pairs i < j in their order [N (N - 1) / 2]

    def distance(self) -> Tensor:  # as equal
        if self.rows is None:
            return F.pdist(self.pixels)
        return torch.cdist(self.pixels[self.rows], self.pixels, compute_mode="donot_use_mm_for_euclid_dist")

    def gradient(self, slope: Tensor, distance: Tensor) -> Tensor:
        """Of the sum of slope * distance in the rows, [R, D], or in all pixels, [N, D]; 0 where distance is."""
        if self.rows is None:
            return torch.ops.aten._pdist_backward(slope, self.pixels, 2.0, distance)
        return torch.ops.aten._cdist_backward(slope, self.pixels[self.rows], self.pixels, 2.0, distance)


def _parts(embeddings: Tensor, ids: Tensor, counts: Tensor | None) -> Iterator[Part]:
    """What covers all ordered pairs of each scene, where halves count twice; blocks of rows have pixels with itself."""
    batch, pixels, dims = embeddings.shape
    known = [pixels] * batch if counts is None else counts.tolist()
    if not 0 <= min(known) <= max(known) <= pixels:
        raise ValueError(f"counts must be 0 .. {pixels} pixels, got {known}")
    first, second = None, None
    for b, count in enumerate(known):
        scene, names = embeddings[b, :count].to(_working(embeddings)).contiguous(), ids[b, :count].long()
        if embeddings.device.type == "cpu" and 0 < count * (count - 1) // 2 <= HALF:
            if first is None or len(first) != count * (count - 1) // 2:
                first, second = torch.triu_indices(count, count, 1)
            yield Part(b, scene, None, names.index_select(0, first) == names.index_select(0, second))
            continue
        step = max(BLOCK // max(count * dims, 1), 1)
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            yield Part(b, scene, rows, names[rows, None] == names)


def _sums_in_torch(embeddings: Tensor, ids: Tensor, counts: Tensor | None, margin: float) -> Tensor:
    """float64 [4]: sums of distances of one id and of hinges of others; pairs of one id; others."""
    sums = torch.zeros(4, dtype=torch.float64, device=embeddings.device)
    for part in _parts(embeddings, ids, counts):
        distance, equal = part.distance(), part.equal
        hinge = (margin - distance).relu_()
        pull, push = torch.where(equal, distance, 0).sum(), torch.where(equal, 0, hinge).sum()
        ones, itself = equal.count_nonzero(), 0 if part.rows is None else len(equal)
        of_part = torch.stack([x.double() for x in (pull, push, ones - itself, equal.numel() - ones)])
        sums += of_part * (2 if part.rows is None else 1)
    return sums


def _gradient_in_torch(grad, pairs, embeddings, ids, counts, margin, pull_weight, push_weight) -> Tensor:
    gradient = embeddings.new_zeros(embeddings.shape)
    pull, push = (2 * grad * torch.stack([grad.new_tensor(pull_weight), grad.new_tensor(push_weight)]) / pairs).to(
        _working(embeddings)
    )  # each pair counts twice
    for part in _parts(embeddings, ids, counts):
        distance = part.distance()
        slope = torch.where(part.equal, pull, torch.where(distance < margin, -push, 0))
        slope = slope.where(distance == distance, math.nan)
        exact = part.gradient(slope, distance).to(gradient.dtype)
        gradient[part.scene, slice(len(exact)) if part.rows is None else part.rows] = exact
    return gradient


# -- Triton -----------------------------------------------------------------------------------------------------------
# As bodies in gravity: a lane owns some pixels i and goes through the others j, eight at a time, so that what it sums
# over j stays in its registers. What it reads lies in tiles of 128 pixels, [D, 128] in float32, with zeros where there
# is no pixel: then a channel is a fixed step away from the next, and no load needs a mask.

TILE, GROUP = 128, 32  # pixels of a tile; channels whose gradient a program sums at once
_TILE = tl.constexpr(TILE)
_LEAST = tl.constexpr(torch.finfo(torch.float32).tiny)  # a squared distance below is 0


@dataclass(frozen=True)
class Launch:
    rows: int  # pixels i per program of one warp, 32 lanes
    rows_backward: int
    columns: int  # pixels j at a time
    programs: int  # that fill the device; a gradient with fewer is split over j


# By compute capability; chosen ahead from what the compiler makes of them, not measured. A lane that owns 4 pixels
# reads 12 numbers for 32 differences; the backward pass keeps D sums for each pixel in registers, and spills with 2.
# Programs are 8 warps for each multiprocessor of A100, H200 and B200: what the registers of the backward pass allow.
LAUNCHES = {80: Launch(128, 32, 8, 864), 90: Launch(128, 32, 8, 1056), 100: Launch(128, 32, 8, 1184)}


@triton.jit
def _count(counts_ptr, b, P):
    """Pixels of scene b, 0 if the count is wrong; and whether it is right."""
    count = P
    if counts_ptr is not None:
        count = tl.load(counts_ptr + b).to(tl.int64)
    right = (count >= 0) & (count <= P)
    return tl.where(right, count, 0).to(tl.int32), right


@triton.jit
def _tiles_kernel(
    x_ptr, counts_ptr, tiles_ptr, P, channels, b_stride, p_stride, d_stride, D: tl.constexpr, GROUP: tl.constexpr
):
    """One program writes GROUP channels of one tile."""
    t, b = tl.program_id(0), tl.program_id(2)
    count, _ = _count(counts_ptr, b, P)
    pixel, d = t * _TILE + tl.arange(0, _TILE), tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    at = b * tl.cast(b_stride, tl.int64) + pixel.to(tl.int64)[:, None] * p_stride + d.to(tl.int64)[None, :] * d_stride
    x = tl.load(x_ptr + at, (pixel < count)[:, None] & (d < channels)[None, :], 0.0).to(tl.float32)
    tile = tl.cast(b, tl.int64) * tl.num_programs(0) + t
    tl.store(tiles_ptr + (tile * D + d[None, :]) * _TILE + tl.arange(0, _TILE)[:, None], x)


@triton.jit
def _squares(x_ptr, y_ptr, i, j, D: tl.constexpr):
    """Squared distances [J, I] of the pixels i of the tile at x_ptr and j of that at y_ptr."""
    total = tl.zeros([j.shape[0], i.shape[0]], tl.float32)
    for d in tl.range(0, D, loop_unroll_factor=min(D, 8)):
        away = tl.load(x_ptr + d * _TILE + i)[None, :] - tl.load(y_ptr + d * _TILE + j)[:, None]
        total += away * away
    return total


@triton.jit
def _sums_kernel(
    tiles_ptr, ids_ptr, counts_ptr, sums_ptr, P, tiles, margin,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program takes ROWS pixels i against one tile of pixels j; tiles after its own count for both orders."""
    block, t, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count, right = _count(counts_ptr, b, P)
    step = tl.cast(D * _TILE, tl.int64)  # from tile to tile
    tiles_ptr += b * (tiles * step)
    ids_ptr += tl.cast(b, tl.int64) * P
    first = block * ROWS
    own = first // _TILE
    i = tl.max_contiguous(tl.arange(0, ROWS), 1)  # lanes take every 32nd pixel, not neighbours: the layout of the sums
    j = tl.arange(0, COLUMNS)
    live = first + i < count
    live_i = tl.minimum(tl.maximum(count - first, 0), ROWS)
    live_j = tl.where(t < own, 0, tl.minimum(tl.maximum(count - t * _TILE, 0), _TILE))
    x_ptr = tiles_ptr + own * step + first % _TILE
    y_ptr = tiles_ptr + t * step
    id_i = tl.load(ids_ptr + first + i, live, 0)
    pull = tl.zeros([ROWS], tl.float32)
    push = tl.zeros([ROWS], tl.float32)
    ones = tl.zeros([ROWS], tl.int32)
    for start in range(0, live_j, COLUMNS):
        inside = start + j < live_j
        square = _squares(x_ptr, y_ptr + start, i, j, D)
        square = tl.where(inside[:, None], square, float("inf"))  # nothing is pushed
        equal = (tl.load(ids_ptr + t * _TILE + start + j, inside, 0)[:, None] == id_i[None, :]) & inside[:, None]
        distance = tl.sqrt(square)
        hinge = tl.where(square >= margin * margin, 0.0, margin - distance)
        pull += tl.sum(tl.where(equal, distance, 0.0), 0)
        push += tl.sum(tl.where(equal, 0.0, hinge), 0)
        ones += tl.sum(equal.to(tl.int32), 0)
    equal_pairs = tl.sum(tl.where(live, ones, 0))
    other_pairs = live_i * live_j - equal_pairs
    equal_pairs -= tl.where(t == own, live_i, 0)  # a pixel and itself
    weight = tl.where(right, tl.where(t == own, 1.0, 2.0), float("nan"))
    sums_ptr += ((tl.cast(b, tl.int64) * tl.num_programs(1) + t) * tl.num_programs(0) + block) * 4
    tl.store(sums_ptr, weight * tl.sum(tl.where(live, pull, 0.0)))
    tl.store(sums_ptr + 1, weight * tl.sum(tl.where(live, push, 0.0)))
    tl.store(sums_ptr + 2, weight * equal_pairs)
    tl.store(sums_ptr + 3, weight * other_pairs)


@triton.jit
def _gradient_kernel(
    tiles_ptr, ids_ptr, counts_ptr, grad_ptr, pairs_ptr, out_ptr,
    P, channels, tiles, span, margin, pull_weight, push_weight,
    D: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program sums, over `span` tiles of pixels j, GROUP channels of the gradient of ROWS pixels i."""
    block, split, b = tl.program_id(0), tl.program_id(1) // (D // GROUP), tl.program_id(2)
    group = tl.program_id(1) % (D // GROUP) * GROUP
    count, right = _count(counts_ptr, b, P)
    step = tl.cast(D * _TILE, tl.int64)  # from tile to tile
    tiles_ptr += b * (tiles * step)
    ids_ptr += tl.cast(b, tl.int64) * P
    first = block * ROWS
    i = tl.max_contiguous(tl.arange(0, ROWS), 1)  # as above
    j = tl.arange(0, COLUMNS)
    live = first + i < count
    x_ptr = tiles_ptr + first // _TILE * step + first % _TILE
    id_i = tl.load(ids_ptr + first + i, live, 0)
    grad = tl.load(grad_ptr).to(tl.float32) * 2  # each pair counts twice
    pull = grad * pull_weight / tl.load(pairs_ptr).to(tl.float32)
    push = grad * push_weight / tl.load(pairs_ptr + 1).to(tl.float32)
    channel = tl.arange(0, GROUP)
    total = tl.zeros([GROUP, ROWS], tl.float32)
    for t in range(split * span, tl.minimum((split + 1) * span, tl.cdiv(count, _TILE))):
        live_j = tl.minimum(count - t * _TILE, _TILE)
        for start in range(0, live_j, COLUMNS):
            y_ptr = tiles_ptr + t * step + start
            square = _squares(x_ptr, y_ptr, i, j, D)
            inside = start + j < live_j
            equal = tl.load(ids_ptr + t * _TILE + start + j, inside, 0)[:, None] == id_i[None, :]
            slope = tl.where(equal, pull, tl.where(square >= margin * margin, 0.0, -push))
            slope = tl.where(inside[:, None] & (square >= _LEAST), slope, 0.0)
            slope *= tl.rsqrt(tl.maximum(square, _LEAST))
            for d in tl.static_range(GROUP):
                at = (group + d) * _TILE
                part = tl.sum(slope * (tl.load(x_ptr + at + i)[None, :] - tl.load(y_ptr + at + j)[:, None]), 0)
                total += tl.where(channel[:, None] == d, part[None, :], 0.0)  # one add: a register's channel is known
                tl.debug_barrier()  # or the assembler begins with the loads of all channels, and spills
    total = tl.where(right, tl.where(live[None, :], total, 0.0), float("nan"))
    at = ((split * tl.num_programs(2) + b) * tl.cast(P, tl.int64) + first + i[None, :]) * channels
    at += group + channel[:, None]
    tl.store(out_ptr + at, total, (first + i < P)[None, :] & (group + channel < channels)[:, None])


def _tiles(embeddings: Tensor, counts: Tensor | None) -> tuple[Tensor, int]:  # float32 [B, tiles, D', 128], group
    batch, pixels, channels = embeddings.shape
    group = min(triton.next_power_of_2(channels), GROUP)
    groups = triton.cdiv(channels, group)
    tiles = torch.empty(
        batch, triton.cdiv(pixels, TILE), groups * group, TILE, dtype=torch.float32, device=embeddings.device
    )
    _tiles_kernel[(tiles.shape[1], groups, batch)](
        embeddings, counts, tiles, pixels, channels, *embeddings.stride(), D=groups * group, GROUP=group, num_warps=4
    )
    return tiles, group


def _sums_in_triton(embeddings: Tensor, ids: Tensor, counts: Tensor | None, margin: float) -> Tensor:
    launch = launch_for(LAUNCHES, embeddings.device)
    batch, pixels, _ = embeddings.shape
    with torch.cuda.device_of(embeddings):
        tiles, _ = _tiles(embeddings, counts)
        blocks = triton.cdiv(pixels, launch.rows)
        sums = torch.empty(batch, tiles.shape[1], blocks, 4, dtype=torch.float32, device=tiles.device)
        _sums_kernel[(blocks, tiles.shape[1], batch)](
            tiles, ids.contiguous(), counts, sums, pixels, tiles.shape[1], margin,
            D=tiles.shape[2], ROWS=launch.rows, COLUMNS=launch.columns, num_warps=1,
        )  # fmt: skip
    return sums.sum((0, 1, 2), dtype=torch.float64)


def _gradient_in_triton(grad, pairs, embeddings, ids, counts, margin, pull_weight, push_weight) -> Tensor:
    launch = launch_for(LAUNCHES, embeddings.device)
    batch, pixels, channels = embeddings.shape
    with torch.cuda.device_of(embeddings):
        tiles, group = _tiles(embeddings, counts)
        blocks, groups = triton.cdiv(pixels, launch.rows_backward), tiles.shape[2] // group
        splits = min(triton.cdiv(launch.programs, blocks * groups * batch), tiles.shape[1])
        span = triton.cdiv(tiles.shape[1], splits)
        splits = triton.cdiv(tiles.shape[1], span)
        parts = torch.empty(splits, batch, pixels, channels, dtype=torch.float32, device=tiles.device)
        _gradient_kernel[(blocks, splits * groups, batch)](
            tiles, ids.contiguous(), counts, grad, pairs, parts, pixels, channels, tiles.shape[1], span,
            margin, pull_weight, push_weight,
            D=tiles.shape[2], GROUP=group, ROWS=launch.rows_backward, COLUMNS=launch.columns, num_warps=1,
        )  # fmt: skip
    return (parts[0] if splits == 1 else parts.sum(0)).to(embeddings.dtype)
