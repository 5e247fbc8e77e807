"""A batch of clips as probes get it, and how it is put together from clips that are read at the same time.

B clips, S views, H x W tokens, C channels. Where clips come from and in which order is not known here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from spatialprobe.engine.reading.rows import StoredRows
from spatialprobe.probes.fusion import Stored


class FeatureKey(NamedTuple):
    """Which features, of several sources, layers and steps."""

    source: int  # place in the list of sources
    layer: int
    step: int | None = None


@dataclass
class Batch:
    """B clips, as stored: quantised features stay quantised, for kernels that read them so."""

    ids: list[str]  # [B]
    frames: Tensor  # int64 [B, S], frames of the window
    features: dict[FeatureKey, Stored]
    labels: dict[str, Tensor]  # name -> [B, S, ...], as LABELS of probes.labels says

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Batch":
        """`fn` of every tensor."""
        features = {
            key: Stored(**{name: None if x is None else fn(x) for name, x in vars(stored).items()})
            for key, stored in self.features.items()
        }
        return Batch(self.ids, fn(self.frames), features, {name: fn(x) for name, x in self.labels.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """On `device`. Lightning and accelerate look for this method."""
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))


class UnequalClips(ValueError):
    """Clips of one batch have features or labels of different shapes: no clip is at fault, so none is skipped."""


class BatchBuilder:
    """A batch in the making: of everything one tensor for all B clips, which several threads fill, a clip each.

    Whichever clip comes first says how large the tensors are.
    """

    def __init__(self, ids: list[str], views: int, device: torch.device):
        self.ids, self.views, self.device = ids, views, device
        self.frames: list[list[int] | None] = [None] * len(ids)  # of a clip's views, once it is whole
        self._features: dict[FeatureKey, StoredRows] = {}  # [B * S, ...]
        self._labels: dict[str, Tensor] = {}  # [B, ...]
        self._first: dict[FeatureKey | str, str] = {}  # whose shape it is
        self._lock, self._events = Lock(), []

    @contextmanager
    def filling(self, place: int, frames: list[int], stream: "torch.cuda.Stream | None") -> Iterator[None]:
        """Around the filling of one place, on `stream` if there is one: afterwards the clip belongs to the batch."""
        with torch.cuda.stream(stream):
            yield
            if stream is not None:
                event = torch.cuda.Event()
                event.record(stream)
                self._events.append(event)
        self.frames[place] = frames

    def rows(
        self, place: int, key: FeatureKey, shape: Sequence[int], dtype: torch.dtype, scaled: bool
    ) -> StoredRows:  # shape: (S, H, W, C)
        """Where a clip's features belong, still without values. Raises UnequalClips."""

        def make() -> StoredRows:
            whole = (len(self.ids) * self.views, *shape[1:])
            if self.device.type == "cpu":
                return StoredRows.empty(whole, dtype, scaled=scaled)
            tokens = [torch.empty(whole[:3], device=self.device) for _ in range(2 + scaled)]
            return StoredRows(torch.empty(whole, dtype=dtype, device=self.device), *tokens)

        whole = self._once(self._features, key, place, make)
        self._must_fit(key, place, (self.views, *whole.data.shape[1:]), shape)
        return whole.part(place * self.views, (place + 1) * self.views)

    def label(self, place: int, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Where a label of a clip belongs, still without values. Raises UnequalClips."""
        make = lambda: torch.empty(len(self.ids), *shape, dtype=dtype, device=self.device)  # noqa: E731
        whole = self._once(self._labels, name, place, make)
        self._must_fit(name, place, whole.shape[1:], shape)
        return whole[place]

    def _once(self, there: dict, key: FeatureKey | str, place: int, make: Callable) -> StoredRows | Tensor:
        with self._lock:
            if key not in there:
                there[key], self._first[key] = make(), self.ids[place]
            return there[key]

    def _must_fit(self, key: FeatureKey | str, place: int, there: Sequence[int], got: Sequence[int]) -> None:
        if tuple(there) != tuple(got):
            what = key if isinstance(key, str) else f"features {tuple(key)}"
            raise UnequalClips(
                f"clips of one batch must have equal shapes, but {what} are {list(there)} of clip {self._first[key]} "
                f"and {list(got)} of clip {self.ids[place]}; use batches of 1, or features pooled to one grid"
            )

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self._features.values(), *self._labels.values()))

    def finish(self) -> Batch | None:
        """The batch of the clips that were filled; None if none was."""
        places = [place for place, frames in enumerate(self.frames) if frames is not None]
        if not places:
            return None
        features = {
            key: Stored(**{n: None if x is None else x.unflatten(0, (-1, self.views)) for n, x in vars(rows).items()})
            for key, rows in self._features.items()
        }
        frames = torch.tensor([frames or [0] * self.views for frames in self.frames], device=self.device)
        batch = Batch([self.ids[place] for place in places], frames, features, self._labels)
        if self._events:
            self._hand_over()
        if len(places) < len(self.ids):
            return batch.map(lambda x: torch.stack([x[place] for place in places]))
        return batch

    def _hand_over(self) -> None:
        """Makes the current stream wait for the copies, and their memory wait for the current stream to be reused."""
        stream = torch.cuda.current_stream(self.device)
        for event in self._events:
            stream.wait_event(event)
        for x in (*(x for rows in self._features.values() for x in vars(rows).values()), *self._labels.values()):
            if x is not None:
                x.record_stream(stream)
