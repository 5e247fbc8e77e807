"""Finds out whose labels a folder holds."""

from inspect import signature
from pathlib import Path

from spatialprobe.probes.labels.base import SPLITS, Labels
from spatialprobe.probes.labels.demo import DemoLabels
from spatialprobe.probes.labels.dl3dv import DL3DVLabels
from spatialprobe.probes.labels.lifted import LiftedLabels
from spatialprobe.probes.labels.scannet import ScanNetLabels

KINDS = {  # layout -> its reader, and what shows it
    "scannet": (ScanNetLabels, "{train,val}/<scene>/metadata.sft", [f"{split}/*/metadata.sft" for split in SPLITS]),
    "dl3dv": (DL3DVLabels, "<subset>/<hash>.sft or <id>.sft", ["[!.]*/[!.]*.sft", "[!.]*.sft"]),
    "demo": (DemoLabels, "labels/<id>.safetensors", ["labels/*.safetensors", "labels/*/*.safetensors"]),
    "lifted": (LiftedLabels, "lift.json and <id>.sft", ["lift.json"]),
}


def open_labels(root: str | Path, layout: str = "auto", **options: object) -> Labels:
    """The labels below `root`, in one of the layouts of KINDS. `options` go to the reader (ScanNet's `classes`).

    Raises ValueError if `root` is not such a folder, shows several layouts and `layout` does not choose, or if its
    reader has no such option.
    """
    root = Path(root)
    if layout not in ("auto", *KINDS):
        raise ValueError(f"layout must be auto or one of {', '.join(KINDS)}, got {layout!r}")
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    asked = KINDS if layout == "auto" else [layout]
    found = [name for name in asked if any(next(root.glob(shown), None) for shown in KINDS[name][2])]
    if "lifted" in found:  # whose clips are named as DL3DV's are
        found = ["lifted"]
    if len(found) != 1:
        looked_for = "; ".join(f"{name}: {KINDS[name][1]}" for name in asked)
        what = f"labels of both {' and '.join(found)}" if found else "no labels"
        raise ValueError(f"{root} holds {what}, looked for {looked_for}")
    reader = KINDS[found[0]][0]
    if unknown := sorted(set(options) - set(signature(reader).parameters)):
        raise ValueError(f"{root} holds labels of layout {found[0]}, which has no {', '.join(unknown)} to choose")
    return reader(root, **options)
