"""The plan of a job in words: clips, blocks, memory, disk. Reads configs and listings; loads and writes nothing."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from spatialprobe.engine.adapter import plan_clip
from spatialprobe.engine.clips.decode import load_clip
from spatialprobe.engine.job import Job
from spatialprobe.engine.resolve import Resolved, resolve
from spatialprobe.engine.run import agree, job_clips, memory_of
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import COMPUTE_DTYPES, STORE_DTYPES, FeatureSpec, Plan

TOKEN_STATISTICS = 8  # bytes per token: mean and rstd, float32


def plan_lines(job: Job) -> Iterator[str]:
    """What `engine extract --dry-run` prints."""
    resolved, refs, out, done = resolve(job), job_clips(job), Path(job.out), 0
    try:
        agree(resolved, out, lambda: FeatureStore.check_place(out, resolved.spec))
    except ValueError as error:
        yield f"store    extract would refuse it: {error}"
    else:
        if (out / "spec.json").exists():
            there = set(FeatureStore.open(out).ids())
            done = sum(ref.id in there for ref in refs)
    spec, adapter = resolved.spec, resolved.adapter
    todo = len(refs) - done
    yield f"clips    {len(refs)} in {job.clips}, {done} done, {todo} to do"
    yield f"model    {job.model}, family {spec.family}, {spec.weights}"
    held = 1 if spec.offload == "host" else resolved.depth
    weights = adapter.weight_bytes(held, COMPUTE_DTYPES[spec.compute_dtype])
    yield f"blocks   {resolved.depth} of {adapter.num_layers} loaded and run, for layers {_list(spec.layers)}"
    if not adapter.num_steps:
        yield f"         (hidden_states {_list(layer + 1 for layer in spec.layers)} in transformers' counting)"
    else:
        merged = ", merged" if spec.merge_steps else ""
        yield f"steps    {_list(spec.steps)} of {adapter.num_steps}{merged}, seed {spec.seed}"
    if not refs:
        return
    frames = spec.frames.window or load_clip(refs[0], spec.frames).window
    plan, rows = plan_clip(frames, adapter, spec)
    first = "" if spec.frames.window else " (first clip)"
    yield f"window   {frames} frames{first}, {len(plan.shown)} shown to the model at {plan.size[0]}x{plan.size[1]}"
    kept = spec.pool or plan.grid[1:]
    yield f"tokens   {'x'.join(map(str, plan.grid))}, kept {len(rows)}x{kept[0]}x{kept[1]}, {adapter.channels} channels"
    batch = adapter.AUTO_BATCH if resolved.batch == "auto" else resolved.batch
    offload = f", offload {spec.offload}" if spec.offload != "none" else ""
    where = f"at batch {batch}, {spec.compute_dtype} on {resolved.device}{offload}"
    planned = memory_of(resolved, batch, out / "cache")
    if planned is None:
        activations = activation_bytes(plan, adapter.channels, COMPUTE_DTYPES[spec.compute_dtype].itemsize, batch)
        yield f"memory   {_gb(weights)} weights + about {_gb(activations)} activations {where}"
        yield f"         (a guess: the peak {_why_unplanned(resolved)} is not counted)"
    else:
        yield f"memory   {planned} {where}"
    clip = clip_bytes(spec, len(rows), kept, adapter.channels)
    if resolved.device.type == "cuda":
        yield f"host     {_gb(waiting_bytes(clip, batch, job.writers))} pinned at most, for what is to be written"
    folder = next(path for path in (out, *out.parents) if path.exists())
    yield f"disk     {_gb(clip)} per clip, {_gb(clip * todo)} to write, {_gb(shutil.disk_usage(folder).free)} free"


def _why_unplanned(resolved: Resolved) -> str:
    return "of windows of any length" if resolved.spec.frames.window is None else "with offloaded blocks"


def clip_bytes(spec: FeatureSpec, rows: int, grid: tuple[int, int], channels: int) -> int:
    """Bytes of one clip's file, but for a header of some kilobytes."""
    dtype = STORE_DTYPES[spec.dtype]
    tokens = rows * math.prod(grid)
    per_token = channels * dtype.itemsize + TOKEN_STATISTICS + (4 if dtype.itemsize == 1 else 0)
    return tokens * per_token * len(spec.tensors())


def waiting_bytes(clip: int, batch: int, writers: int) -> int:
    """Of pinned features at most: those under way to writers, a batch beside them, and one that the device fills.

    A batch's memory is given back with the last of its clips.
    """
    return clip * (2 * writers + 2 * batch)


def activation_bytes(plan: Plan, channels: int, itemsize: int, batch: int) -> int:
    """A rough guess: some 16 tensors of the size of the hidden states at a block's widest point."""
    return 16 * batch * math.prod(plan.grid) * channels * itemsize


def _list(values) -> str:
    return ", ".join(map(str, values))


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
