"""Point maps as channels on a grid of tokens: XYZ and its sinusoids, averaged over the pixels of each token.

Y x X pixels of a label image, H x W tokens, K bands, C channels. Knows no files, and not where points are from.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MAX_BANDS = 16  # the last would be of .2 mm
RIGID = 1e-3  # largest entry of R R^T - 1 that is rounding


def channel_names(bands: int) -> list[str]:  # [C]
    """What the channels are, in their order; wavelengths are in units of the points."""
    waves = [
        f"{wave}({axis}, {2 * math.pi / 2**k:.4g})" for k in range(bands) for wave in ("sin", "cos") for axis in "xyz"
    ]
    return ["x", "y", "z", *waves, "share", "confidence"]


def encode_points(points: Tensor, bands: int) -> Tensor:  # float [..., 3] -> [..., 3 + 6 K]
    """x, y, z, then for k = 0 .. K - 1 the sines and the cosines of 2^k times each: wavelengths 2 pi / 2^k units.

    The positional encoding of NeRF (Mildenhall et al. 2020, equation 4), without its factor of pi.
    """
    turns = [2**k * points for k in range(bands)]
    return torch.cat([points, *(wave(turn) for turn in turns for wave in (torch.sin, torch.cos))], -1)


@lru_cache(64)
def token_shares(pixels: int, tokens: int, pooled: int) -> Tensor:  # float32 [pooled, pixels]
    """Along one side, how much of a stored token each pixel is; what a token's pixels are sums to 1.

    Of a model's `tokens` tokens each sees an equal share of the image, so a pixel on a border belongs to both sides by
    its area. The store's `pooled` ones are means over them, in the bins of `adaptive_avg_pool2d`.
    """
    # in units of a pixel / tokens all borders are whole numbers
    first = torch.arange(tokens)[:, None] * pixels
    at = torch.arange(pixels) * tokens
    overlap = torch.minimum(first + pixels, at + tokens) - torch.maximum(first, at)
    shares = overlap.clamp_min(0).double() / pixels  # [tokens, pixels]
    bins = [(i * tokens // pooled, -(-(i + 1) * tokens // pooled)) for i in range(pooled)]
    return torch.stack([shares[start:stop].mean(0) for start, stop in bins]).float()


@dataclass
class PointSums:
    """What the tokens of a row have been shown so far: sums over frames, and how many these were."""

    sums: Tensor  # float32 [H, W, C]: encoded points and confidence of pixels with depth, their share last but one
    frames: int

    def means(self) -> Tensor:  # float32 [H, W, C]
        """The mean over each token's pixels that have depth, in all frames; zeros where none has.

        The last channels are the share of the token's pixels that have depth, and the mean confidence of these.
        """
        share = self.sums[..., -2:-1]
        means = torch.where(share > 0, self.sums / share, 0)
        means[..., -2] = share[..., 0] / max(self.frames, 1)
        return means


def sum_frame(
    points: Tensor,  # float32 [Y, X, 3]
    confidence: Tensor,  # float32 [Y, X], 0 where there is no depth
    shares: tuple[Tensor, Tensor],  # `token_shares` of rows [H, Y] and of columns [W, X]
    bands: int,
) -> Tensor:  # float32 [H, W, C]
    """Sums over one frame's pixels that have depth, weighted by how much of a token each is: see PointSums.

    Confidence c is averaged as c / (1 + c): models that learn it have no upper bound (VGGT's begins at 1 and goes into
    the hundreds), and it would be all that a LayerNorm of the token leaves.
    """
    there = (confidence > 0) & points.isfinite().all(-1)
    points = torch.where(there[..., None], points, 0)
    trust = 1 - 1 / (1 + torch.where(there, confidence, 0))
    values = torch.cat([encode_points(points, bands), torch.ones_like(trust)[..., None], trust[..., None]], -1)
    rows, columns = shares
    across = columns @ (values * there[..., None])  # [Y, W, C]
    return torch.tensordot(rows, across, 1)


# -- coordinates ------------------------------------------------------------------------------------------------------


def to_camera(points: Tensor, extrinsic: Tensor) -> Tensor:  # [Y, X, 3], world-to-camera [3, 4] -> [Y, X, 3]
    """World points as a camera sees them: x right, y down, z forward."""
    return points @ extrinsic[:, :3].mT + extrinsic[:, 3]


def check_rigid(extrinsic: Tensor, frames: Sequence[int]) -> None:  # [S, 3, 4]
    """Raises ValueError for poses that stretch or mirror."""
    turn = extrinsic[:, :, :3].double()
    off = (turn @ turn.mT - torch.eye(3).double()).abs().amax((1, 2))
    bad = [
        f for f, o, d in zip(frames, off.tolist(), torch.linalg.det(turn).tolist(), strict=True) if o > RIGID or d < 0
    ]
    if bad:
        raise ValueError(f"poses must be rigid, those of frames {bad} stretch or mirror")
