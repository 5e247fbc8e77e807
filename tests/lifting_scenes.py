"""Demo scenes as `lift` takes them, without their colours, and what is exactly true of their objects."""

from dataclasses import dataclass, replace

import numpy as np
from object_tables import lifted_from_world

from spatialprobe.engine.demo.furnish import SceneObject
from spatialprobe.engine.demo.render import cast, rays, surfaces_of
from spatialprobe.engine.demo.scenes import Scene, make_scene
from spatialprobe.engine.lifting.lift import Lifted, lift

UP = np.array([0.0, 0.0, 1.0])


@dataclass(frozen=True)
class Views:
    scene: Scene
    depth: np.ndarray  # float32 [F, H, W]
    masks: np.ndarray  # int32 [F, H, W]


def views_of(scene: Scene) -> Views:
    surfaces, depth, masks = surfaces_of(scene), [], []
    for f in range(scene.frames):
        z, surface = cast(scene, surfaces, f, rays(scene, f))
        depth.append(z.astype(np.float32))
        masks.append(surfaces.instance[surface].astype(np.int32))
    return Views(scene, np.stack(depth), np.stack(masks))


def small_scene(seed: int, frames: int = 17) -> Scene:
    return make_scene(seed, frames=frames, height=147, width=259)


def lift_views(views: Views, **changes) -> Lifted:
    """With the scene's cameras, kinds as names, and up as the demo has it."""
    scene = views.scene
    given = {
        "clip": scene.id,
        "depth": views.depth,
        "extrinsic": np.linalg.inv(scene.poses)[:, :3].astype(np.float32),
        "intrinsic": np.broadcast_to(scene.intrinsic, (scene.frames, 3, 3)).astype(np.float32),
        "masks": views.masks,
        "names": {thing.id: thing.kind for thing in scene.objects},
        "frames": np.arange(scene.frames),
        "up": UP,
    } | changes
    return lift(**given)


@dataclass(frozen=True)
class Truth:
    """An object's box in the lifted frame, along its own x, y, z, which need not be longest first."""

    centre: np.ndarray
    size: np.ndarray
    yaw: float


def truth_of(scene: Scene, thing: SceneObject) -> Truth:
    change = lifted_from_world(scene)
    axis = change[:3, :3] @ (np.cos(thing.yaw), np.sin(thing.yaw), 0)
    centre = change[:3, :3] @ thing.centre + change[:3, 3]
    return Truth(centre, np.array(thing.size), float(np.arctan2(axis[1], axis[0])))


def differences(table, n: int, truth: Truth) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Of a table's box from the true one, along the true one's axes: extent [3], centre [3], which are complete [3],
    and yaw, in radians modulo a quarter turn."""
    off = float(table.yaw[n] - truth.yaw)
    crossed = abs((off + np.pi / 2) % np.pi - np.pi / 2) > np.pi / 4
    order = [1, 0, 2] if crossed else [0, 1, 2]
    c, s = np.cos(truth.yaw), np.sin(truth.yaw)
    centre = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) @ (table.centre[n] - truth.centre)
    yaw = (off + np.pi / 4) % (np.pi / 2) - np.pi / 4
    return table.extent[n][order] - truth.size, centre, table.complete[n][order], yaw


def pixel_at(scene: Scene, thing: SceneObject) -> float:
    """Metres of a pixel at the object's centre, in the mean over views."""
    return float(np.linalg.norm(scene.poses[:, :3, 3] - thing.centre, axis=1).mean() / scene.intrinsic[0, 0])


def worst_pixels(table, scene: Scene) -> tuple[float, int]:
    """The largest difference of a complete axis from the truth, in pixels, and how many axes are complete.

    Of extents, and of centres twice: each end is as far off as that at most.
    """
    worst, count = 0.0, 0
    for n, i in enumerate(table.ids.tolist()):
        thing = scene.objects[i - 1]
        extent, centre, complete, _ = differences(table, n, truth_of(scene, thing))
        off = np.maximum(np.abs(extent), 2 * np.abs(centre)) / pixel_at(scene, thing)
        worst, count = max(worst, float(off[complete].max(initial=0))), count + int(complete.sum())
    return worst, count


def alone(scene: Scene, thing: SceneObject, frame: int) -> int:
    """Pixels that the object would have in a frame if the room held nothing else."""
    single = replace(scene, objects=(replace(thing, id=1),), poses=scene.poses[frame : frame + 1])
    return int((views_of(single).masks == 1).sum())
