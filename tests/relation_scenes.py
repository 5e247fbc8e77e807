"""Many small rooms of boxes with object tables and masks of a few cells: no rendering, every number exact."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from spatialprobe.engine.demo.scenes import look_at
from spatialprobe.engine.lifting.folder import LiftFolder, LiftSpec, file_tensors, table_words
from spatialprobe.engine.lifting.lift import Lifted
from spatialprobe.engine.lifting.objects import ObjectTable
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import FeatureSpec, FrameSelection, tensor_name
from spatialprobe.kernels.pool_features import finish
from spatialprobe.probes.labels import Labels, LiftedLabels
from spatialprobe.probes.labels.relations import NAMES, relation_rows
from spatialprobe.probes.loading.sampling import generator

Room = tuple[ObjectTable, np.ndarray]  # its objects, and masks uint16 [V, H, W]

GRID, FINE, FRAMES = (10, 14), 2, 9  # patches, pixels along a patch's side, frames of a clip
SIZE = (GRID[0] * FINE, GRID[1] * FINE)
CHANNELS = 64
WAVES = (24.0, 12.0, 5.0)  # metres, of true features; of sizes in thirds of e-fold


def boxes_of(number: int, *, objects: int = 7, frames: int = FRAMES) -> Room:
    """A table of `objects` boxes in a room of 6 x 6 x 3 m before a moving camera, and masks uint16 [V, H, W].

    A mask's cells are patches, each of the nearest object whose box reaches its centre on the image. Boxes may overlap:
    nothing here is looked at but numbers.
    """
    rng = generator("boxes", number)
    centre = rng.uniform((-2.5, 1.5, 0.2), (2.5, 6, 2), (objects, 3))
    extent = np.exp(rng.uniform(np.log(0.2), np.log(1.4), (objects, 3)))
    extent[:, :2] = -np.sort(-extent[:, :2], axis=1)
    eyes = np.linspace((0, 0, 1.5), rng.uniform((-1, -0.5, 1.2), (1, 0.5, 1.8)), frames)
    poses = np.stack([look_at(eye, np.array([0, 4, 1.0])) for eye in eyes])
    intrinsic = np.array([[0.6 * SIZE[1], 0, (SIZE[1] - 1) / 2], [0, 0.6 * SIZE[1], (SIZE[0] - 1) / 2], [0, 0, 1]])
    ids = 1 + rng.permutation(3 * objects)[:objects]
    yaw = rng.uniform(-np.pi / 2, np.pi / 2, objects)
    table = ObjectTable(
        f"boxes{number:03d}", SIZE, True, "poses", 1.0, ("box",) * objects,
        frames=np.arange(frames), poses=poses, intrinsic=np.tile(intrinsic, (frames, 1, 1)),
        ids=ids, centre=centre, extent=extent, yaw=yaw, complete=np.ones((objects, 3), bool),
        pixels=np.zeros((objects, frames), np.int64), whole=np.ones((objects, frames)),
        nearest=np.full((objects, frames), np.inf), box=np.full((objects, frames, 4), np.nan),
        sample_pixels=np.zeros((frames, 1, 2), np.int64), sample_points=np.zeros((frames, 1, 3)),
        sample_ids=np.zeros((frames, 1), np.int64),
    )  # fmt: skip
    masks = np.zeros((frames, *GRID), np.uint16)
    cos, sin, zero = np.cos(yaw), np.sin(yaw), np.zeros(objects)
    turn = np.stack([cos, -sin, zero, sin, cos, zero, zero, zero, zero + 1], 1).reshape(-1, 3, 3)
    signs = np.array(np.meshgrid(*[(-0.5, 0.5)] * 3)).reshape(3, 8).T
    corners = centre[:, None] + (signs * extent[:, None]) @ turn.swapaxes(1, 2)  # [N, 8, 3]
    for f, pose in enumerate(poses):
        seen = (corners - pose[:3, 3]) @ pose[:3, :3]  # camera coordinates
        far = np.linalg.norm(centre - pose[:3, 3], axis=1)
        for i in np.argsort(-far):
            if seen[i, :, 2].min() < 0.3:
                continue
            uv = (seen[i] @ intrinsic.T)[:, :2] / seen[i, :, 2:]
            (left, top), (right, bottom) = (uv.min(0) + 0.5) / FINE, (uv.max(0) + 0.5) / FINE
            rows = slice(max(0, round(top)), max(0, round(bottom)))
            masks[f, rows, max(0, round(left)) : max(0, round(right))] = ids[i]
        counts = (masks[f] == ids[:, None, None]).sum((1, 2))
        table.pixels[:, f] = counts * FINE**2
        table.nearest[:, f] = np.where(counts > 0, 0.9 * far, np.inf)
    return table, masks.repeat(FINE, 1).repeat(FINE, 2)


def true_features(table: ObjectTable, masks: np.ndarray) -> torch.Tensor:  # float32 [V, h, w, CHANNELS]
    """At each patch where and how large its object is: its centre for this camera and in the lifted frame, its box.

    As sines and cosines of a few wavelengths, because LayerNorm does not change what has one length.
    """
    x = np.zeros((len(masks), *GRID, CHANNELS), np.float32)
    for f, (pose, cells) in enumerate(zip(table.poses, masks[:, ::FINE, ::FINE], strict=True)):
        camera, nearest = (table.centre - pose[:3, 3]) @ pose[:3, :3], np.minimum(table.nearest[:, f], 9)[:, None]
        known = np.concatenate([camera, table.centre, 3 * np.log(table.extent), nearest], 1)  # [N, 10]
        phase = known[:, :, None] * (2 * np.pi / np.array(WAVES))
        waves = np.concatenate([np.sin(phase), np.cos(phase)], 2).reshape(len(known), -1)
        for i, numbers in zip(table.ids, waves, strict=True):
            x[f][cells == i, : len(numbers)] = numbers
    return torch.from_numpy(x)


def noise_features(table: ObjectTable, masks: np.ndarray, *, per_object: bool = True) -> torch.Tensor:
    """Numbers that say nothing: one vector for all patches of an object in a view, or one per patch."""
    rng = generator("noise", table.clip)
    x = rng.standard_normal((len(masks), *GRID, CHANNELS)).astype(np.float32)
    if per_object:
        for f, cells in enumerate(masks[:, ::FINE, ::FINE]):
            for i in table.ids:
                x[f][cells == i] = rng.standard_normal(CHANNELS)
    return torch.from_numpy(x)


def write_rooms(root: Path, rooms: dict[str, Room], features: Callable[..., torch.Tensor]) -> FeatureStore:
    """A store of `features(table, masks)` of frames 0, 1 and 5, as rows 0, 1, 2; its name is its weights'."""
    about = {"family": "wan", "weights": f"content:{root.name}", "layers": (3,), "pool": GRID}
    spec, rows = FeatureSpec(**about, frames=FrameSelection(window=FRAMES)), [(f + 3) // 4 for f in range(FRAMES)]
    store = FeatureStore.create(root, spec)
    for clip_id, room in rooms.items():
        tensors = finish(features(*room)[[0, 1, 5]], torch.float16).named(tensor_name(3))
        provenance = {"grid": [3, *GRID], "rows_kept": [0, 1, 2], "padded": 0}
        store.write(clip_id, tensors, torch.tensor(rows), provenance)
    return FeatureStore.open(root)


class RoomLabels(Labels):
    """Questions and masks of such rooms, in memory."""

    names, relation_names = ("relations", "instance_masks"), NAMES

    def __init__(self, rooms: dict[str, Room], *, rows: int = 128):
        super().__init__("rooms")
        self.rooms, self.rows = rooms, rows

    def ids(self, split: str | None = None) -> list[str]:
        if split is not None:
            raise ValueError("rooms have no splits")
        return sorted(self.rooms)

    def path(self, clip_id: str) -> Path:
        return self.root / clip_id

    def frames(self, clip_id: str) -> int:
        return self._frames(self.path(clip_id))

    def read(self, clip_id: str, frames: Sequence[int], wanted: Sequence[str]) -> dict[str, torch.Tensor]:
        return self._read(self.path(clip_id), list(frames), wanted)

    def _frames(self, path: Path) -> int:
        return FRAMES

    def _read(self, path: Path, frames: list[int], wanted: Sequence[str]) -> dict[str, torch.Tensor]:
        table, masks = self.rooms[path.name]
        read = {"relations": relation_rows(table, frames, self.rows)}
        read["instance_masks"] = torch.from_numpy(masks[frames].astype(np.int32))
        return {name: read[name] for name in wanted}


def write_lifted(
    root: Path, rooms: dict[str, Room], points: dict[str, np.ndarray] | None = None, *, metric: bool = True
) -> LiftedLabels:
    """The rooms as `engine lift` leaves them, with `points` [V, H, W, 3] of each, or without."""
    kept = "none" if points is None else "float32"
    spec = LiftSpec("rooms", "rooms", FrameSelection(), metric, (0, 0, 1), points=kept)
    folder = LiftFolder(root, spec)
    for clip_id, (table, masks) in rooms.items():
        maps = None if points is None else torch.from_numpy(points[clip_id].astype(np.float32))
        folder.write(clip_id, file_tensors(Lifted(table, maps, [], []), masks), table_words(table))
    return LiftedLabels(root)
