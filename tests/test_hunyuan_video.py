"""HunyuanVideo's features equal those that plain hooks take from the whole library pipeline, bit for bit."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline
from families import CPU, aligned, assert_batch_agrees, bytes_by_depth, features, hooked, make_adapter, make_clip
from families import make_noise as noise_of
from PIL import Image
from tiny.hunyuan_video import build_hunyuan_video

from spatialprobe.engine.adapters.hunyuan_video import HunyuanVideo
from spatialprobe.engine.device import placement
from spatialprobe.engine.job import Job
from spatialprobe.engine.run import run_job
from spatialprobe.engine.types import Clip

SIZE = (32, 48)


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    return build_hunyuan_video(tmp_path_factory.mktemp("hunyuan") / "hunyuan-tiny")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("prompts")


def loaded(path, cache, depth=4, dtype=torch.float32, **options) -> HunyuanVideo:
    adapter = make_adapter(HunyuanVideo, path, **{"size": SIZE, **options})
    adapter.load(depth, CPU, dtype, cache)
    return adapter


def pipeline_hooks(path, dtype, sample: Clip, size, noise, step, prompt, tiling) -> dict[int, torch.Tensor]:
    """Blocks 0 .. 3 of the whole pipeline, called as it calls its transformer."""
    pipe = HunyuanVideoPipeline.from_pretrained(path, torch_dtype=dtype)  # diffusers 0.37 knows no other name
    for name in ("text_encoder", "text_encoder_2", "vae", "transformer"):
        aligned(getattr(pipe, name))
    if tiling:
        pipe.vae.enable_tiling()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(1000, sigmas=np.linspace(1.0, 0.0, 1001)[:-1])
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in sample.frames]
    with torch.inference_mode():
        video = pipe.video_processor.preprocess_video(images, height=size[0], width=size[1]).to(dtype)
        latents = pipe.vae.encode(video).latent_dist.mean.float() * pipe.vae.config.scaling_factor
        timestep = pipe.scheduler.timesteps[step][None]
        noisy = pipe.scheduler.scale_noise(latents, timestep, noise)
        text, pooled, mask = pipe.encode_prompt(prompt)
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    return hooked(
        dict(enumerate(blocks)),
        lambda: pipe.transformer(
            hidden_states=noisy.to(dtype),
            timestep=timestep,
            encoder_hidden_states=text.to(dtype),
            encoder_attention_mask=mask.to(dtype),
            pooled_projections=pooled.to(dtype),
            guidance=torch.tensor([6.0], dtype=dtype) * 1000.0,
        ),
    )


@pytest.mark.parametrize(
    ("dtype", "tiling", "frames"), [(torch.float32, False, 9), (torch.bfloat16, False, 5), (torch.float32, True, 21)]
)
def test_equals_hooks_on_the_whole_pipeline(path, cache, dtype, tiling, frames):
    """21 frames are more than the VAE encodes at once, and 288 pixels more than a tile is high."""
    size = (288, 32) if tiling else SIZE
    adapter = loaded(path, cache, 3, dtype, size=size, vae_tiling=tiling, prompt="a sofa")
    sample = make_clip(frames)
    noise = noise_of(adapter, adapter.plan(frames, (0,)))
    mine = features(adapter, sample, (0, 1, 2), step=749, noise=noise)
    theirs = pipeline_hooks(path, dtype, sample, size, noise, 749, "a sofa", tiling)
    assert sorted(theirs) == [0, 1, 2, 3]  # the whole model ran, mine has 3 blocks
    for layer in (0, 1, 2):
        assert torch.equal(mine[layer].flatten(1, 3), theirs[layer])


def test_step_749_is_the_schedules_with_the_models_shift(path, cache):
    adapter = loaded(path, cache, 1)
    unshifted = 1 - 749 / 1000
    sigma = 7 * unshifted / (1 + 6 * unshifted)
    assert adapter.describe_step(749) == {"timestep": pytest.approx(1000 * sigma), "sigma": pytest.approx(sigma)}
    assert adapter.describe_step(0)["sigma"] == 1.0
    assert adapter.describe_step(874)["sigma"] == pytest.approx(
        0.5023, abs=1e-3
    )  # as much noise as the study's Wan had


def test_prompt_and_guidance_change_features_and_a_cached_prompt_is_not_made_again(path, cache, monkeypatch):
    plain = features(loaded(path, cache, 1), make_clip(), (0,), step=749)[0]
    for other in ({"prompt": "a photo of a room"}, {"guidance_scale": 1.0}, {"flow_shift": 3.0}):
        assert not torch.allclose(features(loaded(path, cache, 1, **other), make_clip(), (0,), step=749)[0], plain)
    monkeypatch.setattr("transformers.LlamaModel.from_pretrained", lambda *a, **k: pytest.fail("loaded again"))
    assert torch.equal(features(loaded(path, cache, 1), make_clip(), (0,), step=749)[0], plain)


def test_rows_follow_the_models_own_order(path, cache):
    adapter = loaded(path, cache, 3)
    plan = adapter.plan(81, tuple(range(81)))
    assert list(plan.rows) == [(f + 3) // 4 for f in range(81)]
    plain, marked = make_clip(size=SIZE), make_clip(size=SIZE)
    plain.frames[:], marked.frames[:] = 100, 100
    marked.frames[5:, :, 16:, 32:] = 255  # the cell at the bottom right, from frame 5 on
    noise = torch.zeros_like(noise_of(adapter, adapter.plan(9, (0,))))
    for layer in (0, 2):
        a, b = (features(adapter, clip, (layer,), step=999, noise=noise)[layer] for clip in (plain, marked))
        where = (a - b).abs().mean(-1)[0]  # [3, 2, 3]
        assert tuple(int(i) for i in np.unravel_index(int(where.argmax()), where.shape)) == (plan.rows[5], 1, 2)


def test_a_batch_and_a_part_of_a_group(path, cache):
    adapter = loaded(path, cache, 3)
    assert_batch_agrees(adapter, (0, 2), step=749)
    sample = make_clip(10)
    repeated = Clip("a", torch.cat([sample.frames, sample.frames[-1:].expand(3, -1, -1, -1)]), torch.arange(13))
    noise = noise_of(adapter, adapter.plan(10, (0,)))
    ten, thirteen = (features(adapter, c, (2,), step=749, noise=noise)[2] for c in (sample, repeated))
    assert torch.equal(ten, thirteen)


def test_only_the_wanted_blocks_are_loaded(path, cache):
    read = bytes_by_depth(lambda: make_adapter(HunyuanVideo, path, size=SIZE), (1, 2, 3, 4), cache)
    blocks = loaded(path, cache).blocks
    assert [read[d + 1] - read[d] for d in (1, 2, 3)] == [sum(p.nbytes for p in b.parameters()) for b in blocks[1:]]


def test_blocks_in_host_memory_change_no_value(path, cache):
    whole, offloaded = loaded(path, cache), loaded(path, cache)
    placement.place(offloaded, CPU, "host")
    assert all(p.is_meta for block in offloaded.blocks for p in block.parameters())
    a, b = (features(adapter, make_clip(5), (1, 3), step=874) for adapter in (whole, offloaded))
    assert torch.equal(a[1], b[1])
    assert torch.equal(a[3], b[3])


def test_a_job_writes_a_store_that_verifies(path, clips_path, tmp_path):
    words = {"clips": str(clips_path), "model": str(path), "out": str(tmp_path / "store"), "layers": [1, 3]}
    report, store = run_job(Job.from_words(words | {"window": 9, "limit": 2, "options": {"size": "32x48"}}))
    assert (report.written, report.failed) == (2, 0)
    assert store.read("clip1", layer=3, step=874).data.shape == (3, 2, 3, 64)
    assert list(store.verify()) == []


@pytest.mark.parametrize("pool", ["none", "1x2"])
def test_the_mean_of_steps_is_that_of_their_features(path, clips_path, tmp_path, pool):
    """The first block's output has the strides of the patches' convolution, not those of [B, N, C]."""
    words = {"clips": str(clips_path), "model": str(path), "layers": [0, 3], "window": 5, "limit": 1, "pool": pool}
    words |= {"steps": [500, 874], "store_dtype": "bfloat16", "options": {"size": "32x48"}}
    _, apart = run_job(Job.from_words(words | {"out": str(tmp_path / "apart")}))
    _, merged = run_job(Job.from_words(words | {"out": str(tmp_path / "merged"), "merge_steps": True}))
    for layer in (0, 3):
        first, second = (apart.read("clip0", layer, step).data.float() for step in (500, 874))
        assert not torch.allclose(first, second, atol=0.05)
        mean = merged.read("clip0", layer).data.float()
        torch.testing.assert_close(mean, (first + second) / 2, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (40, 48)}, "multiples of 16"),
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1"),
        ({"guidance_scale": -1.0}, "guidance_scale must be positive"),
        ({"flow_shift": float("nan")}, "flow_shift must be positive"),
    ],
)
def test_options_the_model_cannot_take(path, options, message):
    with pytest.raises(ValueError, match=message):
        make_adapter(HunyuanVideo, path, **options).check_options()


def test_other_checkpoints_and_unknown_fields_are_refused(path, wan_path, cache, tmp_path):
    with pytest.raises(ValueError, match="pipeline must be HunyuanVideoPipeline, got WanPipeline"):
        make_adapter(HunyuanVideo, wan_path)
    shutil.copytree(path, tmp_path / "changed")
    config = tmp_path / "changed/transformer/config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"image_condition_type": "token_replace"}))
    with pytest.raises(ValueError, match="is an image-to-video HunyuanVideo"):
        make_adapter(HunyuanVideo, tmp_path / "changed")
    config.write_text(json.dumps(fields | {"extra_streams": 3}))
    with pytest.raises(ValueError, match=r"transformer/config\.json has fields .* extra_streams"):
        loaded(tmp_path / "changed", cache)
    config.write_text(json.dumps(fields))
    shard = sorted((tmp_path / "changed/transformer").glob("*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"no file transformer/{shard.name}"):
        loaded(tmp_path / "changed", cache)


def test_layers_beyond_both_stacks_are_refused(path, clips_path, tmp_path):
    words = {"clips": str(clips_path), "model": str(path), "out": str(tmp_path), "layers": [4]}
    with pytest.raises(ValueError, match=r"layers must be blocks 0 \.\. 3"):
        run_job(Job.from_words(words | {"options": {"size": "32x48"}}))
