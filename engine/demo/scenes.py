"""Furnished rooms with a moving camera, described exactly: what stands where, what it is called, where the camera is.

`make_scene` draws a room from a seed; `render.py` makes images and labels of it. Everything in a scene is a box, still
and upright, so depth, masks and 3D relations have exact answers. It does not know photographs: no mirrors, no clutter,
no motion but the camera's.

Conventions. World: metres, right-handed, z up, the floor at z = 0, the room's centre at x = y = 0. Camera: OpenCV's, x
right, y down, z forward. Poses are camera-to-world 4x4, as ScanNet's. Integer pixel coordinates are pixel centres:
u = fx * X / Z + cx, and the image spans u from -0.5 to W - 0.5. Depth is Z, not the length of the ray.
"""

from dataclasses import dataclass, replace

import numpy as np

from spatialprobe.engine.demo.furnish import SceneObject, furnish
from spatialprobe.engine.demo.furniture import FABRICS, ROOMS, WHITE, finish
from spatialprobe.engine.demo.patterns import Finish, mix
from spatialprobe.engine.types import check_clip_id

CLASS_NAMES_20 = (
    "wall",
    "floor",
    "cabinet",
    "bed",
    "chair",
    "sofa",
    "table",
    "door",
    "window",
    "bookshelf",
    "picture",
    "counter",
    "desk",
    "curtain",
    "refrigerator",
    "shower curtain",
    "toilet",
    "sink",
    "bathtub",
    "otherfurniture",
)
NO_TAG = 255  # in tag images: the ceiling, which ScanNet20 has no name for
FACES = ("west", "east", "south", "north", "floor", "ceiling")  # of the room: -x, +x, -y, +y, -z, +z

ROOM_SIZES = {"bathroom": ((3.8, 3.7, 2.4), (4.4, 4.2, 2.6)), "other": ((4.4, 4.2, 2.5), (5.6, 5.2, 2.8))}  # metres

MIN_OBJECTS = 5
EYE_TO_WALL = 0.4  # metres from the camera's path to any wall


@dataclass(frozen=True, eq=False)
class Scene:
    """A room, what stands in it, and the camera's path through it.

    The instance id 0 means none: walls, floor and ceiling. They are tagged (the ceiling as NO_TAG) but are not
    instances. That differs from ScanNet, whose annotated walls and floors have ids of their own.
    """

    id: str  # a clip id
    seed: int
    room: tuple[float, float, float]  # metres along x, y, z
    faces: tuple[Finish, ...]  # [6] in the order of FACES
    objects: tuple[SceneObject, ...]
    height: int  # pixels
    width: int
    intrinsic: np.ndarray  # float64 [3, 3], pixels
    poses: np.ndarray  # float64 [F, 4, 4], camera-to-world

    def __post_init__(self):
        check_clip_id(self.id)
        if min(self.height, self.width) < 2:
            raise ValueError(f"scene {self.id}: images must be at least 2x2 pixels, got {self.height}x{self.width}")
        k = self.intrinsic
        if k.shape != (3, 3) or min(k[0, 0], k[1, 1]) <= 0 or np.any([k[0, 1], k[1, 0], *(k[2] - (0, 0, 1))]):
            raise ValueError(
                f"scene {self.id}: intrinsic must be [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], got {k.tolist()}"
            )
        if self.poses.ndim != 3 or self.poses.shape[1:] != (4, 4) or not len(self.poses):
            raise ValueError(f"scene {self.id}: poses must be [F, 4, 4] with F >= 1, got {self.poses.shape}")
        turn = self.poses[:, :3, :3]
        rigid = np.allclose(turn @ turn.transpose(0, 2, 1), np.eye(3), atol=1e-6) and (np.linalg.det(turn) > 0).all()
        if not rigid or not np.allclose(self.poses[:, 3], (0, 0, 0, 1)):
            raise ValueError(f"scene {self.id}: poses must be rigid with last row 0 0 0 1, without mirroring")
        if [o.id for o in self.objects] != list(range(1, len(self.objects) + 1)):
            raise ValueError(f"scene {self.id}: object ids must be 1, 2, ..., got {[o.id for o in self.objects]}")
        if unknown := {o.tag for o in self.objects} - set(CLASS_NAMES_20):
            raise ValueError(f"scene {self.id}: tags must be ScanNet20 names, got {', '.join(sorted(unknown))}")

    @property
    def frames(self) -> int:
        return len(self.poses)


def make_scene(
    seed: int, *, frames: int = 81, height: int = 96, width: int = 160, room: str | None = None, id: str | None = None
) -> Scene:
    """Draws a room of 5 to 10 objects and a camera path. Equal arguments give equal scenes.

    `room` is a key of ROOMS, by default each in turn as `seed` counts up; `id` is "<room>-<seed>" by default. Images
    are `height` x `width` pixels, 75 degrees wide. The furniture depends on neither `frames` nor the image size.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    if room is not None and room not in ROOMS:
        raise ValueError(f"room must be one of {', '.join(ROOMS)}, got {room!r}")
    room = room or list(ROOMS)[seed % len(ROOMS)]
    rng = np.random.default_rng([seed, *room.encode()])
    placed: list[SceneObject] = []
    while len(placed) < MIN_OBJECTS:  # a crowded draw is thrown away whole
        small, large = ROOM_SIZES.get(room, ROOM_SIZES["other"])
        size = tuple(float(x) for x in np.round(rng.uniform(small, large), 3))
        path = CameraPath.draw(rng, size)
        placed = furnish(rng, size, path.eyes(np.linspace(-1, 1, 65)), ROOMS[room])
    focal = 0.65 * width
    intrinsic = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    name = id or f"{room.replace(' ', '-')}-{seed:04d}"
    looks = room_finishes(rng, room)
    return Scene(name, seed, size, looks, tuple(placed), height, width, intrinsic, path.poses(frames))


def resized(scene: Scene, height: int, width: int) -> Scene:
    """The same camera with images of another size: what resizing its images exactly would show."""
    fy, fx = height / scene.height, width / scene.width
    # The image spans -0.5 .. W - 0.5, so a resize scales u + 0.5, not u.
    scale = np.array([[fx, 0, (fx - 1) / 2], [0, fy, (fy - 1) / 2], [0, 0, 1]])
    return replace(scene, height=height, width=width, intrinsic=scale @ scene.intrinsic)


# The camera


@dataclass(frozen=True)
class CameraPath:
    """An arc about a point in the room, eased at both ends, with a little dolly and rise, looking across that point."""

    centre: tuple[float, float]  # metres, of the arc
    radius: float  # metres
    half_angle: float  # radians either side of -y; the sign gives the direction of travel
    eye_height: float  # metres
    rise: float  # metres from first to last frame
    look_height: float  # metres

    @classmethod
    def draw(cls, rng: np.random.Generator, room: tuple[float, float, float]) -> "CameraPath":
        centre = (float(rng.uniform(-0.2, 0.2)), 0.16 * room[1])
        half_angle = float(np.radians(rng.uniform(26, 34)))
        radius = centre[1] + room[1] / 2 - EYE_TO_WALL
        radius = min(radius, (room[0] / 2 - EYE_TO_WALL - abs(centre[0])) / np.sin(half_angle))
        direction = 1 if rng.random() < 0.5 else -1
        heights = rng.uniform((1.45, -0.15, 0.75), (1.65, 0.15, 0.95)).tolist()
        return cls(centre, float(radius), direction * half_angle, *heights)

    def eyes(self, along: np.ndarray) -> np.ndarray:  # float64 [F], -1 .. 1 -> [F, 3] metres
        angle, radius = self.half_angle * along, self.radius - 0.25 * (1 - along**2)
        height = self.eye_height + self.rise * along / 2
        x, y = self.centre[0] + radius * np.sin(angle), self.centre[1] - radius * np.cos(angle)
        return np.stack([x, y, height], axis=1)

    def poses(self, frames: int) -> np.ndarray:  # [F, 4, 4] camera-to-world
        """A long clip covers the whole arc; a short one its middle, at no more than 2% of the arc per frame."""
        reach = min(1.0, 0.02 * (frames - 1) / 2)
        linear = np.linspace(-1, 1, frames) if frames > 1 else np.zeros(1)
        along = reach * (1.5 * linear - 0.5 * linear**3)
        x, y, z = self.centre[0] + 0.35 * along, self.centre[1] + 0.3, self.look_height
        targets = [np.array([pan, y, z]) for pan in x]
        return np.stack([look_at(eye, target) for eye, target in zip(self.eyes(along), targets, strict=True)])


def look_at(eye: np.ndarray, target: np.ndarray) -> np.ndarray:  # [3], [3] metres -> float64 [4, 4]
    """Camera-to-world pose at `eye` that has `target` in its centre and the horizon level."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(forward, right), forward, eye], axis=1)
    return pose


def room_finishes(rng: np.random.Generator, room: str) -> tuple[Finish, ...]:
    """Paint, floor and ceiling; [6] in the order of FACES."""
    paint = mix(FABRICS[rng.integers(len(FABRICS))], WHITE, 0.72)
    pattern = "tiles" if room in ("bathroom", "kitchen") else "planks"
    colour = {"tiles": (0.80, 0.79, 0.76), "planks": (0.70, 0.54, 0.38)}[pattern]
    walls = [finish(rng, "plain", paint, 0.05, 0.9) for _ in range(4)]
    if room == "bathroom":
        walls = [finish(rng, "tiles", mix(paint, WHITE, 0.4), 0.16, 0.24) for _ in range(4)]
    elif rng.random() < 0.5:
        walls[3] = finish(rng, "stripes", paint, 0.07, 0.3)
    floor = finish(rng, pattern, colour, 0.3, 0.36 if pattern == "tiles" else 0.14)
    return (*walls, floor, Finish("plain", (WHITE, WHITE), glow=0.45))
