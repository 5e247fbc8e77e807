"""One job from words to a filled store, with its records: `run.json` (the report) and `log.jsonl` (a line per clip)."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from spatialprobe.engine.clips.sources import list_clips
from spatialprobe.engine.device.blocks import set_up_blocks
from spatialprobe.engine.device.memory_plan import MemoryPlan, plan_memory
from spatialprobe.engine.device.placement import check_fits, place
from spatialprobe.engine.device.tiling import fit, follow
from spatialprobe.engine.extract import extract
from spatialprobe.engine.files.durable import StoreFull
from spatialprobe.engine.job import Job, select_shard
from spatialprobe.engine.pipeline.latents import LatentFolder, latent_key
from spatialprobe.engine.pipeline.outcomes import Report, run_file
from spatialprobe.engine.pipeline.progress import RunLog
from spatialprobe.engine.processes.sharing import Sharing
from spatialprobe.engine.resolve import Resolved, resolve
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import COMPUTE_DTYPES, ClipRef

T = TypeVar("T")


def job_clips(job: Job) -> list[ClipRef]:
    """The clips a job is about: its listing, shard and limit."""
    return select_shard(list_clips(job.clips, job.layout, targets=job.targets), job.shard, job.limit)


@dataclass
class Run:
    """A job that passed every check: store open, model loaded if there is something to do."""

    job: Job
    resolved: Resolved
    refs: list[ClipRef]
    store: FeatureStore
    missing: int  # clips of `refs` that the store lacks
    blocks: dict  # what `set_up_blocks` found, if the model was loaded

    def extract(self) -> Report:
        """Extracts the missing clips, with a line per clip in `log.jsonl` and the report in `run.json`."""
        started = datetime.now(UTC)
        if self.missing:
            with RunLog(self.store.root / "log.jsonl", total=self.missing) as log:
                report = self.share(log)
        else:
            report = Report(asked=len(self.refs), present=len(self.refs))
        if report.timing and self.resolved.device.type == "cuda":
            plan = memory_of(self.resolved, report.batch_size, self.store.root / "cache")
            report.timing |= {"planned_memory_bytes": plan.running} if plan else {}
        write_report(self.store, self.job, started, {"blocks": self.blocks}, report)
        return report

    def latents(self) -> LatentFolder | None:
        """The folder of latents that the job names."""
        if self.job.latents is None:
            return None
        resolved = self.resolved
        if resolved.latent_key is None:  # it hashes the encoders' weights
            resolved.latent_key = latent_key(resolved.adapter, resolved.spec)
        return LatentFolder(self.job.latents, resolved.latent_key)

    def share(self, log: RunLog, **of_sharing: Any) -> Report:
        """Extracts what no other process on this store does. `of_sharing` goes to `Sharing`."""
        try:
            with Sharing(self.store, **of_sharing) as sharing:
                return extract(
                    self.refs,
                    self.resolved.adapter,
                    self.store,
                    batch_size=self.resolved.batch,
                    loaders=self.resolved.loaders,
                    writers=self.job.writers,
                    progress=log.clip,
                    sharing=sharing,
                    resize=self.job.resize,
                    latents=self.latents(),
                )
        except StoreFull as error:  # not even room to say who works on what
            return Report(len(self.refs), len(self.refs) - self.missing, stopped=str(error))


def write_report(store: FeatureStore, job: Job, started: datetime, parts: dict, report: Report) -> None:
    """Writes `run.json`, of a shard `run-0of4.json`. A full disk is noted in the report."""
    record = {"started": started.isoformat(timespec="seconds"), "spec": store.spec_hash}
    record |= {"job": asdict(job)} | parts | asdict(report)
    try:
        store.write_record(run_file(job.shard), json.dumps(record, indent=1))
    except StoreFull as error:
        report.stopped = report.stopped or str(error)


def survey(job: Job, *, retry_failed: bool = False) -> tuple[Resolved, list[ClipRef], list[ClipRef]]:
    """Checks a job against the model, the clips and the store: the job resolved, its clips, and those missing.

    Raises ValueError for a job that cannot be done. Loads and writes nothing.
    """
    if job.devices:
        raise ValueError(f"devices {job.devices} are for `run_workers`: one process works on one device")
    if job.ray:
        raise ValueError(f"ray {job.ray} is for `run_ray`: this is one process")
    resolved, refs, out = resolve(job), job_clips(job), Path(job.out)
    agree(resolved, out, lambda: FeatureStore.check_place(out, resolved.spec))
    is_store = (out / "spec.json").exists()
    if retry_failed and not is_store:
        raise ValueError(f"there is nothing to retry: {out} is not a feature store")
    done = set()
    if is_store:
        there = FeatureStore.open(out)
        done = set(there.ids())
        failed = there.failures()
        refs = [ref for ref in refs if ref.id in failed] if retry_failed else refs
    return resolved, refs, [ref for ref in refs if ref.id not in done]


def open_run(job: Job, *, retry_failed: bool = False) -> Run:
    """Checks a job, loads the model and opens the store.

    Raises ValueError for a job that cannot be done, before the store is made.
    """
    resolved, refs, todo = survey(job, retry_failed=retry_failed)
    out, missing, blocks = Path(job.out), len(todo), {}
    if missing:
        blocks = set_up(resolved, out)
    store = open_store(resolved, out)  # after loading: bad weights leave no store behind
    return Run(job, resolved, refs, store, missing, blocks)


def open_store(resolved: Resolved, out: Path) -> FeatureStore:
    """A job's store, to write to."""
    return agree(resolved, out, lambda: FeatureStore.create(out, resolved.spec, resolved.about))


def agree(resolved: Resolved, out: Path, use: Callable[[], T]) -> T:
    """`use()`. Where that is refused and tiling was left to us, once more with the tiling of the store that is there:
    of workers whose GPUs have not the same memory free, the first to make the store decides for all."""
    try:
        return use()
    except ValueError:
        if not resolved.may_tile or not (out / "spec.json").exists():
            raise
        resolved.spec = follow(resolved.adapter, resolved.spec, FeatureStore.open(out).spec)
        return use()


def set_up(resolved: Resolved, out: Path) -> dict:
    """This process ready for a job's clips, with its model loaded: returns what `set_up_blocks` found."""
    if resolved.device.type == "cuda":
        torch.cuda.set_device(resolved.device)  # streams and events are made on the current device
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    blocks = load(resolved, out / "cache")
    if resolved.may_tile and resolved.device.type == "cuda" and not (out / "spec.json").exists():
        resolved.spec = fit(resolved.adapter, resolved.spec)
    return blocks


def load(resolved: Resolved, cache: Path) -> dict:
    """Loads a job's model to where its offload says, and sets up its blocks: returns what `set_up_blocks` found.

    Raises ValueError for weights that cannot fit.
    """
    adapter, device, spec = resolved.adapter, resolved.device, resolved.spec
    offload = spec.offload
    dtype = COMPUTE_DTYPES[spec.compute_dtype]
    check_fits(adapter, resolved.depth, dtype, device, offload)
    if offload == "none":
        adapter.load(resolved.depth, device, dtype, cache)
    else:
        adapter.load(resolved.depth, torch.device("cpu"), dtype, cache)
        place(adapter, device, offload)
    return set_up_blocks(adapter.blocks, precision=spec.precision, attention=spec.attention, compile=spec.compile)


def memory_of(resolved: Resolved, batch: int, cache: Path) -> MemoryPlan | None:
    """What a job needs of the device's memory; None where that cannot be planned."""
    adapter, window, spec = resolved.adapter, resolved.spec.frames.window, resolved.spec
    if window is None or spec.offload != "none":
        return None
    return plan_memory(adapter, spec, resolved.depth, batch, window, cache)


def run_job(job: Job) -> tuple[Report, FeatureStore]:
    """Extracts what the store lacks of a job's clips."""
    run = open_run(job)
    return run.extract(), run.store
