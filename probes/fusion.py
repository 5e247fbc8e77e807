"""Features of several stores as one, joined on channels. B clips, S views, H x W tokens, C channels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spatialprobe.kernels.pool_features import dequantize, pool_features, token_stats

Fuse = Literal["concat", "norm"]


@dataclass
class Stored:
    """A batch's features as a store holds them."""

    data: Tensor  # [B, S, H, W, C], store dtype
    mean: Tensor  # float32 [B, S, H, W], over C of the values that `data` stands for
    rstd: Tensor  # float32 [B, S, H, W], 1 / sqrt(variance + 1e-6) of them
    scale: Tensor | None = None  # float32 [B, S, H, W], where the dtype is quantised

    @property
    def values(self) -> Tensor:  # float32 [B, S, H, W, C]
        return dequantize(self.data, self.scale)


def fuse(parts: Sequence[Stored], how: Fuse) -> Stored:
    """The features of several stores, concatenated on C. One store's are returned as they are.

    Grids are average-pooled to the smallest height and the smallest width among them. "norm" first gives each token of
    each store mean 0 and variance 1 (the published study's fusion), so that no store drowns the other; "concat" leaves
    the values. Equal float dtypes stay; others, and normalised ones, become float16 ("norm") or float32.
    """
    if len(parts) == 1:
        return parts[0]
    if len({part.data.shape[:2] for part in parts}) > 1:
        raise ValueError(f"fused features must be of the same clips and views, got {[p.data.shape for p in parts]}")
    grid = tuple(min(part.data.shape[axis] for part in parts) for axis in (2, 3))
    dtypes = {part.data.dtype for part in parts}
    same = dtypes.pop() if len(dtypes) == 1 else torch.float32
    dtype = torch.float16 if how == "norm" else same if same.itemsize > 1 else torch.float32
    data = torch.cat([_aligned(part, grid, how).to(dtype) for part in parts], -1)
    return Stored(data, *token_stats(data))


def _aligned(part: Stored, grid: tuple[int, int], how: Fuse) -> Tensor:  # float32 [B, S, h, w, C]
    x, mean, rstd = part.values, part.mean, part.rstd
    if x.shape[2:4] != grid:
        pooled = pool_features(x, tuple(range(x.shape[1])), grid, dtype=torch.float32)
        x, mean, rstd = pooled.data, pooled.mean, pooled.rstd
    return (x - mean[..., None]) * rstd[..., None] if how == "norm" else x
