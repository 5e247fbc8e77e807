"""Synthetic scenes as an instance head would embed them: a few dozen objects seen from several views.

A camera on an arc looks into a room of two walls, a floor and ellipsoids. A cell's embedding is the mean over its
sub-pixels of its instance's prototype, a drift per (instance, view) and a smooth field over the surface, plus noise; a
few cells mix several instances. Unit norm, float32.
"""

from dataclasses import dataclass

import numpy as np

VIEWS = 8
GRIDS = {1536: (12, 16), 6144: (24, 32), 12480: (30, 52), 49920: (60, 104), 99456: (84, 148)}


@dataclass(frozen=True)
class Noise:
    """Norms of the perturbations of a unit prototype, and the share of mixed cells."""

    drift: float
    field: float
    noise: float
    mixed: float


LEVELS = {
    "easy": Noise(0.05, 0.10, 0.06, 0.02),
    "mid": Noise(0.12, 0.22, 0.12, 0.05),
    "hard": Noise(0.22, 0.40, 0.20, 0.10),
}


@dataclass(frozen=True)
class Scene:
    embeddings: np.ndarray  # float32 [S * H * W, D], unit norm
    truth: np.ndarray  # int64 [S, H, W], instance ids from 1


def make_scene(points: int, dims: int = 32, level: str = "mid", seed: int = 0, samples: int = 3) -> Scene:
    """A scene of 8 views with `points` cells in all, `samples` x `samples` sub-pixels each."""
    height, width = GRIDS[points]
    rng = np.random.default_rng(seed)
    instances = int(rng.integers(23, 43))
    ids, surface = _render(rng, instances, height * samples, width * samples)
    prototypes = _prototypes(rng, instances + 1, dims)
    noise = LEVELS[level]
    drift = rng.normal(size=(VIEWS, instances + 1, dims)) * noise.drift / np.sqrt(dims)
    waves, phases = rng.normal(size=(3, 16)) * 1.3, rng.uniform(0, 2 * np.pi, (instances + 1, 16))
    mix = rng.normal(size=(16, dims)) * noise.field / np.sqrt(8 * dims)
    cells = np.empty((VIEWS, height, width, dims))
    for view in range(VIEWS):
        for row in range(height):
            strip = slice(row * samples, (row + 1) * samples)
            seen = ids[view, strip].ravel()
            field = np.cos(surface[view, strip].reshape(-1, 3) @ waves + phases[seen]) @ mix
            fine = prototypes[seen] + drift[view, seen] + field
            cells[view, row] = fine.reshape(samples, width, samples, dims).mean((0, 2))
    embeddings = cells.reshape(-1, dims) + rng.normal(size=(points, dims)) * noise.noise / np.sqrt(dims)
    mixed = np.flatnonzero(rng.random(points) < noise.mixed)
    shares = rng.dirichlet([0.6] * 3, len(mixed))
    parts = prototypes[rng.integers(1, instances + 1, (len(mixed), 3))]
    embeddings[mixed] = (parts * shares[..., None]).sum(1) + rng.normal(size=(len(mixed), dims)) * 0.5 / np.sqrt(dims)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    middle = samples // 2
    return Scene(embeddings.astype(np.float32), ids[:, middle::samples, middle::samples].copy())


def _prototypes(rng: np.random.Generator, count: int, dims: int) -> np.ndarray:
    """Unit vectors in 12 dimensions of falling spread; a quarter of them resemble another one."""
    rank = min(12, dims)
    basis = np.linalg.qr(rng.normal(size=(dims, rank)))[0] * np.arange(1, rank + 1) ** -0.35
    prototypes = rng.normal(size=(count, rank)) @ basis.T
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    for k in range(4, count):
        if rng.random() < 0.25:
            like = prototypes[rng.integers(1, k)]
            prototypes[k] = 0.75 * like + np.sqrt(1 - 0.75**2) * prototypes[k]
            prototypes[k] /= np.linalg.norm(prototypes[k])
    return prototypes


def _render(rng: np.random.Generator, instances: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Instance ids [S, height, width] (1 floor, 2 and 3 walls, ellipsoids from 4) and surface points [S, h, w, 3]."""
    things = instances - 3
    radius = np.clip(np.exp(rng.normal(np.log(0.42), 0.45, things)), 0.15, 1.3)
    lift = radius * rng.uniform(0.6, 1.0, things) + rng.choice([0, 0, 0.8, 1.5], things)
    centre = np.stack([rng.uniform(-3.4, 3.4, things), rng.uniform(0.2, 4.5, things), lift], 1)
    axes = rng.uniform(0.6, 1.6, (things, 3)) * radius[:, None]
    planes = [((0, 0, 1), 0.0, 1), ((0, 1, 0), 5.2, 2), ((1, 0, 0), 4.0, 3), ((-1, 0, 0), 4.0, 3)]
    x, y = np.meshgrid(np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2)
    start = rng.uniform(-0.5, 0.5)
    ids, surface = [], []
    for view in range(VIEWS):
        angle = start + 0.11 * view
        eye = np.array([3.0 * np.sin(angle), -2.6 * np.cos(angle) - 0.8, 1.7 + 0.05 * view])
        forward = np.array([0.4 * np.sin(1.7 * angle), 2.2, 0.8]) - eye
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, [0, 0, 1.0])
        right /= np.linalg.norm(right)
        up = np.cross(right, forward)
        rays = ((x[..., None] * right + y[..., None] * up) / (0.45 * width) + forward).reshape(-1, 3)
        nearest, seen = np.full(len(rays), 1e9), np.ones(len(rays), np.int64)

        def hit(distance, where, instance, nearest=nearest, seen=seen):
            closer = where & (distance > 1e-3) & (distance < nearest)
            nearest[closer], seen[closer] = distance[closer], instance

        for normal, offset, instance in planes:
            hit((offset - eye @ normal) / (rays @ np.array(normal) + 1e-12), True, instance)
        for k in range(things):
            origin, direction = (eye - centre[k]) / axes[k], rays / axes[k]
            a, b = (direction**2).sum(1), direction @ origin
            root = b * b - a * (origin @ origin - 1)
            hit((-b - np.sqrt(np.maximum(root, 0))) / a, root > 0, 4 + k)
        ids.append(seen.reshape(height, width))
        surface.append(np.clip(eye + rays * nearest[:, None], -8, 8).reshape(height, width, 3))
    return np.stack(ids), np.stack(surface)
