"""Lists the clips of a folder, a list file or a dataset layout as `ClipRef`s, without opening a clip.

Reads names, list files and, for DL3DV, one number per scene. Whether a clip decodes is found out by `decode`.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors

from spatialprobe.engine.types import ClipRef, check_clip_id

# Containers that state their own length, so that a cut file can be told from a short one. MPEG-TS, MPEG-PS and raw
# streams do not: remux them ("ffmpeg -i x.ts -c copy x.mkv").
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
LIST_SUFFIXES = (".jsonl", ".ndjson", ".txt", ".lst")  # the first two hold JSON, one object per line

SCANNET_SPLITS = ("train", "val")
DL3DV_FRAMES = ("images_4", "colmap/images_4")
DL3DV_TARGETS = "DL3DV-processed"  # folder beside the root with <subset>/<hash>.sft


def list_clips(source: str | Path, layout: str = "auto", *, targets: str | Path | None = None) -> list[ClipRef]:
    """Clips of `source`, sorted by id.

    `layout` is a key of LAYOUTS or "auto", which recognises it. `targets` is the folder with DL3DV's
    `<subset>/<hash>.sft`; without it `DL3DV-processed` beside `source` is used if it is there, and a scene without
    such a file has no `start_idx`. Symbolic links are followed, hidden files and folders are left out.

    Raises ValueError, with the path or line, if there is nothing to list or an entry is missing, double or unclear.
    """
    root = Path(source)
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"layout must be auto or one of {', '.join(LAYOUTS)}, got {layout!r}")
    if not root.exists():
        raise ValueError(f"{root}: no such file or folder")
    try:
        layout = _recognise(root) if layout == "auto" else layout
        if targets is not None and layout != "dl3dv":
            raise ValueError(f"targets is for the dl3dv layout, {root} is {layout}")
        refs = _dl3dv(root, targets) if layout == "dl3dv" else LAYOUTS[layout](root)
    except OSError as error:
        raise ValueError(f"{error.filename or root}: {error.strerror or error}") from error
    if not refs:
        raise ValueError(f"{root}: no clips found, looked for {LOOKED_FOR[layout]}")
    return sorted(refs, key=lambda ref: ref.id)


def image_files(folder: str | Path) -> list[Path]:
    """Images directly in `folder`, in name order with numbers by value: frame_2.png comes before frame_10.png.

    Raises ValueError if it mixes image formats, where one frame may be there twice (colour .jpg beside depth .png).
    """
    files = [path for path in Path(folder).iterdir() if _is_image(path.name)]
    formats = {path.suffix.lower().replace("jpeg", "jpg") for path in files}
    if len(formats) > 1:
        raise ValueError(f"{folder}: holds {' and '.join(sorted(formats))} images; name the frames in a list file")
    return sorted(files, key=_by_number)


def _by_number(path: Path) -> tuple[list[Any], str]:
    parts = re.split(r"([0-9]+)", path.name)  # text and digits in turn, so that equal places compare
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], path.name


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _is_video(name: str) -> bool:
    return name.lower().endswith(VIDEO_SUFFIXES) and not name.startswith(".")


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(e.path) for e in entries if e.is_dir() and not e.name.startswith("."))


def _walk(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names of its files) of `folder` and all below it; a link back to a folder above is an error."""
    real = folder.resolve()
    if real in above:
        raise ValueError(f"{folder}: links back to {real}, which holds it")
    with os.scandir(folder) as entries:
        # a link to nothing is a file that cannot be read: its clip fails, and is not left out
        yield folder, sorted(e.name for e in entries if e.is_file() or (e.is_symlink() and not e.is_dir()))
    for below in _folders(folder):
        yield from _walk(below, (*above, real))


# Layouts


def _videos(root: Path) -> list[ClipRef]:
    if root.is_file():
        return [ClipRef(root.stem, str(root))]
    found: dict[str, Path] = {}
    for folder, names in _walk(root):
        for path in (folder / name for name in names if _is_video(name)):
            clip_id = path.relative_to(root).with_suffix("").as_posix()
            if clip_id in found:
                raise ValueError(f"{found[clip_id]} and {path} would both be clip {clip_id}; rename one")
            found[clip_id] = path
    return [ClipRef(clip_id, str(path)) for clip_id, path in found.items()]


def _images(root: Path) -> list[ClipRef]:
    if not root.is_dir():
        raise ValueError(f"{root}: layout images wants a folder")
    clips = [folder for folder, names in _walk(root) if any(map(_is_image, names))]
    if clips == [root]:
        return [ClipRef(root.resolve().name, str(root))]
    if root in clips:
        raise ValueError(f"{root}: holds images itself and in folders below, such as {clips[1]}; give one or the other")
    return [ClipRef(folder.relative_to(root).as_posix(), str(folder)) for folder in clips]


def _scannet(root: Path) -> list[ClipRef]:
    refs = []
    for split in SCANNET_SPLITS:
        scenes = _scannet_scenes(root, split)
        missing = [scene for scene in scenes if not (root / scene / "frames").is_dir()]
        if missing:
            raise ValueError(
                f"{root}: {len(missing)} of {len(scenes)} {split} scenes have no frames/, first {missing[0]}"
            )
        refs += [ClipRef(scene, str(root / scene / "frames")) for scene in scenes]
    return refs


def _scannet_scenes(root: Path, split: str) -> list[str]:
    """ "<split>/<scene>" of every scene in {split}.json, [[split, scene], ...], or without that file in the folder."""
    listing = root / f"{split}.json"
    if not listing.exists():
        return [f"{split}/{folder.name}" for folder in _folders(root / split)] if (root / split).is_dir() else []
    try:
        pairs = json.loads(listing.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{listing}: not JSON: {error}") from error
    if not isinstance(pairs, list):
        raise ValueError(f"{listing}: wanted a list of [split, scene], got {type(pairs).__name__}")
    scenes = []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"{listing}: wanted [split, scene], got {pair!r}")
        if pair[0] != split:
            raise ValueError(f"{listing}: wanted scenes of {split}, got {pair!r}")
        scenes.append(check_clip_id("/".join(pair)))
    if len(set(scenes)) < len(scenes):
        raise ValueError(f"{listing}: lists {max(scenes, key=scenes.count)} more than once")
    return scenes


def _dl3dv(root: Path, targets: str | Path | None = None) -> list[ClipRef]:
    beside = root.resolve().parent / DL3DV_TARGETS
    if targets is None and beside.is_dir() and beside != root.resolve():
        targets = beside
    if targets is not None and not Path(targets).is_dir():
        raise ValueError(f"{targets}: no such folder of DL3DV targets")
    refs = []
    for scene in (scene for subset in _folders(root) for scene in _folders(subset)):
        frames = [scene / name for name in DL3DV_FRAMES if (scene / name).is_dir()]
        if len(frames) > 1:
            raise ValueError(f"{scene}: holds both {' and '.join(DL3DV_FRAMES)}")
        if frames:
            clip_id = scene.relative_to(root).as_posix()
            start_idx = None if targets is None else _dl3dv_start_idx(Path(targets) / f"{clip_id}.sft")
            refs.append(ClipRef(clip_id, str(frames[0]), start_idx=start_idx))
    return refs


def _dl3dv_start_idx(path: Path) -> int | None:
    """The `start_idx` of a targets file, a place in the sorted frames from 0. Its large tensors stay on disk."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            value = file.get_tensor("start_idx")
    except (safetensors.SafetensorError, TypeError) as error:  # TypeError: a dtype that numpy lacks
        raise ValueError(f"{path}: no start_idx can be read: {error}") from error
    if value.size != 1 or value.dtype.kind not in "iu" or value.item() < 0:
        raise ValueError(f"{path}: start_idx must be one frame number, got {value.tolist()}")
    return value.item()


# List files


def _list_file(path: Path) -> list[ClipRef]:
    if not path.is_file():
        raise ValueError(f"{path}: layout list wants a file")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error
    parse = _json_line if path.suffix.lower() in LIST_SUFFIXES[:2] else _text_line
    seen: dict[str, int] = {}
    refs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            ref = parse(line, path.absolute().parent)
            for file in ref.frames or (ref.source,):
                if not Path(file).exists():
                    raise ValueError(f"{file}: no such file or folder")
            if ref.id in seen:
                raise ValueError(f"id {ref.id} is already on line {seen[ref.id]}")
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from error
        seen[ref.id] = number
        refs.append(ref)
    return refs


def _text_line(line: str, folder: Path) -> ClipRef:
    """A path. The id is that path below the list's folder without suffix, or from / on if it is elsewhere."""
    path = Path(os.path.normpath(folder / line.strip()))
    if _is_image(path.name):
        raise ValueError(f"{path}: is an image, a clip of listed images needs a .jsonl list with frames")
    below = path.relative_to(folder if path.is_relative_to(folder) else path.anchor)
    return ClipRef((below.with_suffix("") if _is_video(path.name) else below).as_posix(), str(path))


LINE_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "id": (lambda value: isinstance(value, str), "text"),
    "path": (lambda value: isinstance(value, str) and value != "", "a path"),
    "frames": (
        lambda value: isinstance(value, list) and value != [] and all(isinstance(f, str) and f for f in value),
        "a list of image paths",
    ),
    "start_idx": (lambda value: type(value) is int and value >= 0, "a frame number from 0"),
}


def _json_line(line: str, folder: Path) -> ClipRef:
    """{"id": ..., "path": ... or "frames": [...], "start_idx": ...}, the last if there is one."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"wanted an object, got {type(entry).__name__}")
    for key, value in entry.items():
        if key not in LINE_KEYS:
            raise ValueError(f"unknown key {key!r}, the keys are {', '.join(LINE_KEYS)}")
        valid, wanted = LINE_KEYS[key]
        if not valid(value):
            raise ValueError(f"{key} must be {wanted}, got {value!r}")
    if "id" not in entry or ("path" in entry) == ("frames" in entry):
        raise ValueError(f"wanted id and either path or frames, got {', '.join(entry) or 'nothing'}")
    frames = tuple(str(folder / frame) for frame in entry.get("frames", ()))
    return ClipRef(entry["id"], str(folder / entry.get("path", "")), frames, entry.get("start_idx"))


LAYOUTS: dict[str, Callable[[Path], list[ClipRef]]] = {
    "videos": _videos,
    "images": _images,
    "list": _list_file,
    "scannet": _scannet,
    "dl3dv": _dl3dv,
}
LOOKED_FOR = {
    "videos": f"video files ({' '.join(VIDEO_SUFFIXES)})",
    "images": f"folders of images ({' '.join(IMAGE_SUFFIXES)})",
    "list": f"a list file ({' '.join(LIST_SUFFIXES)}) with a clip per line",
    "scannet": "{train,val}/<scene>/frames",
    "dl3dv": "<subset>/<hash>/{images_4,colmap/images_4}",
}


def _recognise(root: Path) -> str:
    """The layout of `root`. Raises ValueError if none fits, or if both videos and image folders do."""
    if root.is_file():
        suffix = root.suffix.lower()
        if suffix not in VIDEO_SUFFIXES + LIST_SUFFIXES:
            raise ValueError(f"{root}: neither {LOOKED_FOR['videos']} nor {LOOKED_FOR['list']}")
        return "videos" if suffix in VIDEO_SUFFIXES else "list"
    splits = [root / split for split in SCANNET_SPLITS if (root / split).is_dir()]
    if any((scene / "frames").is_dir() for split in splits for scene in _folders(split)):
        return "scannet"
    if any((s / name).is_dir() for subset in _folders(root) for s in _folders(subset) for name in DL3DV_FRAMES):
        return "dl3dv"
    first: dict[str, Path] = {}
    for folder, names in _walk(root):
        for name in names:
            layout = "videos" if _is_video(name) else "images" if _is_image(name) else None
            if layout:
                first.setdefault(layout, folder / name)
        if len(first) == 2:
            both = f"{first['videos']} and {first['images']}"
            raise ValueError(f"{root}: holds both videos and images ({both}); choose layout videos or images")
    if not first:
        raise ValueError(f"{root}: no clips found, looked for {'; '.join(LOOKED_FOR.values())}")
    return next(iter(first))
