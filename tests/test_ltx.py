"""LTX-Video's features equal those that plain hooks take while the library's own pipeline runs, bit for bit."""

import families
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from PIL import Image
from pipeline_step import only_step, sampled_until
from tiny.ltx import build_ltx

from spatialprobe.engine.adapters.ltx import LTX
from spatialprobe.engine.presets import FAMILIES, PRESETS

SIZE = (64, 96)
STEP = 898
FRAMES = 17


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build_ltx(tmp_path_factory.mktemp("ltx") / "ltx-tiny")


def adapter(path, **options) -> LTX:
    return families.make_adapter(LTX, path, **{"size": SIZE, **options})


@pytest.fixture(scope="module")
def ltx(path, tmp_path_factory):
    loaded = adapter(path)
    loaded.load(3, families.CPU, torch.float32, tmp_path_factory.mktemp("cache"))
    return loaded


def published_schedule(grid) -> FlowMatchEulerDiscreteScheduler:
    """1000 steps for a grid of tokens, from the numbers of the published scheduler's config."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    mu = calculate_shift(int(np.prod(grid)), 1024, 4096, 0.95, 2.05)
    scheduler.set_timesteps(1000, sigmas=np.linspace(1.0, 1 / 1000, 1000), mu=mu)
    return scheduler


@torch.inference_mode()
def library_latents(pipe, clip, size):  # -> float32 [1, Z, T, H, W]
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in clip.frames]
    video = pipe.video_processor.preprocess_video(images, height=size[0], width=size[1]).to(pipe.vae.dtype)
    latents = pipe.vae.encode(video).latent_dist.mode().float()
    return pipe._normalize_latents(latents, pipe.vae.latents_mean, pipe.vae.latents_std, pipe.vae.config.scaling_factor)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"prompt": "a photo of the room", "frame_rate": 12.0}),
        (torch.float32, {"vae_tiling": True, "size": (544, 64)}),  # tiles are 512 pixels high
    ],
)
def test_equals_hooks_on_the_running_pipeline(path, tmp_path, dtype, options):
    mine = adapter(path, **options)
    mine.load(3, families.CPU, dtype, tmp_path)
    clip, size = families.make_clip(FRAMES), mine.options["size"]
    noise = families.make_noise(mine, mine.plan(FRAMES, (0,)))
    got = families.features(mine, clip, (0, 2), step=STEP, noise=noise)

    pipe = LTXPipeline.from_pretrained(path, torch_dtype=dtype)  # diffusers 0.37 knows no other name
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        families.aligned(part)
    if mine.options["vae_tiling"]:
        pipe.vae.enable_tiling()
    latents = library_latents(pipe, clip, size)
    schedule = published_schedule(latents.shape[2:])
    noisy = schedule.scale_noise(latents, schedule.timesteps[STEP][None], noise)
    only_step(pipe, STEP)
    seen = families.hooked(
        {i: pipe.transformer.transformer_blocks[i] for i in (0, 2)},
        lambda: pipe(
            prompt=mine.options["prompt"],
            height=size[0],
            width=size[1],
            num_frames=FRAMES,
            frame_rate=mine.options["frame_rate"],
            num_inference_steps=1000,
            guidance_scale=1.0,
            latents=pipe._pack_latents(noisy),
            output_type="latent",
        ),
    )
    assert len(pipe.transformer.transformer_blocks) == 4  # the whole model ran, mine has 3 blocks
    for i in (0, 2):
        assert torch.equal(got[i].flatten(1, 3), seen[i])


def test_noise_is_what_sampling_with_a_perfect_model_leaves(ltx):
    plan = ltx.plan(FRAMES, (0,))
    schedule = published_schedule(plan.grid)
    clean, noise = torch.randn(2, *ltx.noise_shape(plan), generator=torch.Generator().manual_seed(2)).split(1)
    given = {}
    hook = ltx.transformer.register_forward_pre_hook(lambda m, args, kwargs: given.update(kwargs), with_kwargs=True)
    with torch.inference_mode():
        state = ltx.encode({"video": torch.zeros(1, FRAMES, *SIZE, 3, dtype=torch.uint8)}, plan)
        state.clean = clean
        ltx.forward(state, STEP, noise)
    hook.remove()
    expected = sampled_until(STEP, schedule, noise, noise - clean)
    torch.testing.assert_close(given["hidden_states"], expected.flatten(2).transpose(1, 2), atol=1e-4, rtol=0)
    assert float(given["timestep"]) == float(schedule.timesteps[STEP])


def test_the_schedule_is_shifted_by_the_number_of_tokens(path):
    """At the preset's size and window, the default step is half noise; fewer tokens leave less."""
    preset = PRESETS["ltx-video"]
    whole = adapter(path, size=(512, 704))
    plan = whole.plan(81, (0,))
    step = FAMILIES["ltx"].default_step
    assert plan.grid == preset.grid
    assert whole.describe_clip_step(step, plan) == {"timestep": pytest.approx(500.386, abs=1e-3), "sigma": 0.500386}
    schedule = published_schedule(preset.grid)
    for i in (0, 749, step, 999):
        assert whole.describe_clip_step(i, plan)["sigma"] == pytest.approx(float(schedule.sigmas[i]), abs=1e-6)
    assert whole.describe_clip_step(749, plan)["sigma"] == pytest.approx(0.73359, abs=1e-5)
    assert whole.describe_clip_step(step, whole.plan(41, (0,)))["sigma"] < 0.45
