"""Images and exact labels of a demo scene, by intersecting each pixel's ray with every box that may cover it.

Labels are those of the ray through the pixel's centre. Colours are averaged over more rays where surfaces meet.
The light is simple: one lamp, no cast shadows; nearness to floor and furniture darkens a little, for looks alone.
"""

from dataclasses import dataclass

import numpy as np

from spatialprobe.engine.demo.furnish import footprint_distance
from spatialprobe.engine.demo.furniture import Part
from spatialprobe.engine.demo.patterns import PATTERNS
from spatialprobe.engine.demo.scenes import CLASS_NAMES_20, FACES, NO_TAG, Scene, resized

NEAR = 1e-3  # metres; nothing is closer, since the camera keeps its distance from everything


@dataclass(frozen=True)
class Frame:
    """One image and its labels; `render_clip` puts a dimension F before each."""

    rgb: np.ndarray  # uint8 [H, W, 3]
    depth: np.ndarray  # float32 [H, W], metres along the camera's z axis
    instance: np.ndarray  # uint16 [H, W], id of a SceneObject, 0 for none
    tag: np.ndarray  # uint8 [H, W], index into CLASS_NAMES_20, or NO_TAG


@dataclass(frozen=True)
class Surfaces:
    """A scene's boxes as arrays over P surfaces: 0 .. 5 the room's faces in the order of FACES, then every part."""

    centre: np.ndarray  # float64 [3, P], metres
    half: np.ndarray  # float64 [3, P], metres; for the room's faces half the room
    turn: np.ndarray  # float64 [2, P], cosine and sine of the yaw
    pattern: np.ndarray  # int64 [P], position in PATTERNS
    period: np.ndarray  # float64 [P], metres
    offset: np.ndarray  # float64 [2, P], metres
    colours: np.ndarray  # float64 [2, P, 3]
    glow: np.ndarray  # float64 [P]
    instance: np.ndarray  # uint16 [P]
    tag: np.ndarray  # uint8 [P]


def surfaces_of(scene: Scene) -> Surfaces:
    parts = [part for thing in scene.objects for part in thing.parts]
    room = Part((0.0, 0.0, scene.room[2] / 2), scene.room, 0.0, scene.faces[0])
    boxes, looks = [room] * 6 + parts, [*scene.faces, *(part.finish for part in parts)]
    yaw = np.array([box.yaw for box in boxes])
    names = [CLASS_NAMES_20.index(name) for name in ("wall", "wall", "wall", "wall", "floor")] + [NO_TAG]
    names += [CLASS_NAMES_20.index(thing.tag) for thing in scene.objects for _ in thing.parts]
    return Surfaces(
        centre=np.array([box.centre for box in boxes]).T,
        half=np.array([box.size for box in boxes]).T / 2,
        turn=np.stack([np.cos(yaw), np.sin(yaw)]),
        pattern=np.array([list(PATTERNS).index(look.pattern) for look in looks]),
        period=np.array([look.period for look in looks]),
        offset=np.array([look.offset for look in looks]).T,
        colours=np.array([look.colours for look in looks]).swapaxes(0, 1),
        glow=np.array([look.glow for look in looks]),
        instance=np.array([0] * 6 + [thing.id for thing in scene.objects for _ in thing.parts], np.uint16),
        tag=np.array(names, np.uint8),
    )


def render(scene: Scene, frame: int, *, samples: int = 2) -> Frame:
    """Renders one frame. At edges the colour of a pixel is the mean of `samples` x `samples` rays."""
    if not 0 <= frame < scene.frames:
        raise ValueError(f"frame must be 0 .. {scene.frames - 1} of scene {scene.id}, got {frame}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    surfaces, directions = surfaces_of(scene), rays(scene, frame)
    depth, surface = cast(scene, surfaces, frame, directions)
    eye = scene.poses[frame, :3, 3]
    colour, face = shade(scene, surfaces, eye, directions.reshape(3, -1), depth.ravel(), surface.ravel())
    colour, face = colour.reshape(*depth.shape, 3), face.reshape(depth.shape)
    if samples > 1:
        soften_edges(scene, surfaces, frame, samples, colour, surface, face)
    rgb = np.round(255 * np.clip(colour, 0, 1)).astype(np.uint8)
    return Frame(rgb, depth.astype(np.float32), surfaces.instance[surface], surfaces.tag[surface])


def render_clip(scene: Scene, *, samples: int = 2) -> Frame:
    """All frames of a scene, every array with F in front."""
    frames = [render(scene, f, samples=samples) for f in range(scene.frames)]
    return Frame(*(np.stack([getattr(f, name) for f in frames]) for name in ("rgb", "depth", "instance", "tag")))


def soften_edges(
    scene: Scene,
    surfaces: Surfaces,
    frame: int,
    samples: int,
    colour: np.ndarray,  # float64 [H, W, 3], changed in place
    surface: np.ndarray,  # int64 [H, W]
    face: np.ndarray,  # int64 [H, W]
) -> None:
    """Averages finer rays where they meet another surface than the pixel's centre does, or where two faces meet."""
    fine = resized(scene, scene.height * samples, scene.width * samples)
    directions = rays(fine, frame).astype(np.float32)  # for colours only
    depth, met = cast(fine, surfaces, frame, directions)
    blocks = (scene.height, samples, scene.width, samples)
    mixed = (met.reshape(blocks) != surface[:, None, :, None]).any(axis=(1, 3))
    for axis in (0, 1):
        change = np.diff(face, axis=axis) != 0
        mixed |= np.insert(change, 0, False, axis) | np.insert(change, change.shape[axis], False, axis)

    def rays_of_mixed(image: np.ndarray) -> np.ndarray:  # [..., H * samples, W * samples] -> [..., M * samples**2]
        tiles = image.reshape(*image.shape[:-2], *blocks).swapaxes(-3, -2)[..., mixed, :, :]
        return tiles.reshape(*image.shape[:-2], -1)

    chosen = [rays_of_mixed(image) for image in (directions, depth, met)]
    fine_colour, _ = shade(fine, surfaces, scene.poses[frame, :3, 3], *chosen)
    colour[mixed] = fine_colour.reshape(-1, samples**2, 3).mean(axis=1)


# Rays


def rays(scene: Scene, frame: int) -> np.ndarray:  # float64 [3, H, W]
    """World directions of the pixels' rays, of length 1 along the camera's z axis: the distance along one is depth."""
    fx, fy, cx, cy = scene.intrinsic[0, 0], scene.intrinsic[1, 1], scene.intrinsic[0, 2], scene.intrinsic[1, 2]
    x, y = (np.arange(scene.width) - cx) / fx, (np.arange(scene.height) - cy) / fy
    turn = scene.poses[frame, :3, :3]
    across, down = turn[:, 0, None] * x + turn[:, 2, None], turn[:, 1, None] * y
    directions = across[:, None, :] + down[:, :, None]
    return np.where(directions == 0, 1e-12, directions)  # exact zeros would divide to NaN on a box's side


def cast(
    scene: Scene,
    surfaces: Surfaces,
    frame: int,
    directions: np.ndarray,  # [3, H, W]
) -> tuple[np.ndarray, np.ndarray]:  # [H, W] of the directions' dtype, int64 [H, W]
    """Depth and surface that each pixel's ray meets first."""
    eye = scene.poses[frame, :3, 3]
    depth, surface = cast_room(scene, directions, eye)
    for i, window in enumerate(pixel_windows(scene, surfaces, frame), start=6):
        if window is not None:
            near = hit_box(surfaces, i, directions[:, *window], eye)
            closer = near < depth[window]
            np.copyto(depth[window], near, where=closer)
            np.copyto(surface[window], i, where=closer)
    return depth, surface


def cast_room(scene: Scene, directions: np.ndarray, eye: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth [H, W] and face [H, W] where rays that start inside the room leave it."""
    half = np.array(scene.room) / 2
    inside = eye - (0, 0, half[2])
    if (np.abs(inside) >= half).any():
        raise ValueError(f"scene {scene.id}: the camera must stay inside the room, got {eye.round(3).tolist()} m")
    depth, face = np.full_like(directions[0], np.inf), np.zeros(directions.shape[1:], np.int64)
    for axis, (d, h, at) in enumerate(zip(directions, half.tolist(), inside.tolist(), strict=True)):
        leave = (np.copysign(h, d) - at) / d
        nearer = leave < depth
        np.copyto(depth, leave, where=nearer)
        np.copyto(face, 2 * axis + (d > 0), where=nearer)
    return depth, face


def hit_box(surfaces: Surfaces, i: int, directions: np.ndarray, eye: np.ndarray) -> np.ndarray:  # [3, h, w] -> [h, w]
    """Depth where rays enter box `i`, infinite where they miss it (Kay and Kajiya's slabs, in the box's own frame)."""
    # Python floats: a NumPy scalar would turn float32 rays into float64.
    (c, s), half = surfaces.turn[:, i].tolist(), surfaces.half[:, i].tolist()
    x, y, z = (eye - surfaces.centre[:, i]).tolist()
    d = (c * directions[0] + s * directions[1], c * directions[1] - s * directions[0], directions[2])
    enter = leave = None
    for at, along, extent in zip((c * x + s * y, c * y - s * x, z), d, half, strict=True):
        inverse = 1.0 / np.where(along == 0, 1e-12, along)
        middle, reach = -at * inverse, extent * np.abs(inverse)
        enter = middle - reach if enter is None else np.maximum(enter, middle - reach)
        leave = middle + reach if leave is None else np.minimum(leave, middle + reach)
    return np.where((enter <= leave) & (enter > NEAR), enter, np.inf)


def pixel_windows(scene: Scene, surfaces: Surfaces, frame: int) -> list[tuple[slice, slice] | None]:
    """Rows and columns that each part can cover; None for parts out of view. Behind the camera's plane: any pixel."""
    corner = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]).T[:, :, None]  # [3, 8, 1]
    x, y, z = corner * surfaces.half[:, None, 6:]
    c, s = surfaces.turn[:, 6:]
    world = np.stack([c * x - s * y, s * x + c * y, z]) + surfaces.centre[:, None, 6:]
    local = np.einsum("ji,jkp->ikp", scene.poses[frame, :3, :3], world - scene.poses[frame, :3, 3, None, None])
    u, v, z = np.einsum("ij,jkp->ikp", scene.intrinsic, local)
    ahead, crosses = z.max(axis=0) > NEAR, z.min(axis=0) <= NEAR
    z = np.maximum(z, NEAR)
    size = np.array([[scene.width], [scene.height]])
    low = np.clip(np.floor(np.stack([(u / z).min(0), (v / z).min(0)])), 0, size)
    high = np.clip(np.ceil(np.stack([(u / z).max(0), (v / z).max(0)])) + 1, 0, size)
    low, high = np.where(crosses, 0, low).astype(int), np.where(crosses, size, high).astype(int)
    seen = ahead & (low < high).all(axis=0)
    return [
        (slice(top, bottom), slice(left, right)) if visible else None
        for visible, (left, top), (right, bottom) in zip(seen, low.T, high.T, strict=True)
    ]


# Colour


def shade(
    scene: Scene,
    surfaces: Surfaces,
    eye: np.ndarray,  # [3] metres
    directions: np.ndarray,  # [3, N]
    depth: np.ndarray,  # [N] metres
    surface: np.ndarray,  # int64 [N]
) -> tuple[np.ndarray, np.ndarray]:  # float64 [N, 3], int64 [N]
    """Colours, about 0 .. 1, of the points that rays meet, and which face of which surface each point lies on."""
    points = eye[:, None] + directions * depth
    cos, sin = surfaces.turn[:, surface]
    x, y, z = points - surfaces.centre[:, surface]
    local, half = np.stack([cos * x + sin * y, cos * y - sin * x, z]), surfaces.half[:, surface]
    axis = (np.abs(local) / half).argmax(axis=0)
    side = np.sign(np.take_along_axis(local, axis[None], 0)[0])
    side[surface < 6] *= -1  # the room's faces look inwards
    across, along = side * (axis == 0), side * (axis == 1)
    normal = np.stack([cos * across - sin * along, sin * across + cos * along, side * (axis == 2)])
    slant = np.abs((normal * directions).sum(0)) / np.sqrt((directions**2).sum(0))
    span = depth / scene.intrinsic[0, 0] / np.maximum(slant, 0.15)  # metres of the surface in one pixel
    grained = surfaces.pattern[surface] == list(PATTERNS).index("wood")
    share = pattern_share(surfaces, surface, *face_coordinates(local, half, axis, grained), span)[:, None]
    first, second = surfaces.colours[:, surface]
    light = lamp(scene, points, normal) * nearness(scene, points, local, half, axis, surface)
    light += surfaces.glow[surface] * (1 - light)
    return (first + (second - first) * share) * light[:, None], 3 * surface + axis


def face_coordinates(
    local: np.ndarray, half: np.ndarray, axis: np.ndarray, grained: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Metres (u, v), each [N], on the face: v is height, or u the longer side where the face is level or grained."""
    u, v = np.where(axis == 0, local[1], local[0]), np.where(axis == 2, local[1], local[2])
    across, along = np.where(axis == 0, half[1], half[0]), np.where(axis == 2, half[1], half[2])
    swap = (along > across) & ((axis == 2) | grained)
    return np.where(swap, v, u), np.where(swap, u, v)


def lamp(scene: Scene, points: np.ndarray, normal: np.ndarray) -> np.ndarray:  # [3, N], [3, N] -> [N]
    """Lambert light of one lamp below the ceiling, and a sky-like base that favours what looks up."""
    at = np.array([0.15 * scene.room[0], -0.12 * scene.room[1], scene.room[2] - 0.25])
    towards = at[:, None] - points
    square_distance = (towards**2).sum(0)
    facing = np.maximum((normal * towards).sum(0), 0) / np.sqrt(square_distance)
    return 0.64 + 0.1 * normal[2] + 0.08 * normal[0] + 0.75 * facing / (1 + square_distance / 3.4**2)


def nearness(
    scene: Scene, points: np.ndarray, local: np.ndarray, half: np.ndarray, axis: np.ndarray, surface: np.ndarray
) -> np.ndarray:  # [N]
    """Darkening, 0 .. 1, in the room's corners, of the floor around furniture, and of furniture near the floor."""
    factor = np.ones(len(surface))
    upright = np.flatnonzero((surface >= 6) & (axis != 2))
    factor[upright] -= 0.22 * np.exp(-np.maximum(points[2, upright], 0) / 0.12)
    faces = np.flatnonzero(surface < 6)
    gap = half[:, faces] - np.abs(local[:, faces])
    gap[axis[faces], np.arange(len(faces))] = np.inf  # the face itself
    factor[faces] *= 1 - 0.22 * np.exp(-gap / 0.25).sum(0)
    floor = np.flatnonzero(surface == FACES.index("floor"))
    for thing in scene.objects:
        if thing.centre[2] - thing.size[2] / 2 < 0.3:
            away = footprint_distance(thing, points[:2, floor].T)
            factor[floor] *= 1 - 0.45 * np.exp(-away / 0.12)
    return factor


def pattern_share(
    surfaces: Surfaces, surface: np.ndarray, u: np.ndarray, v: np.ndarray, span: np.ndarray
) -> np.ndarray:  # float64 [N]
    """How far each point's colour is from its finish's first towards its second; u, v and span [N] are metres."""
    code, period, offset = surfaces.pattern[surface], surfaces.period[surface], surfaces.offset[:, surface]
    u, v, span, share = u / period, v / period, span / period, np.zeros(len(surface))
    for i, pattern in enumerate(PATTERNS.values()):
        chosen = np.flatnonzero(code == i)
        share[chosen] = pattern(u[chosen], v[chosen], offset[:, chosen], span[chosen])
    return share
