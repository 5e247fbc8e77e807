"""Demo scenes as files: videos or image folders, and labels.

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

from spatialprobe.engine.demo.render import render_clip
from spatialprobe.engine.demo.scenes import Scene

VIDEO_CODECS = ("libx264", "mpeg4")
DEMO_KINDS = ("video", "images")


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


def save_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    with whole(path) as partial:
        save_file({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, partial)


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
