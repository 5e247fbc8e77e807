"""A folder of geometry labels, one `<clip id>.sft` per clip in the layout that the published study gave to DL3DV.

images uint8 [F, 3, H, W], depthmaps float32 [F, H, W, 1], confmaps float32 [F, H, W], start_idx int64 []; where cameras
are known pointmaps [F, H, W, 3], extrinsic [F, 3, 4] (world-to-camera) and intrinsic [F, 3, 3] (pixels). A frame is a
frame of the window.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from spatialprobe.engine.files.spec_folder import ClipFolder
from spatialprobe.engine.types import FrameSelection

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


class TargetFolder(ClipFolder[TargetSpec]):
    NAME, WHAT, READ = SPEC, "targets", staticmethod(read_spec)
