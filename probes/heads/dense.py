"""An image per view from the tokens of four pairs of blocks: DPT's decoder. What the image shows is not known here.

B clips, S views, N = H * W patches, width of the tokens D.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatialprobe.probes.backbone import Tokens

STAGES = 4
LAST = 32  # channels before the last convolution
POSITION_BASE, POSITION_SHARE = 100.0, 0.1  # of the signal that says where in the image a channel is


def stage_pairs(depth: int) -> list[int]:
    """Which pair of blocks each of the four stages reads: evenly spread, the last one always; one entry four times."""
    return [max(0, -(-(i + 1) * depth // STAGES) - 1) for i in range(STAGES)]


class DenseDecoder(nn.Module):
    """Dense prediction transformer's decoder (Ranftl et al. 2021), with VGGT's position signal (Wang et al. 2025).

    Four stages of tokens become maps of 4, 2, 1 and 1/2 times the grid, are fused from coarse to fine, and resized to
    the output. Tokens of special tokens are not read.
    """

    def __init__(
        self,
        width: int,  # D
        outputs: int,  # channels
        size: tuple[int, int],  # (h, w) of the output
        *,
        depth: int,  # pairs of blocks of the backbone
        features: int = 256,
        stages: Sequence[int] = (256, 512, 1024, 1024),  # channels, fine to coarse
    ):
        super().__init__()
        if len(stages) != STAGES or any(c < 4 or c % 4 for c in stages) or features < 8 or features % 8:
            wanted = f"{STAGES} stages of a multiple of 4 channels and features a multiple of 8"
            raise ValueError(f"the decoder needs {wanted}, got {list(stages)} and {features}")
        if min(size) < 1:
            raise ValueError(f"the decoder's output must be at least 1 x 1, got {size}")
        self.size, self.pairs = size, stage_pairs(depth)
        self.norm = nn.LayerNorm(width)
        self.project = nn.ModuleList(nn.Conv2d(width, c, 1) for c in stages)
        self.resize = nn.ModuleList(
            [
                nn.ConvTranspose2d(stages[0], stages[0], 4, stride=4),
                nn.ConvTranspose2d(stages[1], stages[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(stages[3], stages[3], 3, stride=2, padding=1),
            ]
        )
        self.narrow = nn.ModuleList(nn.Conv2d(c, features, 3, padding=1, bias=False) for c in stages)
        self.fuse = nn.ModuleList(Fusion(features, coarser=i < STAGES - 1) for i in range(STAGES))
        self.lower = nn.Conv2d(features, features // 2, 3, padding=1)
        self.last = nn.Sequential(nn.Conv2d(features // 2, LAST, 3, padding=1), nn.ReLU(), nn.Conv2d(LAST, outputs, 1))

    def forward(self, tokens: Tokens) -> Tensor:  # [B, S, h, w, outputs]
        height, width = tokens.grid
        views, aspect = tokens.patches.shape[:2], self.size[1] / self.size[0]
        maps = []
        for pair, project, resize, narrow in zip(self.pairs, self.project, self.resize, self.narrow, strict=True):
            x = self.norm(tokens.pairs[pair][:, :, -height * width :])
            x = project(x.flatten(0, 1).mT.unflatten(2, (height, width)))
            maps.append(narrow(resize(x + position_signal(x, aspect))))
        fused = None
        for i in reversed(range(STAGES)):
            finer = maps[i - 1].shape[-2:] if i else tuple(2 * n for n in maps[0].shape[-2:])
            fused = self.fuse[i](maps[i], fused, finer)
        x = F.interpolate(self.lower(fused), self.size, mode="bilinear")
        x = self.last(x + position_signal(x, aspect))
        return x.unflatten(0, views).movedim(2, -1)


class Fusion(nn.Module):
    """Adds a stage to what came of the coarser ones, and resizes to the next finer."""

    def __init__(self, features: int, *, coarser: bool):  # coarser: whether there is a coarser stage
        super().__init__()
        if coarser:
            self.own = ResidualUnit(features)
        self.joint, self.out = ResidualUnit(features), nn.Conv2d(features, features, 1)

    def forward(self, stage: Tensor, coarse: Tensor | None, size: tuple[int, int]) -> Tensor:
        x = stage if coarse is None else coarse + self.own(stage)
        return self.out(F.interpolate(self.joint(x), size, mode="bilinear"))


class ResidualUnit(nn.Module):
    """Two convolutions, each after a ReLU, added to the input."""

    def __init__(self, features: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(features, features, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def position_signal(x: Tensor, aspect: float) -> Tensor:  # [..., C, H, W] -> [C, H, W]
    """Sines and cosines of x (first half of C) and y: pixel centres over the image's half diagonal, from its middle.

    `aspect` is the image's width by its height, so that maps of one image agree on what is where.
    """
    channels, height, width = x.shape[-3:]
    diagonal = (1 + aspect**2) ** 0.5
    frequency = POSITION_BASE ** -(torch.arange(channels // 4, device=x.device) / (channels // 4))
    parts = []
    for count, extent in ((width, aspect / diagonal), (height, 1 / diagonal)):
        place = ((torch.arange(count, device=x.device) + 0.5) / count * 2 - 1) * extent
        angle = frequency[:, None] * place
        parts.append(torch.cat([angle.sin(), angle.cos()]))  # [C / 2, count]
    across, down = parts[0][:, None, :].expand(-1, height, -1), parts[1][:, :, None].expand(-1, -1, width)
    return POSITION_SHARE * torch.cat([across, down]).to(x.dtype)
