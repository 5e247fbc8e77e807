"""Tagging probes trained the straightforward way, for benchmarks to compare with.

It does what such code usually does: whole feature files are loaded for the few rows that are wanted and pooled then,
LayerNorm and Linear follow each other, and the class scores come from a list of Linears. It uses torch and safetensors
alone and nothing of the engine; the model is the same, so weights can be copied.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

Sample = tuple[Path, list[int], Tensor]  # feature file, rows of the S views, present float [K]


class WholeFiles(Dataset):
    """Features [S, h, w, C] float32 and the classes that are there."""

    def __init__(self, samples: Sequence[Sample], grid: tuple[int, int]):
        self.samples, self.grid = samples, grid

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        path, rows, present = self.samples[i]
        feat = load_file(path)["feat"][rows].float()
        if feat.shape[1:3] != self.grid:
            feat = F.adaptive_avg_pool2d(feat.permute(0, 3, 1, 2), self.grid).permute(0, 2, 3, 1)
        return feat, present


class PlainTagger(nn.Module):
    """A read-out: LayerNorm, Linear, a decoder with one query per class."""

    def __init__(self, channels: int, embed: int, classes: int, *, width: int, heads: int, layers: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(channels, eps=1e-6), nn.Linear(channels, embed)
        self.memory = nn.Linear(embed, width) if embed != width else nn.Identity()
        self.queries = nn.Parameter(torch.zeros(classes, width))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.classifiers = nn.ModuleList(nn.Linear(width, 1) for _ in range(classes))

    def forward(self, x: Tensor) -> Tensor:  # [B, S, h, w, C] -> [B, K]
        memory = self.memory(self.linear(self.norm(x)).flatten(1, 3))
        y = self.queries.expand(len(x), -1, -1)
        for layer in self.layers:
            y = layer(y, memory)
        return torch.cat([classifier(y[:, k]) for k, classifier in enumerate(self.classifiers)], -1)


def asymmetric_loss(logits: Tensor, present: Tensor) -> Tensor:
    """Ridnik et al. 2021 with gamma- 4, gamma+ 0 and no clip."""
    p = logits.sigmoid()
    there, absent = present * p.clamp(min=1e-8).log(), (1 - present) * (1 - p).clamp(min=1e-8).log()
    weight = (1 - (p * present + (1 - p) * (1 - present))).detach() ** (4 * (1 - present))
    return -((there + absent) * weight).sum(1).mean()


class PlainLoop:
    """Epochs over batches in a fixed order, read by worker processes."""

    def __init__(self, model: PlainTagger, grid: tuple[int, int], *, batch: int, workers: int, weight_decay: float):
        self.model, self.grid, self.batch, self.workers = model, grid, batch, workers
        self.optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=weight_decay)

    def _batches(self, samples: Sequence[Sample]) -> DataLoader:
        return DataLoader(WholeFiles(samples, self.grid), batch_size=self.batch, num_workers=self.workers)

    def train(self, samples: Sequence[Sample], rates: Sequence[float]) -> float:
        """One epoch with a learning rate per batch; returns the mean loss over clips."""
        total = 0.0
        for rate, (features, present) in zip(rates, self._batches(samples), strict=True):
            loss = asymmetric_loss(self.model(features), present)
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(features)
        return total / len(samples)

    @torch.no_grad()
    def validate(self, samples: Sequence[Sample]) -> float:
        """The mean loss over clips."""
        total = 0.0
        for features, present in self._batches(samples):
            total += asymmetric_loss(self.model(features), present).item() * len(features)
        return total / len(samples)
