"""Batches of clips for training and evaluation, read from stores ahead of their use.

Order and sampled frames depend on (seed, epoch) alone: not on threads, worker processes, or what was read before.
"""

import hashlib
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.utils.data import IterableDataset, get_worker_info

from spatialprobe.engine.reading.rows import FeatureSource
from spatialprobe.probes.labels.base import Labels
from spatialprobe.probes.loading.batches import Batch, BatchBuilder, FeatureKey, UnequalClips
from spatialprobe.probes.loading.clip_reader import ClipReader, KeptClip
from spatialprobe.probes.loading.sampling import STUDY, FrameSampling, shuffled
from spatialprobe.probes.loading.shards import Shards, source_name

log = logging.getLogger(__name__)

Last = Literal["keep", "pad", "drop"]
OnError = Literal["raise", "skip"]
Sources = FeatureSource | Sequence[FeatureSource | Sequence[FeatureSource]]


class FeatureLoader(IterableDataset):
    """Batches of sampled views with their labels, a pass over the clips each time it is iterated.

    `sources` are read side by side, clip by clip (for fusion and comparison); one that is itself a list of stores is
    their union. Each file is opened once per clip, and of it only the rows of the views are read.

    Every pass is an epoch; in training (`train`) each has its own order and views, otherwise the order is that of the
    ids and a clip's views are always the same, whatever the seed. `last` says what becomes of clips that do not fill a
    batch on every rank: "keep" gives smaller last batches, and ranks may differ by a clip; "pad" repeats the epoch's
    first clips and "drop" leaves out its last ones, so that all batches are full and all ranks have as many.

    At most `read_ahead_bytes` of batches (at least one) are read ahead of the one in use. With `keep_bytes`, clips are
    kept in memory on `keep_on` as they come by, until the budget is used up: in training the rows and labels of every
    frame that a view may be, which the first epoch therefore reads (the study's 20 frames instead of 8), otherwise just
    the views. A kept clip is not read again. With `device` on CUDA, batches are copied there on a stream of their own.

    A clip that cannot be read (missing in a source or the labels, damaged, no features of a frame) raises, or with
    `on_error="skip"` is left out and listed in `skipped` and in the log; its batch is smaller then.

    In a DataLoader, give `batch_size=None`. Its workers share out the batches of this rank, and these come in the same
    order for any number of workers; but each worker is a copy of the loader, so call `set_epoch` before every epoch,
    do not let workers persist, and note that `skipped`, kept clips and `state_dict` stay with the copies.
    """

    def __init__(
        self,
        sources: Sources,
        labels: Labels | None = None,
        *,
        wanted: Sequence[str] = (),  # names of labels
        ids: Sequence[str] | None = None,  # the clips; None: all that a source or the labels have
        keys: Sequence[FeatureKey] | None = None,  # (source, layer, step) of what is read; None: all
        views: int = 8,  # S
        sampling: FrameSampling = STUDY,
        batch: int = 8,  # clips
        last: Last = "keep",
        train: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 4,
        read_ahead_bytes: int = 256 << 20,
        keep_bytes: int = 0,
        keep_on: torch.device | str = "cpu",
        device: torch.device | str = "cpu",
        check: bool = False,  # compare each file with its checksum before its rows are used: reads all of it
        on_error: OnError = "raise",
    ):
        if isinstance(sources, str | Path):
            raise ValueError(f"sources must be stores, got the path {sources}: open_source opens it")
        sources = sources if isinstance(sources, Sequence) else [sources]
        self.sources = [Shards(source) if isinstance(source, Sequence) else source for source in sources]
        self.labels, self.batch, self.last, self.train, self.seed = labels, batch, last, train, seed
        self.rank, self.world_size, self.threads = rank, world_size, threads
        self.read_ahead_bytes, self.keep_bytes, self.keep_on = read_ahead_bytes, keep_bytes, torch.device(keep_on)
        self.device, self.check, self.on_error = torch.device(device), check, on_error
        self._check_numbers()
        specs = [source.spec for source in self.sources]
        options = {"wanted": wanted, "views": views, "sampling": sampling, "train": train, "seed": seed}
        self._reader = ClipReader(specs, labels, keys=keys, device=self.device, **options)
        self.keys = self._reader.keys
        self.skipped: dict[str, str] = {}  # clip id -> why
        self.ids = self._complete(ids)
        if not len(self):
            raise ValueError(f"no batch is left of {len(self.ids)} clips: batch {batch} x {world_size} ranks, {last}")
        self.epoch, self._resume_at, self._next, self._told = 0, 0, 0, 0
        self._kept: dict[str, KeptClip] = {}
        self._kept_bytes, self._keeping = 0, keep_bytes > 0

    def _check_numbers(self) -> None:
        least = {"batch": 1, "threads": 1, "world_size": 1, "rank": 0, "read_ahead_bytes": 0, "keep_bytes": 0}
        for name, n in least.items():
            if getattr(self, name) < n:
                raise ValueError(f"{name} must be at least {n}, got {getattr(self, name)}")
        if self.rank >= self.world_size:
            raise ValueError(f"rank must be below world_size {self.world_size}, got {self.rank}")
        for name, choices in (("last", Last), ("on_error", OnError)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}")
        if not self.sources:
            raise ValueError("sources must be at least one store, got none")
        if self.keep_on.type not in ("cpu", self.device.type):
            raise ValueError(f"keep_on must be cpu or the device {self.device}, got {self.keep_on}")

    def _complete(self, ids: Sequence[str] | None) -> list[str]:
        """The clips that every source and the labels have; the others are an error, or skipped."""
        there = [(source_name(source), set(source.ids())) for source in self.sources]
        if self._reader.wanted:
            there.append((f"labels of {self.labels.root}", set(self.labels.ids())))
        asked = sorted(set().union(*(clips for _, clips in there))) if ids is None else list(ids)
        if len(set(asked)) < len(asked):
            raise ValueError(f"ids must be distinct, got {max(asked, key=asked.count)} more than once")
        for clip_id in asked:
            if lacking := [name for name, clips in there if clip_id not in clips]:
                self.skipped[clip_id] = f"clip {clip_id} is not in {' and '.join(lacking)}"
        if self.skipped and (self.on_error == "raise" or len(self.skipped) == len(asked)):
            some = "; ".join(list(self.skipped.values())[:3])
            raise ValueError(f"{len(self.skipped)} of {len(asked)} clips are not everywhere: {some}")
        return [clip_id for clip_id in asked if clip_id not in self.skipped]

    # -- which clips, when ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Batches of this rank in an epoch, counting those of skipped clips."""
        return len(self._deal(self.ids))

    def _plan(self, epoch: int) -> list[list[str]]:
        """The ids of this rank's batches."""
        return self._deal(shuffled(self.ids, self.seed, epoch) if self.train else self.ids)

    def _deal(self, order: list[str]) -> list[list[str]]:
        """Clips in turn to the ranks, whose batches of equal number are therefore neighbours in `order`."""
        if self.last != "keep":
            whole, rest = divmod(len(order), self.batch * self.world_size)
            whole += self.last == "pad" and rest > 0
            order = list(islice(cycle(order), whole * self.batch * self.world_size))
        mine = order[self.rank :: self.world_size]
        return [mine[i : i + self.batch] for i in range(0, len(mine), self.batch)]

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next pass, which otherwise counts up by itself. The present one's state stays as it is."""
        if epoch != self.epoch:
            self.epoch, self._resume_at, self._next = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the pass is: plain values. "batch" is the number of the next one, after those handed out."""
        return {"epoch": self.epoch, "batch": self._next, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next pass goes on at the exact next batch. Raises ValueError if this loader's batches are others."""
        order = self._order()
        changed = [f"{k} was {state['order'].get(k)}, is {v}" for k, v in order.items() if state["order"].get(k) != v]
        if changed:
            raise ValueError(f"the state is of another loader: {'; '.join(changed)}")
        if state["epoch"] < 0 or not 0 <= state["batch"] <= len(self):
            raise ValueError(f"the state's batch must be 0 .. {len(self)} of an epoch from 0 on, got {state}")
        self.epoch, self._resume_at, self._next = state["epoch"], state["batch"], state["batch"]

    def _order(self) -> dict[str, Any]:
        """What the batches of an epoch depend on."""
        reader, ids = self._reader, hashlib.sha256("\n".join(self.ids).encode()).hexdigest()[:16]
        names = ("batch", "last", "train", "seed", "world_size")
        order = {name: getattr(self, name) for name in names}
        return order | {"ids": ids, "views": reader.views, "sampling": repr(reader.sampling)}

    # -- reading ----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        if worker is not None and self._reader.stream is not None:
            raise ValueError("a DataLoader's workers cannot use CUDA: give device='cpu', or iterate the loader itself")
        epoch, begin, given = self.epoch, self._resume_at, 0
        self._resume_at, self._next = 0, begin
        plan = list(enumerate(self._plan(epoch)))[begin:]
        if worker is not None:
            plan = plan[worker.id :: worker.num_workers]
        with closing(self._read_ahead(plan, epoch)) as batches:
            for number, builder in batches:
                batch = builder.finish()
                self._next = number + 1
                if batch is not None:
                    given += 1
                    yield batch
        self.epoch, self._next = epoch + 1, 0
        if not given and begin == 0 and worker is None:
            raise ValueError(f"every clip was skipped, such as: {next(reversed(self.skipped.values()))}")
        if len(self.skipped) > self._told:
            self._told = len(self.skipped)
            log.warning("%d clips were skipped:\n%s", self._told, "\n".join(self.skipped.values()))

    def _read_ahead(self, plan: Sequence[tuple[int, list[str]]], epoch: int) -> Iterator[tuple[int, BatchBuilder]]:
        """Filled batches with their numbers, in order, while the next ones are being read."""
        todo, under_way, largest = iter(plan), deque(), 0
        pool = ThreadPoolExecutor(self.threads, "read")
        try:
            under_way.extend(self._start(pool, batch, epoch) for batch in islice(todo, 1))
            while under_way:
                number, builder, reads = under_way.popleft()
                for read in reads:
                    self._keep(read.result())
                largest = max(largest, builder.nbytes)
                ahead = max(1, self.read_ahead_bytes // max(1, largest))
                more = max(0, ahead - len(under_way))
                under_way.extend(self._start(pool, batch, epoch) for batch in islice(todo, more))
                yield number, builder
        finally:
            pool.shutdown(cancel_futures=True)

    def _start(
        self, pool: ThreadPoolExecutor, batch: tuple[int, list[str]], epoch: int
    ) -> tuple[int, BatchBuilder, list[Future]]:
        number, ids = batch
        builder = BatchBuilder(ids, self._reader.views, self._reader.device)
        return number, builder, [pool.submit(self._read, builder, place, epoch) for place in range(len(ids))]

    def _read(self, builder: BatchBuilder, place: int, epoch: int) -> KeptClip | None:
        """Fills one place of a batch, or notes why not in `skipped`. Returns what was read to be kept."""
        clip_id = builder.ids[place]
        try:
            if clip_id in self._kept:
                self._reader.fill_kept(builder, place, self._kept[clip_id], epoch)
                return None
            with ExitStack() as stack:
                clips = [stack.enter_context(s.open_clip(clip_id, check=self.check)) for s in self.sources]
                if not self._keeping:
                    self._reader.fill(builder, place, clips, epoch)
                    return None
                kept = self._reader.keep(clip_id, clips, self.keep_on)
            self._reader.fill_kept(builder, place, kept, epoch)
            return kept
        except UnequalClips:
            raise
        except (ValueError, OSError) as error:
            if self.on_error == "raise":
                raise
            self.skipped[clip_id] = str(error)
            return None

    def _keep(self, kept: KeptClip | None) -> None:
        """Keeps a clip if there is room; the first for which there is none ends the keeping."""
        if kept is not None and kept.clip_id not in self._kept:
            self._keeping = self._keeping and self._kept_bytes + kept.nbytes <= self.keep_bytes
            if self._keeping:
                self._kept[kept.clip_id] = kept
                self._kept_bytes += kept.nbytes
