"""Boxes out of made-up sights of one, of 1 x .5 x .8 m, of which front, right side and top are seen."""

from dataclasses import replace

import numpy as np
import pytest

from spatialprobe.engine.lifting.boxes import Seen, box_of
from spatialprobe.engine.lifting.lift import IMAGE_CUTS, Sights, best_whole

SIZE, PIXEL = (1.0, 0.5, 0.8), 0.01
X, Y, Z = np.eye(3, dtype=np.float32)


def middles(length: float, step: float) -> np.ndarray:
    """Of pixels that cover a side."""
    return (np.arange(round(length / step)) + 0.5) * step


def grid(x, y, z) -> np.ndarray:  # float32 [N, 3]
    return np.stack(np.meshgrid(x, y, z), -1).reshape(-1, 3).astype(np.float32)


def box_seen(step: float = PIXEL) -> Seen:
    """`step`: on the right side, away from the camera; that is how slanted it is."""
    x, y, z = (middles(length, at) for length, at in zip(SIZE, (PIXEL, step, PIXEL), strict=True))
    faces = [(grid(x, 0, z), -Y), (grid(SIZE[0], y, z), X), (grid(x, y, SIZE[2]), Z)]
    outline = [  # edges, a step outwards
        (grid(x[0], 0, z), -PIXEL * X),
        (grid(SIZE[0], y[-1], z), step * Y),
        (grid(x, 0, z[0]), -PIXEL * Z),
        (grid(SIZE[0], y, z[0]), -PIXEL * Z),
    ]
    points, normals = (np.concatenate(parts) for parts in zip(*((p, p * 0 + n) for p, n in faces), strict=True))
    edges, along = (np.concatenate(parts) for parts in zip(*((p, p * 0 + a) for p, a in outline), strict=True))
    pixels = (np.full(len(of), PIXEL, np.float32) for of in (points, edges))
    return Seen(
        points=points,
        normals=normals,
        broad=normals,
        pixel=next(pixels),
        rays=points + np.float32((0, 3, 0)),
        edges=edges,
        ends=np.ones(len(edges), bool),
        touches=along[:, 2] < 0,
        along=along,
        edge_pixel=next(pixels),
        whole=1.0,
        differ=0.0,
    )


def test_a_box_that_stands_is_measured_beyond_its_last_pixels():
    for step in (PIXEL, 0.05):  # of which half lies beyond the last pixel's middle
        box = box_of(box_seen(step))
        assert box.complete.all()
        np.testing.assert_allclose(box.extent, SIZE, atol=1e-3)
        np.testing.assert_allclose(box.centre, (0.5, 0.25, 0.4), atol=1e-3)


def test_an_end_in_a_long_step_is_not_known():
    assert box_of(box_seen(0.125)).complete.tolist() == [True, False, True]  # half of it is an eighth of the depth


def test_what_neither_stands_nor_hangs_may_go_on():
    seen = box_seen()
    assert not box_of(replace(seen, touches=seen.touches & False)).complete.any()


@pytest.mark.parametrize("cut", [-X, Y, -Z])
def test_an_object_cut_at_an_end_seen_nowhere_may_go_on_in_any_direction(cut):
    seen = box_seen()
    assert not box_of(replace(seen, ends=seen.along @ cut <= 0)).complete.any()


def test_an_object_of_which_much_is_hidden_may_go_on():
    seen = box_seen()
    assert box_of(replace(seen, whole=0.81)).complete.all()
    assert not box_of(replace(seen, whole=0.79)).complete.any()


def test_axes_along_which_depth_is_astray_are_not_known():
    """The camera is 3 m away along y: three times 1% of 3.2 m is more than a tenth of .5 m; across, it is not."""
    seen = box_seen()
    assert box_of(replace(seen, differ=0.01)).complete.tolist() == [True, False, True]
    assert box_of(replace(seen, differ=0.004)).complete.all()


def test_views_whose_image_cuts_an_object_do_not_show_it_whole():
    pixels, whole = np.array([[900, 1000, 400]]), np.array([[0.7, 0.95, 1.0]])  # the last shows less than half of it
    cut = np.array([[0, IMAGE_CUTS + 0.01, 0]])
    sights = Sights(pixels, whole, whole * 0, np.zeros((1, 3, 4)), cut, [])
    assert best_whole(sights, 0) == 0.7
    assert best_whole(replace(sights, cut=cut * 0), 0) == 0.95
