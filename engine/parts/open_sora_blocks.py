"""The transformer of Open-Sora 2.0, up to its last block, in plain torch.

It lies here because no library has a class for it and the released file has no config: sizes are read from the shapes
of its tensors, and modules bear the tensors' names. Architecture: "Open-Sora 2.0" (arXiv 2503.09642), that is Flux
with three axes of positions: blocks of two streams, whose text and video meet in the attention only, then blocks of
one stream, text first.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of every normalisation
ROTARY_BASE = 10_000
TIME_FREQUENCIES = 128  # pairs of cosine and sine, of periods up to 10,000 / 1000
SINGLE_FILE_HINT = "is it Open_Sora_v2.safetensors, with q, k and v apart?"

Rotary = tuple[Tensor, Tensor]  # cosines and sines, each float32 [N, D/2], of text then video tokens


@dataclass(frozen=True)
class Sizes:
    """What the released file's shapes say. Published: 19, 38, 3072, 128, 12288, 64, 68, 4096, 768."""

    double: int  # blocks of two streams
    single: int  # blocks of one
    width: int
    head: int  # channels of one attention head
    hidden: int  # of the feed-forward parts
    patch: int  # numbers per token: 2 x 2 latents
    condition: int  # the same of the condition, with its mask
    text: int  # channels of the text tokens
    pooled: int  # of the text as one vector

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], where: str) -> "Sizes":
        """Raises ValueError for tensors that are not there, and for variants that this module does not compute."""

        def shape(name: str) -> tuple[int, ...]:
            if name not in shapes:
                raise ValueError(f"{where} has no tensor {name}: {SINGLE_FILE_HINT}")
            return shapes[name]

        def blocks(kind: str) -> int:
            numbers = {int(name.split(".")[1]) for name in shapes if name.startswith(f"{kind}.")}
            if numbers != set(range(len(numbers))):
                raise ValueError(f"{where} must have all {kind} from 0 on, got {sorted(numbers)}")
            return len(numbers)

        if guided := [name for name in shapes if name.startswith("guidance_in.")]:
            raise ValueError(f"{where} is a guidance-distilled variant ({guided[0]}), which is not supported")
        width, patch = shape("img_in.weight")
        sizes = cls(
            double=blocks("double_blocks"),
            single=blocks("single_blocks"),
            width=width,
            head=shape("double_blocks.0.img_attn.norm.query_norm.scale")[0],
            hidden=shape("double_blocks.0.img_mlp.0.weight")[0],
            patch=patch,
            condition=shape("cond_in.weight")[1],
            text=shape("txt_in.weight")[1],
            pooled=shape("vector_in.in_layer.weight")[1],
        )
        if sizes.width % sizes.head or sizes.head % 32:
            raise ValueError(f"{where} must have heads of a multiple of 32 channels, got {sizes.head} of {sizes.width}")
        if sizes.condition != sizes.patch + 4:
            raise ValueError(f"{where} must have a condition of latents and mask, {patch + 4}, got {sizes.condition}")
        return sizes


class OpenSoraTransformer(nn.Module):
    """The first `depth` blocks and what feeds them. Nothing is returned: what is wanted is read from the blocks."""

    def __init__(self, sizes: Sizes, depth: int):
        super().__init__()
        width, double = sizes.width, min(depth, sizes.double)
        self.head = sizes.head
        self.img_in = nn.Linear(sizes.patch, width)
        self.cond_in = nn.Linear(sizes.condition, width)
        self.txt_in = nn.Linear(sizes.text, width)
        self.time_in = Embedder(2 * TIME_FREQUENCIES, width)
        self.vector_in = Embedder(sizes.pooled, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(sizes) for _ in range(double))
        self.single_blocks = nn.ModuleList(SingleBlock(sizes) for _ in range(depth - double))

    def forward(
        self,
        patches: Tensor,  # [B, THW, patch], see `pack`
        condition: Tensor,  # [B, THW, condition]
        text: Tensor,  # [B, L, text]
        pooled: Tensor,  # [B, pooled]
        time: Tensor,  # float32 [B], 1 is noise alone, 0 none
        grid: tuple[int, int, int],  # (T, H, W)
    ) -> None:
        video = self.img_in(patches) + self.cond_in(condition)
        vector = self.time_in(time_features(time).to(patches.dtype)) + self.vector_in(pooled)
        text = self.txt_in(text)
        rotary = rotary_table(text.shape[1], grid, self.head, patches.device)
        for block in self.double_blocks:
            video, text = block(video, text, vector, rotary)
        if not self.single_blocks:
            return
        tokens = torch.cat([text, video], dim=1)
        for block in self.single_blocks:
            tokens = block(tokens, vector, rotary)


def pack(latents: Tensor) -> Tensor:  # [B, C, T, h, w] -> [B, T * h/2 * w/2, 4C], channels the slowest of the 4C
    return latents.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def time_features(time: Tensor) -> Tensor:  # float32 [B] -> [B, 2 * TIME_FREQUENCIES], cosines first
    """In float32, as the released code's compiled function computes, whatever dtype the model has."""
    rates = torch.exp(-math.log(10_000) / TIME_FREQUENCIES * torch.arange(TIME_FREQUENCIES, device=time.device))
    angles = 1000.0 * time.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_table(text: int, grid: tuple[int, int, int], head: int, device: torch.device) -> Rotary:
    """Angles of time, row and column for 1/8, 7/16 and 7/16 of a head's pairs; text tokens are all at (0, 0, 0)."""
    places = torch.meshgrid(*(torch.arange(n, device=device).float() for n in grid), indexing="ij")
    angles = []
    for place, dims in zip(places, (head // 8, 7 * head // 16, 7 * head // 16), strict=True):
        rates = 1.0 / ROTARY_BASE ** (torch.arange(0, dims, 2, device=device).float() / dims)
        angles.append(F.pad(place.flatten(), (text, 0))[:, None] * rates)
    joined = torch.cat(angles, dim=-1)
    return joined.cos(), joined.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:  # [B, heads, N, D]
    """Pair i of a head is its channels i and i + D/2 (Flux has 2i and 2i + 1). Computed in float32."""
    cos, sin = rotary
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def normal(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


class Embedder(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(channels, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """`parts` vectors, each [B, 1, width], of the vector that stands for timestep and text."""

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.parts, self.lin = parts, nn.Linear(width, parts * width)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vector))[:, None].chunk(self.parts, dim=-1)


class Scale(nn.Module):
    """RMS normalisation of a head's channels, in float32, then a learned scale."""

    def __init__(self, head: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(head))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=EPS).to(x.dtype) * self.scale


class QueryKeyNorm(nn.Module):
    def __init__(self, head: int):
        super().__init__()
        self.query_norm, self.key_norm = Scale(head), Scale(head)


class Attention(nn.Module):
    """One stream's projections of a double block."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.head = sizes.head
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(sizes.width, sizes.width) for _ in range(4))
        self.norm = QueryKeyNorm(sizes.head)

    def queries_keys_values(self, x: Tensor) -> list[Tensor]:  # [B, N, width] -> 3 of [B, heads, N, D]
        q, k, v = (heads(proj(x), self.head) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return [self.norm.query_norm(q), self.norm.key_norm(k), v]


def heads(x: Tensor, head: int) -> Tensor:  # [B, N, width] -> [B, heads, N, D]
    return x.unflatten(-1, (-1, head)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, rotary: Rotary) -> Tensor:  # each [B, heads, N, D] -> [B, N, width]
    out = F.scaled_dot_product_attention(rotate(q, rotary), rotate(k, rotary), v)
    return out.transpose(1, 2).flatten(2)


def feed_forward(sizes: Sizes) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(sizes.width, sizes.hidden), nn.GELU(approximate="tanh"), nn.Linear(sizes.hidden, sizes.width)
    )


class DoubleBlock(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.img_mod, self.txt_mod = Modulation(sizes.width, 6), Modulation(sizes.width, 6)
        self.img_attn, self.txt_attn = Attention(sizes), Attention(sizes)
        self.img_mlp, self.txt_mlp = feed_forward(sizes), feed_forward(sizes)

    def forward(self, video: Tensor, text: Tensor, vector: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        video_mod, text_mod = self.img_mod(vector), self.txt_mod(vector)
        of_text = self.txt_attn.queries_keys_values((1 + text_mod[1]) * normal(text) + text_mod[0])
        of_video = self.img_attn.queries_keys_values((1 + video_mod[1]) * normal(video) + video_mod[0])
        both = attend(*(torch.cat(pair, dim=2) for pair in zip(of_text, of_video, strict=True)), rotary)
        text_attended, video_attended = both.split([text.shape[1], video.shape[1]], dim=1)
        video = finish(video, self.img_attn.proj(video_attended), self.img_mlp, video_mod[2:])
        text = finish(text, self.txt_attn.proj(text_attended), self.txt_mlp, text_mod[2:])
        return video, text


def finish(x: Tensor, attended: Tensor, mlp: nn.Module, modulation: tuple[Tensor, ...]) -> Tensor:
    """Both residual steps of one stream."""
    attention_gate, shift, scale, gate = modulation
    x = x + attention_gate * attended
    return x + gate * mlp((1 + scale) * normal(x) + shift)


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side, of text and video tokens alike."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.width
        self.head, self.split = sizes.head, [width, sizes.hidden]
        self.modulation = Modulation(width, 3)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_mlp = nn.Linear(width, width + sizes.hidden)
        self.linear2 = nn.Linear(width + sizes.hidden, width)
        self.norm = QueryKeyNorm(sizes.head)

    def forward(self, tokens: Tensor, vector: Tensor, rotary: Rotary) -> Tensor:  # [B, L + THW, width]
        shift, scale, gate = self.modulation(vector)
        x = (1 + scale) * normal(tokens) + shift
        v, hidden = self.v_mlp(x).split(self.split, dim=-1)
        q = self.norm.query_norm(heads(self.q_proj(x), self.head))
        k = self.norm.key_norm(heads(self.k_proj(x), self.head))
        attended = attend(q, k, heads(v, self.head), rotary)
        return tokens + gate * self.linear2(torch.cat([attended, F.gelu(hidden, approximate="tanh")], dim=-1))
