"""Pictures of a training run beside its numbers: curves, layer x step maps, what the best probe says of one clip."""

import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spatialprobe.engine.reading.rows import FeatureSource
from spatialprobe.probes.checkpoint import load_probe
from spatialprobe.probes.figures import bar_figure, curve_figure, depth_figure, instance_figure, layer_step_figure
from spatialprobe.probes.labels import Labels
from spatialprobe.probes.loading.batches import Batch
from spatialprobe.probes.loading.loader import FeatureLoader
from spatialprobe.probes.pointcloud import write_ply
from spatialprobe.probes.probe import Probe
from spatialprobe.probes.results import Result, varied
from spatialprobe.probes.setup import probe_keys, sampling_of
from spatialprobe.probes.tasks import TASKS
from spatialprobe.probes.tasks.instance import predict
from spatialprobe.probes.training import joined

log = logging.getLogger(__name__)

RELATION_BARS = {  # metric -> how it is called in a picture
    "balanced_accuracy": "balanced accuracy of yes and no",
    "within_25": "lengths off by at most 25%",
    "within_one_hour": "directions off by at most an hour of the clock",
}


def draw_run(folder: Path, results: Sequence[Result], sources: Sequence[FeatureSource], labels: Labels) -> list[Path]:
    """The pictures of a run that `train` wrote to `folder`; returns their files.

    curve.png: losses and score per epoch. layers.png: the score by layer and step, where the grid has several.
    instance.png, or depth.png and points.ply: what the best probe says of the first validation clip. relations.png: the
    best probe's score of every relation.
    """
    task, made = TASKS[results[0].task], []
    score = task.score if task.score not in ("loss", "last") else "loss"
    names = {", ".join(f"{k}={v}" for k, v in one.items()) or task.name: i for i, one in enumerate(varied(results))}
    if any(result.curve for result in results):
        curves = {name: results[i].curve for name, i in names.items()}
        made.append(folder / "curve.png")
        curve_figure(curves, made[-1], score=None if score == "loss" else score, title=task.name)
    places = sorted({tuple(result.keys[0][1:]) for result in results}, key=str)
    whole = [result for result in results if result.metrics]
    if len(places) > 1 and whole:
        made.append(folder / "layers.png")
        _layer_steps(whole, task.shown or score, task.higher_is_better, made[-1])
    if whole and task.name in (*DRAWN, "relation"):
        sign = -1 if task.higher_is_better and score != "loss" else 1
        best = min((i for i, r in enumerate(results) if r.metrics), key=lambda i: sign * results[i].metrics[score])
        if task.name == "relation":
            return made + _draw_relations(folder, results[best])
        file = folder / f"probe-{best:03d}.safetensors"
        made += DRAWN[task.name](folder, *_first_clip(file, sources, labels, results[best].skipped))
    return made


def _draw_relations(folder: Path, result: Result) -> list[Path]:
    """Nothing where no relation was scored."""
    of_each = {
        title: {n.split("/")[1]: x for n, x in result.metrics.items() if n.startswith(f"{name}/") and "/level" not in n}
        for name, title in RELATION_BARS.items()
    }
    if not any(of_each.values()):
        return []
    bar_figure(of_each, folder / "relations.png", chance={RELATION_BARS["balanced_accuracy"]: 0.5}, title=result.task)
    return [folder / "relations.png"]


def _layer_steps(results: Sequence[Result], metric: str, higher: bool, path: Path) -> None:
    """The best value over everything else in the grid."""
    layers = sorted({result.keys[0][1] for result in results})
    steps = sorted({result.keys[0][2] for result in results}, key=lambda step: -1 if step is None else step)
    values = np.full((len(layers), len(steps)), np.nan)
    best = np.fmax if higher else np.fmin
    for result in results:
        at = layers.index(result.keys[0][1]), steps.index(result.keys[0][2])
        values[at] = best(values[at], result.metrics[metric])
    layer_step_figure(values, layers, steps, path, metric=metric)


@torch.no_grad()
def _first_clip(
    file: Path, sources: Sequence[FeatureSource], labels: Labels, skipped: Collection[str]
) -> tuple[Probe, Batch, dict[str, Tensor]]:
    """The probe, the first clip it was validated on, with its images if there are any, and what the probe says."""
    probe, header = load_probe(file, TASKS)
    keys = probe_keys(header)
    clip_id = next(i for i in header["about"]["val_ids"] if i not in skipped)
    loader = FeatureLoader(
        sources, labels, ids=[clip_id], keys=sorted(set(keys)), train=False,
        wanted=[*probe.task.labels, *["images"] * _has_images(labels, clip_id)],
        views=probe.config.views, sampling=sampling_of(probe.config), batch=1,
    )  # fmt: skip
    (batch,) = loader
    outputs = probe.eval()(joined(batch, keys, probe.config.fuse))
    return probe, batch, {name: x.float() for name, x in outputs.items()}


def _has_images(labels: Labels, clip_id: str) -> bool:
    if "images" not in labels.names:
        return False
    try:
        labels.read(clip_id, [0], ["images"])
    except (ValueError, OSError) as error:
        log.warning("pictures have no frames: %s", error)
        return False
    return True


def _frames(batch: Batch, size: tuple[int, int]) -> np.ndarray:  # uint8 [S, H, W, 3]; grey where there are no images
    if "images" not in batch.labels:
        return np.full((batch.frames.shape[1], *size, 3), 127, np.uint8)
    return batch.labels["images"][0].permute(0, 2, 3, 1).numpy()


def _rows(batch: Batch) -> list[str]:
    return [f"frame {frame}" for frame in batch.frames[0].tolist()]


def _draw_instance(folder: Path, probe: Probe, batch: Batch, outputs: dict[str, Tensor]) -> list[Path]:
    truth = batch.labels["instance_masks"][0].numpy()
    path, size = folder / "instance.png", truth.shape[1:]
    predicted = predict(outputs, size, probe.config)[0]
    instance_figure(_frames(batch, size), truth, predicted, path, rows=_rows(batch), title=batch.ids[0])
    return [path]


def _draw_geometry(folder: Path, probe: Probe, batch: Batch, outputs: dict[str, Tensor]) -> list[Path]:
    """Depths with the prediction's median made the truth's, and all predicted points in the frames' colours."""
    targets = probe.task.targets(batch.labels, probe.config, probe.facts)
    valid, truth, predicted = targets["valid"][0], targets["depth"][0], outputs["depth"][0]
    if not valid.any():
        return []
    predicted = predicted * (truth[valid].median() / predicted[valid].median())
    frames = _frames(batch, tuple(truth.shape[1:]))
    depth, points = folder / "depth.png", folder / "points.ply"
    unit = "first view's mean point distance"
    depth_figure(frames, truth.numpy(), predicted.numpy(), depth, rows=_rows(batch), unit=unit, title=batch.ids[0])
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    colours = torch.nn.functional.interpolate(images, tuple(truth.shape[1:]), mode="nearest").permute(0, 2, 3, 1)
    cloud = outputs["points"][0].reshape(-1, 3).numpy()
    there = np.isfinite(cloud).all(1)
    write_ply(points, cloud[there], colours.reshape(-1, 3).numpy().astype(np.uint8)[there])
    return [depth, points]


Drawn = Callable[[Path, Probe, Batch, dict[str, Tensor]], list[Path]]
DRAWN: dict[str, Drawn] = {"instance": _draw_instance, "geometry": _draw_geometry}
