"""The trunk that every probe shares: features to tokens, then attention within each view and across views.

B clips, S views, N = H * W patches, E width. Which task reads the tokens is not known here.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Position = Literal["none", "1d", "2d"]

SPECIAL = 5  # tokens in front of each view's patches: one for the camera, four registers
ROTARY_BASE = 100.0
SPECIAL_STD = 1e-6


@dataclass
class Tokens:
    """What a head reads."""

    pairs: list[Tensor]  # after each pair of blocks [B, S, 5 + N, 2E]; with depth 0 one entry [B, S, N, E]
    grid: tuple[int, int]  # (H, W) of the patches

    @property
    def patches(self) -> Tensor:  # [B, S, N, width]
        """The last pair's patches in raster order."""
        return self.pairs[-1][:, :, -self.grid[0] * self.grid[1] :]


class Backbone(nn.Module):
    """Alternating attention after VGGT (Wang et al. 2025): `depth` pairs of one block per view and one across views.

    The camera and register tokens of the first view are other parameters than those of the rest, so that the first
    view can stand for the coordinate frame. Depth 0 passes the projected features on: a pure read-out.
    """

    def __init__(
        self,
        embed: int,  # E
        depth: int,
        *,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        layer_scale: float = 0.01,
        position: Position = "2d",
    ):
        super().__init__()
        if depth < 0:
            raise ValueError(f"depth must be 0 or more pairs of blocks, got {depth}")
        if position not in get_args(Position):
            raise ValueError(f"position must be one of {', '.join(get_args(Position))}, got {position!r}")
        if depth and (embed % heads or (embed // heads) % 4):
            raise ValueError(f"embed must be {heads} heads of a multiple of 4 channels each, got {embed}")
        self.depth, self.position, self.head_width = depth, position, embed // heads
        self.width = 2 * embed if depth else embed
        block = lambda: Block(embed, heads, mlp_ratio, dropout, layer_scale)  # noqa: E731
        self.within = nn.ModuleList(block() for _ in range(depth))
        self.across = nn.ModuleList(block() for _ in range(depth))
        if depth:
            self.special = nn.Parameter(torch.randn(2, SPECIAL, embed) * SPECIAL_STD)  # first view, other views

    def forward(self, x: Tensor) -> Tokens:  # [B, S, H, W, E]
        batch, views, height, width, embed = x.shape
        x = x.flatten(2, 3)
        if not self.depth:
            return Tokens([x], (height, width))
        first, rest = self.special.to(x.dtype)
        special = torch.stack([first] + [rest] * (views - 1)).expand(batch, -1, -1, -1)
        x = torch.cat([special, x], 2)
        turns = self._turns(height, width, x.device)
        length, pairs = x.shape[2], []
        for within, across in zip(self.within, self.across, strict=True):
            x = within(x.flatten(0, 1), turns).view(batch, views, length, embed)
            per_view = x
            repeated = None if turns is None else turns.repeat(1, views, 1)
            x = across(x.flatten(1, 2), repeated).view(batch, views, length, embed)
            pairs.append(torch.cat([per_view, x], -1))
        return Tokens(pairs, (height, width))

    def _turns(self, height: int, width: int, device: torch.device) -> Tensor | None:
        """Rotary angles as cosine and sine [2, 5 + N, head width / 2]; special tokens stand at 0, patches from 1."""
        if self.position == "none":
            return None
        half = self.head_width // 2
        if self.position == "1d":
            angles = _angles(torch.arange(1, height * width + 1, device=device), half)
        else:
            y, x = torch.meshgrid(
                torch.arange(1, height + 1, device=device), torch.arange(1, width + 1, device=device), indexing="ij"
            )
            angles = torch.cat([_angles(y.flatten(), half // 2), _angles(x.flatten(), half // 2)], -1)
        angles = F.pad(angles, (0, 0, SPECIAL, 0))
        return torch.stack([angles.cos(), angles.sin()])


def _angles(position: Tensor, pairs: int) -> Tensor:  # int [N] -> float32 [N, pairs]
    frequency = ROTARY_BASE ** -(torch.arange(pairs, device=position.device) / pairs)
    return position[:, None] * frequency


def rotate(
    x: Tensor,  # [B, heads, L, channels of a head]
    turns: Tensor | None,  # [2, L, half the channels]
) -> Tensor:
    """Rotary position embedding (Su et al. 2021): channel i and channel i + half turn together."""
    if turns is None:
        return x
    cos, sin = turns.to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    """Pre-norm attention and MLP with normalised queries and keys, and LayerScale (Touvron et al. 2021)."""

    def __init__(self, embed: int, heads: int, mlp_ratio: float, dropout: float, layer_scale: float):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(embed), nn.LayerNorm(embed)
        self.qkv, self.proj = nn.Linear(embed, 3 * embed), nn.Linear(embed, embed)
        self.q_norm, self.k_norm = nn.LayerNorm(embed // heads), nn.LayerNorm(embed // heads)
        hidden = int(embed * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(embed, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, embed))
        self.drop = nn.Dropout(dropout)
        self.scale1 = nn.Parameter(torch.full((embed,), layer_scale))
        self.scale2 = nn.Parameter(torch.full((embed,), layer_scale))

    def forward(self, x: Tensor, turns: Tensor | None) -> Tensor:  # [B, L, E]
        x = x + self.scale1 * self.drop(self.proj(self._attend(self.norm1(x), turns)))
        return x + self.scale2 * self.drop(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, turns: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), turns), rotate(self.k_norm(k), turns)
        mixed = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype))
        return mixed.transpose(1, 2).flatten(2).to(x.dtype)
