"""DL3DV as the published study processed it: `<root>/<subset>/<hash>.sft`, what VGGT-1B predicted for each frame.

The file's frames begin at its `start_idx`, as the window of features extracted with `--start start_idx` does. Folders
that `engine targets` made have the same files, and say in targets.json where their windows begin.
"""

import json
from pathlib import Path

from torch import Tensor

from spatialprobe.engine.files.clipfile import METADATA_KEY
from spatialprobe.engine.targets.folder import SPEC, read_spec
from spatialprobe.engine.types import FrameSelection
from spatialprobe.probes.labels.base import Labels, TensorFile, split_ids

TENSORS = {  # name -> name in the file, where [S, H, W, 1] stands for our [S, H, W]
    "depth": "depthmaps",
    "points": "pointmaps",
    "confidence": "confmaps",
    "extrinsic": "extrinsic",  # world-to-camera
    "intrinsic": "intrinsic",
    "images": "images",
}


class DL3DVLabels(Labels):
    """Geometry: depth, points, cameras. Each scene has a scale of its own."""

    names, selection = tuple(TENSORS), FrameSelection(start="start_idx")
    metric = False

    def __init__(self, root: str | Path):
        super().__init__(root)
        if (made := self.root / SPEC).exists():
            spec = read_spec(made)
            self.selection, self.metric = spec.frames, True  # what teachers give is in metres
            self.cameras_of = Path(spec.cameras) if spec.cameras else None

    def ids(self, split: str | None = None) -> list[str]:
        if split is not None:
            return sorted(i for i in split_ids(self.root, split) if self.path(i).exists())
        return sorted(p.relative_to(self.root).with_suffix("").as_posix() for p in self.root.rglob("[!.]*.sft"))

    def path(self, clip_id: str) -> Path:
        return self.root / f"{clip_id}.sft"

    def padded(self, clip_id: str) -> int:
        with self._explained(clip_id) as path:
            return json.loads(TensorFile(path).metadata.get(METADATA_KEY, "{}")).get("padded", 0)  # if we made it

    def _frames(self, path: Path) -> int:
        return TensorFile(path).shape("depthmaps")[0]

    def _read(self, path: Path, frames: list[int], wanted: tuple[str, ...]) -> dict[str, Tensor]:
        file = TensorFile(path)
        read = {name: file.frames(TENSORS[name], frames) for name in wanted}
        return {
            name: x.squeeze(-1) if name in ("depth", "confidence") and x.ndim == 4 else x for name, x in read.items()
        }
