"""What `engine lift` made of clips: instance masks, cameras and, where they were kept, points in the lifted frame; and
questions about the relations of the objects, from their table."""

from pathlib import Path

import torch
from torch import Tensor

from spatialprobe.engine.lifting.folder import SPEC, SUFFIX, read_spec, read_table
from spatialprobe.probes.labels.base import Labels, TensorFile
from spatialprobe.probes.labels.relations import NAMES, ROWS, relation_rows


class LiftedLabels(Labels):
    """Of the frames that were lifted, which must be those that views are sampled from.

    The lifted frame is gravity-aligned, with its origin below the first view: `points` and `extrinsic` are in it. A
    pixel without a point has confidence 0 and the point 0.
    """

    relation_names = NAMES

    def __init__(self, root: str | Path, *, rows: int = ROWS):  # rows: questions of each view
        super().__init__(root)
        if rows < 1:
            raise ValueError(f"rows must be at least 1 question per view, got {rows}")
        self.rows, spec = rows, read_spec(self.root / SPEC)
        self.selection, self.metric = spec.frames, spec.metric
        points = () if spec.points == "none" else ("points", "confidence")
        self.names = ("instance_masks", *points, "extrinsic", "intrinsic", "relations")

    def ids(self, split: str | None = None) -> list[str]:
        if split is not None:
            raise ValueError(f"a folder of lifted clips has no splits, got split {split!r}")
        found = self.root.rglob(f"[!.]*{SUFFIX}")
        return sorted(p.relative_to(self.root).as_posix().removesuffix(SUFFIX) for p in found)

    def path(self, clip_id: str) -> Path:
        return self.root / f"{clip_id}{SUFFIX}"

    def _frames(self, path: Path) -> int:
        return int(TensorFile(path).whole("objects.frames").max()) + 1

    def _read(self, path: Path, frames: list[int], wanted: tuple[str, ...]) -> dict[str, Tensor]:
        file, read = TensorFile(path), {}
        lifted = file.whole("objects.frames").tolist()
        if unlifted := [f for f in frames if f not in lifted]:
            raise ValueError(f"frames {unlifted} were not lifted, only {lifted}")
        views = [lifted.index(f) for f in frames]
        if "instance_masks" in wanted:
            read["instance_masks"] = file.frames("instance_masks", views).int()
        if {"points", "confidence"} & set(wanted):
            points = file.frames("points", views).float()
            known = points.isfinite().all(-1)
            read["points"], read["confidence"] = torch.where(known[..., None], points, 0), known.float()
        for name in {"extrinsic", "intrinsic"} & set(wanted):
            read[name] = file.frames(name, views)
        if "relations" in wanted:
            read["relations"] = relation_rows(read_table(path), views, self.rows)
        return read
