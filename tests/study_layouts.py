"""Demo scenes in the layouts of the published study: ScanNet-processed and DL3DV."""

from pathlib import Path

import numpy as np

from spatialprobe.engine.demo.render import Frame, render_clip
from spatialprobe.engine.demo.scene_files import save_json, save_tensors, whole, write_image_folder
from spatialprobe.engine.demo.scenes import CLASS_NAMES_20, NO_TAG, Scene, resized
from spatialprobe.engine.types import check_clip_id

MIN_TAG_PIXELS, MIN_TAG_FRAMES = 200, 2  # of a clip, for a tag to count as present in train_pos_rate_20.npy


def save_array(path: Path, array: np.ndarray) -> None:
    with whole(path) as partial:
        np.save(partial, array)


def tag_pixel_counts(tag: np.ndarray) -> np.ndarray:  # uint8 [F, H, W] -> int32 [F, 20]
    """Pixels of each class in each frame; NO_TAG is counted for none."""
    counts = [np.bincount(image.ravel(), minlength=NO_TAG + 1) for image in tag]
    return np.stack(counts)[:, : len(CLASS_NAMES_20)].astype(np.int32)


def write_scannet(root: str | Path, split: str, scenes: list[Scene]) -> Path:
    """Writes a whole split in the ScanNet-processed layout below `root`/ScanNet-processed; returns that folder.

    Differences from the real data: walls and floor are counted as tags but have instance id 0; intrinsic.txt (4x4)
    belongs to the frames as written, not to a larger original.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be train or val, got {split!r}")
    check_distinct(scenes)
    folder, present = Path(root) / "ScanNet-processed", []
    for scene in scenes:
        clip = render_clip(scene)
        counts = tag_pixel_counts(clip.tag)
        present.append((counts.sum(axis=0) >= MIN_TAG_PIXELS) & ((counts > 0).sum(axis=0) >= MIN_TAG_FRAMES))
        write_scannet_scene(folder / split / scene.id, scene, clip, counts)
    save_json(folder / f"{split}.json", [[split, scene.id] for scene in scenes])
    save_json(folder / "class_names_20.json", {"num_classes": len(CLASS_NAMES_20), "names": CLASS_NAMES_20})
    if split == "train":
        save_array(folder / "train_pos_rate_20.npy", np.mean(present, axis=0, dtype=np.float32))
    return folder


def write_scannet_scene(folder: Path, scene: Scene, clip: Frame, counts: np.ndarray) -> None:
    write_image_folder(folder / "frames", clip.rgb, suffix=".jpg")
    save_array(folder / "instance_masks.npy", clip.instance)
    save_array(folder / "poses.npy", scene.poses.astype(np.float32))
    save_array(folder / "tag_pixel_counts_20.npy", counts)
    intrinsic = np.eye(4)
    intrinsic[:3, :3] = scene.intrinsic
    with whole(folder / "intrinsic.txt") as partial:
        np.savetxt(partial, intrinsic, fmt="%.6f")
    window = {"start_idx": np.array(0, np.int32), "gt_num_frames": np.array(scene.frames, np.int32)}
    save_tensors(folder / "metadata.sft", window)  # last: readers take it as the sign that a scene is complete


def write_dl3dv(
    root: str | Path, subset: str, scenes: list[Scene], *, start_idx: int = 0, size: tuple[int, int] = (294, 518)
) -> Path:
    """Writes DL3DV-ALL-960P/<subset>/<id>/images_4 and DL3DV-processed/<subset>/<id>.sft; returns DL3DV-processed.

    The targets cover S = F - start_idx frames rendered at `size` (H, W), the 294x518 of the published ones by default,
    and are exact where those are a model's: depthmaps and confmaps (all 1) float32 [S,H,W,1], pointmaps float32
    [S,H,W,3] in the world, extrinsic float32 [S,3,4] world-to-camera. The split files of the study are not written.
    """
    check_clip_id(subset)
    check_distinct(scenes)
    folder = Path(root) / "DL3DV-processed"
    for scene in scenes:
        if not 0 <= start_idx < scene.frames:
            raise ValueError(f"start_idx must be 0 .. {scene.frames - 1} of scene {scene.id}, got {start_idx}")
        images = Path(root) / "DL3DV-ALL-960P" / subset / scene.id / "images_4"
        write_image_folder(images, render_clip(scene).rgb, first=1)
        save_tensors(folder / subset / f"{scene.id}.sft", dl3dv_targets(scene, start_idx, size))
    return folder


def dl3dv_targets(scene: Scene, start_idx: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """What a scene's file holds: frames from `start_idx` on, as maps of `size` (H, W); depth and points in metres."""
    window = resized(scene, *size)
    clip = Frame(*(array[start_idx:] for array in vars(render_clip(window)).values()))
    poses = scene.poses[start_idx:]
    points = unproject(clip.depth, window.intrinsic, poses)
    return {
        "images": clip.rgb.transpose(0, 3, 1, 2),
        "depthmaps": clip.depth[..., None],
        "pointmaps": points.astype(np.float32),
        "confmaps": np.ones((*clip.depth.shape, 1), np.float32),
        "intrinsic": np.broadcast_to(window.intrinsic, (len(poses), 3, 3)).astype(np.float32),
        "extrinsic": np.linalg.inv(poses)[:, :3].astype(np.float32),
        "start_idx": np.array(start_idx, np.int32),
    }


def unproject(
    depth: np.ndarray,  # [F, H, W] metres
    intrinsic: np.ndarray,  # [3, 3] pixels
    poses: np.ndarray,  # [F, 4, 4] camera-to-world
) -> np.ndarray:  # float64 [F, H, W, 3] metres, world
    """World points of depth images."""
    v, u = np.mgrid[: depth.shape[1], : depth.shape[2]]
    rays = np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(intrinsic).T
    turned = np.einsum("fij,hwj->fhwi", poses[:, :3, :3], rays)
    return turned * depth[..., None] + poses[:, None, None, :3, 3]


def check_distinct(scenes: list[Scene]) -> None:
    names = [scene.id for scene in scenes]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"scenes must be at least one, with distinct ids, got {names}")
