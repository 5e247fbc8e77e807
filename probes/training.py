"""The state of probes in training, and one step of it. The loop over epochs is `train.py`'s."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spatialprobe.probes.batches import Batch, FeatureKey
from spatialprobe.probes.fusion import Fuse, Stored, fuse
from spatialprobe.probes.probe import Probe, project
from spatialprobe.probes.task import ProbeConfig

BETAS = (0.9, 0.95)  # of AdamW, and the rate that the cosine ends at: the published study's
MIN_LR = 1e-6


@dataclass
class Trainee:
    """A probe in training."""

    probe: Probe
    keys: tuple[FeatureKey, ...]  # of a batch's features, those it reads, joined on channels
    optimizer: torch.optim.AdamW
    curve: list[dict[str, float]] = field(default_factory=list)  # per epoch: train_loss, val_loss, score, ...
    best_score: float | None = None
    best_epoch: int | None = None
    best: dict[str, Tensor] = field(default_factory=dict)  # the probe's weights at its best epoch
    stopped: str = ""  # why it trains no more, before its last epoch
    loss_sum: float = 0.0  # over the clips of this epoch so far
    clips: int = 0

    @classmethod
    def fresh(cls, probe: Probe, keys: tuple[FeatureKey, ...]) -> "Trainee":
        config, device = probe.config, next(probe.parameters()).device
        optimizer = torch.optim.AdamW(
            probe.parameters(), lr=config.lr, betas=BETAS, weight_decay=config.weight_decay, fused=device.type == "cuda"
        )
        return cls(probe, keys, optimizer)

    @property
    def config(self) -> ProbeConfig:
        return self.probe.config


class Diverged(ValueError):
    """The loss of the only probe left is no longer finite."""


def train_step(trainees: Sequence[Trainee], batch: Batch, step: int, steps_per_epoch: int) -> None:
    """One batch for every probe that still trains; each ends with the weights it would have alone.

    The features are read once, by the joint input layers. Their gradient is one product, after the probes have run one
    by one, so that a single probe's activations are in memory at a time. A probe whose loss is not finite is stopped
    before its weights take harm. All randomness depends on (the probe's seed, step).
    """
    active = [t for t in trainees if not t.stopped]
    device = batch.frames.device
    with autocast(device):
        projected = project([t.probe for t in active], features_of(batch, active))
    gradients = []
    for trainee, x in zip(active, projected, strict=True):
        leaf = x.detach().requires_grad_()
        loss = _loss(trainee.probe, leaf, batch.labels, step)["loss"]
        value = loss.item()
        if math.isfinite(value):
            loss.backward()
            trainee.loss_sum += value * len(batch.ids)
            trainee.clips += len(batch.ids)
        else:
            clips = ", ".join(batch.ids)
            trainee.stopped = f"the loss is {value} at step {step} (clips {clips})"
        gradients.append(torch.zeros_like(x) if leaf.grad is None else leaf.grad)
    torch.autograd.backward(projected, gradients)
    reduce_gradients([t for t in active if not t.stopped])
    for trainee in active:
        if not trainee.stopped:
            for group in trainee.optimizer.param_groups:
                group["lr"] = learning_rate(trainee.config, (step + 1) / steps_per_epoch)
            trainee.optimizer.step()
        trainee.optimizer.zero_grad()


def _loss(probe: Probe, projected: Tensor, labels: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """What the task's loss says, with dropout and sampling drawn from (the probe's seed, step)."""
    config, device = probe.config, projected.device
    torch.manual_seed(_mix(config.seed, step, "dropout"))
    with autocast(device):
        outputs = probe.read(projected)
    return task_loss(probe, outputs, labels, torch.Generator(device).manual_seed(_mix(config.seed, step, "loss")))


def task_loss(
    probe: Probe, outputs: dict[str, Tensor], labels: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    targets = probe.task.targets(labels, probe.config, probe.facts)
    return probe.task.loss({name: x.float() for name, x in outputs.items()}, targets, probe.config, generator)


def learning_rate(config: ProbeConfig, epoch: float) -> float:
    """At `epoch` (a fraction): linear from 0 over `warmup` epochs, then a cosine that ends at MIN_LR."""
    if epoch < config.warmup:
        return config.lr * epoch / config.warmup
    done = (epoch - config.warmup) / max(config.epochs - config.warmup, 1e-9)
    low = min(MIN_LR, config.lr)
    return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def features_of(batch: Batch, trainees: Sequence[Trainee]) -> list[Stored]:
    """The features that each probe reads, joined once for all probes that read the same."""
    made: dict[tuple, Stored] = {}
    for trainee in trainees:
        chosen = (trainee.keys, trainee.config.fuse)
        if chosen not in made:
            made[chosen] = joined(batch, *chosen)
    return [made[trainee.keys, trainee.config.fuse] for trainee in trainees]


def joined(batch: Batch, keys: Sequence[FeatureKey], how: Fuse) -> Stored:
    return fuse([batch.features[key] for key in keys], how)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; elsewhere nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def reduce_gradients(trainees: Sequence[Trainee]) -> None:
    """The mean over processes, where there are several: batches are equally large on all of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    ranks = torch.distributed.get_world_size()
    for trainee in trainees:
        grads = [p.grad for p in trainee.probe.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        torch.distributed.all_reduce(flat)
        for grad, reduced in zip(grads, flat.div_(ranks).split([g.numel() for g in grads]), strict=True):
            grad.copy_(reduced.view_as(grad))


def _mix(seed: int, step: int, what: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}|{step}|{what}".encode()).digest()[:8], "little") >> 1
