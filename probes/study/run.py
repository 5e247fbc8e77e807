"""Runs a study part by part: the engine's own extraction, then `train` for each task. Both go on where they stopped.

What fails with one part is written down, and the others go on. What the numbers mean is not known here.
"""

import gc
import json
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from spatialprobe.engine.adapter import plan_clip
from spatialprobe.engine.files.durable import StoreFull, write_whole
from spatialprobe.engine.job import Job
from spatialprobe.engine.pipeline.outcomes import Report
from spatialprobe.engine.pipeline.progress import summary
from spatialprobe.engine.processes.workers import run_workers
from spatialprobe.engine.resolve import resolve
from spatialprobe.engine.run import run_job
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import Refused
from spatialprobe.probes.loop import TrainProgress, train
from spatialprobe.probes.results import Result, read_results, split_hash
from spatialprobe.probes.setup import sampling_of, split
from spatialprobe.probes.study.job import SUMMARY, Part, StudyJob
from spatialprobe.probes.task import ProbeConfig
from spatialprobe.probes.tasks import TASKS

FAILURES = (ValueError, OSError, MemoryError, RuntimeError, ImportError)  # of one part: the others go on
EXPECTED = (ValueError, OSError, MemoryError, Refused)  # of these the message is enough


@dataclass
class Findings:
    """What a study came to, so far."""

    results: dict[tuple[Part, str], list[Result]] = field(default_factory=dict)  # by part and task
    failed: dict[str, str] = field(default_factory=dict)  # part, or part/task -> why

    @property
    def diverged(self) -> dict[str, str]:
        """Probes whose loss stopped being finite, by part, task and their number there -> when."""
        return {
            f"{part.name}/{task} probe {number}": result.stopped
            for (part, task), results in self.results.items()
            for number, result in enumerate(results)
            if result.stopped.startswith("the loss")
        }


def run_study(
    study: StudyJob,
    *,
    tell: Callable[[str], object] = lambda line: None,
    progress: Callable[[], Callable[[TrainProgress], object]] = lambda: lambda state: None,  # makes one for each run
) -> Findings:
    """Extracts and trains what is not there yet, part after part. A part that fails is in `failed`; the rest go on.

    Writes study.json after every run. Raises KeyboardInterrupt, StoreFull, and what a lost GPU raises: nothing more
    could be done after them.
    """
    found = Findings()
    if not (study.out / SUMMARY).exists():
        write_summary(study, found)  # before all else it says of which data the folder is
    for part in study.parts:
        for task, why, results in run_part(study, part, tell, progress):
            if why:
                name = f"{part.name}/{task}" if task else part.name
                found.failed[name] = why
                tell(f"{name} failed: {why}")
            else:
                found.results[part, task] = results
            write_summary(study, found)
    return found


def run_part(
    study: StudyJob, part: Part, tell: Callable[[str], object], progress: Callable
) -> Iterator[tuple[str, str, list[Result]]]:  # (task, why it failed or "", results)
    """What becomes of each task; of none where there are no features."""
    store, why = attempt(lambda: extracted(study, part, tell))
    if why:
        yield "", why, []
        return
    for task in study.axes:
        tell(f"{part.name}: {task}")
        results, why = attempt(lambda task=task: trained(study, part, store, task, progress))
        yield task, why, results or []


def attempt(work: Callable[[], Any]) -> tuple[Any, str]:
    """What `work` returns, or why not. A failure that may be a bug is told with its traceback."""
    try:
        return work(), ""
    except StoreFull:
        raise
    except FAILURES as error:
        if type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error):
            raise
        if not isinstance(error, EXPECTED) and type(error).__name__ != "OutOfMemoryError":
            traceback.print_exc()
        return None, str(error) or type(error).__name__


# -- one part ---------------------------------------------------------------------------------------------------------


def extracted(study: StudyJob, part: Part, tell: Callable[[str], object]) -> FeatureStore:
    """The part's store, whole. Raises ValueError if it cannot be."""
    job = study.job(part)
    check_views(study, job)
    tf32 = torch.backends.cudnn.allow_tf32  # extraction turns it off, in a run that finds nothing to do it does not
    try:
        report, root = run_workers(job) if job.devices else run_here(job)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        gc.collect()  # the model, whose hooks hold it in a circle: the probes want the device's memory
    tell(summary(report, root).splitlines()[0])
    if report.interrupted:
        raise KeyboardInterrupt
    if report.stopped:
        raise MemoryError(f"extraction stopped: {report.stopped}")
    if report.failed and not study.skip_failed:
        some = "; ".join(f"{clip_id} {why}" for clip_id, why in list(report.failures.items())[:3])
        raise ValueError(f"{report.failed} clips failed, so its numbers would be of other clips: {some}")
    return FeatureStore.open(root)


def run_here(job: Job) -> tuple[Report, Path]:
    report, store = run_job(job)
    return report, store.root


def check_views(study: StudyJob, job: Job) -> None:
    """Raises ValueError where the features would not see the frames that probes are shown. Needs no weights."""
    resolved = resolve(job)
    frames = resolved.spec.frames.window
    if frames is None:
        return
    plan, kept = plan_clip(frames, resolved.adapter, resolved.spec)
    for task in study.axes:
        config = study.configs(task)[0]
        sampling = sampling_of(config)
        unseen = [f for f in sampling.candidates(frames) if plan.rows[f] not in kept]
        most = (min(config.context, frames) - 1) // config.gap + 1
        if unseen or config.views > most:
            lacking = f"lacks frames {unseen}" if unseen else f"holds {most} such views at most"
            raise ValueError(
                f"probes of {task} are shown {config.views} views, {config.gap} frames apart, of frames "
                f"{config.query!r} of {config.context}; the features' window of {frames} frames {lacking}"
            )


def trained(study: StudyJob, part: Part, store: FeatureStore, task: str, progress: Callable) -> list[Result]:
    """The results of a part's probes, from their file if that is of this very run."""
    folder = study.out / "runs" / part.name / task
    configs = study.configs(task, store)
    if (there := finished(folder / "results.json", configs, study, store)) is not None:
        return there
    shown = progress()
    try:
        return train(
            TASKS[task], store, study.labels, grid=study.grid(store), val=study.val, out=folder,
            progress=shown, **study.training, **study.axes[task],
        )  # fmt: skip
    finally:
        getattr(shown, "close", lambda: None)()


def finished(path: Path, configs: Sequence[ProbeConfig], study: StudyJob, store: FeatureStore) -> list[Result] | None:
    """The results in `path` if they are of these probes, features, labels and clips; None if `train` must say."""
    if not path.exists():
        return None
    results = read_results(path)
    train_ids, val_ids = split([store], study.labels, study.val, configs[0].data_seed, "raise")
    about = [store.spec_hash, str(study.labels.root), len(train_ids), split_hash(val_ids)]
    wanted = json.loads(json.dumps([[asdict(config), *about] for config in configs]))
    there = [[r.config, *(s["spec"] for s in r.sources), r.labels, r.train_clips, r.split] for r in results]
    return results if there == wanted else None


def write_summary(study: StudyJob, found: Findings) -> None:
    """Writes study.json: every probe with what distinguishes it and where its results are, and what failed."""
    probes = [
        {"encoder": part.encoder, "model": part.model, "pos_embed": part.pos_embed, "task": task}
        | {name: result.config[name] for name in ("position", "layer", "step", "seed")}
        | {"metrics": {name: x if x is not None and math.isfinite(x) else None for name, x in result.metrics.items()}}
        | {"stopped": result.stopped, "results": f"runs/{part.name}/{task}/results.json"}
        | {"probe": number, "store": f"stores/{part.name}"}
        for (part, task), results in found.results.items()
        for number, result in enumerate(results)
    ]
    asked = {"encoders": study.encoders, "pos_embed": study.pos_embed, "tasks": list(study.axes)}
    asked |= {"position": study.position, "seeds": study.seeds} | study.data
    text = json.dumps({"asked": asked, "probes": probes, "failed": found.failed}, indent=1, default=str)
    write_whole(study.out / SUMMARY, text)
