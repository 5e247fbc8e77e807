"""Object tables of boxes that are moved about: cheap, exact where geometry is concerned, with made-up pixels."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from spatialprobe.engine.demo.scenes import look_at
from spatialprobe.engine.lifting.objects import ObjectTable
from spatialprobe.engine.questions.ask import ask
from spatialprobe.engine.questions.lines import record_lines
from spatialprobe.engine.questions.settings import Settings

SIZE, FOCAL = (96, 160), 104.0
TAGS = ("chair", "table", "lamp", "sofa", "otherfurniture", "shelf", "bed", "door", "kitchen cabinets", "mattress")
AHEAD = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 1.5], [0, 0, 0, 1.0]])  # at 1.5 m, looking level along +y


def table_of_boxes(
    centre: Sequence[Sequence[float]],  # [N, 3]
    extent: Sequence[Sequence[float]],  # [N, 3]
    tags: Sequence[str] | None = None,
    *,
    poses: np.ndarray = AHEAD[None],  # [V, 4, 4]
    clip: str = "boxes",
    yaw: Sequence[float] | None = None,
    points: np.ndarray | None = None,  # [V, K, 3]
) -> ObjectTable:
    """All are seen whole and complete; a box's image is that of its centre and its width across."""
    centre, extent = np.array(centre, float), np.array(extent, float)
    n, v = len(centre), len(poses)
    k = np.array([[FOCAL, 0, (SIZE[1] - 1) / 2], [0, FOCAL, (SIZE[0] - 1) / 2], [0, 0, 1]])
    local = np.einsum("vij,nvi->nvj", poses[:, :3, :3], centre[:, None] - poses[:, :3, 3])
    pixel = local @ k.T
    pixel = pixel[..., :2] / np.maximum(pixel[..., 2:], 0.1)
    half = FOCAL * extent[:, None, ::2] / 2 / np.maximum(local[..., 2:], 0.1)
    points = np.full((v, 1, 3), (0, 2, 0.5)) if points is None else points
    return ObjectTable(
        clip, SIZE, True, "poses", 1.0, tuple(tags or TAGS[:n]),
        frames=np.arange(v) * 3, poses=np.array(poses), intrinsic=np.broadcast_to(k, (v, 3, 3)), ids=np.arange(n) + 1,
        centre=centre, extent=extent, yaw=np.zeros(n) if yaw is None else np.array(yaw, float),
        complete=np.ones((n, 3), bool), pixels=np.full((n, v), 500), whole=np.ones((n, v)),
        nearest=np.linalg.norm(local, axis=2), box=np.concatenate([pixel - half, pixel + half], 2),
        sample_pixels=np.arange(v * points.shape[1] * 2).reshape(v, -1, 2) % SIZE[0], sample_points=points,
        sample_ids=np.zeros(points.shape[:2], np.int64),
    )  # fmt: skip


def random_table(number: int, *, objects: int = 8, views: int = 6, alike: bool = False, **changes) -> ObjectTable:
    """A room of boxes and a camera on an arc; `alike`: with three tags among them."""
    rng = np.random.default_rng([number, objects])
    extent = np.exp(rng.uniform(np.log(0.25), np.log(1.8), (objects, 3)))
    extent[:, :2] = -np.sort(-extent[:, :2], axis=1)
    centre = np.concatenate([rng.uniform((-3, 2), (3, 7), (objects, 2)), extent[:, 2:] / 2], 1)
    centre[::3, 2] += rng.uniform(0, 1.5, len(centre[::3]))
    angle = np.linspace(-0.6, 0.6, views)
    eyes = np.stack([3.5 * np.sin(angle), 3.5 - 3.5 * np.cos(angle), 1.5 + 0.1 * angle], 1)
    poses = np.stack([look_at(eye, np.array([0, 4.5, 0.8])) for eye in eyes])
    table = table_of_boxes(
        centre, extent, [TAGS[i % (3 if alike else len(TAGS))] for i in range(objects)], poses=poses,
        clip=f"boxes-{number:05d}", yaw=rng.uniform(-np.pi / 2, np.pi / 2, objects),
        points=rng.uniform((-3, 2, 0), (3, 7, 2.5), (views, 12, 3)),
    )  # fmt: skip
    return replace(table, **changes)


def rolled(table: ObjectTable, degrees: float) -> ObjectTable:
    """The same room seen by cameras that are turned clockwise about where they look."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    return replace(table, poses=table.poses @ turn)


def mirrored(table: ObjectTable) -> ObjectTable:
    """Left and right exchanged, in the room and in the images."""
    flip = np.diag([-1.0, 1, 1, 1])
    poses = flip @ table.poses @ flip
    box = table.box.copy()
    box[..., 0], box[..., 2] = table.size[1] - 1 - table.box[..., 2], table.size[1] - 1 - table.box[..., 0]
    return replace(
        table, poses=poses, centre=table.centre * (-1, 1, 1), yaw=-table.yaw, box=box,
        sample_points=table.sample_points * (-1, 1, 1),
    )  # fmt: skip


def records(table: ObjectTable, **words) -> list[dict]:
    """What is asked about a table, read back; `words` as the command's."""
    settings = Settings.from_words({name: str(value) for name, value in words.items()})
    return [json.loads(line) for line in record_lines(ask(table, settings))]
