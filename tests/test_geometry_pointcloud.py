"""PLY files byte by byte, and colours of depth."""

import struct

import numpy as np
import pytest

from spatialprobe.probes.pointcloud import RAMP, colour_depth, write_ply

HEADER = b"""ply
format binary_little_endian 1.0
element vertex %d
property float x
property float y
property float z
property uchar red
property uchar green
property uchar blue
end_header
"""


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f4"])
def test_a_ply_file_holds_the_header_and_a_record_per_point(tmp_path, count, dtype):
    rng = np.random.default_rng(count)
    points, colours = rng.normal(size=(count, 3)).astype(dtype), rng.integers(0, 256, (count, 3), np.uint8)
    write_ply(tmp_path / "cloud.ply", points, colours)
    records = b"".join(struct.pack("<fffBBB", *p, *c) for p, c in zip(points.tolist(), colours.tolist(), strict=True))
    assert (tmp_path / "cloud.ply").read_bytes() == HEADER % count + records
    assert [p.name for p in tmp_path.iterdir()] == ["cloud.ply"]


def test_a_ply_file_is_not_written_of_what_is_no_cloud(tmp_path):
    path, colours = tmp_path / "cloud.ply", np.zeros((4, 3), np.uint8)
    with pytest.raises(ValueError, match=r"points \[N, 3\].*got \[4, 2\] and uint8 \[4, 3\]"):
        write_ply(path, np.zeros((4, 2)), colours)
    with pytest.raises(ValueError, match=r"got \[4, 3\] and float64 \[4, 3\]"):
        write_ply(path, np.zeros((4, 3)), np.zeros((4, 3)))
    with pytest.raises(ValueError, match="2 of 4 are not"):
        write_ply(path, np.array([[0, 0, 0], [np.nan, 0, 0], [1e39, 0, 0], [1, 1, 1]]), colours)
    assert not path.exists()


def test_depth_is_coloured_evenly_in_its_inverse():
    near, far = 1.0, 4.0
    inverse = np.linspace(1 / far, 1 / near, len(RAMP))
    np.testing.assert_array_equal(colour_depth(1 / inverse, near, far), RAMP)
    np.testing.assert_array_equal(colour_depth([0.5, 9.0], near, far), [RAMP[-1], RAMP[0]])
    between = 1 / ((inverse[0] + inverse[1]) / 2)
    np.testing.assert_array_equal(colour_depth(between, near, far), ((RAMP[0] + RAMP[1]) / 2).round())


def test_depth_that_is_unknown_is_grey_and_does_not_count_for_the_range():
    depth = np.array([[1.0, np.nan], [np.inf, 0.0]])
    assert colour_depth(depth).tolist() == [[RAMP[0].tolist(), [127] * 3], [[127] * 3] * 2]
    assert (colour_depth(np.zeros((2, 2))) == 127).all()
    known = np.linspace(1, 5, 100)
    low, high = np.percentile(known, [2, 98])
    expected = colour_depth(known, low, high)
    np.testing.assert_array_equal(colour_depth(np.append(known, np.nan))[:-1], expected)


@pytest.mark.parametrize(("near", "far"), [(2.0, 1.0), (0.0, 1.0), (-1.0, None)])
def test_a_range_that_is_none_is_refused(near, far):
    with pytest.raises(ValueError, match="near and far must be positive and in this order"):
        colour_depth(np.ones((2, 2)), near, far)
