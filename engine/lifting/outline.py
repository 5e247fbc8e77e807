"""What one view shows of each object: its points and normals, and where its outline is the object's own end.

It knows one depth map, one mask image and a pinhole camera. Of a surface it knows neighbouring pixels alone; planes are
followed from pixel to pixel in inverse depth, in which they are linear.
"""

from dataclasses import dataclass, fields

import numpy as np

from spatialprobe.engine.lifting.blur import blurred

STEEP = 8.0  # tangent of the angle to the ray beyond which neighbouring pixels count as two surfaces: 83 degrees
NEARER = 0.01  # of the depth: a neighbour is in front only by more, since depth is that uncertain
TOUCHING = 0.02  # of the depth: a neighbour is at the object's surface, followed to it, if no farther behind
BEND, FLAT = 0.25, 0.5  # of the slope, and of that of a surface at 45 degrees: what a slope may grow by towards an edge
SUPPORT = 2  # of a pixel's 4 neighbours on its surface; a pixel of fewer is a stray one
MARGIN = 2  # pixels about a view


@dataclass(frozen=True)
class View:
    """One view, framed by 2 pixels of nothing, flat: pixel (u, v) is at (v + 2) * (W + 4) + u + 2."""

    size: tuple[int, int]  # (H, W)
    objects: np.ndarray  # int32 [P] id at each pixel, 0 for none, -1 outside the image
    inverse: np.ndarray  # float32 [P] 1 / depth, 0 where it is not known
    joined: np.ndarray  # uint8 [P] bit 0: one surface with the pixel to the right, 1: left, 2: below, 3: above
    solid: np.ndarray  # bool [P] at least SUPPORT of 4 neighbours are on its surface, and its depth is not blurred
    camera: np.ndarray  # float64 [3, 3] intrinsic inverse
    turn: np.ndarray  # float64 [3, 3] camera to lifted frame
    centre: np.ndarray  # float64 [3]

    @property
    def stride(self) -> int:
        return self.size[1] + 2 * MARGIN

    @property
    def footprint(self) -> float:
        """Width of a pixel at distance 1, along the finer axis."""
        return float(min(self.camera[0, 0], self.camera[1, 1]))

    @property
    def broad(self) -> int:
        """Pixels over which a normal is one of a surface, not of its roughness: a degree of the usual camera."""
        return max(1, round(self.size[1] / 90))

    def places(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # int64 [M] -> u, v [M]
        v, u = np.divmod(at, self.stride)
        return u - MARGIN, v - MARGIN

    def points(self, at: np.ndarray) -> np.ndarray:  # float32 [M, 3]
        """Points in the lifted frame of pixels whose depth is known."""
        u, v = self.places(at)
        rays = self.turn @ self.camera
        found = np.empty((len(at), 3), np.float32)
        for i in range(3):
            found[:, i] = (u * rays[i, 0] + v * rays[i, 1] + rays[i, 2]) / self.inverse[at] + self.centre[i]
        return found

    def distances(self, at: np.ndarray) -> np.ndarray:  # float64 [M]
        """From the camera's centre; infinite for pixels whose surface is not known, or stray."""
        u, v = self.places(at)
        square = sum((u * row[0] + v * row[1] + row[2]) ** 2 for row in self.camera.tolist())
        with np.errstate(divide="ignore"):
            return np.where(self.solid[at], np.sqrt(square) / self.inverse[at], np.inf)

    def normals(self, at: np.ndarray, reach: int = 1) -> np.ndarray:  # float32 [M, 3]
        """Unit normals towards the camera, by pixels `reach` away; NaN where none of them is on the same surface.

        A plane n x = 1 has inverse depth n K^-1 (u, v, 1), which is linear in the pixel.
        """
        across, down = self._slope(at, 1, reach, 0), self._slope(at, self.stride, reach, 1)
        u, v = self.places(at)
        plane = np.stack([across, down, self.inverse[at] - across * u - down * v], 1)
        away = plane @ np.linalg.inv(self.camera) @ self.turn.T
        return (-away / np.linalg.norm(away, axis=1, keepdims=True)).astype(np.float32)

    def _slope(self, at: np.ndarray, step: int, reach: int, axis: int) -> np.ndarray:  # float64 [M] per pixel
        here, total, count = self.inverse[at].astype(np.float64), np.zeros(len(at)), np.zeros(len(at))
        limit = reach * STEEP * self.camera[axis, axis]
        for away in (reach * step, -reach * step):
            there = np.clip(at + away, 0, len(self.inverse) - 1)
            rise = self.inverse[there] - here
            same = (self.objects[there] == self.objects[at]) & (np.abs(rise) <= limit * here)
            total += np.where(same, np.sign(away) * rise, 0)
            count += same
        with np.errstate(invalid="ignore"):
            return total / (count * reach)  # 0 / 0 is NaN


def view_of(
    depth: np.ndarray,  # float32 [H, W], 0 where it is not known
    objects: np.ndarray,  # int [H, W]
    intrinsic: np.ndarray,  # float64 [3, 3]
    pose: np.ndarray,  # float64 [4, 4] camera to lifted frame
) -> View:
    height, width = depth.shape
    inside = slice(MARGIN, -MARGIN), slice(MARGIN, -MARGIN)
    framed = np.full((height + 2 * MARGIN, width + 2 * MARGIN), -1, np.int32)
    framed[inside] = objects
    inverse = np.zeros(framed.shape, np.float32)
    np.divide(1, depth, out=inverse[inside], where=depth > 0)
    camera = np.linalg.inv(intrinsic)
    joined = np.zeros(framed.shape, np.uint8)
    for axis, bit in ((1, 0), (0, 2)):
        a, b = _halves(axis)
        near = np.maximum(inverse[a], inverse[b])
        limit = near * np.float32(STEEP * camera[1 - axis, 1 - axis])
        same = (np.abs(inverse[a] - inverse[b]) <= limit) & (framed[a] == framed[b]) & (inverse[a] > 0)
        same &= inverse[b] > 0
        joined[a] |= same.view(np.uint8) << np.uint8(bit)
        joined[b] |= same.view(np.uint8) << np.uint8(bit + 1)
    blurry = np.zeros(framed.shape, bool)
    blurry[inside] = blurred(inverse[inside], objects, (camera[0, 0], camera[1, 1]))
    neighbours = np.array([bin(bits).count("1") for bits in range(16)], np.uint8)
    return View(
        (height, width),
        framed.ravel(),
        inverse.ravel(),
        joined.ravel(),
        ((neighbours[joined] >= SUPPORT) & ~blurry).ravel(),
        camera,
        pose[:3, :3],
        pose[:3, 3],
    )


def _halves(axis: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """All pixels but the last along an axis, and all but the first."""
    all_of = slice(None)
    return ((all_of,) * axis + (slice(None, -1),), (all_of,) * axis + (slice(1, None),))


@dataclass(frozen=True)
class Outline:
    """Edges between a pixel of an object and a neighbour that is not the object's, M of them."""

    at: np.ndarray  # int64 [M] the object's pixel
    ends: np.ndarray  # bool [M] whether the object itself ends there, not the image, nor something nearer
    framed: np.ndarray  # bool [M] whether the image ends there
    touches: np.ndarray  # bool [M] whether it ends at another surface that it stands on or hangs against
    along: np.ndarray  # float32 [M, 3] a pixel's step on the surface outwards, in the lifted frame; NaN: not known

    def only(self, wanted: np.ndarray) -> "Outline":  # bool [M]
        return Outline(*(getattr(self, field.name)[wanted] for field in fields(self)))


def outline_of(view: View) -> Outline:
    """Edges of pixels whose depth is known. A neighbour of unknown depth counts as something nearer.

    A neighbour is nearer if its own surface, followed back to the object's pixel, would be in front there: a floor that
    the object stands on is not, although it is nearer in the next pixel.
    """
    found = [_edges(view, step, bit) for step, bit in ((1, 0), (-1, 1), (view.stride, 2), (-view.stride, 3))]
    return Outline(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _edges(view: View, step: int, bit: int) -> tuple[np.ndarray, ...]:
    objects, inverse = view.objects, view.inverse
    at = np.flatnonzero((objects[: -abs(step)] if step > 0 else objects[-step:]) > 0) + max(-step, 0)
    at = at[(objects[at + step] != objects[at]) & view.solid[at]]
    here, beyond = inverse[at], inverse[at + step]
    continues = (view.joined[at + step] >> bit & 1).astype(bool)
    followed = np.where(continues, 2 * beyond - inverse[at + 2 * step], beyond)  # of the neighbour, back to the pixel
    in_front = np.minimum(followed, beyond) > here * (1 + NEARER)
    framed = objects[at + step] < 0
    ends = ~framed & (beyond > 0) & ~in_front
    inner = runs_out(view, at, step, bit ^ 1)
    touches = ends & inner & (beyond > (2 * here - inverse[at - step]) * (1 - TOUCHING))
    along = np.full((len(at), 3), np.nan, np.float32)
    along[inner] = view.points(at[inner]) - view.points(at[inner] - step)
    return at, ends, framed, touches, along


def runs_out(view: View, at: np.ndarray, step: int, bit: int) -> np.ndarray:  # bool [M]
    """Whether a surface runs out to the pixel from the one inwards, and not a small step in depth: no steeper there."""
    joined, before = view.joined[at] >> bit & 1, view.joined[at - step] >> bit & 1
    here, next_, last = view.inverse[at], view.inverse[at - step], view.inverse[at - 2 * step]
    slope, slope_before = here - next_, next_ - last
    bend = np.abs(slope - slope_before)
    steeper = (bend > BEND * np.abs(slope) + FLAT * view.footprint * here) & (np.abs(slope) > np.abs(slope_before))
    return joined.astype(bool) & ~(before.astype(bool) & steeper)
