"""The pull-push loss of pixel embeddings: one object's together, different objects' a margin apart.

Neither pass holds the P x P distances. Which pixels are sampled, and what made the embeddings, is not known here.
B scenes, P pixels of a scene, D channels.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spatialprobe.kernels.launch import Impl, launch_for, use_triton

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_CHANNELS = 128  # of the Triton kernel, whose gradient of a block of pixels stays in registers
CHUNK = 1 << 22  # distances that the torch implementation holds at a time


# -- what is called ---------------------------------------------------------------------------------------------------


def contrastive_loss(
    embeddings: Tensor,  # [B, P, D] float32, bfloat16, float16; torch: float64 too
    ids: Tensor,  # int [B, P], object of each pixel; every value is an object
    *,
    counts: Tensor | None = None,  # int [B]: only the first counts[b] pixels of scene b are there; None: all P
    margin: float = 1.0,
    pull_weight: float = 1.0,
    push_weight: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:  # scalar, float32 (float64 of float64)
    """Mean distance of pairs of equal ids, plus mean of max(0, margin - distance) of pairs of unequal ids.

    Pairs are two different pixels of one scene; each mean is over the pairs of all scenes together, and 0 where there
    are none. Distances are Euclidean, sqrt(sum (a - b)^2) in float32: exact for close pairs, which dot products are
    not. A distance of 0 has gradient 0, and so has one of `margin`. Sums are taken in a fixed order.

    Differentiable once, in `embeddings`. Squared distances below 1e-38 count as 0. Raises ValueError for shapes,
    dtypes and counts that do not fit, and, in Triton, for D beyond 128.
    """
    if embeddings.ndim != 3 or 0 in embeddings.shape[1:]:
        raise ValueError(f"embeddings must be [B, P, D], got {list(embeddings.shape)}")
    triton = use_triton(impl, embeddings)
    if embeddings.dtype not in ((*FLOATS,) if triton else (*FLOATS, torch.float64)):
        raise ValueError(f"embeddings must be one of {', '.join(map(str, FLOATS))}, got {embeddings.dtype}")
    batch, pixels, channels = embeddings.shape
    if ids.shape != (batch, pixels) or ids.is_floating_point() or ids.device != embeddings.device:
        got = f"{ids.dtype} {list(ids.shape)} on {ids.device}"
        raise ValueError(f"ids must be whole numbers [{batch}, {pixels}] on {embeddings.device}, got {got}")
    if counts is None:
        counts = torch.full((batch,), pixels, device=embeddings.device)
    if counts.shape != (batch,) or counts.is_floating_point() or counts.device != embeddings.device:
        got = f"{counts.dtype} {list(counts.shape)} on {counts.device}"
        raise ValueError(f"counts must be whole numbers [{batch}] on {embeddings.device}, got {got}")
    if triton and channels > MAX_CHANNELS:
        raise ValueError(f"the Triton kernel takes at most {MAX_CHANNELS} channels, got {channels}; impl='torch' more")
    wide = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    weights = (float(pull_weight), float(push_weight))
    return _loss(wide, ids.long(), counts.long().clamp(0, pixels), float(margin), *weights, triton)[0]


def definition(
    embeddings: Tensor,  # [B, P, D]
    ids: Tensor,  # int [B, P]
    counts: Tensor,  # int [B]
    margin: float,
    pull_weight: float,
    push_weight: float,
) -> Tensor:
    """The loss as it is written above, with all distances in memory."""
    there = torch.arange(ids.shape[1], device=ids.device) < counts[:, None]
    pairs = there[:, :, None] & there[:, None, :] & ~torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
    same = ids[:, :, None] == ids[:, None, :]
    square = (embeddings[:, :, None] - embeddings[:, None, :]).square().sum(-1)
    distance = torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)  # gradient 0 at 0, not NaN
    pull, push = pairs & same, pairs & ~same
    apart = (margin - distance).relu()
    return pull_weight * _mean(distance, pull) + push_weight * _mean(apart, push)


def _mean(x: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, x, 0.0).sum() / where.sum().clamp_min(1)


# -- as torch sees it -------------------------------------------------------------------------------------------------


@torch.library.custom_op("spatialprobe::contrastive_loss", mutates_args=())
def _loss(
    embeddings: Tensor,
    ids: Tensor,
    counts: Tensor,
    margin: float,
    pull_weight: float,
    push_weight: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:  # loss; float64 [2], of what a pair's distance changes the loss by: equal ids, unequal
    sums = (_triton_sums if triton else _torch_sums)(embeddings, ids, counts, margin)
    pull, push, pulls, pushes = sums.unbind()
    per_pair = torch.stack([pull_weight / pulls.clamp_min(1), -push_weight / pushes.clamp_min(1)])
    return (per_pair[0] * pull - per_pair[1] * push).to(embeddings.dtype), per_pair


@_loss.register_fake
def _(embeddings, ids, counts, margin, pull_weight, push_weight, triton):
    return embeddings.new_empty(()), embeddings.new_empty(2, dtype=torch.float64)


@torch.library.custom_op("spatialprobe::contrastive_loss_backward", mutates_args=())
def _gradient(
    embeddings: Tensor, ids: Tensor, counts: Tensor, per_pair: Tensor, margin: float, triton: bool
) -> Tensor:  # like embeddings
    return (_triton_gradient if triton else _torch_gradient)(embeddings, ids, counts, per_pair, margin)


@_gradient.register_fake
def _(embeddings, ids, counts, per_pair, margin, triton):
    return torch.empty_like(embeddings, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    embeddings, ids, counts, ctx.margin, _, _, ctx.triton = inputs
    ctx.save_for_backward(embeddings, ids, counts, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    embeddings, ids, counts, per_pair = ctx.saved_tensors
    gradient = _gradient(embeddings, ids, counts, per_pair * grad, ctx.margin, ctx.triton)
    return gradient, None, None, None, None, None, None


_loss.register_autograd(_backward, setup_context=_setup)


# -- torch: a chunk of rows of the distances at a time ----------------------------------------------------------------


def _chunks(embeddings: Tensor, ids: Tensor, counts: Tensor):
    """(scene, pixels, their distances to all of the scene [n, P], pairs of equal ids, pairs of unequal ids)."""
    for scene, count in enumerate(counts.tolist()):
        f, of = embeddings[scene, :count], ids[scene, :count]
        rows = max(CHUNK // max(count, 1), 1)
        for first in range(0, count, rows):
            some = slice(first, min(first + rows, count))
            distance = torch.cdist(f[some], f, compute_mode="donot_use_mm_for_euclid_dist")
            same = of[some, None] == of
            other = torch.ones_like(same)
            other.diagonal(first).fill_(False)
            yield scene, some, distance, same & other, ~same


def _torch_sums(embeddings: Tensor, ids: Tensor, counts: Tensor, margin: float) -> Tensor:
    """float64 [4]: distances of equal ids, margins not kept by unequal ids, and how many pairs of each."""
    sums = torch.zeros(4, dtype=torch.float64, device=embeddings.device)
    for _, _, distance, pull, push in _chunks(embeddings, ids, counts):
        apart = (margin - distance).relu()
        parts = (torch.where(pull, distance, 0.0), torch.where(push, apart, 0.0), pull, push)
        sums += torch.stack([part.sum(dtype=torch.float64) for part in parts])
    return sums


def _torch_gradient(embeddings: Tensor, ids: Tensor, counts: Tensor, per_pair: Tensor, margin: float) -> Tensor:
    gradient = torch.zeros_like(embeddings, memory_format=torch.contiguous_format)
    for scene, some, distance, pull, push in _chunks(embeddings, ids, counts):
        # every pair counts twice, from either side; in float64, where close pairs do not cancel
        pull, push = pull & (distance > 0), push & (distance > 0) & (distance < margin)
        slope = 2 * (pull * per_pair[0] + push * per_pair[1]) / torch.where(distance > 0, distance, 1.0)
        f = embeddings[scene, : distance.shape[1]].double()
        gradient[scene, some] = (slope.sum(1, keepdim=True) * f[some] - slope @ f).to(gradient.dtype)
    return gradient


# -- Triton -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """A program compares `mine` pixels with `others` at a time."""

    mine: int
    others: int
    warps: int


# By compute capability. The work is arithmetic in registers: per pair and channel one subtraction and one multiply-add,
# no tensor cores (their TF32 is wrong by up to 2.8 times for close pairs).
# - 64 x 64 pairs: each channel's 128 loaded numbers serve 4096 pairs. 8 warps have 16 pairs per thread; on 4, forward
#   spills. Backward holds gradients [64, D] beside them.
# - 2048 pixels make 32 programs per scene, so a batch of 8 fills the 108 to 148 SMs of all three.
# Measured: registers and spills, compiled ahead for all three. Time was not: it needs a GPU.
LAUNCHES = {
    80: {"forward": Launch(64, 64, 8), "backward": Launch(64, 64, 8)},
    90: {"forward": Launch(64, 64, 8), "backward": Launch(64, 64, 8)},
    100: {"forward": Launch(64, 64, 8), "backward": Launch(64, 64, 8)},
}


@triton.jit
def _squares(f_ptr, i, j, count, P, D, BI: tl.constexpr, BJ: tl.constexpr):
    """Squared distances [BI, BJ] of pixels i and j; f is [D, P], so that neighbours are loaded together."""
    total = tl.zeros([BI, BJ], tl.float32)
    for d in range(D):
        a = tl.load(f_ptr + d * P + i, i < count, 0.0)
        b = tl.load(f_ptr + d * P + j, j < count, 0.0)
        difference = a[:, None] - b[None, :]
        total += difference * difference
    return total


@triton.jit
def _forward_kernel(f_ptr, ids_ptr, counts_ptr, out_ptr, P, D, margin, BI: tl.constexpr, BJ: tl.constexpr):
    """Over one block of pixels and all others of its scene: the four sums of `_torch_sums`."""
    scene = tl.program_id(1).to(tl.int64)
    f_ptr += scene * P * D
    ids_ptr += scene * P
    count = tl.load(counts_ptr + scene)
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    mine = tl.load(ids_ptr + i, i < count, 0)
    pull = tl.zeros([BI], tl.float32)
    push = tl.zeros([BI], tl.float32)
    pulls = tl.zeros([BI], tl.float32)  # a program has at most BI * P pairs: whole numbers below 2**24 a pixel
    pushes = tl.zeros([BI], tl.float32)
    for start in range(0, count, BJ):
        j = start + tl.arange(0, BJ)
        theirs = tl.load(ids_ptr + j, j < count, 0)
        distance = tl.sqrt_rn(_squares(f_ptr, i, j, count, P, D, BI, BJ))
        pair = (i < count)[:, None] & (j < count)[None, :] & (i[:, None] != j[None, :])
        same = mine[:, None] == theirs[None, :]
        pull += tl.sum(tl.where(pair & same, distance, 0.0), 1)
        push += tl.sum(tl.where(pair & (mine[:, None] != theirs[None, :]), tl.maximum(margin - distance, 0.0), 0.0), 1)
        pulls += tl.sum(tl.where(pair & same, 1.0, 0.0), 1)
        pushes += tl.sum(tl.where(pair & (mine[:, None] != theirs[None, :]), 1.0, 0.0), 1)
    out_ptr += (scene * tl.num_programs(0) + tl.program_id(0)) * 4
    tl.store(out_ptr, tl.sum(pull, 0))
    tl.store(out_ptr + 1, tl.sum(push, 0))
    tl.store(out_ptr + 2, tl.sum(pulls, 0))
    tl.store(out_ptr + 3, tl.sum(pushes, 0))


@triton.jit
def _backward_kernel(
    f_ptr, ids_ptr, counts_ptr, per_pair_ptr, out_ptr, P, D, margin,
    BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of pixels, from differences: close pairs do not cancel as in a product of slopes and f."""
    scene = tl.program_id(1).to(tl.int64)
    f_ptr += scene * P * D
    out_ptr += scene * P * D
    ids_ptr += scene * P
    count = tl.load(counts_ptr + scene)
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    mine = tl.load(ids_ptr + i, i < count, 0)
    equal = 2.0 * tl.load(per_pair_ptr)  # twice: a pair counts from either side
    unequal = 2.0 * tl.load(per_pair_ptr + 1)
    channel = tl.arange(0, BD)
    gradient = tl.zeros([BI, BD], tl.float32)
    for start in range(0, count, BJ):
        j = start + tl.arange(0, BJ)
        theirs = tl.load(ids_ptr + j, j < count, 0)
        square = _squares(f_ptr, i, j, count, P, D, BI, BJ)
        distance = tl.sqrt_rn(square)
        live = (i < count)[:, None] & (j < count)[None, :] & (square > 0.0)
        same = mine[:, None] == theirs[None, :]
        slope = tl.where(same, equal, tl.where(distance < margin, unequal, 0.0))
        slope = tl.where(live, slope, 0.0) / tl.where(square > 0.0, distance, 1.0)
        for d in range(D):
            a = tl.load(f_ptr + d * P + i, i < count, 0.0)
            b = tl.load(f_ptr + d * P + j, j < count, 0.0)
            column = tl.sum(slope * (a[:, None] - b[None, :]), 1)
            gradient += tl.where(channel[None, :] == d, column[:, None], 0.0)
    at = out_ptr + i[:, None] * D + channel[None, :]
    tl.store(at, gradient, (i < P)[:, None] & (channel < D)[None, :])


def _triton_sums(embeddings: Tensor, ids: Tensor, counts: Tensor, margin: float) -> Tensor:  # float64 [4]
    batch, pixels, channels = embeddings.shape
    launch = launch_for(LAUNCHES, embeddings.device)["forward"]
    blocks = triton.cdiv(pixels, launch.mine)
    parts = torch.empty(batch, blocks, 4, device=embeddings.device)
    if batch:
        with torch.cuda.device_of(embeddings):
            _forward_kernel[blocks, batch](
                embeddings.mT.contiguous(), ids.contiguous(), counts.contiguous(), parts, pixels, channels, margin,
                BI=launch.mine, BJ=launch.others, num_warps=launch.warps,
            )  # fmt: skip
    return parts.double().sum((0, 1))


def _triton_gradient(embeddings: Tensor, ids: Tensor, counts: Tensor, per_pair: Tensor, margin: float) -> Tensor:
    batch, pixels, channels = embeddings.shape
    launch = launch_for(LAUNCHES, embeddings.device)["backward"]
    gradient = torch.empty(batch, pixels, channels, device=embeddings.device)
    if batch:
        with torch.cuda.device_of(embeddings):
            _backward_kernel[triton.cdiv(pixels, launch.mine), batch](
                embeddings.mT.contiguous(), ids.contiguous(), counts.contiguous(), per_pair.float(), gradient,
                pixels, channels, margin,
                BI=launch.mine, BJ=launch.others, BD=triton.next_power_of_2(channels), num_warps=launch.warps,
            )  # fmt: skip
    return gradient
