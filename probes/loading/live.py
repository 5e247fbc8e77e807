"""Batches of clips while they are extracted: one pass, in the order of their arrival."""

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, get_args

import torch
from torch.utils.data import IterableDataset, get_worker_info

from spatialprobe.probes.labels.base import Labels
from spatialprobe.probes.loading.batches import Batch, BatchBuilder, FeatureKey, UnequalClips
from spatialprobe.probes.loading.clip_reader import ClipReader
from spatialprobe.probes.loading.loader import OnError
from spatialprobe.probes.loading.sampling import STUDY, FrameSampling

if TYPE_CHECKING:
    from spatialprobe.engine.live import LiveStore

log = logging.getLogger(__name__)


class LiveLoader(IterableDataset):
    """What `FeatureLoader` gives of a store, of clips that `live` is extracting; each view is what the store's is.

    With `on_error="skip"`, clips that extraction failed on are listed in `skipped` too.
    """

    def __init__(
        self,
        arriving: "LiveStore",
        labels: Labels | None = None,
        *,
        wanted: Sequence[str] = (),
        keys: Sequence[FeatureKey] | None = None,  # (0, layer, step)
        views: int = 8,
        sampling: FrameSampling = STUDY,
        batch: int = 8,
        train: bool = True,
        seed: int = 0,
        epoch: int = 0,  # of the sampled views
        device: torch.device | str = "cpu",
        on_error: OnError = "raise",
    ):
        if batch < 1 or on_error not in get_args(OnError):
            choices = ", ".join(get_args(OnError))
            raise ValueError(f"batch must be at least 1 and on_error one of {choices}, got {batch} and {on_error!r}")
        options = {"wanted": wanted, "views": views, "sampling": sampling, "train": train, "seed": seed}
        self._reader = ClipReader([arriving.spec], labels, keys=keys, device=torch.device(device), **options)
        self.arriving, self.batch, self.epoch, self.on_error = arriving, batch, epoch, on_error
        self.keys, self.skipped = self._reader.keys, {}

    def __iter__(self) -> Iterator[Batch]:
        """Raises ValueError for a clip that failed, unless they are skipped, and whatever ended the extraction."""
        if get_worker_info() is not None:
            raise ValueError("features arrive in the process that extracts: give the DataLoader num_workers=0")
        clips = iter(self.arriving)
        while group := list(islice(clips, self.batch)):
            builder = BatchBuilder([clip.clip_id for clip in group], self._reader.views, self._reader.device)
            for place, clip in enumerate(group):
                try:
                    self._reader.fill(builder, place, [clip], self.epoch)
                except UnequalClips:
                    raise
                except (ValueError, OSError) as error:
                    if self.on_error == "raise":
                        raise
                    self.skipped[clip.clip_id] = str(error)
            self._note_failures()
            if (made := builder.finish()) is not None:
                yield made
        self._note_failures()
        if self.skipped:
            log.warning("%d clips were skipped:\n%s", len(self.skipped), "\n".join(self.skipped.values()))

    def _note_failures(self) -> None:
        for clip_id, reason in list(self.arriving.failed.items()):
            self.skipped[clip_id] = f"clip {clip_id} could not be extracted: {reason}"
            if self.on_error == "raise":
                raise ValueError(self.skipped[clip_id])
