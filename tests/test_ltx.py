"""LTX-Video's features equal those that plain hooks take while the library's own pipeline runs, bit for bit."""

import json
import shutil

import families
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from PIL import Image
from pipeline_step import only_step, sampled_until

from spatialprobe.engine.adapters.ltx import LTX
from spatialprobe.engine.demo.tiny.ltx import build_ltx
from spatialprobe.engine.job import Job
from spatialprobe.engine.presets import FAMILIES, PRESETS
from spatialprobe.engine.run import run_job
from spatialprobe.engine.types import Clip

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


def test_rows_follow_the_vae(ltx):
    plan = ltx.plan(81, (0,))
    assert list(plan.rows) == [(f + 7) // 8 for f in range(81)]
    assert plan.grid == (11, 2, 3)
    assert ltx.plan(10, (0,)).grid[0] == 3  # frame 9 opens a row of its own
    assert ltx.plan(1, (0,)).grid[0] == 1


def test_a_marked_patch_is_found_at_its_row_and_cell(path, tmp_path):
    ltx = adapter(path, size=(128, 192))
    ltx.load(1, families.CPU, torch.float32, tmp_path)
    plain, marked = families.make_clip(FRAMES, (128, 192)), families.make_clip(FRAMES, (128, 192))
    marked.frames[9:, :, 64:, 96:] = 255  # bottom right, from frame 9 on
    plan = ltx.plan(FRAMES, (0,))
    noise = torch.zeros(1, *ltx.noise_shape(plan))
    a, b = (families.features(ltx, clip, (0,), step=999, noise=noise)[0] for clip in (plain, marked))
    change = (a - b).abs().mean(-1)[0]  # [3, 4, 6]
    assert int(change.mean((1, 2)).argmax()) == plan.rows[9] == 2
    quarters = change[2].view(2, 2, 2, 3).mean((1, 3))  # [top or bottom, left or right]
    assert int(quarters.argmax()) == 3
    assert quarters[1, 1] > 1.5 * quarters.flatten()[:3].max()
    with torch.inference_mode():
        videos = [ltx.prepare(clip, plan)["video"][None] for clip in (plain, marked)]
        before, after = (ltx.encode({"video": video}, plan).clean for video in videos)
    assert torch.equal(before[:, :, :2], after[:, :, :2])  # the VAE looks at no later frame
    assert not torch.equal(before[:, :, 2], after[:, :, 2])


def test_a_batch_agrees_with_single_clips(ltx):
    families.assert_batch_agrees(ltx, (0, 2), frames=9, step=STEP)


@pytest.mark.parametrize("frames", [1, 2, 12])
def test_a_group_of_frames_is_completed_not_dropped(ltx, frames):
    clip = families.make_clip(frames)
    whole = 1 + -(-(frames - 1) // 8) * 8
    pixels = torch.cat([clip.frames, clip.frames[-1:].expand(whole - frames, -1, -1, -1)])
    repeated = Clip("a", pixels, torch.arange(whole))
    short, full = (families.features(ltx, c, (0,), step=STEP)[0] for c in (clip, repeated))
    assert short.shape[1] == 1 + (whole - 1) // 8
    assert torch.equal(short, full)


def test_only_the_wanted_blocks_are_loaded(path, tmp_path, ltx):
    read = families.bytes_by_depth(lambda: adapter(path), (1, 2, 4), tmp_path)
    block = sum(p.nbytes for p in ltx.blocks[0].parameters())
    assert (read[2] - read[1], read[4] - read[1]) == (block, 3 * block)
    assert ltx.vae.decoder is None
    kinds = {type(v).__name__ for v in vars(ltx).values() if isinstance(v, torch.nn.Module)}
    assert kinds == {"LTXVideoTransformer3DModel", "AutoencoderKLLTXVideo", "ModuleList"}


def test_the_prompt_is_embedded_once(path, tmp_path, monkeypatch, ltx):
    first = adapter(path)
    first.load(1, families.CPU, torch.float32, tmp_path)
    monkeypatch.setattr("transformers.T5EncoderModel.from_pretrained", lambda *a, **k: pytest.fail("loaded again"))
    again = adapter(path)
    again.load(1, families.CPU, torch.float32, tmp_path)
    assert torch.equal(again.text["prompt"], first.text["prompt"])
    assert torch.equal(again.text["mask"], ltx.text["mask"])
    assert again.text["mask"].sum() == 1  # </s>, then padding
    assert again.text["prompt"].shape == (1, 128, 32)


def test_clips_become_a_store(path, clips_path, tmp_path):
    words = {"clips": str(clips_path), "model": str(path), "out": str(tmp_path / "store"), "window": 9, "limit": 2}
    report, store = run_job(Job.from_words(words | {"layers": [1], "options": {"size": "64x96"}}))
    assert (report.written, report.failed) == (2, 0)
    assert list(store.verify()) == []
    assert store.read("clip1", 1, STEP).data.shape == (2, 2, 3, 48)
    assert store.read("clip1", 1, STEP).rows.tolist() == [0] + [1] * 8
    (step,) = store.provenance("clip1")["steps"]
    assert step == {"step": STEP, **adapter(path).describe_clip_step(STEP, adapter(path).plan(9, (0,)))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (64, 90)}, r"size must be multiples of 32 pixels, got \(64, 90\)"),
        ({"size": (0, 96)}, "size must be multiples of 32"),
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1, got 0"),
        ({"frame_rate": 0.0}, r"frame_rate must be positive, got 0\.0"),
        ({"frame_rate": float("inf")}, "frame_rate must be positive"),
    ],
)
def test_options_the_model_cannot_take(path, options, message):
    with pytest.raises(ValueError, match=message):
        adapter(path, **options).check_options()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", {"_class_name": "LTXConditionPipeline"}, "pipeline must be LTXPipeline, got LTXCondition"),
        ("transformer/config.json", {"patch_size": 2}, r"one latent per token, got patches of \(2, 1\)"),
        ("transformer/config.json", {"warp": 1}, r"transformer/config\.json has fields .* does not know: warp"),
        ("vae/config.json", {"warp": 1}, r"vae/config\.json has fields .* does not know: warp"),
        ("scheduler/scheduler_config.json", {"warp": 1}, r"scheduler_config\.json has fields .* does not know: warp"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "must be a FlowMatchEuler.* got DDIM"),
        ("transformer/config.json", {"num_attention_heads": 4}, "must have shape"),
    ],
)
def test_another_checkpoint_is_refused(path, tmp_path, file, change, message):
    shutil.copytree(path, tmp_path / "ltx")
    config = tmp_path / "ltx" / file
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        adapter(tmp_path / "ltx").load(1, families.CPU, torch.float32, tmp_path / "cache")


def test_a_missing_shard_is_named(path, tmp_path):
    shutil.copytree(path, tmp_path / "ltx")
    next((tmp_path / "ltx/transformer").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"has no file transformer/diffusion_pytorch_model-0000"):
        adapter(tmp_path / "ltx").load(4, families.CPU, torch.float32, tmp_path / "cache")


def test_a_layer_beyond_the_stack_is_refused(path, clips_path, tmp_path):
    words = {"clips": str(clips_path), "model": str(path), "out": str(tmp_path / "store"), "layers": [4]}
    with pytest.raises(ValueError, match=r"layers must be blocks 0 \.\. 3, got \[4\]"):
        run_job(Job.from_words(words))
