"""Demo scenes as files: videos, image folders and labels, also in the ScanNet-processed and DL3DV layouts.

Files get their final name when they are whole; an existing file is replaced, an existing folder with files is refused.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from spatialprobe.engine.demo.render import Frame, render_clip
from spatialprobe.engine.demo.scenes import CLASS_NAMES_20, NO_TAG, Scene, resized
from spatialprobe.engine.types import check_clip_id

VIDEO_CODECS = ("libx264", "mpeg4")
DEMO_KINDS = ("video", "images")
MIN_TAG_PIXELS, MIN_TAG_FRAMES = 200, 2  # of a clip, for a tag to count as present in train_pos_rate_20.npy


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a temporary path with the same suffix, and renames it to `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} must be new or empty, got a folder with files in it")
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def save_array(path: Path, array: np.ndarray) -> None:
    with whole(path) as partial:
        np.save(partial, array)


def save_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    with whole(path) as partial:
        save_file({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, partial, metadata)


def save_json(path: Path, value: object) -> None:
    with whole(path) as partial:
        partial.write_text(json.dumps(value, indent=1))


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray],  # uint8 [H, W, 3] each
    fps: int | Fraction = 12,
    *,
    codec: str = "libx264",
) -> None:
    """Encodes RGB frames as an MP4 of good quality. H.264 in 4:2:0, so H and W must be even."""
    if codec not in VIDEO_CODECS or codec not in av.codecs_available:
        ready = [name for name in VIDEO_CODECS if name in av.codecs_available]
        raise ValueError(f"codec must be one of {', '.join(ready)} (what PyAV has here), got {codec!r}")
    if fps <= 0:
        raise ValueError(f"fps must be positive, got {fps}")
    quality = {"crf": "14", "preset": "medium"} if codec == "libx264" else {"qscale": "2"}
    stream, written = None, 0
    with whole(Path(path)) as partial:
        with av.open(str(partial), "w", format="mp4") as video:
            for image in frames:
                check_image(image, written)
                if stream is None:
                    if image.shape[0] % 2 or image.shape[1] % 2:
                        raise ValueError(f"video frames must have even sides, got {image.shape[0]}x{image.shape[1]}")
                    stream = video.add_stream(codec, rate=fps, options=quality)
                    stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "yuv420p"
                elif image.shape[:2] != (stream.height, stream.width):
                    wanted, got = f"{stream.height}x{stream.width}", f"{image.shape[0]}x{image.shape[1]}"
                    raise ValueError(f"frame {written} must be {wanted} like the first, got {got}")
                video.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                written += 1
            if stream is None:
                raise ValueError(f"a video needs at least 1 frame, got none for {path}")
            video.mux(stream.encode(None))


def write_image_folder(
    path: str | Path,
    frames: Iterable[np.ndarray],  # uint8 [H, W, 3] each
    *,
    suffix: str = ".png",
    first: int = 0,
) -> None:
    """Writes frame_00000.png and so on, from number `first`; ".jpg" is written at quality 95."""
    if suffix not in (".png", ".jpg"):
        raise ValueError(f"suffix must be .png or .jpg, got {suffix!r}")
    with whole(Path(path)) as partial:
        partial.mkdir()
        for i, image in enumerate(frames):
            check_image(image, i)
            options = {"quality": 95} if suffix == ".jpg" else {}
            Image.fromarray(image).save(partial / f"frame_{first + i:05d}{suffix}", **options)
        if not any(partial.iterdir()):
            raise ValueError(f"an image folder needs at least 1 frame, got none for {path}")


def check_image(image: np.ndarray, number: int) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"frame {number} must be uint8 [H, W, 3], got {image.dtype} {image.shape}")


# The demo's own layout


def write_demo(root: str | Path, scene: Scene, *, kind: str = "video", fps: int = 12) -> Path:
    """Writes videos/<id>.mp4 or images/<id>/frame_00000.png.. below `root`, and the labels; returns the clip's path.

    labels/<id>.safetensors holds depth float32 [F,H,W] in metres, instance uint16 [F,H,W], tag uint8 [F,H,W] (255 is
    none), poses float64 [F,4,4] camera-to-world and intrinsic float64 [3,3] in pixels; labels/<id>.json the seed, the
    room and the object table (`scene_table`). Conventions: the docstring of scenes.py.
    """
    if kind not in DEMO_KINDS:
        raise ValueError(f"kind must be one of {', '.join(DEMO_KINDS)}, got {kind!r}")
    clip = render_clip(scene)
    path = Path(root) / ("videos" if kind == "video" else "images") / scene.id
    if kind == "video":
        path = path.with_name(path.name + ".mp4")
        write_video(path, clip.rgb, fps)
    else:
        write_image_folder(path, clip.rgb)
    labels = {"depth": clip.depth, "instance": clip.instance, "tag": clip.tag}
    labels |= {"poses": scene.poses, "intrinsic": scene.intrinsic}
    save_tensors(Path(root) / "labels" / f"{scene.id}.safetensors", labels)
    save_json(Path(root) / "labels" / f"{scene.id}.json", scene_table(scene))
    return path


def scene_table(scene: Scene) -> dict:
    """The room and its objects as plain data: everything that exact answers need but the parts' looks."""
    objects = [asdict(thing) for thing in scene.objects]
    for thing in objects:
        thing["parts"] = [{name: part[name] for name in ("centre", "size", "yaw")} for part in thing["parts"]]
    return {"id": scene.id, "seed": scene.seed, "room": scene.room, "objects": objects}


# The layouts of the published study


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
