"""Trains a grid of probes in one pass over the data, for any task; one loop, with exact resume.

What a probe learns is its task's; how one step goes is `training.py`'s.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spatialprobe.engine.files.durable import make_folder
from spatialprobe.engine.reading.rows import FeatureSource
from spatialprobe.probes.checkpoint import load_probe, load_run, save_probe, save_run
from spatialprobe.probes.evaluation import evaluate_all
from spatialprobe.probes.labels import Labels
from spatialprobe.probes.loading.loader import FeatureLoader
from spatialprobe.probes.loading.shards import source_name
from spatialprobe.probes.probe import Probe
from spatialprobe.probes.results import Result, split_hash, write_results
from spatialprobe.probes.setup import (
    channels,
    checked_stores,
    class_names,
    device_of,
    feature_keys,
    grid_configs,
    probe_keys,
    sampling_of,
    split,
)
from spatialprobe.probes.task import ProbeTask
from spatialprobe.probes.tasks import TASKS
from spatialprobe.probes.training import Diverged, Trainee, of_all_processes, processes, train_step

SAVE_EVERY = 300.0  # seconds between checkpoints inside an epoch


@dataclass
class TrainProgress:
    """What `progress` is told after every batch of training."""

    epoch: int
    epochs: int
    batch: int  # of this epoch, from 1
    batches: int
    losses: list[float]  # of each probe, the mean over this epoch so far


def train(
    task: ProbeTask,
    sources: FeatureSource | Sequence[FeatureSource],
    labels: Labels,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,  # setting -> values; one probe for every combination
    val: float | Sequence[str] | None = None,  # share or ids of the clips to validate on; None: the dataset's, or .1
    out: str | Path | None = None,  # folder of results.json, the probes, and the checkpoint that a rerun goes on from
    device: torch.device | str | None = None,  # None: CUDA if there
    threads: int = 4,
    keep_bytes: int = 4 << 30,  # of training clips kept in memory after the first epoch, and as many of the others
    compiled: bool = False,  # torch.compile of backbone and head
    on_error: str = "raise",  # or "skip" clips that cannot be read
    save_every: float = SAVE_EVERY,
    progress: Callable[[TrainProgress], object] = lambda state: None,
    **settings: Any,  # fields of ProbeConfig, or the task's own options, instead of its defaults
) -> list[Result]:
    """Trains a probe for every combination of `grid` and returns their results in that order.

    All probes read the same batches, so batch, views, epochs and what else shapes the pass cannot be in the grid; each
    ends with the weights that it would have alone, up to float noise of the joint product. `layer` and `step` choose
    among what a store holds. Several stores are joined on channels (`fuse`). Under torchrun or accelerate launch every
    process takes `batch` clips of each step and validates its share of the probes; the first one writes.

    With `out`, a run that was killed goes on from its last checkpoint and ends with the same numbers. Raises ValueError
    for settings and data that do not fit, also if a probe's score was NaN in every epoch (no class of AP_head is in the
    validation clips), and Diverged if the loss of every probe stopped being finite; a probe of several whose loss does
    is stopped, and its result says so.
    """
    sources = checked_stores(sources, labels)
    configs = grid_configs(task, grid or {}, settings)
    shared, device = configs[0], device_of(device)
    rank, world = processes()
    train_ids, val_ids = split(sources, labels, val, shared.data_seed, on_error)
    keys = [feature_keys(sources, config) for config in configs]
    common = {
        "wanted": task.labels,
        "keys": sorted({key for each in keys for key in each}),
        "views": shared.views,
        "sampling": sampling_of(shared),
        "batch": shared.batch,
        "threads": threads,
        "device": device,
        "on_error": on_error,
    }
    loader = FeatureLoader(
        sources, labels, ids=train_ids, seed=shared.data_seed, rank=rank, world_size=world, keep_bytes=keep_bytes,
        last="keep" if world == 1 else "pad", **common,
    )  # fmt: skip
    val_loader = FeatureLoader(sources, labels, ids=val_ids, train=False, keep_bytes=keep_bytes, **common)
    facts = {}  # by what they may depend on
    for config in configs:
        key = json.dumps(config.options, sort_keys=True, default=str)
        if key not in facts:
            facts[key] = task.facts(labels, loader.ids, config)
    trainees = []
    for config, of_probe in zip(configs, keys, strict=True):
        chosen = facts[json.dumps(config.options, sort_keys=True, default=str)]
        probe = Probe(task, config, channels(sources, of_probe, loader.ids, on_error), chosen).to(device)
        if compiled:
            probe.backbone.compile()
            probe.head.compile()
        trainees.append(Trainee.fresh(probe, of_probe))
    about = {
        "task": task.name,
        "probes": [asdict(config) for config in configs],
        "sources": [source.spec_hash for source in sources],
        "labels": str(Path(labels.root).resolve()),
        "train_clips": len(loader.ids),
        "val_ids": val_ids,
        "classes": class_names(task, labels),
        "world_size": world,
    }
    folder = None if out is None else Path(out)
    run = Run(task, trainees, loader, val_loader, folder if rank == 0 else None, about, save_every, progress)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if folder is not None and (folder / "checkpoint.safetensors").exists():
            run.resume(load_run(folder / "checkpoint.safetensors", trainees, about))
        run.epochs(shared.epochs)
        results = run.results(sources, labels)
    if all(trainee.stopped.startswith("the loss") for trainee in trainees):
        raise Diverged(f"{trainees[0].stopped}; the last checkpoint is kept")
    return results


def evaluate(
    probe: str | Path,
    sources: FeatureSource | Sequence[FeatureSource],
    labels: Labels,
    *,
    ids: Sequence[str] | None = None,  # None: those that the probe was validated on
    device: torch.device | str | None = None,
    threads: int = 4,
    on_error: str = "raise",
) -> dict[str, float]:
    """A trained probe's loss and metrics on clips. `probe` is a file that `train` wrote.

    Raises ValueError for a damaged file, for stores of other features than it was trained on, and for labels of other
    classes.
    """
    sources, device = checked_stores(sources, labels), device_of(device)
    probe, header = load_probe(Path(probe), TASKS)
    there = [source.spec_hash for source in sources]
    if there != header["about"]["sources"]:
        raise ValueError(f"the probe was trained on features {header['about']['sources']}, got those of {there}")
    if (classes := class_names(probe.task, labels)) != header["about"]["classes"]:
        known = header["about"]["classes"]
        wanted, got = (f"{len(names)} classes ({', '.join(names[:3])}, ...)" for names in (known, classes))
        raise ValueError(f"the probe was trained on {wanted}, labels in {labels.root} have {got} or another order")
    config, keys = probe.config, probe_keys(header)
    loader = FeatureLoader(
        sources, labels, ids=header["about"]["val_ids"] if ids is None else ids, train=False, wanted=probe.task.labels,
        keys=sorted(set(keys)), views=config.views, sampling=sampling_of(config),
        batch=config.batch, threads=threads, device=device, on_error=on_error,
    )  # fmt: skip
    (found,) = evaluate_all([Trainee.fresh(probe.to(device), keys)], loader)
    return found


class Run:
    """The loop over epochs, and what it must remember to go on after a kill."""

    def __init__(self, task, trainees, loader, val_loader, folder, about, save_every, progress):
        self.task, self.trainees, self.loader, self.val_loader = task, trainees, loader, val_loader
        self.folder, self.about, self.save_every, self.progress = folder, about, save_every, progress
        self.epoch, self.seconds, self.started = 0, 0.0, time.monotonic()
        if folder is not None:
            make_folder(folder)

    def epochs(self, count: int) -> None:
        steps = len(self.loader)
        saved = time.monotonic()
        while self.epoch < count and any(not t.stopped for t in self.trainees):
            for batch in self.loader:
                number = self.loader.state_dict()["batch"]  # from 1; batches of which no clip could be read count too
                train_step(self.trainees, batch, self.epoch * steps + number - 1, steps)
                losses = [t.loss_sum / max(t.clips, 1) for t in self.trainees]
                self.progress(TrainProgress(self.epoch, count, number, steps, losses))
                if all(t.stopped for t in self.trainees):
                    return
                if time.monotonic() - saved > self.save_every and number < steps:
                    self.save()
                    saved = time.monotonic()
            self.validate()
            self.epoch += 1
            self.save()
            saved = time.monotonic()

    def validate(self) -> None:
        """Ends an epoch: scores of the probes in training, their best weights, and which have trained long enough."""
        active = [t for t in self.trainees if not t.stopped]
        by_loss = self._by_loss
        for trainee, found in zip(active, self._measured(active, metrics=not by_loss), strict=True):
            row = {"train_loss": trainee.loss_sum / max(trainee.clips, 1), "val_loss": found.pop("loss")} | found
            trainee.curve.append(row)
            trainee.loss_sum, trainee.clips = 0.0, 0
            score = -row["val_loss"] if by_loss else row[self.task.score] * (1 if self.task.higher_is_better else -1)
            better = not math.isnan(score) and (trainee.best_score is None or score > trainee.best_score)
            if self.task.score == "last" or better:
                trainee.best_score, trainee.best_epoch = score, self.epoch
                trainee.best = {n: x.detach().cpu().clone() for n, x in trainee.probe.state_dict().items()}
            patience, last_best = trainee.config.patience, -1 if trainee.best_epoch is None else trainee.best_epoch
            if patience is not None and self.epoch - last_best >= patience:
                trainee.stopped = f"no better score in {patience} epochs"

    @property
    def _by_loss(self) -> bool:
        """Whether epochs are judged without the task's metrics, which are then measured once, at the end."""
        return self.task.score in ("loss", "last")

    def _measured(self, trainees: Sequence[Trainee], **what: bool) -> list[dict[str, float]]:
        """What `evaluate_all` says of each probe; with several processes, each measures some of them."""
        rank, world = processes()
        mine = trainees[rank::world]
        shares = of_all_processes(evaluate_all(mine, self.val_loader, **what) if mine else [])
        return [shares[i % world][i // world] for i in range(len(trainees))]

    def _of_best_epochs(self, trainees: Sequence[Trainee]) -> list[dict[str, float]]:
        """The loss and the metrics of the best weights: what their epoch's validation found, and what it left out."""
        more = self._measured(trainees, loss=False) if self._by_loss else [{}] * len(trainees)
        found = []
        for trainee, metrics in zip(trainees, more, strict=True):
            row = dict(trainee.curve[trainee.best_epoch])
            del row["train_loss"]
            found.append({"loss": row.pop("val_loss")} | row | metrics)
        return found

    def save(self) -> None:
        if self.folder is None:
            return
        where = {"epoch": self.epoch, "loader": self.loader.state_dict(), "seconds": self.spent()}
        save_run(self.folder / "checkpoint.safetensors", self.trainees, self.about, where)

    def resume(self, where: dict[str, Any]) -> None:
        self.epoch, self.seconds = where["epoch"], where["seconds"]
        self.loader.load_state_dict(where["loader"])

    def spent(self) -> float:
        """Seconds of training so far, of killed runs too."""
        return self.seconds + time.monotonic() - self.started

    def results(self, sources: Sequence[FeatureSource], labels: Labels) -> list[Result]:
        """Every probe's metrics with its best weights; written where the run has a folder."""
        whole = [t for t in self.trainees if t.best]
        for i, trainee in enumerate(self.trainees):
            if trainee.curve and not trainee.best and not trainee.stopped.startswith("the loss"):
                clips = f"{len(self.val_loader.ids)} validation clips"
                why = f"{clips} may hold NaN" if self._by_loss else f"{clips} lack what it is measured on"
                raise ValueError(
                    f"{self.task.score} of probe {i} was NaN in all {len(trainee.curve)} epochs, so there is no best "
                    f"one: {why}"
                )
        for trainee in whole:
            trainee.probe.load_state_dict(trainee.best)
        found = iter(self._of_best_epochs(whole))
        everywhere = of_all_processes(self.loader.skipped | self.val_loader.skipped)
        skipped = {clip_id: why for of_one in everywhere for clip_id, why in of_one.items()}
        results = [
            Result(
                self.task.name,
                asdict(t.config),
                next(found) if t.best else {},
                t.best_epoch,
                t.curve,
                t.stopped,
                [{"store": source_name(s), "spec": s.spec_hash, "weights": s.spec.weights} for s in sources],
                [list(key) for key in t.keys],
                str(labels.root),
                len(self.loader.ids),
                len(self.val_loader.ids),
                self.spent(),
                skipped,
                split_hash(self.about["val_ids"]),
            )
            for t in self.trainees
        ]
        if self.folder is not None:
            for i, trainee in enumerate(self.trainees):
                if trainee.best:
                    save_probe(self.folder / f"probe-{i:03d}.safetensors", trainee, self.about)
            write_results(self.folder / "results.json", results)
        return results
