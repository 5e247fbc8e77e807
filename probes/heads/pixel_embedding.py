"""A unit vector for every token, and for every pixel between tokens: equal vectors, same thing.

B clips, S views, h x w tokens, H x W pixels of the masks, D dimensions. What the vectors are for is not known here.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatialprobe.probes.backbone import Tokens

Kind = Literal["mlp", "linear"]

HIDDEN = 64


class PixelEmbedding(nn.Module):
    """Each patch token alone to D dimensions, of length 1: an MLP width -> 64 -> 64 -> D with GELU, or one Linear."""

    def __init__(self, width: int, dims: int = 32, kind: Kind = "mlp"):
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"head must be one of {', '.join(get_args(Kind))}, got {kind!r}")
        if kind == "linear":
            self.layers = nn.Linear(width, dims)
        else:
            self.layers = nn.Sequential(
                nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, dims)
            )

    def forward(self, tokens: Tokens) -> dict[str, Tensor]:
        """{"embeddings": float32 [B, S, h, w, D]}; lengths are 1 in float32, also under autocast."""
        raw = self.layers(tokens.patches).unflatten(2, tokens.grid)
        return {"embeddings": F.normalize(raw.float(), dim=-1)}


def at_pixels(
    embeddings: Tensor,  # [B, S, h, w, D]
    pixels: Tensor,  # int64 [...], places in the flattened [B, S, H, W]
    size: tuple[int, int],  # (H, W), of any aspect: the grid is stretched over it
) -> Tensor:
    """Unit vectors [..., D] at single pixels: what upsampling the whole grid and normalising would give there.

    The same as F.interpolate(mode="bilinear", align_corners=False) to H x W, at a cost that does not grow with H x W.
    """
    (height, width), grid = size, embeddings.shape[2:4]
    view, y, x = pixels // (height * width), pixels // width % height, pixels % width
    dtype = embeddings.dtype
    y_near, y_weight = _neighbours(y, grid[0], height, dtype)  # [..., 2]
    x_near, x_weight = _neighbours(x, grid[1], width, dtype)
    rows = (view[..., None, None] * grid[0] + y_near[..., :, None]) * grid[1] + x_near[..., None, :]  # [..., 2, 2]
    weights = y_weight[..., :, None] * x_weight[..., None, :]
    # One weighted sum of 4 table rows per pixel, without the rows themselves in memory.
    mixed = F.embedding_bag(
        rows.view(-1, 4), embeddings.flatten(0, 3), per_sample_weights=weights.view(-1, 4), mode="sum"
    )
    return F.normalize(mixed, dim=-1).view(*pixels.shape, -1)


def _neighbours(position: Tensor, cells: int, pixels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two cells around a pixel and their weights, [..., 2] each. Beyond the outer cells' centres they stay flat."""
    centre = ((position.to(dtype) + 0.5) * (cells / pixels) - 0.5).clamp(min=0)
    low = centre.long()
    part = centre - low
    return torch.stack([low, (low + 1).clamp(max=cells - 1)], -1), torch.stack([1 - part, part], -1)
