"""Instance grouping: are tokens of one object alike, and unlike those of others, in every view that shows it?

B clips, S views, h x w tokens, H x W pixels of the masks, D dimensions, P sampled pixels of a clip.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields

import numpy as np
import torch
from torch import Tensor

from spatialprobe.kernels.contrastive_loss import contrastive_loss
from spatialprobe.probes.heads.pixel_embedding import PixelEmbedding, at_pixels
from spatialprobe.probes.labels import Labels
from spatialprobe.probes.metrics.instance import Grouping, InstanceMetrics, resize_nearest
from spatialprobe.probes.task import ProbeConfig, ProbeTask

OPTIONS = {
    "head": "mlp",  # or "linear"
    "dims": 32,  # D
    "pixels": 2048,  # P
    "margin": 1.0,  # distance from which two instances are far enough apart; of unit vectors 2 is the largest
} | asdict(Grouping())
TRIES = 4  # places tried per wanted pixel


def no_facts(labels: Labels, ids: Sequence[str], config: ProbeConfig) -> None:
    """The task needs to know nothing of the whole training set."""


def instance_head(width: int, config: ProbeConfig, facts: None) -> PixelEmbedding:
    """Raises ValueError for any option that training or evaluation would stumble over later."""
    options = config.options
    for name, least in (("dims", grouping(config).components), ("pixels", 2)):
        if not isinstance(options[name], int) or options[name] < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {options[name]!r}")
    if not isinstance(options["margin"], int | float) or not options["margin"] > 0:
        raise ValueError(f"margin must be a positive number, got {options['margin']!r}")
    return PixelEmbedding(width, options["dims"], options["head"])


def grouping(config: ProbeConfig) -> Grouping:
    return Grouping(**{f.name: config.options[f.name] for f in fields(Grouping)})


def instance_targets(labels: dict[str, Tensor], config: ProbeConfig, facts: None) -> dict[str, Tensor]:
    """{"instances": int32 [B, S, H, W], 0 is none}."""
    return {"instances": labels["instance_masks"]}


def instance_loss(
    outputs: dict[str, Tensor], targets: dict[str, Tensor], config: ProbeConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """The pull-push loss over P pixels of each clip, pooled over the batch; embeddings are upsampled bilinearly.

    A clip that shows no instance contributes nothing; a batch of such clips has loss 0 and gradient 0.
    """
    embeddings, instances = outputs["embeddings"], targets["instances"]
    pixels = sample_pixels(instances, config.options["pixels"], generator)
    if not len(pixels):
        return {"loss": 0 * embeddings.sum()}
    sampled = at_pixels(embeddings, pixels, tuple(instances.shape[2:]))
    return {"loss": contrastive_loss(sampled, instances.flatten()[pixels], margin=config.options["margin"])}


def sample_pixels(
    instances: Tensor,  # int [B, S, H, W]
    pixels: int,  # P
    generator: torch.Generator,
) -> Tensor:
    """P places of each clip, over all its views, that show an instance (id > 0), uniformly: int64 [B', P].

    Places are of the flattened `instances`; B' are the clips that show any. Without replacement, but with where a clip
    has fewer than P. What is drawn for a clip does not depend on the other clips.
    """
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device).item()
    rngs = [np.random.default_rng((seed, clip)) for clip in range(len(instances))]
    flat = instances.flatten(1)
    # Most pixels show an instance, so a few tries per wanted pixel find enough without a look at all millions.
    count = flat.shape[1]
    tried = np.stack([rng.choice(count, min(TRIES * pixels, count), replace=False) for rng in rngs])
    shows = (flat.gather(1, torch.from_numpy(tried).to(flat.device)) > 0).cpu().numpy()
    chosen = []
    for clip, rng in enumerate(rngs):
        places = tried[clip, shows[clip]][:pixels]
        if len(places) < pixels:
            every = (flat[clip] > 0).nonzero().squeeze(1).cpu().numpy()
            if not len(every):
                continue
            places = rng.choice(every, pixels, replace=len(every) < pixels)
        chosen.append(clip * count + places)
    drawn = np.stack(chosen) if chosen else np.empty((0, pixels), np.int64)
    return torch.from_numpy(drawn).to(flat.device)


def predict(
    outputs: dict[str, Tensor],
    size: tuple[int, int],  # (H, W)
    config: ProbeConfig,
) -> np.ndarray:
    """Groups int64 [B, S, H, W] of every clip, -1 is noise; each pixel shows its token's, as `resize_nearest` says."""
    embeddings = outputs["embeddings"].detach().float().cpu().numpy()
    return np.stack([resize_nearest(grouping(config).labels(scene), size) for scene in embeddings])


INSTANCE = ProbeTask(
    name="instance",
    labels=("instance_masks",),
    defaults=ProbeConfig(
        embed=1024, depth=2, dropout=0.1, lr=1e-3, weight_decay=0.01, warmup=2, epochs=40, batch=8, views=8,
        options=OPTIONS,
    ),
    score="loss",
    higher_is_better=True,
    facts=no_facts,
    head=instance_head,
    targets=instance_targets,
    loss=instance_loss,
    metrics=lambda config, facts: InstanceMetrics(grouping(config)),
    shown="T-mIoU",
)  # fmt: skip
