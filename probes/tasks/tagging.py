"""Semantic tagging: which of the dataset's classes are there in the sampled views of a clip.

The classes are those the labels count pixels of, however many and whatever they are called (for ScanNet the list in
`class_names_20.json`, `class_names_200.json` or any other): nothing here knows a name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spatialprobe.probes.heads.tag_decoder import TagDecoder
from spatialprobe.probes.labels import Labels, presence_rates
from spatialprobe.probes.metrics.tagging import TaggingMetrics
from spatialprobe.probes.task import ProbeConfig, ProbeTask

OPTIONS = {
    "threshold": 200,  # pixels over all sampled views from which a class counts as there
    "gamma_negative": 4.0,  # asymmetric loss
    "gamma_positive": 0.0,
    "clip": 0.0,
    "decoder_width": 512,
    "decoder_layers": 2,
    "decoder_heads": 8,
    "decoder_dropout": 0.1,
    "text_embeddings": None,  # file: see read_text_embeddings. None: learned queries
    "train_pos_rate": None,  # file .npy [K], as the study's train_pos_rate_20.npy. None: computed from the labels
}
TEXT_KEY = "text_embeddings"


@dataclass(frozen=True)
class TagFacts:
    """What tagging must know of the training set."""

    names: tuple[str, ...]  # [K] classes
    rates: tuple[float, ...]  # [K], share of the training clips in which each class is there
    text: Tensor | None = field(default=None, compare=False)  # float32 [K, any], embeddings of the names


def tag_facts(labels: Labels, ids: Sequence[str], config: ProbeConfig) -> TagFacts:
    """The labels' classes and how common they are: `presence_rates` of the training clips, or the file given.

    Raises ValueError for labels without classes, options out of range, a file that does not fit, and if no class is
    there in any training clip. A class that is there in none is kept: it counts as rare.
    """
    options, names = config.options, tuple(labels.class_names)
    if options["threshold"] < 1:
        raise ValueError(f"threshold must be at least 1 pixel, got {options['threshold']}")
    if min(options["gamma_negative"], options["gamma_positive"]) < 0 or not 0 <= options["clip"] < 1:
        got = f"{options['gamma_negative']}, {options['gamma_positive']} and {options['clip']}"
        raise ValueError(f"gamma_negative and gamma_positive must be 0 or more and clip in [0, 1), got {got}")
    if not names:
        raise ValueError(f"tagging needs labels with classes, and {labels.root} has none")
    if options["train_pos_rate"] is None:
        rates, source = presence_rates(labels, ids).numpy(), f"{len(ids)} training clips of {labels.root}"
    else:
        rates, source = _read_numpy(Path(options["train_pos_rate"])), options["train_pos_rate"]
    if rates.shape != (len(names),) or not ((rates >= 0) & (rates <= 1)).all():
        raise ValueError(f"rates in {source} must be [{len(names)}] shares of 1, got {rates.dtype} {list(rates.shape)}")
    if not rates.any():
        raise ValueError(f"none of the {len(names)} classes is there in {source}: tagging has nothing to learn")
    path = options["text_embeddings"]
    text = None if path is None else read_text_embeddings(path, len(names))
    return TagFacts(names, tuple(rates.astype(float).tolist()), text)


def tag_head(width: int, config: ProbeConfig, facts: TagFacts) -> TagDecoder:
    options = config.options
    return TagDecoder(
        width,
        len(facts.names),
        width=options["decoder_width"],
        layers=options["decoder_layers"],
        heads=options["decoder_heads"],
        dropout=options["decoder_dropout"],
        embeddings=facts.text,
    )


def tag_targets(labels: dict[str, Tensor], config: ProbeConfig, facts: TagFacts) -> dict[str, Tensor]:
    """{"present": bool [B, K]} of tag_pixel_counts int [B, S, K]: `threshold` pixels or more over the S views."""
    counts = labels["tag_pixel_counts"]
    if counts.shape[-1] != len(facts.names):
        raise ValueError(f"labels must count {len(facts.names)} classes as in training, got {counts.shape[-1]}")
    return {"present": counts.sum(1) >= config.options["threshold"]}


def tag_loss(
    outputs: dict[str, Tensor], targets: dict[str, Tensor], config: ProbeConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """`asymmetric_loss` with the config's options. Nothing in it is random."""
    names = ("gamma_negative", "gamma_positive", "clip")
    return {
        "loss": asymmetric_loss(outputs["logits"], targets["present"], **{name: config.options[name] for name in names})
    }


def asymmetric_loss(
    logits: Tensor,  # [B, K]
    present: Tensor,  # bool [B, K]
    *,
    gamma_negative: float = 4.0,
    gamma_positive: float = 0.0,
    clip: float = 0.0,
) -> Tensor:  # float32 scalar
    """Asymmetric loss (Ridnik et al. 2021), summed over classes, mean over samples.

    With p the probability of a class and q = max(p - clip, 0): -(1 - p)^gamma_positive log p where it is there, and
    -q^gamma_negative log(1 - q) where not. The powers weight and have no gradient. Logits of any size keep a finite
    loss (the paper's code cuts logarithms at 1e-8, which leaves very wrong answers without a gradient).
    """
    logits = logits.float()
    p = logits.detach().sigmoid()
    absent = F.logsigmoid(-logits)
    if clip:
        absent = ((-logits).sigmoid() + clip).clamp(max=1).log()
    weight = torch.where(present, (1 - p) ** gamma_positive, (p - clip).clamp(min=0) ** gamma_negative)
    return -(weight * torch.where(present, F.logsigmoid(logits), absent)).sum(1).mean()


# -- files ------------------------------------------------------------------------------------------------------------


def read_text_embeddings(path: str | Path, classes: int) -> Tensor:  # float32 [classes, channels]
    """Row k belongs to class k of the labels: an .npy file, or tensor "text_embeddings" of a .safetensors file.

    Raises ValueError for another suffix or key, a shape of other than `classes` rows, and values that are not finite.
    """
    path = Path(path)
    if path.suffix == ".npy":
        embeddings = torch.from_numpy(_read_numpy(path))
    elif path.suffix == ".safetensors":
        embeddings = _read_tensor(path)
    else:
        raise ValueError(f"text embeddings must be a .npy or .safetensors file, got {path}")
    if embeddings.ndim != 2 or len(embeddings) != classes or not embeddings.shape[1]:
        raise ValueError(f"{path} must hold [{classes}, channels], a row per class, got {list(embeddings.shape)}")
    if not embeddings.is_floating_point() or not embeddings.isfinite().all():
        raise ValueError(f"{path} must hold finite floats, got {embeddings.dtype}, or values that are not finite")
    return embeddings.float()


def _read_tensor(path: Path) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            if TEXT_KEY not in file.keys():
                raise ValueError(f"{path} must hold {TEXT_KEY}, got {', '.join(sorted(file.keys())) or 'nothing'}")
            return file.get_tensor(TEXT_KEY)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_numpy(path: Path) -> np.ndarray:  # of floats
    try:
        array = np.load(path)
    except (ValueError, OSError, EOFError) as error:  # EOFError: of an empty file
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise ValueError(f"{path} must hold one array of floats, got {getattr(array, 'dtype', 'several arrays')}")
    return array


TAGGING = ProbeTask(
    name="tagging",
    labels=("tag_pixel_counts",),
    defaults=ProbeConfig(
        embed=512, depth=2, dropout=0.3, lr=3e-4, weight_decay=0.05, warmup=2, epochs=10, batch=8, views=8,
        options=OPTIONS,
    ),
    score="AP_head",
    higher_is_better=True,
    facts=tag_facts,
    head=tag_head,
    targets=tag_targets,
    loss=tag_loss,
    metrics=lambda config, facts: TaggingMetrics(facts.rates),
    facts_type=TagFacts,
)  # fmt: skip
