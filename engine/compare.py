"""How far the features of one store are from another's, per layer and step: for any change that may move values.

The first store is the reference. Rows are read one at a time, so memory does not grow with clips or their length.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spatialprobe.engine.files.schema import differing
from spatialprobe.engine.reading.rows import FeatureSource, Key, OpenClip, StoredRows
from spatialprobe.engine.types import tensor_name
from spatialprobe.kernels.pool_features import dequantize


@dataclass
class Agreement:
    """Of all tokens of one layer and step that were compared. Sums are float64."""

    clips: int = 0
    tokens: int = 0
    cosines: float = 0.0  # sum over tokens
    worst: float = math.inf  # least cosine of a token
    worst_clip: str = ""
    squares: float = 0.0  # of the reference
    error: float = 0.0  # squares of the differences
    largest: float = 0.0  # magnitude of a difference

    @property
    def cosine(self) -> float:
        return self.cosines / self.tokens

    @property
    def relative(self) -> float:
        """Relative L2: the differences' norm over the reference's. 0 for equal values, inf if the reference is 0."""
        if not self.error:
            return 0.0
        return math.sqrt(self.error / self.squares) if self.squares else math.inf

    def add(self, a: Tensor, b: Tensor, clip_id: str) -> None:  # [..., C], values
        """Of tokens of zeros the cosine is 1 where both are, else 0."""
        a, b = a.double(), b.double()
        norms, dots = a.norm(dim=-1) * b.norm(dim=-1), (a * b).sum(-1)
        both_zero = ~(a.any(-1) | b.any(-1))
        cosines = torch.where(norms > 0, dots / norms, both_zero.double()).clamp(-1, 1)
        difference = b - a
        least = float(cosines.min())
        if least < self.worst:
            self.worst, self.worst_clip = least, clip_id
        self.tokens += cosines.numel()
        self.cosines += float(cosines.sum())
        self.squares += float(a.square().sum())
        self.error += float(difference.square().sum())
        self.largest = max(self.largest, float(difference.abs().max()))


@dataclass
class Comparison:
    spec: dict[str, tuple[str, str]]  # fields in which the specs differ -> JSON of both, "nothing" where it is lacking
    only_in_a: list[str]  # clips
    only_in_b: list[str]
    agreements: dict[Key, Agreement]  # of layers and steps that both hold
    compared: int = 0  # clips, in whole or in part
    left_out: dict[str, list[str]] = field(default_factory=dict)  # why something could not be compared -> clips
    damaged: dict[str, str] = field(default_factory=dict)  # clip -> why it could not be read

    @property
    def unseen(self) -> int:
        """Clips that were not compared, or not in all layers that both stores hold."""
        left_out = {clip_id for ids in self.left_out.values() for clip_id in ids}
        return len({*self.only_in_a, *self.only_in_b, *left_out, *self.damaged})

    def within(self, limit: float) -> bool:
        """Whether something was compared, every clip of either store was, and every relative L2 is at most `limit`."""
        found = [x for x in self.agreements.values() if x.tokens]
        return bool(found) and not self.unseen and all(x.relative <= limit for x in found)

    def to_json(self) -> str:
        tensors = [
            {
                "layer": layer,
                "step": step,
                "clips": x.clips,
                "tokens": x.tokens,
                "cosine_mean": x.cosine,
                "cosine_worst": x.worst,
                "worst_clip": x.worst_clip,
                "relative_l2": x.relative if math.isfinite(x.relative) else None,
                "max_abs": x.largest,
            }
            for (layer, step), x in self.agreements.items()
            if x.tokens
        ]
        about: dict[str, Any] = {
            "clips_compared": self.compared,
            "only_in_a": self.only_in_a,
            "only_in_b": self.only_in_b,
            "spec": {name: {"a": a, "b": b} for name, (a, b) in self.spec.items()},
            "left_out": self.left_out,
            "damaged": self.damaged,
        }
        return json.dumps(about | {"tensors": tensors}, indent=1, allow_nan=False)


def compare_stores(
    a: FeatureSource,
    b: FeatureSource,
    *,
    progress: Callable[[int], object] = lambda clips: None,  # progress(1) after each clip that both hold
) -> Comparison:
    """Compares all clips, layers and steps that both hold; what cannot be compared is named.

    Quantised features are compared by their values. Raises ValueError if the stores share no layer and step.
    """
    keys = [key for key in a.spec.tensors() if key in b.spec.tensors()]
    if not keys:
        names = [", ".join(tensor_name(*key) for key in store.spec.tensors()) for store in (a, b)]
        raise ValueError(f"the stores have no layer and step in common: one holds {names[0]}, the other {names[1]}")
    ids = set(a.ids()), set(b.ids())
    only = sorted(ids[0] - ids[1]), sorted(ids[1] - ids[0])
    out = Comparison(differing(a.spec, b.spec), *only, {key: Agreement() for key in keys})
    for key in a.spec.tensors() + b.spec.tensors():
        if key not in keys:
            out.left_out[f"{tensor_name(*key)} is in {'one' if key in a.spec.tensors() else 'the other'} only"] = []
    for clip_id in sorted(ids[0] & ids[1]):
        try:
            with a.open_clip(clip_id) as clip_a, b.open_clip(clip_id) as clip_b:
                _compare_clip(clip_a, clip_b, keys, out)
        except ValueError as error:
            out.damaged[clip_id] = str(error)
        progress(1)
    return out


def _compare_clip(a: OpenClip, b: OpenClip, keys: list[Key], out: Comparison) -> None:
    def left_out(why: str) -> None:
        out.left_out.setdefault(why, []).append(a.clip_id)

    if a.rows != b.rows:
        left_out("rows see other frames")
        return
    alike = []
    for key in keys:
        if a.shape(key) == b.shape(key):
            alike.append(key)
        else:
            left_out(f"{tensor_name(*key)} is {list(a.shape(key))} in one, {list(b.shape(key))} in the other")
    if not alike:
        return
    for row in range(a.shape(alike[0])[0]):
        read_a, read_b = a.read(alike, [row]), b.read(alike, [row])
        for key in alike:
            out.agreements[key].add(values(read_a[key]), values(read_b[key]), a.clip_id)
    for key in alike:
        out.agreements[key].clips += 1
    out.compared += 1


def values(stored: StoredRows) -> Tensor:
    """Rows as numbers: dequantised where they have a scale."""
    return stored.data if stored.scale is None else dequantize(stored.data, stored.scale)


def compare_lines(comparison: Comparison) -> Iterator[str]:
    """What `engine compare` prints."""
    clips = f"{len(comparison.only_in_a)} only in the first, {len(comparison.only_in_b)} only in the second"
    yield f"{comparison.compared} clips compared, {clips}"
    for name, (a, b) in comparison.spec.items():
        yield f"spec {name}: {a} in the first, {b} in the second"
    for why, ids in comparison.left_out.items():
        yield f"not compared: {why}" + (f" ({len(ids)} clips, as {ids[0]})" if ids else "")
    for why in comparison.damaged.values():
        yield f"damaged: {why}"
    found = [(key, x) for key, x in comparison.agreements.items() if x.tokens]
    if found:
        yield f"{'':<20}{'cosine':>12}{'worst':>12}{'relative L2':>13}{'max abs':>12}  clip of the worst token"
    for key, x in found:
        numbers = f"{x.cosine:>12.8f}{x.worst:>12.8f}{x.relative:>13.3e}{x.largest:>12.3e}"
        yield f"{tensor_name(*key):<20}{numbers}  {x.worst_clip}"
