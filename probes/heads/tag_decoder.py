"""A query per class reads the tokens of all views and becomes the class's score.

B clips, S views, N patches, K classes, D width of the decoder. What a class is, and whether it is there, is not known.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatialprobe.probes.backbone import Tokens

QUERY_STD = 0.02
MLP_RATIO = 4


class TagDecoder(nn.Module):
    """Pre-norm transformer decoder on the patches of the last pair of blocks, after Query2Label (Liu et al. 2021).

    Queries are learned, or a learned projection of `embeddings`, which stay as they are and are kept with the weights.
    Special tokens are not read. Dropout is on what each of a layer's three parts adds, and within the MLP.
    """

    def __init__(
        self,
        tokens: int,  # width of the tokens that are read
        classes: int,  # K
        *,
        width: int = 512,  # D
        layers: int = 2,
        heads: int = 8,
        dropout: float = 0.1,
        embeddings: Tensor | None = None,  # float32 [K, any], of the classes' names
    ):
        super().__init__()
        if width < 1 or heads < 1 or width % heads:
            raise ValueError(f"the decoder's width must be a multiple of its heads, got {width} and {heads}")
        if layers < 1 or classes < 1 or not 0 <= dropout < 1:
            got = f"{layers}, {classes} and {dropout}"
            raise ValueError(f"the decoder needs layers and classes of at least 1 and dropout in [0, 1), got {got}")
        if embeddings is not None and (embeddings.ndim != 2 or len(embeddings) != classes):
            raise ValueError(f"embeddings must be [{classes}, channels], got {list(embeddings.shape)}")
        self.memory = nn.Identity() if tokens == width else nn.Linear(tokens, width)
        self.register_buffer("embeddings", embeddings)
        if embeddings is None:
            self.queries = nn.Parameter(torch.randn(classes, width) * QUERY_STD)
        else:
            self.query = nn.Linear(embeddings.shape[1], width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, dropout) for _ in range(layers))
        bound = width**-0.5  # as of one nn.Linear(D, 1) per class
        self.weight = nn.Parameter(torch.empty(classes, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(classes).uniform_(-bound, bound))

    def forward(self, tokens: Tokens) -> dict[str, Tensor]:
        """{"logits": [B, K]}, each class's score before the sigmoid."""
        memory = self.memory(tokens.patches.flatten(1, 2))  # [B, S * N, D]
        queries = self.queries if self.embeddings is None else self.query(self.embeddings)
        x = queries.expand(len(memory), -1, -1)
        for layer in self.layers:
            x = layer(x, memory)
        return {"logits": torch.einsum("bkd,kd->bk", x, self.weight.to(x.dtype)) + self.bias}


class DecoderLayer(nn.Module):
    """Attention among the queries, attention from the queries to the memory, and an MLP, each added to the queries."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.among, self.read = Attention(width, heads), Attention(width, heads)
        hidden = MLP_RATIO * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # [B, K, D], [B, L, D] -> [B, K, D]
        normed = self.norm1(x)
        x = x + self.drop(self.among(normed, normed))
        x = x + self.drop(self.read(self.norm2(x), memory))
        return x + self.drop(self.mlp(self.norm3(x)))


class Attention(nn.Module):
    """Multi-head attention of queries to a memory."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # [B, K, D], [B, L, D] -> [B, K, D]
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
