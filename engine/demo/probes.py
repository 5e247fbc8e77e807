"""The demo's probes: each task on both models' features, on both joined, and on noise in their place.

The settings are small enough for two CPU cores and few clips. What the numbers look like is the report's matter.
"""

import json
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import STORE_DTYPES, tensor_name
from spatialprobe.kernels.pool_features import finish
from spatialprobe.probes import open_labels, train
from spatialprobe.probes.loading.sampling import generator
from spatialprobe.probes.pictures import draw_run
from spatialprobe.probes.report.axes import criterion
from spatialprobe.probes.results import Result
from spatialprobe.probes.tasks import TASKS

VAL = 0.34  # of the clips

# Both models have rows for frames 0, 4, 8, ..., of which each clip shows 4.
COMMON = {"query": "::4", "gap": 4, "context": 17, "views": 4, "embed": 64, "heads": 4, "depth": 0, "batch": 2}
DECODER = {"decoder_width": 64, "decoder_layers": 1, "decoder_heads": 4}
DENSE = {"features": 16, "stages": [8, 8, 16, 16], "camera_layers": 1, "out_size": "40x64"}
SETTINGS = {  # task -> its probes' settings
    "tagging": COMMON | DECODER | {"epochs": 12, "lr": 1e-3},
    "instance": COMMON | {"epochs": 12, "lr": 2e-3, "pixels": 512, "min_cluster_size": 10},
    "geometry": COMMON | DENSE | {"epochs": 10, "warmup": 1, "lr": 1e-3},
    "relation": COMMON | {"epochs": 12, "lr": 1e-3, "hidden": 64},
}


@dataclass
class Trained:
    """The probes of one task on one choice of features."""

    folder: Path  # results.json, probes and pictures
    sources: list[FeatureStore]
    labels: Path
    settings: dict[str, object]  # other than the task's own defaults
    grid: dict[str, list[int]]
    results: list[Result]

    @property
    def best(self) -> Result:
        """The one that the page shows: by the task's own criterion; the first where none has its number."""
        by = criterion(self.results[0].task)
        values = [result.metrics.get(by.metric, math.nan) for result in self.results]
        best = by.best(values)
        return self.results[0 if best is None else values.index(best)]

    @property
    def diverged(self) -> bool:
        return any(result.stopped.startswith("the loss") for result in self.results)

    @property
    def command(self) -> str:
        """What trains the same probes, in a folder beside theirs."""
        words = ["engine", "probe", "--task", self.results[0].task]
        words += [word for source in self.sources for word in ("--features", str(source.root))]
        words += ["--labels", str(self.labels), "--out", f"{self.folder}-again", "--val", str(VAL)]
        for name, values in self.grid.items():
            words += ["--grid", f"{name}={','.join(map(str, values))}"]
        for name, value in self.settings.items():
            words += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        return shlex.join(words)


def train_task(
    name: str,  # of the task
    root: Path,  # gets a folder for each choice of features
    vgm: FeatureStore,  # whose layers and steps are all tried
    others: dict[str, FeatureStore],  # of one layer each; the first is joined to the best of `vgm`
    labels: Path,
) -> dict[str, Trained]:
    """Trains the task's probes; returns what they came to by choice of features: "vgm", `others`, "joined"."""
    grid = {"layer": list(vgm.spec.layers), "step": list(vgm.spec.steps)}
    trained = {"vgm": _train(name, root / "vgm", [vgm], labels, grid=grid)}
    best = trained["vgm"].best.config
    for other, store in others.items():
        trained[other] = _train(name, root / other, [store], labels)
    pair = [vgm, next(iter(others.values()))]
    trained["joined"] = _train(name, root / "joined", pair, labels, layer=best["layer"], step=best["step"])
    return trained


def _train(
    name: str, folder: Path, sources: list[FeatureStore], labels: Path, *, grid: dict | None = None, **place: int
) -> Trained:
    opened, settings, grid = open_labels(labels), SETTINGS[name] | place, grid or {}
    with one_thread():
        results = train(TASKS[name], sources, opened, grid=grid, val=VAL, out=folder, device="cpu", **settings)
        draw_run(folder, results, sources, opened)
    return Trained(folder, sources, labels, settings, grid, results)


@contextmanager
def one_thread() -> Iterator[None]:
    """Products this small lose more to torch's threads than they gain: two took up to three times the CPU time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def write_noise(root: Path, like: FeatureStore) -> FeatureStore:
    """A store of standard normal numbers in one layer, with the clips, rows and shape of another store's.

    A probe that reads it sees nothing of a clip: what it scores comes from where a pixel is and what rooms have in
    common.
    """
    spec = replace(like.spec, family="noise", weights="none", layers=(0,), steps=())
    store = FeatureStore.create(root, spec, {"model": "noise"})
    for clip_id in like.ids():
        there = like.read(clip_id, *like.spec.tensors()[0])
        numbers = generator("noise", clip_id).standard_normal(there.data.shape, np.float32)
        tensors = finish(torch.from_numpy(numbers), STORE_DTYPES[spec.dtype]).named(tensor_name(0))
        store.write(clip_id, tensors, there.rows, like.provenance(clip_id))
    return store
