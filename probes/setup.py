"""What a training run is made of, checked before it begins: stores, configs of a grid, clips of either side, device."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from spatialprobe.engine.reading.rows import FeatureSource
from spatialprobe.probes.labels import Labels
from spatialprobe.probes.loading.batches import FeatureKey
from spatialprobe.probes.loading.sampling import FrameSampling, shuffled
from spatialprobe.probes.loading.shards import source_name
from spatialprobe.probes.task import SHARED, ProbeConfig, ProbeTask


def checked_stores(sources: FeatureSource | Sequence[FeatureSource], labels: Labels) -> list[FeatureSource]:
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
            what = f"{source_name(source)} holds (layer, step) {there}"
            raise ValueError(f"{what}; the settings layer and step must choose one of them, got {asked}")
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
            f"{len(unlabelled)} clips have features but no labels in {labels.root}, such as {unlabelled[0]}; "
            'on_error="skip" (--skip-unreadable) leaves them out'
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


def class_names(task: ProbeTask, labels: Labels) -> list[str]:
    """What the task's answers are called, where it is asked for classes or relations."""
    names = {"tag_pixel_counts": labels.class_names, "relations": labels.relation_names}
    return [name for label in task.labels for name in names.get(label, ())]


def device_of(device: torch.device | str | None) -> torch.device:
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
