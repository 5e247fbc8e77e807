"""RICE, the vision tower of LLaVA-OneVision-1.5, in plain torch, for images of one size.

It lies here because the library has no class for it. Modules bear the names of the published tensors. Architecture:
LLaVA-OneVision-1.5 (arXiv 2509.23661), that is Qwen2-VL's tower with LayerNorm before the blocks, a class token for
every image, which has a learned rotary angle of its own, and attention over the whole image in every block.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTARY_BASE = 10_000


@dataclass(frozen=True)
class RiceConfig:
    """The table `vision_config`. Published: 24 blocks of width 1024, 16 heads, patches of 14 pixels, merged 2 x 2."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int  # pixels
    spatial_merge_size: int  # patches per token of the decoder, in height and in width
    text_hidden_size: int  # channels of what the merger puts out
    layer_norm_eps: float = 1e-5
    in_channels: int = 3
    hidden_act: str = "gelu"
    temporal_patch_size: int = 1
    embed_dim: int | None = None  # the same as hidden_size, and not used
    initializer_range: float | None = None

    @classmethod
    def of(cls, table: Mapping[str, Any], where: str) -> "RiceConfig":
        """Raises ValueError for what this module does not compute. Fields that it does not know are not looked at."""
        known = {field.name for field in fields(cls)}
        config = cls(**{name: value for name, value in table.items() if name in known})
        for name, wanted in (("hidden_act", "gelu"), ("temporal_patch_size", 1)):
            if getattr(config, name) != wanted:
                raise ValueError(f"{where}: {name} must be {wanted!r}, got {getattr(config, name)!r}")
        if config.hidden_size % (4 * config.num_heads):
            raise ValueError(
                f"{where}: hidden_size must be a multiple of 4 x {config.num_heads} heads, got {config.hidden_size}"
            )
        return config


def merged_order(height: int, width: int, merge: int, device: torch.device) -> Tensor:  # int64 [height * width]
    """The patches as the tower sees them, those of a cell together: their places in reading order."""
    places = torch.arange(height * width, device=device).view(height // merge, merge, width // merge, merge)
    return places.transpose(1, 2).flatten()


def rotary_angles(config: RiceConfig, height: int, width: int, device: torch.device) -> Tensor:
    """float32 [height * width, D / 2] for heads of D channels: first of the row, then of the column."""
    quarter = config.hidden_size // config.num_heads // 4
    speeds = 1.0 / ROTARY_BASE ** (torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    order = merged_order(height, width, config.spatial_merge_size, device)
    return torch.cat([torch.outer(p.float(), speeds) for p in (order // width, order % width)], dim=1)


class RiceViT(nn.Module):
    def __init__(self, config: RiceConfig, depth: int, *, merger: bool):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.patch_embed = nn.ModuleDict({"proj": _patch_projection(config)})
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.class_pos_emb = nn.Parameter(torch.empty(1, width // config.num_heads // 2))
        self.pre_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(depth))
        self.merger = Merger(config) if merger else None

    def forward(
        self,
        patches: Tensor,  # [I, N, 3 * patch * patch] in merged order, of I images
        angles: Tensor,  # of `rotary_angles`
    ) -> Tensor | None:  # [I, N / merge^2, text_hidden_size], or nothing without a merger
        patch = self.config.patch_size
        x = self.patch_embed["proj"](patches.reshape(-1, self.config.in_channels, patch, patch))
        x = torch.cat([self.class_embedding.expand(len(patches), 1, -1), x.view(len(patches), -1, x.shape[1])], dim=1)
        angles = torch.cat([self.class_pos_emb.float(), angles]).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
        x = self.pre_layernorm(x)
        for block in self.blocks:
            x = block(x, cos, sin)
        return None if self.merger is None else self.merger(x[:, 1:])


def _patch_projection(config: RiceConfig) -> nn.Conv2d:
    patch = config.patch_size
    return nn.Conv2d(config.in_channels, config.hidden_size, patch, stride=patch, bias=False)


class Block(nn.Module):
    def __init__(self, config: RiceConfig):
        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attn = Attention(width, config.num_heads)
        self.mlp = MLP(width, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [I, 1 + N, C]
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [I, heads, 1 + N, D]
        q, k = (rotate(x, cos, sin) for x in (q, k))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns channel i of a head together with channel i + D / 2, in float32."""
    left, right = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Merger(nn.Module):
    """The patches of a cell become one token of the decoder."""

    def __init__(self, config: RiceConfig):
        super().__init__()
        joined = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = nn.Sequential(nn.Linear(joined, joined), nn.GELU(), nn.Linear(joined, config.text_hidden_size))
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).reshape(len(x), -1, self.joined))
