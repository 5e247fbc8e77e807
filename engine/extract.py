"""Clips in, features on disk. The life of a clip is the body of `extract`, top to bottom.

Loader threads decode and prepare, the calling thread drives the device, writer threads store; the queues between
them are bounded, so a slow stage stalls the ones before it and memory stays flat however many clips there are.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from spatialprobe.engine.adapter import Adapter, Inputs
from spatialprobe.engine.decode import load_clip
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.tap import Taps
from spatialprobe.engine.timing import Clock
from spatialprobe.engine.types import (
    STORE_DTYPES,
    ClipError,
    ClipRef,
    FeatureSpec,
    Plan,
    ShortClip,
    parse_query,
    tensor_name,
)
from spatialprobe.kernels.pool_features import Finished, finish, pool_features

AUTO_BATCH = 4  # where batch_size="auto" starts before it halves


@dataclass
class Prepared:
    """A clip that is ready for the device, or the reason why it will never be."""

    ref: ClipRef
    plan: Plan | None = None
    inputs: Inputs | None = None
    provenance: dict = field(default_factory=dict)
    error: ClipError | None = None


@dataclass
class Report:
    """What became of a run's clips."""

    asked: int  # clips of the listing, after shard and limit
    present: int  # of these, in the store before the run
    written: int = 0
    failed: int = 0
    skipped: int = 0  # shorter than their window, with short="skip"
    batch_size: int = 0  # after halving, if memory ran out
    interrupted: bool = False
    failures: dict[str, str] = field(default_factory=dict)  # clip id -> stage and reason, of this run
    timing: dict = field(default_factory=dict)  # Clock.summary()


Progress = Callable[[str, str, str], None]  # (clip id, "written" | "failed" | "skipped", reason)


@torch.inference_mode()
def extract(
    refs: Sequence[ClipRef],
    adapter: Adapter,  # loaded to max(spec.layers) + 1 blocks
    store: FeatureStore,
    *,
    batch_size: int | str = 1,  # or "auto": starts at 4 and halves when the device's memory runs out
    loaders: int = 2,
    writers: int = 2,
    progress: Progress = lambda clip_id, outcome, reason: None,
) -> Report:
    """Extracts every clip of `refs` that `store` lacks.

    A clip that cannot be extracted is recorded in the store's `failed.jsonl`, and the run goes on. Batches are padded
    to `batch_size` with repeats: kernels keep one shape, and a clip's features do not depend on how many neighbours
    it happens to have. Only with a batch of 1 they are the same bits whatever the order (see tests/test_extract.py).
    """
    spec = store.spec
    device = torch.device(adapter.device)
    clock = Clock(device)
    done = set(store.ids())
    todo = [ref for ref in refs if ref.id not in done]
    report = Report(asked=len(refs), present=len(refs) - len(todo))
    batcher = Batcher(AUTO_BATCH if batch_size == "auto" else batch_size, may_halve=batch_size == "auto")

    def settle(prepared: Prepared, outcome: str, stage: str = "", reason: str = "") -> None:
        setattr(report, outcome, getattr(report, outcome) + 1)
        if outcome == "failed":
            store.record_failure(prepared.ref.id, stage, reason)
            report.failures[prepared.ref.id] = f"{stage}: {reason}"
        progress(prepared.ref.id, outcome, reason)

    taps = Taps(adapter.blocks, spec.layers)
    host = HostCopies(device)
    load_pool, write_pool = ThreadPoolExecutor(loaders, "load"), ThreadPoolExecutor(writers, "write")
    writes: deque[tuple[Prepared, Future]] = deque()

    def collect(limit: int) -> None:
        """Waits until at most `limit` writes are under way. A bad clip is settled; a full disk ends the run."""
        while len(writes) > limit or (writes and writes[0][1].done()):
            prepared, future = writes.popleft()
            try:
                future.result()
            except ClipError as error:
                settle(prepared, "failed", "features", str(error))
            else:
                settle(prepared, "written")

    try:
        arriving = ahead(load_pool, lambda ref: prepare(ref, adapter, spec, clock), todo, depth=loaders + batcher.size)
        for batch in batcher.batches(arriving, clock):
            for prepared in batch.rejected:
                skip = isinstance(prepared.error, ShortClip) and spec.frames.short == "skip"
                settle(prepared, "skipped" if skip else "failed", "decode", str(prepared.error))
            for clips in batcher.within_memory(batch.clips):
                features = None
                try:
                    features = run_batch(clips, batcher.size, adapter, spec, taps, host, clock)
                except torch.OutOfMemoryError as error:
                    reason = str(error).splitlines()[0]
                if features is None:  # halve out here: the error's traceback holds on to the batch's memory
                    batcher.halve(clips, reason)
                    continue
                for b, prepared in enumerate(clips):
                    prepared.inputs = None  # a window of pixels: not to be kept until the write is through
                    writes.append((prepared, write_pool.submit(write, b, prepared, features, adapter, store, clock)))
                with clock.host("wait for writers"):
                    collect(limit=2 * writers)
        collect(limit=0)
    except KeyboardInterrupt:
        report.interrupted = True
        collect(limit=0)
    finally:
        load_pool.shutdown(wait=True, cancel_futures=True)
        write_pool.shutdown(wait=True)
        taps.remove()
    report.batch_size = batcher.size
    report.timing = clock.summary()
    return report


# -- loader threads -------------------------------------------------------------------------------------------------


def prepare(ref: ClipRef, adapter: Adapter, spec: FeatureSpec, clock: Clock) -> Prepared:
    """Decodes a clip and makes the model's input of it. A clip that cannot be read comes back with its error."""
    try:
        with clock.host("decode"):
            clip = load_clip(ref, spec.frames)
        clock.add("decode", 0.0, clip.frames.nbytes)
        plan, kept = plan_clip(len(clip.frames), adapter, spec)
    except ClipError as error:
        return Prepared(ref, error=error)
    with clock.host("prepare"):
        inputs = adapter.prepare(clip, plan)
    provenance = {
        "clip": clip.id,
        "index": clip.index.tolist(),
        "padded": clip.padded,
        "source_size": list(clip.frames.shape[2:]),
        "grid": list(plan.grid),
        "rows_kept": list(kept),
    }
    return Prepared(ref, plan, inputs, provenance)


def plan_clip(frames: int, adapter: Adapter, spec: FeatureSpec) -> tuple[Plan, tuple[int, ...]]:
    """The plan for a window of `frames` frames and the feature rows to keep, or ClipError if it cannot be met."""
    try:
        query = parse_query(spec.frames.query, frames)
        plan = adapter.plan(frames, query)
        if spec.pool is not None and (spec.pool[0] > plan.grid[1] or spec.pool[1] > plan.grid[2]):
            raise ValueError(f"pool {spec.pool} is larger than the model's token grid {plan.grid[1:]}")
        return plan, plan.wanted_rows(query)
    except ValueError as error:
        raise ClipError(str(error)) from None


def ahead(pool: ThreadPoolExecutor, fn: Callable, items: Iterable, depth: int) -> Iterator:
    """map(fn, items) on `pool`, in order, with at most `depth` results made or in the making."""
    items = iter(items)
    waiting = deque(pool.submit(fn, item) for item in islice(items, depth))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(pool.submit(fn, item) for item in islice(items, 1))


# -- batches --------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    clips: list[Prepared]  # of equal plans
    rejected: list[Prepared]  # clips that turned out unreadable meanwhile


@dataclass
class Batcher:
    """Groups clips of equal plans. Halves the size when memory runs out, if it may."""

    size: int
    may_halve: bool = False

    def batches(self, arriving: Iterator[Prepared], clock: Clock) -> Iterator[Batch]:
        """Full batches as they fill up, then the rest. At most 4 plans wait for company at a time."""
        waiting: dict[Plan, list[Prepared]] = {}
        while True:
            with clock.host("wait for loaders"):
                prepared = next(arriving, None)
            if prepared is None:
                break
            if prepared.error is not None:
                yield Batch([], [prepared])
                continue
            group = waiting.setdefault(prepared.plan, [])
            group.append(prepared)
            if len(group) >= self.size:
                yield Batch(waiting.pop(prepared.plan), [])
            elif len(waiting) > 4:
                yield Batch(waiting.pop(next(iter(waiting))), [])
        for group in waiting.values():
            yield Batch(group, [])

    def within_memory(self, clips: list[Prepared]) -> Iterator[list[Prepared]]:
        """The clips in pieces of the current size; a piece that ran out of memory comes again in halves."""
        self._left = deque(clips)
        while self._left:
            yield [self._left.popleft() for _ in range(min(self.size, len(self._left)))]

    def halve(self, clips: list[Prepared], reason: str) -> None:
        if self.size == 1 or not self.may_halve:
            hint = "one clip alone does not fit" if self.size == 1 else "use a smaller batch size, or auto"
            raise MemoryError(f"out of device memory at batch size {self.size}: {hint} ({reason})")
        self._left.extendleft(reversed(clips))
        self.size //= 2
        torch.cuda.empty_cache()


# -- the device -----------------------------------------------------------------------------------------------------


@dataclass
class BatchFeatures:
    """A batch's finished features in host memory, whole once `copied` has happened."""

    tensors: dict[str, Finished]
    peaks: dict[str, Tensor]  # float32 [B]: per tensor and clip, the largest magnitude before rounding
    copied: "torch.cuda.Event | None" = None


def run_batch(
    clips: list[Prepared],
    size: int,
    adapter: Adapter,
    spec: FeatureSpec,
    taps: Taps,
    host: "HostCopies",
    clock: Clock,
) -> BatchFeatures:
    """Encodes once, then runs the blocks once per noise step, keeping only pooled rows of the wanted layers."""
    plan, device = clips[0].plan, torch.device(adapter.device)
    padded = clips + [clips[-1]] * (size - len(clips))
    rows = tuple(clips[0].provenance["rows_kept"])
    merged: dict[int, Tensor] = {}  # layer -> mean over steps so far
    out = BatchFeatures({}, {})

    def keep(name: str, pooled: Tensor) -> None:
        out.peaks[name] = host.copy(pooled.abs().flatten(1).amax(1))
        finished = finish(pooled, STORE_DTYPES[spec.dtype])
        out.tensors[name] = Finished(*(host.copy(x) for x in vars(finished).values()))

    with clock.on_device("upload"):
        inputs = {name: upload([clip.inputs[name] for clip in padded], device) for name in clips[0].inputs}
    with clock.on_device("encode"):
        state = adapter.encode(inputs, plan)
    for step in spec.steps or (None,):

        def receive(layer: int, tokens: Tensor, step: int | None = step) -> None:
            with clock.on_device("finish", out_of="blocks"):
                x = adapter.grid(tokens, state, plan)
                if spec.merge_steps and spec.steps:
                    weight = 1.0 / len(spec.steps)
                    merged[layer] = pool_features(x, rows, spec.pool, into=merged.get(layer), weight=weight)
                else:
                    keep(tensor_name(layer, step), pool_features(x, rows, spec.pool))

        with clock.on_device("upload"):
            noise = batch_noise(padded, adapter.noise_shape(plan), spec.seed, step, device)
        with clock.on_device("blocks"), taps.into(receive):
            adapter.forward(state, step, noise)
    with clock.on_device("finish"):
        for layer, pooled in merged.items():
            keep(tensor_name(layer), pooled)
    out.copied = host.event()
    return out


def upload(tensors: list[Tensor], device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.stack(tensors)
    shape = (len(tensors), *tensors[0].shape)
    staged = torch.empty(shape, dtype=tensors[0].dtype, pin_memory=True)  # a caching allocator: buffers are reused
    return torch.stack(tensors, out=staged).to(device, non_blocking=True)


def batch_noise(
    clips: list[Prepared], shape: tuple[int, ...] | None, seed: int, step: int | None, device: torch.device
) -> Tensor | None:
    """Standard normal noise [B, *shape], drawn on the CPU per (seed, clip id, step): the same on every machine."""
    if shape is None:
        return None
    noise = []
    for clip in clips:
        key = hashlib.sha256(f"{seed}|{step}|{clip.ref.id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        noise.append(torch.randn(shape, generator=generator))
    return upload(noise, device)


class HostCopies:
    """Copies finished features off the device as they come: on CUDA on a stream of its own, into pinned memory."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, x: Tensor | None) -> Tensor | None:
        if x is None or self.stream is None:
            return x
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self.stream):
            host.copy_(x, non_blocking=True)
        x.record_stream(self.stream)
        return host

    def event(self) -> "torch.cuda.Event | None":
        """Happens once all copies so far are whole."""
        if self.stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self.stream)
        return event


# -- writer threads -------------------------------------------------------------------------------------------------


def write(
    b: int, prepared: Prepared, features: BatchFeatures, adapter: Adapter, store: FeatureStore, clock: Clock
) -> None:
    """Checks and stores clip `b` of a batch. Raises ClipError for features that must not be stored."""
    if features.copied is not None:
        features.copied.synchronize()
    spec, tensors = store.spec, {}
    for name, finished in features.tensors.items():
        peak = float(features.peaks[name][b])
        if not peak < float("inf"):
            raise ClipError(f"features of {name} are not finite")
        if not torch.isfinite(finished.mean[b]).all():
            raise ClipError(f"features of {name} overflow {spec.dtype}: largest magnitude {peak:.6g}; try bfloat16")
        tensors[name] = finished.data[b]
        tensors[f"{name}.mean"], tensors[f"{name}.rstd"] = finished.mean[b], finished.rstd[b]
        if finished.scale is not None:
            tensors[f"{name}.scale"] = finished.scale[b]
    kept = prepared.provenance["rows_kept"]
    position = {row: i for i, row in enumerate(kept)}
    rows = torch.tensor([position.get(row, -1) for row in prepared.plan.rows])
    steps = [{"step": step, **adapter.describe_step(step)} for step in spec.steps]
    start = time.perf_counter()
    nbytes = store.write(prepared.ref.id, tensors, rows, prepared.provenance | {"seed": spec.seed, "steps": steps})
    clock.add("write", time.perf_counter() - start, nbytes)
