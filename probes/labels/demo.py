"""The procedural scenes of `engine demo`: `<root>/labels/<id>.safetensors`, exact in every pixel."""

from pathlib import Path

import torch
from torch import Tensor

from spatialprobe.engine.clips.cameras import unproject
from spatialprobe.engine.demo.scenes import CLASS_NAMES_20, NO_TAG
from spatialprobe.engine.types import ClipRef
from spatialprobe.probes.labels.base import Labels, TensorFile, read_images, read_names, world_to_camera


class DemoLabels(Labels):
    """Every label there is. Walls and floor are tagged but are no instances; confidence is 1."""

    names = (
        "tag_pixel_counts", "instance_masks", "depth", "points", "confidence", "extrinsic", "intrinsic", "images",
    )  # fmt: skip
    class_names = CLASS_NAMES_20
    up = (0.0, 0.0, 1.0)

    def ids(self, split: str | None = None) -> list[str]:
        if split is not None:
            raise ValueError(f"the demo's scenes have no splits, got split {split!r}")
        folder = self.root / "labels"
        return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("[!.]*.safetensors"))

    def path(self, clip_id: str) -> Path:
        return self.root / "labels" / f"{clip_id}.safetensors"

    def object_names(self, clip_id: str) -> dict[int, str]:
        """Their kinds, which are finer than their tags: a nightstand is a cabinet."""
        with self._explained(clip_id) as path:
            return read_names(path.with_suffix(".json"), "objects", lambda thing: (thing["id"], thing["kind"]))

    def _frames(self, path: Path) -> int:
        return TensorFile(path).shape("depth")[0]

    def _read(self, path: Path, frames: list[int], wanted: tuple[str, ...]) -> dict[str, Tensor]:
        file, read = TensorFile(path), {}
        if "tag_pixel_counts" in wanted:
            tag = file.frames("tag", frames)
            counts = [torch.bincount(image.flatten().long(), minlength=NO_TAG + 1) for image in tag]
            read["tag_pixel_counts"] = torch.stack(counts)[:, : len(CLASS_NAMES_20)].int()
        if "instance_masks" in wanted:
            read["instance_masks"] = file.frames("instance", frames).int()
        if {"depth", "points", "confidence"} & set(wanted):
            read["depth"] = file.frames("depth", frames)
            read["confidence"] = torch.ones_like(read["depth"])
        if {"extrinsic", "points"} & set(wanted):
            extrinsic = world_to_camera(file.frames("poses", frames))
            read["extrinsic"] = extrinsic.float()
        if {"intrinsic", "points"} & set(wanted):
            intrinsic = file.whole("intrinsic")
            if intrinsic.shape != (3, 3) or not intrinsic.diagonal().min() > 0:
                raise ValueError(f"intrinsic must be [3, 3] with positive focal lengths, got {intrinsic.tolist()}")
            read["intrinsic"] = intrinsic.float().expand(len(frames), 3, 3)
        if "points" in wanted:
            read["points"] = unproject(read["depth"], extrinsic, intrinsic.expand(len(frames), 3, 3))
        if "images" in wanted:
            read["images"] = self._images(path, frames)
        return read

    def _images(self, path: Path, frames: list[int]) -> Tensor:  # uint8 [S, 3, H, W]
        clip_id = path.relative_to(self.root / "labels").with_suffix("").as_posix()
        video = self.root / "videos" / f"{clip_id}.mp4"
        source = video if video.exists() else self.root / "images" / clip_id
        return read_images(ClipRef(clip_id, str(source)), frames)
