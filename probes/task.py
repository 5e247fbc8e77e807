"""What a probe task is, and the settings of one probe. How training runs is not known here."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from os import PathLike, fspath
from typing import Any, Protocol, get_args

from torch import Tensor, nn

from spatialprobe.probes.backbone import Position
from spatialprobe.probes.fusion import Fuse

SHARED = ("batch", "views", "epochs", "data_seed", "gap", "context", "query")  # one pass over the data has one of each
KINDS = {  # type of a setting -> types that its value may have, in words
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    int | None: ((int, type(None)), "an integer or null"),
    str: ((str,), "text"),
}


@dataclass(frozen=True)
class ProbeConfig:
    """Settings of one probe; a task's `defaults` are the published study's."""

    embed: int  # E, width of the tokens
    depth: int  # pairs of blocks; 0 is the pure read-out
    dropout: float
    lr: float
    weight_decay: float
    warmup: float  # epochs of linear warm-up, then cosine to MIN_LR
    epochs: int
    batch: int  # clips
    views: int  # S frames sampled per clip
    heads: int = 16
    mlp_ratio: float = 4.0
    layer_scale: float = 0.01
    position: Position = "2d"
    seed: int = 42  # of the probe: its first weights, dropout, and the pixels its loss samples
    data_seed: int = 42  # of the data: order of clips, sampled frames
    gap: int = 5  # frames between two sampled views, and where they may be: see FrameSampling
    context: int = 76
    query: str = "0,1:76:4"
    patience: int | None = None  # epochs without a better score after which the probe stops; None trains to the end
    layer: int | None = None  # which of the store's features; None where it holds only one
    step: int | None = None
    fuse: Fuse = "norm"  # several stores: each token normalised first, or as they are
    options: Mapping[str, Any] = field(default_factory=dict)  # the task's own, by name

    def __post_init__(self):
        for f in fields(self):
            if f.type in KINDS:
                _must_be(f.name, getattr(self, f.name), *KINDS[f.type])
        for name in ("embed", "epochs", "batch", "views", "heads", "gap"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.depth < 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"depth must be 0 or more and dropout in [0, 1), got {self.depth} and {self.dropout}")
        if not 0 < self.lr < math.inf or not 0 <= self.weight_decay < math.inf or not 0 <= self.warmup < math.inf:
            got = f"{self.lr}, {self.weight_decay} and {self.warmup}"
            raise ValueError(f"lr must be positive, weight_decay and warmup not negative, got {got}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1 epoch, got {self.patience}")
        if self.fuse not in get_args(Fuse):
            raise ValueError(f"fuse must be one of {', '.join(get_args(Fuse))}, got {self.fuse!r}")

    def with_settings(self, **settings: Any) -> "ProbeConfig":
        """A copy with fields, or the task's own options by name, set.

        Raises ValueError for a name that is neither, and for a value of another kind than the field's or the default.
        """
        known = {f.name for f in fields(self)} - {"options"}
        # paths as text: a config is written to files as JSON
        own = {n: fspath(x) if isinstance(x, PathLike) else x for n, x in settings.items() if n not in known}
        if unknown := sorted(set(own) - set(self.options)):
            choices = ", ".join(sorted(known | set(self.options)))
            raise ValueError(f"no probe setting is called {', '.join(unknown)}; there are {choices}")
        for name, value in own.items():
            if type(self.options[name]) in KINDS:
                _must_be(name, value, *KINDS[type(self.options[name])])
        settings = {name: value for name, value in settings.items() if name in known}
        return replace(self, **settings, options={**self.options, **own})


def _must_be(name: str, value: Any, kinds: tuple[type, ...], wanted: str) -> None:
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


class Metrics(Protocol):
    """Collects what an evaluation pass shows."""

    def update(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> None: ...

    def result(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class ProbeTask:
    """One axis of the study: which labels, which head, which loss, which numbers.

    `Facts` are what a task must know of the whole training set (class names, positive rates); a task makes its own.
    """

    name: str
    labels: tuple[str, ...]  # what is asked of Labels.read
    defaults: ProbeConfig
    score: str  # metric that picks the best epoch; "loss": the validation loss; "last": the last epoch is taken
    higher_is_better: bool  # of a metric
    facts: Callable[..., Any]  # (labels, training ids, config) -> Facts
    # (width, config, facts); forward(Tokens, **targets that it is told) -> dict of outputs
    head: Callable[[int, ProbeConfig, Any], nn.Module]
    # (labels of a batch, on the device; config; facts); of the config it may read the options alone
    targets: Callable[[dict[str, Tensor], ProbeConfig, Any], dict[str, Tensor]]
    loss: Callable[..., dict[str, Tensor]]  # (outputs, targets, config, generator); "loss" is what is minimised
    metrics: Callable[[ProbeConfig, Any], Metrics]
    shown: str = ""  # metric for pictures, where the score is a loss
    facts_type: type | None = None  # dataclass of Facts, to read them back from a probe's file
    told: tuple[str, ...] = ()  # of the targets, what the head gets beside the tokens: what it is asked, no answers
