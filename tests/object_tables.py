"""Object tables straight from what a demo scene says of itself: exact boxes, no point maps, no estimate."""

import numpy as np

from spatialprobe.engine.demo.render import render_clip
from spatialprobe.engine.demo.scenes import Scene
from spatialprobe.engine.lifting.objects import ObjectTable


def lifted_from_world(scene: Scene) -> np.ndarray:  # float64 [4, 4]
    """Scene's world to the lifted frame: below the first camera on the floor, +y where it looks."""
    pose = scene.poses[0]
    forward = pose[:2, 2] / np.linalg.norm(pose[:2, 2])
    turn = np.array([[forward[1], -forward[0], 0], [forward[0], forward[1], 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = turn, -turn @ (pose[0, 3], pose[1, 3], 0)
    return matrix


def table_of_scene(scene: Scene, *, samples: int = 8) -> ObjectTable:
    """All objects that some view shows, each with its exact box; all of them complete and whole wherever seen."""
    clip, change = render_clip(scene), lifted_from_world(scene)
    things = [o for o in scene.objects if (clip.instance == o.id).any()]
    poses, n, v = change @ scene.poses, len(things), scene.frames
    camera = np.linalg.inv(scene.intrinsic)
    rows, columns = np.mgrid[: scene.height, : scene.width]
    rays = np.stack([columns, rows, np.ones_like(rows)], -1) @ camera.T  # [H, W, 3]
    points = np.einsum("vij,hwj->vhwi", poses[:, :3, :3], rays) * clip.depth[..., None] + poses[:, None, None, :3, 3]
    centre, extent, yaw = np.zeros((n, 3)), np.zeros((n, 3)), np.zeros(n)
    pixels, nearest, box = np.zeros((n, v), np.int64), np.full((n, v), np.inf), np.full((n, v, 4), np.nan)
    for i, thing in enumerate(things):
        axis = change[:3, :3] @ (np.cos(thing.yaw), np.sin(thing.yaw), 0)
        angle, (width, depth, height) = np.arctan2(axis[1], axis[0]), thing.size
        if depth > width:
            angle, width, depth = angle + np.pi / 2, depth, width
        centre[i] = change[:3, :3] @ thing.centre + change[:3, 3]
        extent[i], yaw[i] = (width, depth, height), (angle + np.pi / 2) % np.pi - np.pi / 2
        for f in range(v):
            there = np.argwhere(clip.instance[f] == thing.id)
            pixels[i, f] = len(there)
            if len(there):
                seen = points[f][tuple(there.T)]
                nearest[i, f] = np.linalg.norm(seen - poses[f, :3, 3], axis=1).min()
                box[i, f] = (*there.min(0)[::-1], *there.max(0)[::-1])
    rng = np.random.default_rng(0)
    uv = np.stack([rng.integers(scene.width, size=(v, samples)), rng.integers(scene.height, size=(v, samples))], -1)
    at = (np.arange(v)[:, None], uv[..., 1], uv[..., 0])
    return ObjectTable(
        scene.id,
        (scene.height, scene.width),
        True,
        "poses",
        1.0,
        tuple(o.kind for o in things),
        frames=np.arange(v),
        poses=poses,
        intrinsic=np.broadcast_to(scene.intrinsic, (v, 3, 3)),
        ids=np.array([o.id for o in things], np.int64),
        centre=centre,
        extent=extent,
        yaw=yaw,
        complete=np.ones((n, 3), bool),
        pixels=pixels,
        whole=(pixels > 0).astype(float),
        nearest=nearest,
        box=box,
        sample_pixels=uv,
        sample_points=points[at],
        sample_ids=clip.instance[at].astype(np.int64),
    )
