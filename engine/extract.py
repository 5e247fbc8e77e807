"""Clips in, features on disk. The life of a clip is the body of `extract`, top to bottom.

Loader threads decode and prepare, the calling thread drives the device, writer threads store; the queues between
them are bounded, so a slow stage stalls the ones before it and memory stays flat however many clips there are. On the
CPU what takes a millisecond or two is done by the calling thread too.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from spatialprobe.engine.adapter import Adapter, plan_clip
from spatialprobe.engine.clips.decode import load_clip
from spatialprobe.engine.device import tiling
from spatialprobe.engine.device.compiled import CompileTimes, full_batch, new_pass
from spatialprobe.engine.device.launches import LaunchTimes
from spatialprobe.engine.device.tap import Taps
from spatialprobe.engine.files.durable import StoreFull
from spatialprobe.engine.pipeline.bottleneck import held_back_line
from spatialprobe.engine.pipeline.feeding import Fed, Feeder, stage
from spatialprobe.engine.pipeline.latents import FromLatents, LatentFolder
from spatialprobe.engine.pipeline.outcomes import Outcomes, Progress, Report, TakenOver
from spatialprobe.engine.pipeline.queues import BatchSize, Behind, Nearby, ahead
from spatialprobe.engine.pipeline.timing import Clock
from spatialprobe.engine.processes.sharing import Alone, Sharing
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import STORE_DTYPES, ClipError, ClipRef, FeatureSpec, Plan, first_line, tensor_name
from spatialprobe.kernels.pool_features import Finished, accumulate, pool_features

SHORT_LOAD, SHORT_WRITE = 1e-3, 2e-3  # seconds; see `Nearby`. A write waits for the disk in part


@dataclass
class Prepared:
    """A clip that is ready for the device."""

    ref: ClipRef
    plan: Plan
    rows: tuple[int, ...]  # of the model's T rows, those to keep
    fed: Fed  # what it gives to the device; emptied once the device has it
    provenance: dict
    about: dict = field(default_factory=dict)  # what decoding found out, for the latents' file


@dataclass
class Unreadable:
    """A clip that will never be ready."""

    ref: ClipRef
    stage: str
    error: ClipError


@torch.inference_mode()
def extract(
    refs: Sequence[ClipRef],
    adapter: Adapter,  # loaded to max(spec.layers) + 1 blocks
    store: FeatureStore,
    *,
    batch_size: int | str = 1,  # or "auto": the family's AUTO_BATCH, halved when the device's memory runs out
    loaders: int = 2,
    writers: int = 4,  # most of their time they wait for the disk, and together for one commit
    progress: Progress = lambda clip_id, outcome, reason: None,
    sharing: Sharing | Alone = Alone(),  # noqa: B008, it has no state
    resize: str = "auto",  # see `feeding`
    latents: LatentFolder | None = None,
) -> Report:
    """Extracts every clip of `refs` that `store` lacks, and that no other process of `sharing` does.

    A clip that cannot be extracted is recorded in the store's `failed.jsonl`, and the run goes on. A full disk or too
    little memory ends it, with what was done in the report. Features are the same bits whatever the order only with a
    batch of 1: in a batch, a library's kernels may round otherwise (tests/test_extract_models.py has the bounds).
    """
    spec, device = store.spec, torch.device(adapter.device)
    clock, host, size = Clock(device), HostCopies(device), BatchSize(batch_size, adapter.AUTO_BATCH)
    feeder = Feeder(adapter, clock, resize=resize, latents=latents)
    done = set(store.ids())
    todo = [ref for ref in refs if ref.id not in done]
    report = Report(asked=len(refs), present=len(refs) - len(todo))
    outcomes = Outcomes(report, store, progress, sharing.release, sharing.again)
    launches, taps = LaunchTimes(adapter.blocks, spec, device), Taps(adapter.blocks, spec.layers)
    loading, writing = ThreadPoolExecutor(loaders, "load"), ThreadPoolExecutor(writers, "write")
    if device.type == "cpu":
        loading, writing = Nearby(loading, SHORT_LOAD), Nearby(writing, SHORT_WRITE)
    on_device = lambda clips: run_batch(  # noqa: E731
        full_batch(clips, size.now, spec.compile), adapter, spec, taps, host, clock, feeder
    )
    compiling = CompileTimes(spec.compile)
    writes = Behind(writing, 2 * writers, outcomes.settle_write)
    try:
        for turn in sharing.turns(todo, outcomes):
            arriving = ahead(loading, lambda ref: prepare(ref, adapter, spec, clock, feeder), turn, loaders + size.now)
            arriving = clock.waiting("wait for loaders", arriving)
            readable = only_prepared(arriving, outcomes)
            for batch in size.groups(readable, key=lambda clip: clip.plan):
                for clips, features in size.fitting(batch, on_device):
                    for b, clip in enumerate(clips):
                        clip.fed.let_go()  # of a window of pixels: not to be kept until the write is through
                        with clock.host("wait for writers"):  # or do what they would
                            writes.put(clip.ref, write, b, clip, features, store, clock, sharing, latents)
                    with clock.host("wait for writers"):
                        writes.wait()
            writes.wait(0)
    except KeyboardInterrupt:
        report.interrupted, report.stopped = True, writes.settle_rest()
    except (StoreFull, MemoryError) as error:
        why = first_line(error) + (tiling.advice(adapter) if isinstance(error, MemoryError) else "")
        report.stopped = "; ".join(filter(None, (why, writes.settle_rest())))
    finally:
        loading.shutdown(cancel_futures=True)
        writing.shutdown()
        launches.remove()
        taps.remove()
        compiling.stop()
    report.batch_size, report.timing = size.now, compiling.told_apart(clock) | launches.summary()
    cannot = [] if device.type == "cuda" and adapter.PREPARES_ON_DEVICE else ["prepare"]
    cannot += [] if isinstance(adapter, FromLatents) and latents is None else ["encode"]
    here = [side for side, pool in (("loaders", loading), ("writers", writing)) if getattr(pool, "here", False)]
    about = {"loaders": loaders, "writers": writers, "cannot": cannot, "here": here}
    report.timing["held_back"] = held_back_line(report.timing, **about)
    if latents is not None:
        report.timing["latents"] = {"read": latents.hits, "made": latents.made}
    settled = report.present + report.written + report.elsewhere + report.failed + report.skipped
    assert settled == report.asked or report.interrupted or report.stopped, f"{report.asked - settled} clips were lost"
    return report


# -- loader threads -------------------------------------------------------------------------------------------------


def prepare(ref: ClipRef, adapter: Adapter, spec: FeatureSpec, clock: Clock, feeder: Feeder) -> Prepared | Unreadable:
    """Decodes a clip and makes the model's input of it. A clip that cannot be read comes back with its error."""
    fed, about = feeder.from_disk(ref)
    if about is not None:
        try:
            return _prepared(ref, *plan_clip(about["window"], adapter, spec), fed, about, adapter, spec)
        except ValueError as error:
            return Unreadable(ref, "prepare", ClipError(f"{type(error).__name__}: {first_line(error)}"))
    try:
        window = spec.frames.window
        planned = None if window is None else plan_clip(window, adapter, spec)
        shown = None if planned is None else planned[0].shown
        with clock.host("decode"):
            clip = load_clip(ref, spec.frames, shown)
        clock.add("decode", nbytes=clip.frames.nbytes)
    except ClipError as error:
        return Unreadable(ref, "decode", error)
    try:
        plan, kept = planned or plan_clip(clip.window, adapter, spec)
        if window is None:
            clip = replace(clip, frames=clip.frames[list(plan.shown)], index=clip.index[list(plan.shown)])
        feeder.take(fed, clip, plan)
    except (ValueError, OSError) as error:  # a window the model cannot do, or pixels its processor refuses
        return Unreadable(ref, "prepare", ClipError(f"{type(error).__name__}: {first_line(error)}"))
    about = {
        "index": clip.index.tolist(),  # source frames the model was shown
        "padded": clip.padded,
        "source_size": list(clip.frames.shape[2:]),
        "window": clip.window,
    }
    return _prepared(ref, plan, kept, fed, about, adapter, spec)


def _prepared(
    ref: ClipRef, plan: Plan, kept: tuple[int, ...], fed: Fed, about: dict, adapter: Adapter, spec: FeatureSpec
) -> Prepared:
    provenance = {
        "clip": ref.id,
        "index": about["index"],
        "padded": about["padded"],
        "source_size": about["source_size"],
        "grid": list(plan.grid),
        "rows_kept": list(kept),
        "seed": spec.seed,
        "steps": [{"step": step, **adapter.describe_clip_step(step, plan)} for step in spec.steps],
    }
    return Prepared(ref, plan, kept, fed, provenance, about)


def only_prepared(arriving: Iterable[Prepared | Unreadable], outcomes: Outcomes) -> Iterator[Prepared]:
    """The clips that are ready; the others are settled on the way."""
    for clip in arriving:
        if isinstance(clip, Prepared):
            yield clip
        else:
            outcomes.unreadable(clip.ref, clip.stage, clip.error)


# -- the device -----------------------------------------------------------------------------------------------------


@dataclass
class BatchFeatures:
    """A batch's finished features in host memory, whole once `copied` has happened."""

    ran: dict[str, int | str]  # for provenance: "batch", and on CUDA the "gpu", whose kernels round in their own way
    tensors: dict[str, Finished]
    copied: "torch.cuda.Event | None" = None


def run_batch(
    clips: list[Prepared],
    adapter: Adapter,
    spec: FeatureSpec,
    taps: Taps,
    host: "HostCopies",
    clock: Clock,
    feeder: Feeder,
) -> BatchFeatures:
    """Encodes once, then runs the blocks once per noise step, keeping only pooled rows of the wanted layers."""
    plan, device = clips[0].plan, torch.device(adapter.device)
    rows = clips[0].rows
    dtype = STORE_DTYPES[spec.dtype]
    merged: dict[int, Tensor] = {}  # layer -> mean over steps so far
    weight = 1.0 / len(spec.steps) if spec.merge_steps else 1.0
    out = BatchFeatures({"batch": len(clips)} | host.gpu, {})

    state = feeder.state([clip.fed for clip in clips], plan, host.copy)
    for step in spec.steps or (None,):

        def receive(layer: int, tokens: Tensor, step: int | None = step) -> None:
            with clock.on_device("finish", out_of="blocks"):
                x, onto = adapter.grid(tokens.to(device), state, plan), merged.pop(layer, None)
                if spec.merge_steps and step != spec.steps[-1]:
                    merged[layer] = accumulate(x, rows, spec.pool, onto, weight=weight)
                else:
                    name = tensor_name(layer, None if spec.merge_steps else step)
                    done = pool_features(x, rows, spec.pool, dtype=dtype, onto=onto, weight=weight)
                    out.tensors[name] = done.map(host.copy)

        with clock.host("noise"):
            noise = batch_noise([clip.ref.id for clip in clips], adapter.noise_shape(plan), spec.seed, step, device)
        with clock.on_device("blocks"), taps.into(receive, plan.passes):
            new_pass(spec.compile)
            adapter.forward(state, step, noise)
    out.copied = host.event()
    return out


def batch_noise(
    clip_ids: list[str], shape: tuple[int, ...] | None, seed: int, step: int | None, device: torch.device
) -> Tensor | None:
    """Standard normal noise [B, *shape], drawn on the CPU per (seed, clip id, step): the same on every machine."""
    if shape is None:
        return None
    noise = []
    for clip_id in clip_ids:
        key = hashlib.sha256(f"{seed}|{step}|{clip_id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        noise.append(torch.randn(shape, generator=generator))
    return stage(noise, device).to(device, non_blocking=True)


class HostCopies:
    """Copies finished features off the device as they come: on CUDA on a stream of its own, into pinned memory."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}

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
        event = torch.cuda.Event(blocking=True)  # writers that wait for it sleep, and leave the cores to loaders
        event.record(self.stream)
        return event


# -- writer threads -------------------------------------------------------------------------------------------------


def write(
    b: int,
    prepared: Prepared,
    features: BatchFeatures,
    store: FeatureStore,
    clock: Clock,
    sharing: Sharing | Alone,
    latents: LatentFolder | None,
) -> None:
    """Checks and stores clip `b` of a batch. Raises ClipError for features that must not be stored."""
    if features.copied is not None:
        features.copied.synchronize()
    spec, tensors = store.spec, {}
    for name, finished in features.tensors.items():
        peak = float(finished.peak[b].amax())
        if not peak < float("inf"):
            raise ClipError(f"features of {name} are not finite")
        if not torch.isfinite(finished.mean[b]).all():
            raise ClipError(f"features of {name} overflow {spec.dtype}: largest magnitude {peak:.6g}; try bfloat16")
        tensors |= finished.map(lambda x: x[b]).named(name)
    position = {row: i for i, row in enumerate(prepared.rows)}
    rows = torch.tensor([position.get(row, -1) for row in prepared.plan.rows])
    if not sharing.holds(prepared.ref.id):
        raise TakenOver(prepared.ref.id)
    if latents is not None and prepared.fed.made:
        with clock.host("write latents"):
            latents.write(prepared.ref, prepared.fed.source, prepared.fed.made, prepared.about)
    with clock.host("write"):
        nbytes = store.write(prepared.ref.id, tensors, rows, prepared.provenance | features.ran)
    clock.add("write", nbytes=nbytes)
