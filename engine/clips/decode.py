"""Turns a `ClipRef` into a decoded `Clip`: the frames of the window and no more, or a ClipError that says why not.

A file gives the same bytes every time, in any thread. Nothing is written and nothing is kept between calls.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile
from torch import Tensor

from spatialprobe.engine.clips import video
from spatialprobe.engine.clips.sources import image_files
from spatialprobe.engine.types import Clip, ClipError, ClipRef, FrameSelection, ShortClip

# A window that starts below this is decoded from the first frame on. Above, reading the packets of the whole file in
# search of a keyframe is cheaper; encoders place one every 250 frames or more often.
LOOK_FOR_KEYFRAME = 250

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# What Pillow raises for broken files; SyntaxError and ValueError come from its PNG and BMP readers.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

UPRIGHT = (False, 1, 1)
# EXIF orientation: swap rows and columns, then step through rows, through columns. Other values mean upright.
ORIENTATIONS = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}


def load_clip(
    ref: ClipRef,
    selection: FrameSelection,
    shown: tuple[int, ...] | None = None,  # frames of the window, if not all are needed
) -> Clip:
    """Decodes the window of `selection`, or of it just `shown`: uint8 RGB [S, 3, H, W], a view of channels-last memory.

    Videos: see `video`. Images: the orientation in their EXIF data is applied; grey and CMYK become RGB without a
    colour profile, transparency is dropped, of 16-bit samples the high byte is kept.

    Raises ClipError for anything that cannot be read whole, ShortClip where `selection.short` forbids padding.
    """
    try:
        load = _load_images if ref.frames or Path(ref.source).is_dir() else _load_video
        return load(ref, selection, shown)
    except OSError as error:
        raise ClipError(f"{error.filename or ref.source}: {error.strerror or error}") from error


def select_frames(
    total: int, selection: FrameSelection, start_idx: int | None, clip_id: str
) -> tuple[Tensor, int]:  # int64 [F], padded
    """Source frames of the window in a clip of `total` frames, and how many at the end repeat the last one."""
    if total < 1:
        raise ClipError(f"clip {clip_id}: has no frames")
    first = _first_frame(selection, start_idx, clip_id)
    if first is None:
        first = max(0, (total - _span(selection)) // 2)
    if first >= total:
        raise ClipError(f"clip {clip_id}: window starts at frame {first} of {total}")
    window = selection.window or math.ceil((total - first) / selection.stride)
    index = [*range(first, min(total, first + window * selection.stride), selection.stride)]
    padded = window - len(index)
    if padded and selection.short != "pad":
        wanted = f"wanted {window} frames from frame {first} at stride {selection.stride}"
        raise ShortClip(f"clip {clip_id}: {wanted}, got {len(index)} of {total} in the source")
    return torch.tensor(index + index[-1:] * padded), padded


def window_cut(selection: FrameSelection) -> dict[str, int | str | None]:
    """What says which source frame is frame f of the window: selections of equal cuts see the same frames."""
    cut = {"start": "start" if selection.start == 0 else selection.start, "stride": selection.stride}
    return cut | ({"window": selection.window} if selection.start == "center" else {})


def describe_cut(cut: dict[str, int | str | None]) -> str:
    return ", ".join(f"{name} {value}" for name, value in cut.items())


def _first_frame(selection: FrameSelection, start_idx: int | None, clip_id: str) -> int | None:
    """First frame of the window; None if it is centred, so that it depends on the length of the clip."""
    if isinstance(selection.start, int):
        return selection.start
    if selection.start == "start_idx":
        if start_idx is None:
            raise ClipError(f"clip {clip_id}: its window starts at start_idx, which the source does not give")
        if start_idx < 0:
            raise ClipError(f"clip {clip_id}: start_idx must be a frame number from 0, got {start_idx}")
        return start_idx
    return None if selection.start == "center" and selection.window else 0


def _span(selection: FrameSelection) -> int:
    """Source frames from the first to the last of the window."""
    return (selection.window - 1) * selection.stride + 1


def _load_video(ref: ClipRef, selection: FrameSelection, shown: tuple[int, ...] | None) -> Clip:
    path = Path(ref.source)
    first = _first_frame(selection, ref.start_idx, ref.id)
    packets = video.read_packets(path) if first is None or first >= LOOK_FOR_KEYFRAME else None
    images = None
    if packets is not None:
        index, padded = select_frames(len(packets.shown), selection, ref.start_idx, ref.id)
        wanted = range(int(index[0]), int(index[-1]) + 1, selection.stride)
        only = None if shown is None else {int(index[-1]), *index[list(shown)].tolist()}
        images = video.frames_from_keyframe(path, packets, wanted, only)
    if images is None:
        total = None
        if first is None:
            total = video.count_frames(path)
            first = int(select_frames(total, selection, ref.start_idx, ref.id)[0][0])
        stop = first + _span(selection) if selection.window else sys.maxsize
        wanted = range(first, stop, selection.stride)
        only = None if shown is None else {wanted[j] for j in shown}
        images, seen = video.frames_from_start(path, wanted, only)
        index, padded = select_frames(total or seen, selection, ref.start_idx, ref.id)
        if padded and only is not None:  # shown frames repeat the last one, which is known only now
            images, _ = video.frames_from_start(path, wanted, {*index.tolist()})
    window, index = len(index), index if shown is None else index[list(shown)]
    frames = _stack(images, index.tolist(), lambda number: f"{path}: frame {number}")
    return Clip(ref.id, frames, index, padded, window)


def _load_images(ref: ClipRef, selection: FrameSelection, shown: tuple[int, ...] | None) -> Clip:
    try:
        files = [Path(frame) for frame in ref.frames] or image_files(ref.source)
    except ValueError as error:
        raise ClipError(str(error)) from error
    index, padded = select_frames(len(files), selection, ref.start_idx, ref.id)
    window, index = len(index), index if shown is None else index[list(shown)]
    images = {number: _read_image(files[number]) for number in sorted(set(index.tolist()))}
    return Clip(ref.id, _stack(images, index.tolist(), lambda number: str(files[number])), index, padded, window)


def _read_image(path: Path) -> np.ndarray:
    """uint8 RGB [H, W, 3], turned as its EXIF data says. Raises ClipError, also for an image that is cut short."""
    image, orientation = _open_image(path)
    if image.mode.startswith("I;16"):  # Pillow would clip it at 255
        rgb = np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    elif image.mode in ("I", "F"):
        raise ClipError(f"{path}: has 32-bit samples, wanted 8 or 16 bits")
    else:
        rgb = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    swap, rows, columns = ORIENTATIONS.get(orientation, UPRIGHT)
    return (rgb.transpose(1, 0, 2) if swap else rgb)[::rows, ::columns]


def _open_image(path: Path) -> tuple[Image.Image, int | None]:
    """The image with its pixels read, and its EXIF orientation."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: half an image would pass for a whole one")
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a photograph with previews
            image.load()
            orientation = image.getexif().get(ExifTags.Base.Orientation)
    except IMAGE_ERRORS as error:
        raise ClipError(f"{path}: image cannot be read: {error}") from error
    if count > 1:
        raise ClipError(f"{path}: is an animation of {count} images, wanted one image")
    return image, orientation


def _stack(images: dict[int, np.ndarray], index: list[int], name: Callable[[int], str]) -> Tensor:
    """uint8 [F, 3, H, W] of the images [H, W, 3] that `index` names; takes them out of `images` to save memory."""
    shape = images[index[0]].shape
    pixels = np.empty((len(index), *shape), np.uint8)
    for row, number in enumerate(index):
        image = images.pop(number) if row == 0 or number != index[row - 1] else pixels[row - 1]
        if image.shape != shape:
            sizes = [f"{width}x{height}" for height, width, _ in (image.shape, shape)]
            raise ClipError(f"{name(number)} is {sizes[0]}, but {name(index[0])} is {sizes[1]}")
        pixels[row] = image
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
