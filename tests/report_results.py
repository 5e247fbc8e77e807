"""Files of results as probes write them, and stores that they name, made up: a whole study in a second."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from spatialprobe.engine.presets import FAMILIES, PRESETS
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import FeatureSpec
from spatialprobe.probes.labels.relations import KINDS, NAMES
from spatialprobe.probes.report.axes import BY_TASK
from spatialprobe.probes.results import Result, write_results
from spatialprobe.probes.tasks import TASKS

STAGES = {"decode": {"seconds": 3.0, "gb_per_s": 0.1}, "blocks": {"seconds": 8.0}, "write": {"seconds": 1.0}}
TIMING = {"seconds": 10.0, "busy": 0.8, "peak_memory_bytes": 2_500_000_000, "stages": STAGES}
CLIP_BYTES = 1_234_000

Source = dict[str, str]


def make_store(root: Path, model: str, *, family: str | None = None, **fields) -> Source:
    """A store of two clips with the record of its run; returns how results name it."""
    family = family or PRESETS[model].family
    steps = (749, 900) if family in FAMILIES and FAMILIES[family].default_step else ()
    spec = FeatureSpec(**{"family": family, "weights": f"content:{model}", "layers": (10, 20), "steps": steps} | fields)
    store = FeatureStore.create(root, spec, {"model": model})
    for i in range(2):
        (store.clips / f"clip{i}.safetensors").write_bytes(bytes(CLIP_BYTES))
    store.write_record("run.json", json.dumps({"written": 25, "timing": TIMING}))
    return {"store": str(root), "spec": store.spec_hash, "weights": spec.weights}


def make_result(
    task: str, sources: list[Source], metrics: dict, *, layer=10, step=None, about=None, **settings
) -> Result:
    """A result with the task's default settings but for `settings`, and with the fields of `about`."""
    fields = {
        "task": task,
        "config": asdict(TASKS[task].defaults.with_settings(layer=layer, step=step, **settings)),
        "metrics": metrics,
        "best_epoch": 1,
        "curve": [{"train_loss": 2.0, "val_loss": 1.5}, {"train_loss": 1.0, "val_loss": 1.25}],
        "stopped": "",
        "sources": sources,
        "keys": [[i, layer, step] for i in range(len(sources))],
        "labels": f"data/{task}",
        "train_clips": 90,
        "val_clips": 10,
        "seconds": 12.5,
        "split": "aa11",
    }
    return Result(**fields | (about or {}))


def make_metrics(task: str, draw: np.random.Generator) -> dict[str, float]:
    """Numbers in [0, 1) for everything that the task's tables show, and a loss."""
    names = {"loss", "AP_head", *(m.metric for m in BY_TASK[task].measures)} if task == "tagging" else {"loss"}
    names |= {m.metric for m in BY_TASK[task].measures}
    if task == "relation":
        names |= {"within_67_150", "within_90_110", "same_hour", "within_one_hour"}
        for name, kind in zip(NAMES, KINDS, strict=True):
            of_kind = {"yes_or_no": ["balanced_accuracy"], "length": ["within_50_200"], "hour": ["same_hour"]}[kind]
            names |= {f"{metric}/{name}" for metric in of_kind}
        names |= {f"{m}/level{k}" for m, k in itertools.product(("balanced_accuracy", "within_50_200"), (1, 2, 3))}
    return {name: float(draw.random()) for name in sorted(names)}


GENERATORS = ("wan2.1-t2v-1.3b", "cogvideox-2b", "wan2.1-t2v-14b")


def write_study(
    root: Path, *, generators: Sequence[str] = GENERATORS, positions: Sequence[str] = ("native", "none", "shuffled")
) -> Path:
    """Stores and all four tasks below `root`; returns the folder of the results.

    Generators have a grid of layers and steps, Wan 14B three seeds; DINOv2 has several kinds of positions, read by
    probes with two; Wan 14B and Qwen are joined; Qwen's geometry was measured on other labels as well.
    """
    draw = np.random.default_rng(0)
    stores = {m: make_store(root / "stores" / m, m) for m in generators}
    stores |= {m: make_store(root / "stores" / m, m) for m in ("qwen3-vl-8b", "internvl3-8b")}
    for how in positions:
        options = {"pos_embed": how, "tap": "tower"}
        stores[f"dinov2 {how}"] = make_store(root / "stores" / f"dinov2-{how}", "dinov2-large", options=options)
    runs = root / "runs"

    def write(name: str, task: str, sources: list[Source], **grid) -> None:
        points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        results = [make_result(task, sources, make_metrics(task, draw), **point) for point in points]
        write_results(runs / task / name / "results.json", results)

    for task in ("tagging", "instance", "geometry", "relation"):
        for model in sorted(set(generators) - {"wan2.1-t2v-14b"}):
            write(model, task, [stores[model]], layer=(10, 20), step=(749, 900))
        write("wan2.1-t2v-14b", task, [stores["wan2.1-t2v-14b"]], layer=(10, 20), step=(749,), seed=(1, 2, 3))
        for model in ("qwen3-vl-8b", "internvl3-8b"):
            write(model, task, [stores[model]], layer=(10, 20))
        for how in positions:
            write(f"dinov2-{how}", task, [stores[f"dinov2 {how}"]], position=("2d", "none"))
        write("joined", task, [stores["wan2.1-t2v-14b"], stores["qwen3-vl-8b"]])
    other = make_result(
        "geometry",
        [stores["qwen3-vl-8b"]],
        make_metrics("geometry", draw),
        about={"labels": "data/other", "val_clips": 7},
    )
    write_results(runs / "other" / "results.json", [other])
    return runs
