"""One probe: input layer, backbone, head; and many probes reading the same features in one product.

How probes are trained is `training.py`'s and `loop.py`'s. B clips, S views, C channels of the features, E width of the
tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spatialprobe.kernels.pool_features import LAYER_NORM_EPS
from spatialprobe.kernels.probe_input import grouped_probe_input, probe_input
from spatialprobe.probes.backbone import Backbone
from spatialprobe.probes.fusion import Stored
from spatialprobe.probes.task import ProbeConfig, ProbeTask


class InputLayer(nn.Module):
    """LayerNorm(C) and Linear(C -> E) as parameters; `project` applies them, fused, to frozen features."""

    def __init__(self, channels: int, embed: int):
        super().__init__()
        linear, norm = nn.Linear(channels, embed), nn.LayerNorm(channels)
        self.weight, self.bias = linear.weight, linear.bias
        self.gamma, self.beta = norm.weight, norm.bias


class Probe(nn.Module):
    """A probe whose first weights depend on its config's seed alone."""

    def __init__(self, task: ProbeTask, config: ProbeConfig, channels: int, facts: Any):
        super().__init__()
        self.task, self.config, self.facts = task, config, facts
        with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU: no GPU's generator is touched
            torch.default_generator.manual_seed(config.seed)
            self.input = InputLayer(channels, config.embed)
            self.backbone = Backbone(
                config.embed,
                config.depth,
                heads=config.heads,
                mlp_ratio=config.mlp_ratio,
                dropout=config.dropout,
                layer_scale=config.layer_scale,
                position=config.position,
            )
            self.head = task.head(self.backbone.width, config, facts)

    def read(
        self,
        projected: Tensor,  # [B, S, H, W, E]
        targets: Mapping[str, Tensor] | None = None,  # the task's; of them the head gets what it is told, if anything
    ) -> dict[str, Tensor]:
        """What the head says of projected features."""
        return self.head(self.backbone(projected), **{name: targets[name] for name in self.task.told})

    def forward(self, features: Stored, targets: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return self.read(project([self], [features])[0], targets)


def project(probes: Sequence[Probe], features: Sequence[Stored]) -> list[Tensor]:
    """Each probe's input layer on its features: [B, S, H, W, E] of each, in the order of `probes`.

    Probes that read the same features (the same object) at one width share one product, so the features are read once.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (probe, stored) in enumerate(zip(probes, features, strict=True)):
        groups.setdefault((id(stored), probe.config.embed), []).append(i)
    out: list[Tensor | None] = [None] * len(probes)
    for members in groups.values():
        stored, layers = features[members[0]], [probes[i].input for i in members]
        known = {"scale": stored.scale, "mean": stored.mean, "rstd": stored.rstd, "eps": LAYER_NORM_EPS}
        if len(layers) == 1:
            layer = layers[0]
            out[members[0]] = probe_input(stored.data, layer.weight, layer.bias, layer.gamma, layer.beta, **known)
            continue
        weight, bias, gamma, beta = (
            torch.stack([getattr(layer, name) for layer in layers]) for name in ("weight", "bias", "gamma", "beta")
        )
        joint = grouped_probe_input(stored.data, weight, bias, gamma, beta, **known)  # [..., P, E]
        for i, projected in zip(members, joint.unbind(-2), strict=True):
            out[i] = projected
    return out
