"""Open-Sora 2.0 against a slow reference in float64 and against diffusers' Flux, whose architecture it has."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from families import CPU, assert_batch_agrees, bytes_by_depth, features, make_adapter, make_clip
from families import make_noise as noise_of
from open_sora_reference import flux, slow
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny.open_sora import build_open_sora
from transformers import AutoTokenizer, CLIPTextModel, T5Config, T5EncoderModel

from spatialprobe.engine.adapters.open_sora import OpenSora
from spatialprobe.engine.device import placement
from spatialprobe.engine.job import Job
from spatialprobe.engine.parts.open_sora_blocks import OpenSoraTransformer, Sizes, pack
from spatialprobe.engine.run import run_job
from spatialprobe.engine.types import Clip

SIZE, HEAD = (32, 48), 32
T5, CLIP = "google/t5-v1_1-xxl", "openai/clip-vit-large-patch14"


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    return build_open_sora(tmp_path_factory.mktemp("open-sora") / "open-sora-tiny")


@pytest.fixture(scope="session")
def weights(path):
    return {k: x for k, x in load_file(path / "Open_Sora_v2.safetensors").items() if not k.startswith("final_layer.")}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("prompts")


@pytest.fixture
def changed(path, tmp_path):
    """A copy, and a function that writes its transformer anew."""
    copy = shutil.copytree(path, tmp_path / "changed")
    file = copy / "Open_Sora_v2.safetensors"

    def write(rename=lambda name: name, **more):
        save_file({rename(name): x for name, x in load_file(path / file.name).items()} | more, file)
        return copy

    return write


def loaded(path, cache, depth=4, dtype=torch.float32, **options) -> OpenSora:
    adapter = make_adapter(OpenSora, path, **{"size": SIZE, "prompt_tokens": 16, **options})
    adapter.load(depth, CPU, dtype, cache)
    return adapter


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- the transformer --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_every_block_equals_a_slow_reference_in_float64(path, weights):
    grid, sizes = (2, 2, 3), Sizes.of({k: tuple(x.shape) for k, x in weights.items()}, "file")
    patches, condition, text, pooled = draw(12, 64, seed=1), draw(12, 68, seed=2), draw(5, 32, seed=3), draw(32, seed=4)
    model = OpenSoraTransformer(sizes, 4)
    model.load_state_dict(weights, strict=True)
    seen = []
    for block in (*model.double_blocks, *model.single_blocks):
        block.register_forward_hook(lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out[:, 5:]))
    model(patches[None], condition[None], text[None], pooled[None], torch.tensor([0.7644]), grid)
    expected = slow(weights, patches, condition, text, pooled, 0.7644, grid, HEAD)
    assert len(seen) == len(expected) == 4
    for mine, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(mine[0].double(), theirs, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(expected[0], expected[3], atol=0.1)


def test_patches_hold_a_channel_s_four_latents_side_by_side():
    latents = torch.arange(2 * 3 * 4 * 6.0).view(1, 2, 3, 4, 6)
    packed = pack(latents)
    assert packed.shape == (1, 18, 8)
    for t, y, x in ((0, 0, 0), (1, 1, 2), (2, 0, 1)):
        expected = [latents[0, c, t, 2 * y + i, 2 * x + j] for c in range(2) for i in range(2) for j in range(2)]
        assert packed[0, t * 6 + y * 3 + x].tolist() == [float(v) for v in expected]


# -- the whole way ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def by_hand(path, weights, sample, size, step, noise, *, prompt, first_frame, vae_sample, tiling) -> list[torch.Tensor]:
    """The video tokens after every block, with the libraries' own classes and Flux for the transformer."""
    vae = AutoencoderKLHunyuanVideo(block_out_channels=(32, 32, 32, 32), layers_per_block=1).eval()
    vae.load_state_dict(load_file(path / "hunyuan_vae.safetensors"), strict=True)
    vae.use_framewise_encoding, vae.use_tiling = False, tiling
    resized = [np.asarray(Image.fromarray(f.permute(1, 2, 0).numpy()).resize(size[::-1], 3)) for f in sample.frames]
    video = (torch.from_numpy(np.stack(resized)).permute(3, 0, 1, 2)[None].float() / 255 - 0.5) / 0.5
    rows = (video.shape[2] + 3) // 4
    noise, draws = noise[:, :, :rows], noise[:, :, rows:]

    def latents(frames, draws):
        found = vae.encode(frames).latent_dist
        return 0.476986 * (found.mean + found.std * draws if vae_sample else found.mean)

    clean = latents(video, draws[:, :, :rows])
    mask, first = torch.zeros_like(clean[:, :1]), torch.zeros_like(clean)
    if first_frame:
        mask[:, :, 0] = 1
        first[:, :, :1] = latents(video[:, :, :1], draws[:, :, rows:])
    height, width = clean.shape[3] // 2, clean.shape[4] // 2
    alpha = (1 + (height * width - 256) / 1920) * rows**0.5
    time = 1 - step / 1000
    time = alpha * time / (1 + (alpha - 1) * time)
    noisy = (1 - time) * clean + (1 - (1 - 1e-5) * (1 - time)) * noise
    tokens = [
        torch.cat([x[0, :, t, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2].flatten() for x in (noisy, mask, first)])
        for t in range(rows)
        for y in range(height)
        for z in range(width)
    ]
    embedded = {}
    for name, cls, length in ((T5, T5EncoderModel, 16), (CLIP, CLIPTextModel, 77)):
        ids = AutoTokenizer.from_pretrained(path / name)(prompt, padding="max_length", max_length=length)["input_ids"]
        embedded[name] = cls.from_pretrained(path / name)(input_ids=torch.tensor([ids]))
    model = flux(weights, HEAD)
    seen = []
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.register_forward_hook(lambda m, args, out: seen.append(out[1]))
    places = torch.meshgrid(*(torch.arange(n) for n in (rows, height, width)), indexing="ij")
    model(
        hidden_states=torch.stack(tokens)[None],
        encoder_hidden_states=embedded[T5].last_hidden_state,
        pooled_projections=embedded[CLIP].pooler_output,
        timestep=torch.tensor([time]),
        img_ids=torch.stack(places, -1).view(-1, 3),
        txt_ids=torch.zeros(16, 3),
    )
    return seen


@pytest.mark.parametrize(
    ("size", "frames", "step", "options"),
    [
        (SIZE, 9, 750, {"first_frame": True, "vae_sample": False}),
        (SIZE, 21, 300, {"first_frame": True, "vae_sample": True}),
        (SIZE, 5, 750, {"first_frame": False, "vae_sample": True}),
        ((288, 32), 5, 750, {"first_frame": True, "vae_sample": False}),  # higher than a tile of the VAE
    ],
)
def test_equals_flux_of_the_same_weights(path, weights, cache, size, frames, step, options):
    adapter = loaded(path, cache, size=size, prompt="a sofa", **options)
    sample = make_clip(frames)
    noise = noise_of(adapter, adapter.plan(frames, (0,)))
    mine = features(adapter, sample, (0, 1, 2, 3), step=step, noise=noise)
    theirs = by_hand(path, weights, sample, size, step, noise, prompt="a sofa", tiling=True, **options)
    for layer in range(4):
        torch.testing.assert_close(mine[layer].flatten(1, 3), theirs[layer], rtol=1e-4, atol=1e-4)


def test_bfloat16_is_the_same_but_for_rounding(path, cache):
    sample = make_clip(1)  # the VAE's convolutions in time are slow in bfloat16 on a CPU
    exact = features(loaded(path, cache), sample, (1, 3), step=750)
    rounded = features(loaded(path, cache, dtype=torch.bfloat16), sample, (1, 3), step=750)
    for layer in (1, 3):
        assert rounded[layer].dtype == torch.bfloat16
        error = (rounded[layer].float() - exact[layer]).norm() / exact[layer].norm()
        assert 1e-4 < float(error) < 0.05  # 8 bits of mantissa through the VAE and up to 4 blocks


def test_tiling_changes_values_only_above_a_tile(path, cache):
    for size, equal in ((SIZE, True), ((288, 32), False)):
        pair = [
            features(loaded(path, cache, 1, size=size, vae_tiling=tiling), make_clip(5), (0,), step=750)[0]
            for tiling in (True, False)
        ]
        assert torch.equal(*pair) is equal


# -- the study --------------------------------------------------------------------------------------------------------


def test_step_750_is_the_study_s_time_and_the_kept_rows_are_its_21(path):
    adapter = make_adapter(OpenSora, path)
    plan = adapter.plan(129, tuple(range(81)))
    assert plan.size == (480, 848)
    assert plan.grid == (33, 30, 53)
    assert list(plan.rows[:81]) == [(f + 3) // 4 for f in range(81)]
    assert plan.wanted_rows(tuple(range(81))) == tuple(range(21))
    alpha = 9.7359  # 1 + 2 * (1590 - 256) / 3840, times the root of 33
    for dtype, rounding in ((torch.float32, 1e-6), (torch.bfloat16, 2**-9)):
        adapter.dtype = dtype
        step = adapter.describe_clip_step(750, plan)
        shifted = alpha * 0.25 / (1 + (alpha - 1) * 0.25)
        assert step["timestep"] == pytest.approx(1000 * shifted, abs=1000 * rounding + 0.01)
        assert step["sigma"] == pytest.approx(shifted + 1e-5 * (1 - shifted), abs=rounding + 1e-5)
    assert shifted == pytest.approx(0.764, abs=1e-3)
    assert adapter.describe_clip_step(0, plan) == {"timestep": 1000.0, "sigma": 1.0}


def test_the_draws_of_the_latents_are_part_of_the_clip_s_noise(path, cache):
    sampled, mean = (make_adapter(OpenSora, path, size=SIZE, vae_sample=s) for s in (True, False))
    plan = mean.plan(9, (0,))
    assert mean.noise_shape(plan) == (16, 3, 4, 6)
    assert sampled.noise_shape(plan) == (16, 3 + 3 + 1, 4, 6)
    adapter = loaded(path, cache, 1, vae_sample=True)
    noise = noise_of(adapter, plan)
    base = features(adapter, make_clip(), (0,), step=750, noise=noise)[0]
    for frame in (0, 3, 6):  # of the noise, of the latents' draws, of the first frame's
        other = noise.clone()
        other[:, :, frame] += 1
        assert not torch.allclose(features(adapter, make_clip(), (0,), step=750, noise=other)[0], base)


def test_rows_follow_the_models_own_order(path, cache):
    adapter = loaded(path, cache, 3)
    plain, marked = make_clip(size=SIZE), make_clip(size=SIZE)
    plain.frames[:], marked.frames[:] = 100, 100
    marked.frames[5:, :, 16:, 32:] = 255  # the cell at the bottom right, from frame 5 on
    noise = torch.zeros_like(noise_of(adapter, adapter.plan(9, (0,))))
    for layer in (0, 2):
        a, b = (features(adapter, clip, (layer,), step=999, noise=noise)[layer] for clip in (plain, marked))
        where = (a - b).abs().mean(-1)[0]  # [3, 2, 3]
        assert tuple(int(i) for i in np.unravel_index(int(where.argmax()), where.shape)) == (2, 1, 2)


def test_a_batch_and_a_part_of_a_group(path, cache):
    assert_batch_agrees(loaded(path, cache, 3, vae_sample=True), (0, 2), step=750)
    adapter, sample = loaded(path, cache, 3), make_clip(10)
    repeated = Clip("a", torch.cat([sample.frames, sample.frames[-1:].expand(3, -1, -1, -1)]), torch.arange(13))
    noise = noise_of(adapter, adapter.plan(10, (0,)))
    ten, thirteen = (features(adapter, c, (2,), step=750, noise=noise)[2] for c in (sample, repeated))
    assert torch.equal(ten, thirteen)


def test_only_the_wanted_blocks_are_loaded(path, cache):
    options = {"size": SIZE, "prompt_tokens": 16}
    read = bytes_by_depth(lambda: make_adapter(OpenSora, path, **options), (1, 2, 3, 4), cache)
    blocks = loaded(path, cache).blocks
    assert [read[d + 1] - read[d] for d in (1, 2, 3)] == [sum(p.nbytes for p in b.parameters()) for b in blocks[1:]]


def test_single_blocks_are_not_taken_for_the_larger_double_ones(path, monkeypatch):
    adapter = make_adapter(OpenSora, path, size=SIZE)
    one, two, three, whole = (adapter.weight_bytes(depth, torch.float32) for depth in (1, 2, 3, 4))
    assert whole < one + 3 * (two - one)
    monkeypatch.setattr(placement, "free_bytes", lambda device: whole)
    placement.check_fits(adapter, 4, torch.float32, CPU, "none")
    monkeypatch.setattr(placement, "free_bytes", lambda device: three)
    with pytest.raises(ValueError, match=r"4 blocks need .* 3 would fit \(layers up to 2\)"):
        placement.check_fits(adapter, 4, torch.float32, CPU, "none")


def test_blocks_in_host_memory_change_no_value(path, cache):
    whole, offloaded = loaded(path, cache), loaded(path, cache)
    placement.place(offloaded, CPU, "host")
    assert all(p.is_meta for block in offloaded.blocks for p in block.parameters())
    a, b = (features(adapter, make_clip(5), (1, 3), step=750) for adapter in (whole, offloaded))
    assert torch.equal(a[1], b[1])
    assert torch.equal(a[3], b[3])


def test_a_job_writes_a_store_that_verifies(path, clips_path, tmp_path):
    words = {"clips": str(clips_path), "model": str(path), "family": "open_sora", "out": str(tmp_path / "store")}
    words |= {"layers": [1, 3], "window": 9, "limit": 2, "options": {"size": "32x48", "prompt_tokens": "16"}}
    report, store = run_job(Job.from_words(words))
    assert (report.written, report.failed) == (2, 0)
    assert store.read("clip1", layer=3, step=750).data.shape == (3, 2, 3, 64)
    (step,) = store.provenance("clip1")["steps"]
    alpha = (1 + (6 - 256) / 1920) * 3**0.5
    assert step["sigma"] == pytest.approx(alpha * 0.25 / (1 + (alpha - 1) * 0.25), abs=1e-5)
    assert list(store.verify()) == []
    with pytest.raises(ValueError, match="name the family with --family"):
        run_job(Job.from_words({k: v for k, v in words.items() if k != "family"}))
    with pytest.raises(ValueError, match=r"layers must be blocks 0 \.\. 3"):
        run_job(Job.from_words(words | {"layers": [4]}))


# -- what can be wrong ------------------------------------------------------------------------------------------------


def test_text_encoders_may_lie_elsewhere_and_their_weights_are_part_of_the_cached_prompt(path, cache, tmp_path):
    copy = shutil.copytree(path, tmp_path / "without")
    shutil.move(copy / T5, tmp_path / "t5")
    with pytest.raises(ValueError, match=r"text_encoder 'google/t5-v1_1-xxl' is no folder of .*--option text_encoder="):
        loaded(copy, cache, 1)
    base, moved = loaded(path, cache, 1), loaded(copy, cache, 1, text_encoder=str(tmp_path / "t5"))
    assert moved.checkpoint.identity != base.checkpoint.identity  # the encoders in a checkpoint are part of it
    assert torch.equal(moved.text, base.text)
    weights = load_file(tmp_path / "t5/model.safetensors")
    save_file({name: x + 0.1 for name, x in weights.items()}, tmp_path / "t5/model.safetensors", {"format": "pt"})
    assert not torch.allclose(loaded(copy, cache, 1, text_encoder=str(tmp_path / "t5")).text, base.text)
    T5EncoderModel(T5Config(vocab_size=256, d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path / "t5"
    )
    with pytest.raises(ValueError, match=r"text_encoder must give 32 channels.* got 24 of .*t5"):
        loaded(copy, cache, 1, text_encoder=str(tmp_path / "t5"))
    torch.save(weights, tmp_path / "t5/pytorch_model.bin")
    (tmp_path / "t5/model.safetensors").unlink()
    with pytest.raises(ValueError, match="t5 cannot be loaded"):  # pickles are never read
        loaded(copy, cache, 1, text_encoder=str(tmp_path / "t5"))


def test_no_text_encoder_is_left_and_none_is_loaded_again(path, cache, monkeypatch):
    adapter = loaded(path, cache, 1)
    modules = {type(m).__name__ for m in vars(adapter).values() if isinstance(m, torch.nn.Module)}
    assert modules == {"OpenSoraTransformer", "AutoencoderKLHunyuanVideo"}
    monkeypatch.setattr("transformers.T5EncoderModel.from_pretrained", lambda *a, **k: pytest.fail("loaded again"))
    assert torch.equal(loaded(path, cache, 1).text, adapter.text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (40, 48)}, "multiples of 16"),
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1"),
        ({"text_encoder": ""}, "text_encoder must be a folder"),
    ],
)
def test_options_the_model_cannot_take(path, options, message):
    with pytest.raises(ValueError, match=message):
        make_adapter(OpenSora, path, **options).check_options()


@pytest.mark.parametrize(
    ("rename", "more", "message"),
    [
        (lambda n: n.replace("img_in", "x_in"), {}, r"has no tensor img_in\.weight"),
        (lambda n: n.replace("cond_in", "c_in"), {}, r"has no tensor cond_in\.weight"),
        (lambda n: n.replace("double_blocks.1", "double_blocks.2"), {}, r"all double_blocks from 0 on, got \[0, 2\]"),
        (lambda n: n, {"guidance_in.in_layer.weight": torch.zeros(2)}, "guidance-distilled"),
        (lambda n: n, {"cond_in.weight": torch.zeros(64, 70)}, "a condition of latents and mask, 68, got 70"),
        (lambda n: n, {"img_in.weight": torch.zeros(64, 32), "cond_in.weight": torch.zeros(64, 36)}, "other latents"),
    ],
)
def test_files_of_other_models_are_refused(changed, rename, more, message):
    with pytest.raises(ValueError, match=message):
        make_adapter(OpenSora, changed(rename, **more))


def test_fused_and_broken_files_are_refused(changed, path, wan_path, cache):
    with pytest.raises(ValueError, match=r"has no file Open_Sora_v2\.safetensors"):
        make_adapter(OpenSora, wan_path)
    copy = changed(lambda n: n.replace("double_blocks.1.img_attn.q_proj", "double_blocks.1.img_attn.qkv"))
    with pytest.raises(ValueError, match=r"lacks 2 of .* first double_blocks\.1\.img_attn\.q_proj"):
        loaded(copy, cache)
    file = copy / "hunyuan_vae.safetensors"
    file.write_bytes((path / file.name).read_bytes()[:-100])
    changed()
    with pytest.raises(ValueError, match=r"hunyuan_vae\.safetensors is not a whole safetensors file"):
        loaded(copy, cache)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="is it HunyuanVideo's VAE"):
        make_adapter(OpenSora, copy)
