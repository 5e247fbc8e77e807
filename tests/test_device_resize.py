"""Frames resized on a device have the bits that Pillow gives them on the CPU."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from spatialprobe.engine.clips import images
from spatialprobe.engine.device import resize as device_resize
from spatialprobe.engine.device.resize import FILTERS, columns_first, resize_on_device


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def by_pillow(frames: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(frame).resize(size[::-1], resample)) for frame in frames])


@pytest.mark.parametrize("resample", FILTERS, ids=lambda f: f.name)
def test_every_size_up_and_down_has_pillows_bits(resample):
    sizes = random.Random(int(resample))
    for case in range(150):
        height, width, *size = (sizes.randint(1, 90) for _ in range(4))
        size = [height, size[1]] if case % 10 == 0 else [size[0], width] if case % 10 == 1 else size
        frames = noise((2, height, width, 3), case)
        if case % 3 == 0:  # only black and white: the lobes of a filter pass 0 and 255
            frames = (frames > 127).astype(np.uint8) * 255
        got = resize_on_device(torch.from_numpy(frames), tuple(size), resample).numpy()
        np.testing.assert_array_equal(got, by_pillow(frames, tuple(size), resample), err_msg=f"{frames.shape} {size}")


@pytest.mark.parametrize(
    ("source", "size"),
    [((540, 960), (480, 832)), ((1080, 1920), (480, 832)), ((2160, 1216), (480, 832)), ((97, 211), (480, 720))],
)
def test_real_sizes_have_pillows_bits(source, size):
    frames = noise((1, *source, 3), 7)
    got = resize_on_device(torch.from_numpy(frames), size, Image.Resampling.LANCZOS).numpy()
    np.testing.assert_array_equal(got, by_pillow(frames, size, Image.Resampling.LANCZOS))


def test_which_side_comes_first_changes_values():
    """So that the other tests would notice a wrong order."""
    x, resample = torch.from_numpy(noise((1, 90, 40, 3), 1)), Image.Resampling.BICUBIC
    rows_first = device_resize._resample(device_resize._resample(x, 2, 35, resample), 1, 50, resample)
    columns = device_resize._resample(device_resize._resample(x, 1, 50, resample), 2, 35, resample)
    assert not torch.equal(rows_first, columns)
    want = columns if columns_first((90, 40), (50, 35)) else rows_first
    np.testing.assert_array_equal(want.numpy(), by_pillow(x.numpy(), (50, 35), resample))


def test_frames_are_taken_in_pieces(monkeypatch):
    frames = torch.from_numpy(noise((5, 33, 47, 3), 2))
    whole = resize_on_device(frames, (21, 60), Image.Resampling.LANCZOS)
    monkeypatch.setattr(device_resize, "CHUNK", 2 * 33 * 60 * 3)
    assert torch.equal(resize_on_device(frames, (21, 60), Image.Resampling.LANCZOS), whole)


@pytest.mark.parametrize(
    ("frames", "size", "resample", "match"),
    [
        (torch.zeros(1, 4, 4, 3), (2, 2), Image.Resampling.BOX, "wanted uint8 frames"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), (0, 2), Image.Resampling.BOX, "at least 1x1"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), (2, 2), Image.Resampling.NEAREST, "resample must be one of BOX"),
    ],
)
def test_what_cannot_be_resized(frames, size, resample, match):
    with pytest.raises(ValueError, match=match):
        resize_on_device(frames, size, resample)


def test_a_pillow_that_resizes_otherwise_is_refused(monkeypatch):
    device = torch.device("cpu")
    images.check_against_pillow((30, 20), (17, 29), Image.Resampling.BICUBIC, device)
    monkeypatch.setattr(device_resize, "PRECISION", 6)
    device_resize._taps.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"does not resize \(31, 20\) to \(17, 29\) .* --resize host"):
            images.check_against_pillow((31, 20), (17, 29), Image.Resampling.BICUBIC, device)
    finally:
        device_resize._taps.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("resample", FILTERS, ids=lambda f: f.name)
def test_a_gpu_has_pillows_bits(resample):
    frames = noise((3, 211, 397, 3), 3)
    got = resize_on_device(torch.from_numpy(frames).cuda(), (120, 208), resample).cpu().numpy()
    np.testing.assert_array_equal(got, by_pillow(frames, (120, 208), resample))
