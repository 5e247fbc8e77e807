"""Point clouds in files and depth in colours, for people to look at. Where they come from is not known here."""

from pathlib import Path

import numpy as np

RAMP = np.array([[13, 8, 65], [84, 39, 143], [205, 66, 90], [250, 158, 59], [252, 253, 191]])  # far to near, RGB
UNKNOWN = (127, 127, 127)
VERTEX = np.dtype([("place", "<f4", 3), ("colour", "u1", 3)])


def write_ply(
    path: str | Path,
    points: np.ndarray,  # [N, 3]
    colours: np.ndarray,  # uint8 [N, 3] RGB
) -> None:
    """A PLY file, binary little endian: per vertex x, y, z in float32, then red, green, blue.

    The file has its name only when it is whole. Raises ValueError for other shapes or colours, and for points that are
    not finite.
    """
    points, colours, path = np.asarray(points), np.asarray(colours), Path(path)
    if points.ndim != 2 or points.shape[1] != 3 or colours.shape != points.shape or colours.dtype != np.uint8:
        got = f"{list(points.shape)} and {colours.dtype} {list(colours.shape)}"
        raise ValueError(f"wanted points [N, 3] and colours uint8 [N, 3], got {got}")
    vertices = np.empty(len(points), VERTEX)
    with np.errstate(over="ignore"):  # refused below
        vertices["place"], vertices["colour"] = points, colours
    if bad := int((~np.isfinite(vertices["place"])).any(1).sum()):
        raise ValueError(f"points must be finite in float32, but {bad} of {len(points)} are not")
    properties = [f"property float {n}" for n in "xyz"] + [f"property uchar {n}" for n in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}", *properties, "end_header", ""]
    temp = path.with_name(f".{path.name}.part")
    temp.write_bytes("\n".join(header).encode() + vertices.tobytes())
    temp.replace(path)


def colour_depth(
    depth: np.ndarray,  # [...]
    near: float | None = None,
    far: float | None = None,
) -> np.ndarray:  # uint8 [..., 3] RGB
    """Dark is `far` and beyond, bright is `near` and nearer, even in 1 / depth; grey is no positive finite number.

    None: the 2nd and 98th percentile of the depths there are. Give both to pictures that are to be compared. Raises
    ValueError unless 0 < near <= far.
    """
    depth = np.asarray(depth, dtype=np.float64)
    known = np.isfinite(depth) & (depth > 0)
    low, high = np.percentile(depth[known], [2, 98]) if known.any() else (1.0, 1.0)
    near, far = low if near is None else near, high if far is None else far
    if not 0 < near <= far:
        raise ValueError(f"near and far must be positive and in this order, got {near} and {far}")
    closeness = (1 / np.where(known, depth, far) - 1 / far) / max(1 / near - 1 / far, 1e-12)
    stops = np.linspace(0, 1, len(RAMP))
    rgb = np.stack([np.interp(closeness, stops, channel) for channel in RAMP.T], -1).round().astype(np.uint8)
    return np.where(known[..., None], rgb, np.array(UNKNOWN, np.uint8))
