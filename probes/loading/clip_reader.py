"""What is wanted of every clip, and reading it into its place of a batch: features of several sources, and labels.

Which clips, in which order and by how many threads is not known here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from spatialprobe.engine.clips.decode import describe_cut, window_cut
from spatialprobe.engine.files.schema import quantised
from spatialprobe.engine.reading.memory import MemoryClip, copy_rows, each
from spatialprobe.engine.reading.rows import Key, OpenClip, StoredRows
from spatialprobe.engine.types import STORE_DTYPES, FeatureSpec
from spatialprobe.probes.labels.base import Labels
from spatialprobe.probes.loading.batches import BatchBuilder, FeatureKey
from spatialprobe.probes.loading.sampling import FrameSampling, generator


@dataclass
class KeptClip:
    """All that later epochs can want of a clip."""

    clip_id: str
    length: int  # frames of the window
    clips: list[MemoryClip]  # one of each source
    frames: list[int]  # ascending; every frame that a view may be
    labels: dict[str, Tensor]  # [len(frames), ...]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.clips, *self.labels.values()))


class ClipReader:
    """Reads features and labels of the frames that a clip's views are."""

    def __init__(
        self,
        specs: Sequence[FeatureSpec],  # of the sources
        labels: Labels | None,
        *,
        keys: Sequence[FeatureKey] | None,  # None: all
        wanted: Sequence[str],  # names of labels
        views: int,
        sampling: FrameSampling,
        train: bool,
        seed: int,
        device: torch.device,
    ):
        self.specs, self.labels, self.wanted = list(specs), labels, tuple(wanted)
        self.views, self.sampling, self.train, self.seed = views, sampling, train, seed
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        there = [FeatureKey(i, *key) for i, spec in enumerate(specs) for key in spec.tensors()]
        self.keys = there if keys is None else [FeatureKey(*key) for key in keys]
        if unknown := [tuple(key) for key in self.keys if key not in there]:
            raise ValueError(f"keys must be (source, layer, step) of {[tuple(key) for key in there]}, got {unknown}")
        if len(set(self.keys)) < len(self.keys):
            raise ValueError(f"keys must be distinct, got {[tuple(key) for key in self.keys]}")
        if isinstance(wanted, str):
            raise ValueError(f"wanted must be a list of names, got the string {wanted!r}")
        if idle := sorted(set(range(len(specs))) - {key.source for key in self.keys}):
            raise ValueError(f"keys must name features of every source, got none of sources {idle}")
        if (labels is None) == bool(self.wanted):
            got = f"{getattr(labels, 'root', None)} and {self.wanted}"
            raise ValueError(f"labels and the names of those wanted belong together, got {got}")
        if unknown := [name for name in self.wanted if name not in labels.names]:
            raise ValueError(f"labels wanted must be some of {', '.join(labels.names)}, got {', '.join(unknown)}")
        must_see_equal_frames(self.specs, labels)

    # -- frames -----------------------------------------------------------------------------------------------------

    def length(self, clip_id: str, clips: Sequence[OpenClip]) -> int:
        """Frames of the window that all sources and the labels know.

        Raises ValueError if a source has no features of a frame that a view may be.
        """
        lengths = [len(clip.rows) for clip in clips] + ([self.labels.frames(clip_id)] if self.wanted else [])
        for clip in clips:
            if unseen := [f for f in self._may_be(clip_id, min(lengths)) if clip.rows[f] < 0]:
                raise ValueError(
                    f"clip {clip_id}: {clip.name} has no row that sees frames {unseen}, of which views are sampled "
                    f"(query {self.sampling.query!r})"
                )
        return min(lengths)

    def choose(self, clip_id: str, length: int, epoch: int) -> list[int]:
        """The frames of a clip's views: in training others in every epoch, else always the same."""
        names = (self.seed, epoch, clip_id) if self.train else (clip_id,)
        with _naming(clip_id):
            return self.sampling.sample(self.views, length, generator("frames", *names))

    def _may_be(self, clip_id: str, length: int) -> list[int]:
        with _naming(clip_id):
            return list(self.sampling.candidates(length))

    # -- reading ----------------------------------------------------------------------------------------------------

    def fill(self, builder: BatchBuilder, place: int, clips: Sequence[OpenClip], epoch: int) -> None:
        """Reads a clip's views into their place. Raises what sources and labels raise, and UnequalClips."""
        clip_id = builder.ids[place]
        frames = self.choose(clip_id, self.length(clip_id, clips), epoch)
        with builder.filling(place, frames, self.stream):
            self._fill_features(builder, place, clips, frames)
            for name, x in self._labels(clip_id, frames).items():
                builder.label(place, name, x.shape, x.dtype).copy_(x, non_blocking=True)

    def keep(self, clip_id: str, clips: Sequence[OpenClip], device: torch.device) -> KeptClip:
        """Reads all that later epochs can want of a clip onto `device`."""
        length = self.length(clip_id, clips)
        frames = self._may_be(clip_id, length) if self.train else self.choose(clip_id, length, 0)
        kept = []
        with torch.cuda.stream(self.stream):  # where it will be copied from
            for source, clip in enumerate(clips):
                rows = sorted({clip.rows[f] for f in frames})
                place = {f: rows.index(clip.rows[f]) for f in frames}
                read = clip.read(self._keys(source), rows)
                features = {key: each(x, lambda x: x.to(device)) for key, x in read.items()}
                kept.append(MemoryClip(clip_id, clip.name, [place.get(f, -1) for f in range(length)], features))
            labels = {name: x.to(device) for name, x in self._labels(clip_id, frames).items()}
        return KeptClip(clip_id, length, kept, frames, labels)

    def fill_kept(self, builder: BatchBuilder, place: int, kept: KeptClip, epoch: int) -> None:
        """Like `fill`, from what was kept."""
        frames = self.choose(builder.ids[place], kept.length, epoch)
        with builder.filling(place, frames, self.stream):
            self._fill_features(builder, place, kept.clips, frames)
            at = [kept.frames.index(f) for f in frames]
            for name, x in kept.labels.items():
                copy_rows(x, at, builder.label(place, name, (len(at), *x.shape[1:]), x.dtype))

    def _fill_features(
        self, builder: BatchBuilder, place: int, clips: Sequence[OpenClip], frames: Sequence[int]
    ) -> None:
        for source, clip in enumerate(clips):
            spec, keys, rows = self.specs[source], self._keys(source), [clip.rows[f] for f in frames]
            dtype, scaled = STORE_DTYPES[spec.dtype], quantised(spec)
            shapes = {key: (len(rows), *clip.shape(key)[1:]) for key in keys}
            slots = {key: builder.rows(place, FeatureKey(source, *key), shapes[key], dtype, scaled) for key in keys}
            if self.stream is None or isinstance(clip, MemoryClip):
                clip.read(keys, rows, out=slots)
                continue
            pinned = {key: StoredRows.empty(shapes[key], dtype, scaled=scaled, pinned=True) for key in keys}
            staged = MemoryClip(clip.clip_id, clip.name, [], clip.read(keys, rows, out=pinned))
            staged.read(keys, range(len(rows)), out=slots)

    def _keys(self, source: int) -> list[Key]:
        return [key[1:] for key in self.keys if key.source == source]

    def _labels(self, clip_id: str, frames: list[int]) -> dict[str, Tensor]:
        return self.labels.read(clip_id, frames, self.wanted) if self.wanted else {}


def must_see_equal_frames(specs: Sequence[FeatureSpec], labels: Labels | None) -> None:
    """Raises ValueError unless frame f of the window is the same source frame for all sources and the labels."""
    cuts = [window_cut(spec.frames) for spec in specs]
    for i, cut in enumerate(cuts):
        if cut != cuts[0]:
            said = f"{describe_cut(cuts[0])} of source 0, {describe_cut(cut)} of {i}"
            raise ValueError(f"sources must see the same frames, got {said}")
    if labels is not None and cuts[0] != (known := window_cut(labels.selection)):
        said = f"{describe_cut(known)}, features at {describe_cut(cuts[0])}"
        raise ValueError(f"labels in {labels.root} are of frames at {said}")


@contextmanager
def _naming(clip_id: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"clip {clip_id}: {error}") from None
