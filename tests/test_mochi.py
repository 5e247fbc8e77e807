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

from spatialprobe.engine.adapters.mochi import Mochi
from spatialprobe.engine.demo.tiny.mochi import build_mochi
from spatialprobe.engine.job import Job
from spatialprobe.engine.presets import FAMILIES
from spatialprobe.engine.run import run_job
from spatialprobe.engine.types import Clip

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


def changed(path, folder, file: str, change: dict):
    """A copy of the checkpoint with other fields in one of its configs."""
    shutil.copytree(path, folder)
    config = folder / file
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    return folder


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
    zeros = changed(path, tmp_path / "mochi", "model_index.json", {"force_zeros_for_empty_prompt": True})
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


def test_rows_follow_the_vae(mochi):
    plan = mochi.plan(81, (0,))
    assert list(plan.rows) == [(f + 5) // 6 for f in range(81)]
    assert plan.grid == (15, 2, 4)
    assert mochi.plan(8, (0,)).grid[0] == 3  # frame 7 opens a row of its own
    assert mochi.plan(1, (0,)).grid[0] == 1


def test_a_marked_patch_is_found_at_its_row_and_cell(mochi):
    plain, marked = families.make_clip(FRAMES, SIZE), families.make_clip(FRAMES, SIZE)
    marked.frames[7:, :, 16:, 32:] = 255  # bottom right, from frame 7 on
    plan = mochi.plan(FRAMES, (0,))
    noise = torch.zeros(1, *mochi.noise_shape(plan))
    a, b = (families.features(mochi, clip, (0,), step=999, noise=noise)[0] for clip in (plain, marked))
    change = (a - b).abs().mean(-1)[0]  # [3, 2, 4]
    assert int(change.mean((1, 2)).argmax()) == plan.rows[7] == 2
    quarters = change[2].view(2, 1, 2, 2).mean((1, 3))  # [top or bottom, left or right]
    assert int(quarters.argmax()) == 3
    assert quarters[1, 1] > 1.5 * quarters.flatten()[:3].max()
    with torch.inference_mode():
        videos = [mochi.prepare(clip, plan)["video"][None] for clip in (plain, marked)]
        before, after = (mochi.encode({"video": video}, plan) for video in videos)
    assert torch.equal(before[:, :, :2], after[:, :, :2])  # the VAE looks at no later frame
    assert not torch.equal(before[:, :, 2], after[:, :, 2])


def test_a_batch_agrees_with_single_clips(mochi):
    families.assert_batch_agrees(mochi, (0, 1), frames=7, step=STEP)


@pytest.mark.parametrize("frames", [1, 2, 11])
def test_a_group_of_frames_is_completed_not_dropped(mochi, frames):
    clip = families.make_clip(frames)
    whole = 1 + -(-(frames - 1) // 6) * 6
    pixels = torch.cat([clip.frames, clip.frames[-1:].expand(whole - frames, -1, -1, -1)])
    repeated = Clip("a", pixels, torch.arange(whole))
    short, full = (families.features(mochi, c, (0,), step=STEP)[0] for c in (clip, repeated))
    assert short.shape[1] == 1 + (whole - 1) // 6
    assert torch.equal(short, full)


def test_only_the_wanted_blocks_are_loaded(path, tmp_path, mochi):
    read = families.bytes_by_depth(lambda: adapter(path), (1, 2, 3), tmp_path)
    block = sum(p.nbytes for p in mochi.blocks[0].parameters())
    last = read[3] - read[2]
    assert read[2] - read[1] == block
    assert 0 < last < block  # the last block has no text branch after its attention
    assert mochi.vae.decoder is None
    kinds = {type(v).__name__ for v in vars(mochi).values() if isinstance(v, torch.nn.Module)}
    assert kinds == {"MochiTransformer3DModel", "AutoencoderKLMochi", "ModuleList"}


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


def test_the_prompt_is_embedded_once(path, tmp_path, monkeypatch):
    first = adapter(path)
    first.load(1, families.CPU, torch.float32, tmp_path)
    monkeypatch.setattr("transformers.T5EncoderModel.from_pretrained", lambda *a, **k: pytest.fail("loaded again"))
    again = adapter(path)
    again.load(1, families.CPU, torch.float32, tmp_path)
    assert torch.equal(again.text["prompt"], first.text["prompt"])
    assert torch.equal(again.text["mask"], first.text["mask"])
    assert again.text["prompt"].shape == (1, 256, 32)


def test_clips_become_a_store(path, clips_path, tmp_path):
    words = {"clips": str(clips_path), "model": str(path), "out": str(tmp_path / "store"), "window": 9, "limit": 2}
    report, store = run_job(Job.from_words(words | {"layers": [1], "options": {"size": "32x64"}}))
    assert (report.written, report.failed) == (2, 0)
    assert list(store.verify()) == []
    assert store.read("clip1", 1, STEP).data.shape == (3, 2, 4, 48)
    assert store.read("clip1", 1, STEP).rows.tolist() == [0] + [1] * 6 + [2] * 2
    (step,) = store.provenance("clip1")["steps"]
    assert (step["step"], step["sigma"]) == (STEP, pytest.approx(0.5, abs=2e-3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (32, 90)}, r"size must be multiples of 16 pixels, got \(32, 90\)"),
        ({"size": (0, 96)}, "size must be multiples of 16"),
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1, got 0"),
        ({"prompt_tokens": 257}, "prompt_tokens must be at most 256, got 257"),
    ],
)
def test_options_the_model_cannot_take(path, options, message):
    with pytest.raises(ValueError, match=message):
        adapter(path, **options).check_options()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", {"_class_name": "LTXPipeline"}, "pipeline must be MochiPipeline, got LTXPipeline"),
        ("transformer/config.json", {"warp": 1}, r"transformer/config\.json has fields .* does not know: warp"),
        ("vae/config.json", {"warp": 1}, r"vae/config\.json has fields .* does not know: warp"),
        ("scheduler/scheduler_config.json", {"warp": 1}, r"scheduler_config\.json has fields .* does not know: warp"),
        ("scheduler/scheduler_config.json", {"invert_sigmas": False}, "inverted sigmas"),
        ("transformer/config.json", {"num_attention_heads": 4}, "must have shape"),
    ],
)
def test_another_checkpoint_is_refused(path, tmp_path, file, change, message):
    other = changed(path, tmp_path / "mochi", file, change)
    with pytest.raises(ValueError, match=message):
        adapter(other).load(1, families.CPU, torch.float32, tmp_path / "cache")


def test_a_missing_shard_is_named(path, tmp_path):
    shutil.copytree(path, tmp_path / "mochi")
    next((tmp_path / "mochi/transformer").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"has no file transformer/diffusion_pytorch_model-0000"):
        adapter(tmp_path / "mochi").load(3, families.CPU, torch.float32, tmp_path / "cache")


def test_a_layer_beyond_the_stack_is_refused(path, clips_path, tmp_path):
    words = {"clips": str(clips_path), "model": str(path), "out": str(tmp_path / "store"), "layers": [3]}
    with pytest.raises(ValueError, match=r"layers must be blocks 0 \.\. 2, got \[3\]"):
        run_job(Job.from_words(words))
