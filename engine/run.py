"""One job from words to a filled store, with its records: `run.json` (the report) and `log.jsonl` (a line per clip)."""

import json
from dataclasses import asdict
from datetime import UTC, datetime

from spatialprobe.engine.extract import Report, extract
from spatialprobe.engine.job import Job, resolve, select_shard
from spatialprobe.engine.progress import RunLog
from spatialprobe.engine.sources import list_clips
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import COMPUTE_DTYPES, ClipRef


def job_clips(job: Job) -> list[ClipRef]:
    """The clips a job is about: its listing, shard and limit."""
    return select_shard(list_clips(job.clips, job.layout, targets=job.targets), job.shard, job.limit)


def run_job(job: Job, *, retry_failed: bool = False) -> tuple[Report, FeatureStore]:
    """Extracts what the store lacks of a job's clips. The model is loaded only if there is something to do.

    Raises ValueError for a job that cannot be done, before anything is written.
    """
    started = datetime.now(UTC)
    resolved = resolve(job)
    refs = job_clips(job)
    store = FeatureStore.create(job.out, resolved.spec, resolved.about)
    if retry_failed:
        failed = store.failures()
        refs = [ref for ref in refs if ref.id in failed]
    done = set(store.ids())
    missing = sum(ref.id not in done for ref in refs)
    if missing:
        dtype = COMPUTE_DTYPES[resolved.spec.compute_dtype]
        resolved.adapter.load(resolved.depth, resolved.device, dtype, store.root / "cache")
        with RunLog(store.root / "log.jsonl", total=missing) as log:
            report = extract(
                refs,
                resolved.adapter,
                store,
                batch_size=resolved.batch,
                loaders=job.loaders,
                writers=job.writers,
                progress=log.clip,
            )
    else:
        report = Report(asked=len(refs), present=len(refs))
    shard = f"-{job.shard.replace('/', 'of')}" if job.shard else ""
    record = {"started": started.isoformat(timespec="seconds"), "spec": store.spec_hash, "job": asdict(job)}
    (store.root / f"run{shard}.json").write_text(json.dumps(record | asdict(report), indent=1))
    return report, store
