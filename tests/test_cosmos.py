"""Cosmos-Predict2's features equal those that plain hooks take while the library's own pipeline runs, bit for bit."""

import types

import families
import pytest
import torch
from diffusers import Cosmos2VideoToWorldPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.cosmos import pipeline_cosmos2_video2world
from PIL import Image
from pipeline_step import only_step, sampled_until
from tiny.cosmos import build_cosmos

from spatialprobe.engine.adapters.cosmos import Cosmos
from spatialprobe.engine.presets import FAMILIES

SIZE = (64, 96)
STEP = 596
FRAMES = 9


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build_cosmos(tmp_path_factory.mktemp("cosmos") / "cosmos-tiny")


def adapter(path, **options) -> Cosmos:
    return families.make_adapter(Cosmos, path, **{"size": SIZE, **options})


@pytest.fixture(scope="module")
def cosmos(path, tmp_path_factory):
    loaded = adapter(path)
    loaded.load(3, families.CPU, torch.float32, tmp_path_factory.mktemp("cache"))
    return loaded


class NoChecks:
    """Stands for the package that judges prompts and what is generated, without which the pipeline refuses to run."""

    def to(self, device):
        return self

    def check_text_safety(self, prompt):
        return True


def resized(mask, size, interpolation):
    return torch.nn.functional.interpolate(mask, size=size, mode="nearest")


@pytest.fixture
def library(monkeypatch):
    """Makes Cosmos2VideoToWorldPipeline run: without the safety package, torchvision, and chance in the VAE."""
    monkeypatch.setattr(pipeline_cosmos2_video2world, "CosmosSafetyChecker", NoChecks)
    torchvision = types.SimpleNamespace(
        functional=types.SimpleNamespace(resize=resized), InterpolationMode=types.SimpleNamespace(NEAREST="nearest")
    )
    monkeypatch.setattr(transformer_cosmos, "transforms", torchvision, raising=False)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def published_schedule() -> FlowMatchEulerDiscreteScheduler:
    """Karras et al.'s from 80 down to 0.002, through the scheduler as the pipeline sets it up."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(sigmas=torch.linspace(0, 1, 1000, dtype=torch.float64))
    return scheduler


@torch.inference_mode()
def library_latents(pipe, clip, size):  # -> float32 [1, Z, T, h, w]
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in clip.frames]
    video = pipe.video_processor.preprocess_video(images, height=size[0], width=size[1]).to(pipe.vae.dtype)
    latents = pipe.vae.encode(video).latent_dist.mode().float()
    mean, std = (torch.tensor(pipe.vae.config[k]).view(1, 16, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    return (latents - mean) / std


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"condition_rows": 2, "prompt": "a photo of the room"}),
        (torch.bfloat16, {"prompt": "a photo of the room", "fps": 10.0, "size": (32, 48)}),
        (torch.float32, {"vae_tiling": True, "size": (272, 64)}),  # tiles are 256 pixels high
    ],
)
def test_equals_hooks_on_the_running_pipeline(path, tmp_path, library, dtype, options):
    mine = adapter(path, **options)
    mine.load(3, families.CPU, dtype, tmp_path)
    clip, size = families.make_clip(FRAMES), mine.options["size"]
    noise = families.make_noise(mine, mine.plan(FRAMES, (0,)))
    got = families.features(mine, clip, (0, 2), step=STEP, noise=noise)

    pipe = Cosmos2VideoToWorldPipeline.from_pretrained(path, torch_dtype=dtype, safety_checker=NoChecks())
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        families.aligned(part)
    if mine.options["vae_tiling"]:
        pipe.vae.enable_tiling()
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in clip.frames]
    noisy = library_latents(pipe, clip, size) + published_schedule().sigmas[STEP] * noise
    # The pipeline multiplies the latents it is given by its largest sigma, which is a step's only at the start.
    whole = pipe.prepare_latents
    pipe.prepare_latents = lambda *args: (noisy, *whole(*args)[1:])
    only_step(pipe, STEP)
    seen = families.hooked(
        {i: pipe.transformer.transformer_blocks[i] for i in (0, 2)},
        lambda: pipe(
            video=images[: 1 + 4 * (mine.options["condition_rows"] - 1)],
            prompt=mine.options["prompt"],
            height=size[0],
            width=size[1],
            num_frames=FRAMES,
            fps=mine.options["fps"],
            num_inference_steps=1000,
            guidance_scale=1.0,
            output_type="latent",
        ),
    )
    assert len(pipe.transformer.transformer_blocks) == 4  # the whole model ran, mine has 3 blocks
    for i in (0, 2):
        assert torch.equal(got[i].flatten(1, 3), seen[i])


def model_input(cosmos, clean, step, noise) -> dict:
    given = {}
    hook = cosmos.transformer.register_forward_pre_hook(lambda m, args, kwargs: given.update(kwargs), with_kwargs=True)
    with torch.inference_mode():
        cosmos.forward(clean, step, noise)
    hook.remove()
    return given


def test_noise_is_what_sampling_with_a_perfect_model_leaves(cosmos):
    """From sigma 80 down along x0 + sigma eps; the model sees it divided by sigma + 1, and the first row clean."""
    plan = cosmos.plan(FRAMES, (0,))
    schedule = published_schedule()
    clean, noise = torch.randn(2, *cosmos.noise_shape(plan), generator=torch.Generator().manual_seed(2)).split(1)
    given = model_input(cosmos, clean, STEP, noise)
    latents = sampled_until(STEP, schedule, clean + 80.0 * noise, noise)
    sigma = float(schedule.sigmas[STEP])
    seen = given["hidden_states"]
    torch.testing.assert_close(seen[:, :, 1:], latents[:, :, 1:] / (sigma + 1), atol=1e-3, rtol=0)
    assert torch.equal(seen[:, :, :1], clean[:, :, :1])
    assert given["timestep"].flatten().tolist() == pytest.approx([0.0001 / 1.0001] + 2 * [sigma / (sigma + 1)])
    assert given["condition_mask"].amax((0, 3, 4)).tolist() == [[1, 0, 0], [0, 0, 0]]  # condition, padding


def test_the_default_step_is_half_noise(cosmos):
    assert FAMILIES["cosmos"].default_step == STEP
    step = cosmos.describe_step(STEP)
    assert step["sigma"] == pytest.approx(1, abs=2e-3)
    assert step["timestep"] == pytest.approx(0.5, abs=1e-3)
    for i in (0, 300, 999):  # Karras et al. 2022, equation 5, rho 7
        sigma = (80 ** (1 / 7) + i / 999 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert cosmos.describe_step(i)["sigma"] == pytest.approx(sigma, rel=1e-4, abs=1e-6)
    assert cosmos.describe_step(749)["timestep"] == pytest.approx(0.1703 / 1.1703, abs=1e-4)


def test_a_window_must_leave_rows_to_noise(path, cosmos):
    with pytest.raises(ValueError, match="a window of 1 frames has 1 rows, of which 1 would be conditions"):
        cosmos.plan(1, (0,))
    with pytest.raises(ValueError, match="a window of 5 frames has 2 rows, of which 2 would be conditions"):
        adapter(path, condition_rows=2).plan(5, (0,))
    with pytest.raises(ValueError, match=r"go up to 128 rows, .* got a grid of \(129, 4, 6\)"):
        cosmos.plan(513, (0,))
    assert cosmos.plan(509, (0,)).grid[0] == 128


def test_the_prompt_is_embedded_once_and_as_the_pipeline_does(path, tmp_path, library, monkeypatch):
    words = {"prompt": "a photo of the room", "prompt_tokens": 32}
    first = adapter(path, **words)
    first.load(1, families.CPU, torch.float32, tmp_path)
    pipe = Cosmos2VideoToWorldPipeline.from_pretrained(path, safety_checker=NoChecks())
    families.aligned(pipe.text_encoder)
    with torch.inference_mode():
        expected, _ = pipe.encode_prompt(words["prompt"], do_classifier_free_guidance=False, max_sequence_length=32)
    torch.testing.assert_close(first.text["prompt"], expected, atol=1e-6, rtol=1e-6)
    words_end = len(pipe.tokenizer(words["prompt"]).input_ids)
    assert first.text["prompt"][0, :words_end].abs().amax(-1).min() > 0
    assert not first.text["prompt"][0, words_end:].any()  # padding is zeroed
    monkeypatch.setattr("transformers.T5EncoderModel.from_pretrained", lambda *a, **k: pytest.fail("loaded again"))
    again = adapter(path, **words)
    again.load(1, families.CPU, torch.float32, tmp_path)
    assert torch.equal(again.text["prompt"], first.text["prompt"])
