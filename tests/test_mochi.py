"""Mochi's features equal those that plain hooks take while the library's own pipeline runs, bit for bit."""

import json
import shutil

import families
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline
from diffusers.models.attention_processor import MochiAttnProcessor2_0
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from PIL import Image
from pipeline_step import only_step, sampled_until
from tiny.mochi import build_mochi

from spatialprobe.engine.adapters.mochi import Mochi
from spatialprobe.engine.presets import FAMILIES

SIZE = (32, 64)
STEP = 847
FRAMES = 13


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build_mochi(tmp_path_factory.mktemp("mochi") / "mochi-tiny")


def adapter(path, **options) -> Mochi:
    return families.make_adapter(Mochi, path, **{"size": SIZE, **options})


@pytest.fixture(scope="module")
def mochi(path, tmp_path_factory):
    loaded = adapter(path)
    loaded.load(2, families.CPU, torch.float32, tmp_path_factory.mktemp("cache"))
    return loaded


def published_schedule() -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(1000, sigmas=np.array(linear_quadratic_schedule(1000, 0.025)))
    return scheduler


@torch.inference_mode()
def library_latents(pipe, clip, size):  # -> float32 [1, Z, T, h, w]
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in clip.frames]
    video = pipe.video_processor.preprocess_video(images, height=size[0], width=size[1]).to(pipe.vae.dtype)
    latents = pipe.vae.encode(video).latent_dist.mode().float()
    mean, std = (
        torch.tensor(pipe.vae.config[k]).view(1, 12, 1, 1, 1).to(latents) for k in ("latents_mean", "latents_std")
    )
    normalised = (latents - mean) * pipe.vae.config.scaling_factor / std
    # what the pipeline does before it decodes leads back
    torch.testing.assert_close(normalised * std / pipe.vae.config.scaling_factor + mean, latents, atol=1e-5, rtol=1e-5)
    return normalised


def assert_equals_pipeline(path, cache, depth, layers, dtype, frames=FRAMES, **options):
    mine = adapter(path, **options)
    mine.load(depth, families.CPU, dtype, cache)
    clip, size = families.make_clip(frames), mine.options["size"]
    noise = families.make_noise(mine, mine.plan(frames, (0,)))
    got = families.features(mine, clip, layers, step=STEP, noise=noise)

    pipe = MochiPipeline.from_pretrained(path, torch_dtype=dtype)  # diffusers 0.37 knows no other name
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        families.aligned(part)
    if mine.options["vae_tiling"]:
        pipe.vae.enable_tiling()
    latents = library_latents(pipe, clip, size)
    share = published_schedule().sigmas[STEP]  # of the video: the schedule is inverted
    only_step(pipe, STEP)
    seen = families.hooked(
        {i: pipe.transformer.transformer_blocks[i] for i in layers},
        lambda: pipe(
            prompt=mine.options["prompt"],
            height=size[0],
            width=size[1],
            num_frames=frames,
            num_inference_steps=1000,
            guidance_scale=1.0,
            latents=share * latents + (1 - share) * noise,
            output_type="latent",
        ),
    )
    assert len(pipe.transformer.transformer_blocks) == 3
    for i in layers:
        assert torch.isfinite(got[i]).all()
        assert torch.equal(got[i].flatten(1, 3), seen[i])


@pytest.mark.parametrize(
    ("depth", "layers", "dtype", "options"),
    [
        (2, (0, 1), torch.float32, {}),  # the second is the last one loaded, not the model's last
        (3, (1, 2), torch.bfloat16, {"prompt": "a photo of the room", "frames": 1}),  # such convolutions are slow
        (1, (0,), torch.float32, {"vae_tiling": True, "size": (272, 32)}),  # tiles are 256 pixels high
    ],
)
def test_equals_hooks_on_the_running_pipeline(path, tmp_path, depth, layers, dtype, options):
    assert_equals_pipeline(path, tmp_path, depth, layers, dtype, **options)


def test_latents_that_the_config_says_nothing_about_are_normalised_as_the_class_has_it(path, tmp_path, mochi):
    video = {"video": torch.randint(0, 256, (1, 1, *SIZE, 3), generator=torch.Generator().manual_seed(3)).byte()}
    plan = mochi.plan(1, (0,))
    whole = json.loads((path / "vae/config.json").read_text())
    found = []
    for name in ("silent", "none"):
        shutil.copytree(path, tmp_path / name)
        fields = {k: v for k, v in whole.items() if not k.startswith("latents_")}
        fields |= {"latents_mean": None, "latents_std": None} if name == "none" else {}
        (tmp_path / name / "vae/config.json").write_text(json.dumps(fields))
        model = adapter(tmp_path / name)
        model.load(1, families.CPU, torch.float32, tmp_path / "cache")
        with torch.inference_mode():
            found.append(model.encode(video, plan))
    with torch.inference_mode():
        expected = mochi.encode(video, plan)
    assert torch.equal(found[0], expected)
    mean, std = (torch.tensor(whole[k]).view(1, 12, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    torch.testing.assert_close((found[1] - mean) / std, expected)  # of the scale 1


def test_an_empty_prompt_may_stand_for_no_text_at_all(path, tmp_path, mochi):
    """As the original program does, and the pipeline if its checkpoint says so."""
    zeros = families.changed(path, tmp_path / "mochi", "model_index.json", {"force_zeros_for_empty_prompt": True})
    assert_equals_pipeline(zeros, tmp_path / "cache", 2, (0, 1), torch.float32)
    assert mochi.text["mask"].sum() == 1  # without it: </s>, then padding


def test_noise_is_what_sampling_with_a_perfect_model_leaves(mochi):
    plan = mochi.plan(FRAMES, (0,))
    schedule = published_schedule()
    clean, noise = torch.randn(2, *mochi.noise_shape(plan), generator=torch.Generator().manual_seed(2)).split(1)
    given = {}
    hook = mochi.transformer.register_forward_pre_hook(lambda m, args, kwargs: given.update(kwargs), with_kwargs=True)
    with torch.inference_mode():
        mochi.forward(clean, STEP, noise)
    hook.remove()
    expected = sampled_until(STEP, schedule, noise, clean - noise)
    torch.testing.assert_close(given["hidden_states"], expected, atol=1e-4, rtol=0)
    assert float(given["timestep"]) == float(schedule.timesteps[STEP])


def test_the_default_step_is_half_noise(mochi):
    assert FAMILIES["mochi"].default_step == STEP
    step = mochi.describe_step(STEP)
    assert step["sigma"] == pytest.approx(0.5, abs=2e-3)
    assert step["timestep"] == pytest.approx(1000 * (1 - step["sigma"]), abs=1e-3)
    assert mochi.describe_step(0) == {"timestep": 0.0, "sigma": 1.0}
    assert mochi.describe_step(500) == {"timestep": 25.0, "sigma": 0.975}  # half the steps take 2.5% of the noise
    assert mochi.describe_step(749)["sigma"] == pytest.approx(0.72695, abs=1e-5)


def test_no_block_waits_to_learn_which_tokens_are_valid(mochi, monkeypatch):
    """The library's attention asks the mask for them with `nonzero`, which on a GPU is a wait in every block."""
    plan = mochi.plan(1, (0,))
    state = torch.zeros(1, *mochi.noise_shape(plan))
    monkeypatch.setattr(torch, "nonzero", lambda *a, **k: pytest.fail("waited for the device"))
    with torch.inference_mode():
        mochi.forward(state, STEP, torch.ones_like(state))
    monkeypatch.setattr(mochi.blocks[0].attn1, "processor", MochiAttnProcessor2_0())  # the library's own does
    with torch.inference_mode(), pytest.raises(pytest.fail.Exception, match="waited"):
        mochi.forward(state, STEP, torch.ones_like(state))
