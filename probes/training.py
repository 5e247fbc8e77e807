"""The state of probes in training, and one step of it. The loop over epochs is `loop.py`'s."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spatialprobe.probes.fusion import Fuse, Stored, fuse
from spatialprobe.probes.loading.batches import Batch, FeatureKey
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
        config = probe.config
        optimizer = torch.optim.AdamW(
            probe.parameters(), lr=config.lr, betas=BETAS, weight_decay=config.weight_decay, fused=True
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
    by one, so that a single probe's activations are in memory at a time. A probe whose loss is not finite, in any
    process, is stopped before its weights take harm. All randomness depends on (the probe's seed, step, process).
    """
    active = [t for t in trainees if not t.stopped]
    device = batch.frames.device
    with autocast(device):
        projected = project([t.probe for t in active], features_of(batch, active))
    losses, gradients = [], []
    for trainee, x, targets in zip(active, projected, targets_of(batch, active), strict=True):
        leaf = x.detach().requires_grad_()
        loss = _loss(trainee.probe, leaf, targets, step)["loss"]
        loss.backward()
        losses.append(loss.detach().float())
        gradients.append(leaf.grad)
    torch.autograd.backward(projected, gradients)
    values = mean_over_processes([torch.stack(losses)])[0].tolist()
    for trainee, value in zip(active, values, strict=True):
        if not math.isfinite(value):
            clips = ", ".join(clip_id for ids in of_all_processes(batch.ids) for clip_id in ids)
            trainee.stopped = f"the loss is {value} at step {step} (clips {clips})"
        else:
            trainee.loss_sum += value * len(batch.ids)
            trainee.clips += len(batch.ids)
            _update(trainee, learning_rate(trainee.config, (step + 1) / steps_per_epoch))
        trainee.optimizer.zero_grad()


def _loss(probe: Probe, projected: Tensor, targets: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """What the task's loss says, with dropout and sampling drawn from (the probe's seed, step, process)."""
    seed, device, rank = probe.config.seed, projected.device, processes()[0]
    torch.manual_seed(_mix(seed, step, rank, "dropout"))
    with autocast(device):
        outputs = probe.read(projected, targets)
    return task_loss(probe, outputs, targets, torch.Generator(device).manual_seed(_mix(seed, step, rank, "loss")))


def task_loss(
    probe: Probe, outputs: dict[str, Tensor], targets: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    return probe.task.loss({name: x.float() for name, x in outputs.items()}, targets, probe.config, generator)


def _update(trainee: Trainee, lr: float) -> None:
    """One step of the optimizer, with the mean of the gradients of all processes."""
    parameters = [p for p in trainee.probe.parameters() if p.grad is not None]
    for parameter, grad in zip(parameters, mean_over_processes([p.grad for p in parameters]), strict=True):
        parameter.grad = grad
    for group in trainee.optimizer.param_groups:
        group["lr"] = lr
    trainee.optimizer.step()


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


def targets_of(batch: Batch, trainees: Sequence[Trainee]) -> list[dict[str, Tensor]]:
    """What each probe is to say, made once for all probes of the same options and facts."""
    made: list[tuple[Probe, dict[str, Tensor]]] = []
    found = []
    for probe in (trainee.probe for trainee in trainees):
        same = (x for p, x in made if p.facts == probe.facts and p.config.options == probe.config.options)
        targets = next(same, None)
        if targets is None:
            targets = probe.task.targets(batch.labels, probe.config, probe.facts)
            made.append((probe, targets))
        found.append(targets)
    return found


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; elsewhere nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def processes() -> tuple[int, int]:
    """This process' rank and the number of processes that train together."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else (0, 1)


def mean_over_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor's mean over processes, which all have equally large batches; alone, the tensors themselves."""
    ranks = processes()[1]
    if ranks == 1:
        return list(tensors)
    flat = torch.cat([x.flatten() for x in tensors])
    torch.distributed.all_reduce(flat)
    parts = flat.div_(ranks).split([x.numel() for x in tensors])
    return [part.view_as(x) for part, x in zip(parts, tensors, strict=True)]


def of_all_processes(value: Any) -> list[Any]:
    """What each process has, in the order of their ranks. All must call it at the same point."""
    values = [value] * processes()[1]
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def _mix(seed: int, step: int, rank: int, what: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}|{step}|{rank}|{what}".encode()).digest()[:8], "little") >> 1
