"""The VAE's memory layout is an option of the spec, and its values stay within rounding."""

import pytest
import torch

from spatialprobe.engine.job import Job
from spatialprobe.engine.resolve import resolve


def loaded(wan_path, tmp_path, value: str):
    job = {"clips": "clips", "model": str(wan_path), "out": str(tmp_path / "store"), "layers": [0], "window": 9}
    found = resolve(Job.from_words(job | {"options": {"size": "64x96", "vae_channels_last": value}}))
    found.adapter.load(1, torch.device("cpu"), torch.float32, tmp_path)
    return found


@torch.inference_mode()
def test_channels_last_is_in_the_spec_and_gives_the_same_latents_but_for_rounding(wan_path, tmp_path):
    plain, last = (loaded(wan_path, tmp_path, value) for value in ("false", "true"))
    assert (plain.spec.options["vae_channels_last"], last.spec.options["vae_channels_last"]) == (False, True)
    assert plain.spec != last.spec
    layouts = [
        [
            m.weight.is_contiguous(memory_format=torch.channels_last_3d)
            for m in found.adapter.vae.modules()
            if isinstance(m, torch.nn.Conv3d) and m.weight.shape[1] > 1 and m.weight[0, 0].numel() > 1
        ]
        for found in (plain, last)
    ]
    assert not any(layouts[0])
    assert all(layouts[1])
    assert len(layouts[1]) > 5
    plan = plain.adapter.plan(9, tuple(range(9)))
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (1, 9, 64, 96, 3), dtype=torch.uint8, generator=generator)
    want, got = (found.adapter.encode({"video": video}, plan) for found in (plain, last))
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_it_must_be_true_or_false(wan_path, tmp_path):
    with pytest.raises(ValueError, match="option vae_channels_last must be bool, got 'auto'"):
        loaded(wan_path, tmp_path, "auto")
