"""ScanNet as the published study processed it: `<root>/{train,val}/<scene>/` with arrays over the window's frames."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from spatialprobe.engine.types import ClipRef
from spatialprobe.probes.labels.base import (
    SPLITS,
    Labels,
    mapped_array,
    read_array,
    read_images,
    read_names,
    split_ids,
    world_to_camera,
)


class ScanNetLabels(Labels):
    """Tags of `classes` classes, instances, and cameras.

    `poses.npy` of the published preprocessing has the identity where ScanNet has no pose: such frames are not marked.
    `intrinsic_size` is the (height, width) of the images that intrinsic.txt belongs to, if not that of the masks: real
    ScanNet's are (968, 1296), the demo's are the masks'.
    """

    names = ("tag_pixel_counts", "instance_masks", "extrinsic", "intrinsic", "images")
    up, identity_is_no_pose = (0.0, 0.0, 1.0), True

    def __init__(self, root: str | Path, *, classes: int = 20, intrinsic_size: tuple[int, int] | None = None):
        super().__init__(root)
        self.classes, self.intrinsic_size = classes, intrinsic_size
        listing = self.root / f"class_names_{classes}.json"
        try:
            self.class_names = tuple(json.loads(listing.read_text(encoding="utf-8-sig"))["names"])
        except FileNotFoundError:
            there = ", ".join(sorted(p.name for p in self.root.glob("class_names_*.json"))) or "no such list"
            raise ValueError(f"{listing} does not exist; there is {there}") from None
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{listing} must hold a table with names, got another: {error}") from error
        if len(self.class_names) != classes:
            raise ValueError(f"{listing} must name {classes} classes, got {len(self.class_names)}")

    def ids(self, split: str | None = None) -> list[str]:
        listed = [i for s in SPLITS if (self.root / f"{s}.json").exists() for i in split_ids(self.root, s)]
        if split is not None:
            listed = split_ids(self.root, split)
        elif not listed:
            listed = [p.relative_to(self.root).as_posix() for s in SPLITS for p in (self.root / s).glob("[!.]*")]
        return sorted(i for i in listed if (self.path(i) / "metadata.sft").exists())  # its last file: a scene is whole

    def path(self, clip_id: str) -> Path:
        return self.root / clip_id

    def object_names(self, clip_id: str) -> dict[int, str]:
        """From ScanNet's own <scene>.aggregation.json, or aggregation.json, in the clip's folder, if it is there."""
        with self._explained(clip_id) as path:
            for file in (path / f"{path.name}.aggregation.json", path / "aggregation.json"):
                if file.exists():  # the masks of the published preprocessing have objectId + 1
                    return read_names(file, "segGroups", lambda group: (group["objectId"] + 1, group["label"]))
        return {}

    def _frames(self, path: Path) -> int:
        with safe_open(path / "metadata.sft", "pt") as file:
            return int(file.get_tensor("gt_num_frames"))

    def _read(self, path: Path, frames: list[int], wanted: tuple[str, ...]) -> dict[str, Tensor]:
        read = {}
        if "tag_pixel_counts" in wanted:
            counts = read_array(path / f"tag_pixel_counts_{self.classes}.npy", frames, "int32")
            read["tag_pixel_counts"] = torch.from_numpy(counts)
        if "instance_masks" in wanted:
            masks = read_array(path / "instance_masks.npy", frames, "uint16")
            read["instance_masks"] = torch.from_numpy(masks.astype(np.int32))
        if "extrinsic" in wanted:
            poses = torch.from_numpy(read_array(path / "poses.npy", frames, "float32"))
            if poses.shape[1:] != (4, 4):
                raise ValueError(f"poses.npy must be [F, 4, 4], got [F, {', '.join(map(str, poses.shape[1:]))}]")
            read["extrinsic"] = world_to_camera(poses).float()
        if "intrinsic" in wanted:
            read["intrinsic"] = self._intrinsic(path).expand(len(frames), 3, 3)
        if "images" in wanted:
            read["images"] = read_images(ClipRef(path.name, str(path / "frames")), frames)
        return read

    def _intrinsic(self, path: Path) -> Tensor:  # float32 [3, 3]
        matrix = np.array((path / "intrinsic.txt").read_text().split(), float)
        if matrix.size != 16:
            raise ValueError(f"intrinsic.txt must be 4x4, got {matrix.size} numbers")
        scale = np.ones(2)
        if self.intrinsic_size is not None:
            mask = mapped_array(path / "instance_masks.npy").shape[1:]
            scale = np.array(mask) / self.intrinsic_size
        # centres are whole numbers: (u + 1/2) scales, u does not
        resize = np.array([[scale[1], 0, scale[1] / 2 - 0.5], [0, scale[0], scale[0] / 2 - 0.5], [0, 0, 1]])
        return torch.from_numpy(resize @ matrix.reshape(4, 4)[:3, :3]).float()
