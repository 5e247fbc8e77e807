"""What is kept of a block's output: wanted rows, pooled tokens, summed over noise steps, rounded for the store.

These torch definitions are the specification, and what runs on every device today.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

QUANTISED_MAX = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
LAYER_NORM_EPS = 1e-6


@dataclass
class Finished:
    """Features as they are stored, with what their readers would otherwise compute again."""

    data: Tensor  # [..., C], store dtype
    scale: Tensor | None  # float32 [...], data * scale is the value; None unless quantised
    mean: Tensor  # float32 [...], mean over C of the stored values
    rstd: Tensor  # float32 [...], 1 / sqrt(variance over C + 1e-6) of the stored values

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Finished":
        """`fn` of every tensor that is there."""
        return Finished(**{name: None if x is None else fn(x) for name, x in vars(self).items()})

    def named(self, name: str) -> dict[str, Tensor]:
        """As a store's file names them: `name`, `name.mean`, `name.rstd` and, if quantised, `name.scale`."""
        parts = {f"{name}.{part}": x for part, x in vars(self).items() if part != "data" and x is not None}
        return {name: self.data} | parts


def pool_features(
    x: Tensor,  # [B, T, H, W, C], any float dtype
    rows: tuple[int, ...],  # wanted rows of T
    grid: tuple[int, int] | None,  # (h, w) after pooling; None keeps H, W
    *,
    into: Tensor | None = None,  # float32 [B, len(rows), h, w, C], added to in place
    weight: float = 1.0,
) -> Tensor:
    """`weight` times the wanted rows of `x`, average-pooled as `adaptive_avg_pool2d` does. float32 [B, R, h, w, C].

    The mean over K noise steps is K calls with weight 1/K into one buffer; the K outputs never exist at once.
    """
    if x.ndim != 5:
        raise ValueError(f"x must be [B, T, H, W, C], got {tuple(x.shape)}")
    if not rows or min(rows) < 0 or max(rows) >= x.shape[1]:
        raise ValueError(f"rows must name some of the {x.shape[1]} rows, got {rows}")
    batch, _, height, width, channels = x.shape
    if grid is not None and (grid[0] > height or grid[1] > width):
        raise ValueError(f"grid must not be larger than the {height}x{width} tokens, got {grid[0]}x{grid[1]}")
    first, last = rows[0], rows[-1] + 1
    kept = x[:, first:last] if rows == tuple(range(first, last)) else x[:, list(rows)]
    if grid is None or grid == (height, width):
        pooled = kept.float()
    else:
        pooled = _average(kept.flatten(0, 1), grid).view(batch, len(rows), *grid, channels)
    if into is not None:
        return into.add_(pooled, alpha=weight)
    if weight != 1.0:
        return pooled * weight
    is_input = pooled.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    return pooled.clone() if is_input else pooled  # what is returned may be added to


def _average(x: Tensor, grid: tuple[int, int]) -> Tensor:  # [N, H, W, C] -> [N, h, w, C]
    (height, width), (h, w) = x.shape[1:3], grid
    if height % h == 0 and width % w == 0:  # exact bins: one reduction, no permuted copies
        return x.unflatten(2, (w, -1)).unflatten(1, (h, -1)).mean((2, 4), dtype=torch.float32)
    return F.adaptive_avg_pool2d(x.float().permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)


def finish(x: Tensor, dtype: torch.dtype) -> Finished:
    """Rounds float32 features [..., C] to the store's dtype, with per-token statistics of the rounded values.

    float8_e4m3 and int8 get one scale per token, its largest magnitude over the dtype's largest value. float16 does
    not saturate: a value beyond 65504 becomes infinite, and with it the token's mean, which the caller must refuse.
    """
    if dtype not in QUANTISED_MAX:
        data, scale = x.to(dtype), None
    else:
        top = QUANTISED_MAX[dtype]
        scale = (x.abs().amax(-1) / top).clamp_min(torch.finfo(torch.float32).tiny)
        data = (x / scale[..., None]).clamp(-top, top)
        data = (data.round() if dtype == torch.int8 else data).to(dtype)
    return Finished(data, scale, *token_stats(dequantize(data, scale)))


def dequantize(data: Tensor, scale: Tensor | None) -> Tensor:  # [..., C], [...] -> float32 [..., C]
    """The values that stored features stand for."""
    return data.float() if scale is None else data.float() * scale[..., None]


def token_stats(x: Tensor) -> tuple[Tensor, Tensor]:  # [..., C] -> float32 [...], float32 [...]
    """Mean and 1 / sqrt(biased variance + 1e-6) over channels: what LayerNorm(eps=1e-6) needs of each token."""
    variance, mean = torch.var_mean(x.float(), dim=-1, correction=0)
    return mean, (variance + LAYER_NORM_EPS).rsqrt()
