"""Pixels at outlines whose depth is blurred into that of what is beside them, as estimated depth often is: they are on
neither surface.

It knows one view's inverse depth and object ids. A blurred step is told from a sharp one by its neighbours: depth goes
on changing in its direction on both sides of it, and far less a few pixels away.
"""

import numpy as np

REACH = 6  # pixels on either side of an outline that a blur may reach: twice the deviation of one of 3 pixels
SPREAD = 0.4  # of the step across the outline, that the steps beside it are at least: .6 from a deviation of 1 pixel on
STEEPER = 2.0  # times the surface's own slope, by which a step across the outline is none of the surface
STEP = 0.5  # of a pixel's footprint: smaller steps are not looked at
FADED = 0.1  # of the step across the outline: where steps are smaller, its blur ends


def blurred(
    inverse: np.ndarray,  # float32 [H, W] 1 / depth, 0 where it is not known
    objects: np.ndarray,  # int [H, W]
    footprint: tuple[float, float],  # width and height of a pixel at distance 1
) -> np.ndarray:  # bool [H, W]
    """Which pixels are."""
    out = np.zeros(inverse.shape, bool)
    along_rows(inverse, objects, footprint[0], out)
    along_rows(inverse.T, objects.T, footprint[1], out.T)
    return out


def along_rows(inverse: np.ndarray, objects: np.ndarray, size: float, out: np.ndarray) -> None:
    """Marks them in `out`, on both sides of each outline between a pixel and the one to its right."""
    if inverse.shape[1] <= 2 * REACH + 1:
        return
    row, left = np.nonzero(objects[:, REACH : -REACH - 1] != objects[:, REACH + 1 : -REACH])
    left += REACH
    around = inverse[row[:, None], left[:, None] + np.arange(-REACH, REACH + 2)]  # [M, 2 REACH + 2]
    steps = np.diff(around, axis=1)
    steps *= np.sign(steps[:, REACH, None])  # that across the outline is the middle one
    step, own = steps[:, REACH], np.maximum(steps[:, 0], steps[:, -1])
    spread = np.minimum(steps[:, REACH - 1], steps[:, REACH + 1]) >= SPREAD * step
    nearest, farthest = (of(around[:, REACH], around[:, REACH + 1]) for of in (np.maximum, np.minimum))
    found = spread & (farthest > 0) & (step > STEEPER * own) & (step > STEP * size * nearest)
    row, left, steps, faded = row[found], left[found], steps[found], (own + FADED * step)[found]
    for sign, at in ((-1, left), (1, left + 1)):
        going = np.ones(len(row), bool)
        for away in range(REACH):
            out[row[going], (at + sign * away)[going]] = True
            going &= steps[:, REACH + sign * (away + 1)] > faded
