"""Trains a grid of probes in one pass over the data, for any task; one loop, with exact resume.

What a probe learns is its task's; how one step goes is `training.py`'s.
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spatialprobe.engine.durable import make_folder
from spatialprobe.engine.reading.rows import FeatureSource
from spatialprobe.probes.batches import FeatureKey
from spatialprobe.probes.checkpoint import load_probe, load_run, save_probe, save_run
from spatialprobe.probes.data import FeatureLoader
from spatialprobe.probes.evaluation import evaluate_all
from spatialprobe.probes.labels import Labels
from spatialprobe.probes.probe import Probe
from spatialprobe.probes.results import Result, write_results
from spatialprobe.probes.sampling import FrameSampling, shuffled
from spatialprobe.probes.shards import source_name
from spatialprobe.probes.task import SHARED, ProbeConfig, ProbeTask
from spatialprobe.probes.tasks.geometry import GEOMETRY
from spatialprobe.probes.tasks.instance import INSTANCE
from spatialprobe.probes.tasks.tagging import TAGGING
from spatialprobe.probes.training import Diverged, Trainee, of_all_processes, processes, train_step

TASKS = {task.name: task for task in (TAGGING, INSTANCE, GEOMETRY)}
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
    sources = _stores(sources, labels)
    configs = grid_configs(task, grid or {}, settings)
    shared, device = configs[0], _device(device)
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
        "train_clips": len(loader.ids),
        "val_ids": val_ids,
        "classes": _classes(task, labels),
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
    sources, device = _stores(sources, labels), _device(device)
    probe, header = load_probe(Path(probe), TASKS)
    there = [source.spec_hash for source in sources]
    if there != header["about"]["sources"]:
        raise ValueError(f"the probe was trained on features {header['about']['sources']}, got those of {there}")
    if (classes := _classes(probe.task, labels)) != header["about"]["classes"]:
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
            )
            for t in self.trainees
        ]
        if self.folder is not None:
            for i, trainee in enumerate(self.trainees):
                if trainee.best:
                    save_probe(self.folder / f"probe-{i:03d}.safetensors", trainee, self.about)
            write_results(self.folder / "results.json", results)
        return results


# -- what a run is made of --------------------------------------------------------------------------------------------


def _stores(sources: FeatureSource | Sequence[FeatureSource], labels: Labels) -> list[FeatureSource]:
    """Raises ValueError for none, and for a path in the place of what it holds."""
    stores = list(sources) if isinstance(sources, Sequence) and not isinstance(sources, str) else [sources]
    if not stores:
        raise ValueError("sources must be at least one store, got none")
    if path := next((x for x in stores if isinstance(x, str | Path)), None):
        raise ValueError(f"sources must be stores, got the path {path}: open_source opens it")
    if isinstance(labels, str | Path):
        raise ValueError(f"labels must be a reader of labels, got the path {labels}: open_labels opens it")
    return stores


def grid_configs(task: ProbeTask, grid: Mapping[str, Sequence[Any]], settings: Mapping[str, Any]) -> list[ProbeConfig]:
    """The config of every combination, the last axis fastest. Raises ValueError for an axis that is no setting."""
    base = task.defaults.with_settings(**settings)
    for name, values in grid.items():
        if name in SHARED:
            raise ValueError(
                f"{name} cannot be in a grid: its probes share one pass over the data ({', '.join(SHARED)})"
            )
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"grid[{name!r}] must be a list of values, got {values!r}")
    if both := sorted(set(grid) & set(settings)):
        raise ValueError(f"{', '.join(both)} cannot be both in the grid and set")
    points = (dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values()))
    configs = [base.with_settings(**point) for point in points]
    if task.score == "last" and any(config.patience is not None for config in configs):
        raise ValueError(f"{task.name} takes its last epoch, whatever it scores: patience must be null")
    return configs


def feature_keys(sources: Sequence[FeatureSource], config: ProbeConfig) -> tuple[FeatureKey, ...]:
    """What a probe reads: of every store the layer and step of its config, or all there is if that is one.

    Raises ValueError if a store has several and the config does not choose, or lacks the one chosen.
    """
    keys = []
    for i, source in enumerate(sources):
        there = source.spec.tensors()
        fitting = [
            (layer, step)
            for layer, step in there
            if len(there) == 1 or (config.layer in (None, layer) and (step is None or config.step in (None, step)))
        ]
        only = there[0] if len(there) == 1 else None
        asked = {"layer": config.layer, "step": config.step}
        if only and len(sources) == 1 and (config.layer not in (None, only[0]) or config.step not in (None, only[1])):
            fitting = []
        if len(fitting) != 1:
            raise ValueError(f"{source_name(source)} holds {there}; which to read must be one of them, got {asked}")
        keys.append(FeatureKey(i, *fitting[0]))
    return tuple(keys)


def probe_keys(header: Mapping[str, Any]) -> tuple[FeatureKey, ...]:
    """What a trained probe reads, of its file's header."""
    return tuple(FeatureKey(*key) for key in header["keys"])


def sampling_of(config: ProbeConfig) -> FrameSampling:
    return FrameSampling(config.context, config.gap, config.query)


def channels(sources: Sequence[FeatureSource], keys: Sequence[FeatureKey], ids: Sequence[str], on_error: str) -> int:
    """C of the joined features, as the first clip has them, or with on_error "skip" the first that can be read."""
    for clip_id in ids:
        try:
            return sum(_channels(sources[key.source], key, clip_id) for key in keys)
        except (ValueError, OSError):
            if on_error == "raise" or clip_id == ids[-1]:
                raise


def _channels(source: FeatureSource, key: FeatureKey, clip_id: str) -> int:
    with source.open_clip(clip_id) as clip:
        return clip.shape((key.layer, key.step))[3]


def split(
    sources: Sequence[FeatureSource], labels: Labels, val: float | Sequence[str] | None, seed: int, on_error: str
) -> tuple[list[str], list[str]]:
    """Training and validation clips, of those that all stores and the labels have.

    `val` None takes the dataset's own split where it has one (ids in both), else one clip in ten, drawn from `seed`.
    With on_error "raise", features without labels are an error and labels without features are not: one may extract a
    part. Raises ValueError if a side is empty.
    """
    labelled = set(labels.ids())
    there = set.intersection(*(set(source.ids()) for source in sources))
    if on_error == "raise" and (unlabelled := sorted(there - labelled)):
        raise ValueError(
            f"{len(unlabelled)} clips have features but no labels in {labels.root}, such as {unlabelled[0]}"
        )
    both = there & labelled
    if val is None:
        try:
            ours = [[i for i in labels.ids(name) if i in both] for name in ("train", "val")]
        except ValueError:  # the dataset does not say
            ours = [[], []]
        if all(ours):
            return ours[0], ours[1]
        val = 0.1
    if isinstance(val, int | float):
        if not 0 < val < 1:
            raise ValueError(f"val must be a share between 0 and 1, or clip ids, got {val}")
        order = shuffled(sorted(both), seed, -1)
        val = order[: max(1, round(val * len(order)))] if len(order) > 1 else []
    if missing := sorted(set(val) - both):
        raise ValueError(f"{len(missing)} clips to validate on have no features or labels, such as {missing[0]}")
    val_ids = sorted(val)
    train_ids = sorted(both - set(val_ids))
    if not train_ids or not val_ids:
        raise ValueError(f"training and validation need clips each, got {len(train_ids)} and {len(val_ids)}")
    return train_ids, val_ids


def _classes(task: ProbeTask, labels: Labels) -> list[str]:
    """What the task's answers are called, where it is asked for classes."""
    return list(labels.class_names) if "tag_pixel_counts" in task.labels else []


def _device(device: torch.device | str | None) -> torch.device:
    """Raises ValueError for a name that is none, and for a device that is not there."""
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda or cuda:1, got {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return found
