"""A folder of geometry labels, one `<clip id>.sft` per clip in the layout that the published study gave to DL3DV.

images uint8 [F, 3, H, W], depthmaps float32 [F, H, W, 1], confmaps float32 [F, H, W], start_idx int64 []; where cameras
are known pointmaps [F, H, W, 3], extrinsic [F, 3, 4] (world-to-camera) and intrinsic [F, 3, 3] (pixels). A frame is a
frame of the window. A clip is done when its file has its final name.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from spatialprobe.engine.clipfile import all_files, write_file
from spatialprobe.engine.durable import RunFolder, make_folder, publish, publish_first, room_for, write_text
from spatialprobe.engine.failures import append_failure, read_failures
from spatialprobe.engine.schema import differences
from spatialprobe.engine.types import FrameSelection, check_clip_id

SUFFIX = ".sft"
SPEC = "targets.json"


@dataclass(frozen=True)
class TargetSpec:
    """What changes a value of the labels. A folder holds labels of one spec."""

    teacher: str  # `model_type` of the checkpoint
    weights: str  # as of FeatureSpec
    frames: FrameSelection
    size: tuple[int, int] | None  # (H, W) of the maps; None: the study's, 518 pixels along the longer side
    cameras: str | None = None  # folder of the labels that poses and intrinsics were taken from
    intrinsic_size: tuple[int, int] | None = None  # (H, W) of the images that its intrinsics are of, if not its own
    compute_dtype: str = "float32"
    device: str = "cuda"
    versions: dict[str, str] = field(default_factory=dict, hash=False)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "TargetSpec":
        raw = json.loads(text)
        sizes = {name: raw[name] and tuple(raw[name]) for name in ("size", "intrinsic_size")}
        return cls(**raw | {"frames": FrameSelection(**raw["frames"])} | sizes)


def read_spec(path: Path) -> TargetSpec:
    """Raises ValueError for a file that holds something else."""
    try:
        return TargetSpec.from_json(path.read_text())
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not the spec of a folder of targets: {error}") from error


class TargetFolder:
    """What `engine.report` and the pipeline need of a store, over such a folder."""

    def __init__(self, root: Path, spec: TargetSpec):
        """Makes the folder, or opens one of an equal spec. Raises ValueError for one of another, or of other things."""
        self.check_place(root, spec)
        make_folder(root)
        self.root, self.spec, self.run = root, spec, RunFolder(root / "tmp")
        temp = self.run.file()
        write_text(temp, spec.to_json())
        publish_first(temp, root / SPEC)
        self.check_place(root, spec)  # another process may have been first

    @staticmethod
    def check_place(root: Path, spec: TargetSpec) -> None:
        """Raises what making the folder would, and writes nothing."""
        if root.exists() and not root.is_dir():
            raise ValueError(f"{root} is a file; targets are a folder")
        if (root / SPEC).exists():
            if changed := differences(read_spec(root / SPEC), spec):
                lines = "\n".join(f"  {line}" for line in changed)
                raise ValueError(f"{root} holds targets of another spec; choose another folder\n{lines}")
        elif root.is_dir() and (foreign := sorted(p.name for p in root.iterdir() if p.name != "tmp")):
            raise ValueError(f"{root} is not empty and no folder of targets: it holds {', '.join(foreign[:5])}")

    def path(self, clip_id: str) -> Path:
        return self.root / f"{check_clip_id(clip_id)}{SUFFIX}"

    def ids(self) -> list[str]:
        """Clips that are done, sorted."""
        return sorted(name.removesuffix(SUFFIX) for name, _ in all_files(self.root) if name.endswith(SUFFIX))

    def write(self, clip_id: str, tensors: dict[str, Tensor], provenance: dict[str, Any]) -> int:
        """Stores a clip's labels and returns its file's size. Raises StoreFull if the disk is full."""
        final, temp = self.path(clip_id), self.run.file()
        with room_for(final, sum(x.nbytes for x in tensors.values())):
            try:
                size = write_file(temp, tensors, provenance | {"clip": clip_id, "spec": asdict(self.spec)})
                publish(temp, final)
            finally:
                temp.unlink(missing_ok=True)
        return size

    def write_record(self, name: str, text: str) -> None:
        """Writes a small file beside the clips, whole or not at all; one of that name is replaced."""
        with room_for(self.root / name, len(text)):
            temp = self.run.file()
            write_text(temp, text)
            publish(temp, self.root / name)

    def record_failure(self, clip_id: str, stage: str, reason: str) -> None:
        append_failure(self.root / "failed.jsonl", clip_id, stage, reason)


def failed_clips(root: Path) -> set[str]:
    """Clips whose last attempt failed and that have no file."""
    records, _ = read_failures(root / "failed.jsonl")
    return {clip_id for clip_id in records if not (root / f"{clip_id}{SUFFIX}").exists()}
