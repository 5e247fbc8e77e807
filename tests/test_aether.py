"""Aether's features equal those of the study's procedure done by hand with the library's own classes, bit for bit."""

import json
import shutil

import families
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed, get_3d_rotary_pos_embed
from PIL import Image
from transformers import AutoTokenizer, T5EncoderModel

from spatialprobe.engine.adapters.aether import Aether
from spatialprobe.engine.checkpoint import content_hash
from spatialprobe.engine.demo.tiny.cogvideox import build_aether, build_cogvideox
from spatialprobe.engine.device import placement
from spatialprobe.engine.device.placement import place
from spatialprobe.engine.job import Job
from spatialprobe.engine.reading.probing_files import export_probing
from spatialprobe.engine.reading.published import PublishedDump
from spatialprobe.engine.resolve import resolve
from spatialprobe.engine.run import run_job
from spatialprobe.engine.types import Clip, FrameSelection, parse_query

SIZE, LENGTH = (64, 96), 9  # pixels; frames of a half, so that 17 fill both
HALVES = ([0, 1, 3, 5, 7, 9, 11, 13, 15], [0, 2, 4, 6, 8, 10, 12, 14, 16])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build_aether(tmp_path_factory.mktemp("aether") / "aether-tiny")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_cogvideox(tmp_path_factory.mktemp("base") / "cogvideox-5b-i2v", "5b-i2v", num_layers=1)


@pytest.fixture
def adapter(path, base):
    def make(model=path, **options) -> Aether:
        given = {"size": SIZE, "half_frames": LENGTH, "base": str(base)} | options
        return families.make_adapter(Aether, model, **given)

    return make


@pytest.fixture(scope="module")
def loaded(path, base, tmp_path_factory):
    """Three of four blocks for the features, all for the reconstruction; and one where nothing is reconstructed."""
    cache, models = tmp_path_factory.mktemp("cache"), {}
    for geometry in ("reconstruct", "zero"):
        options = {"size": SIZE, "half_frames": LENGTH, "base": str(base), "geometry": geometry}
        models[geometry] = families.make_adapter(Aether, path, **options)
        models[geometry].load(3, families.CPU, torch.float32, cache)
    return models


def library(path, base, dtype=torch.float32):
    """The pipeline with the transformer in it; its rotary tables run at 12/8 of the pace."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(path / "transformer", torch_dtype=dtype)
    vae = AutoencoderKLCogVideoX.from_pretrained(base / "vae", torch_dtype=dtype)
    text = T5EncoderModel.from_pretrained(base / "text_encoder", dtype=dtype)
    for model in (transformer, vae, text):
        families.aligned(model)
    scheduler = CogVideoXDPMScheduler.from_pretrained(base / "scheduler")
    tokenizer = AutoTokenizer.from_pretrained(base / "tokenizer")
    return CogVideoXImageToVideoPipeline(tokenizer, text, vae, transformer, scheduler)


def rotary(fps):
    """cos and sin of 3 latent frames of 4 x 6 tokens: the library's, but that time goes 12 / fps times as fast."""
    tables = get_3d_rotary_pos_embed(32, ((0, 0), (4, 6)), (4, 6), 3)
    times = get_1d_rotary_pos_embed(8, torch.arange(3.0) * (12 / fps), use_real=True)
    for table, time in zip(tables, times, strict=True):
        table[:, :8] = time.repeat_interleave(24, 0)
    return tables


@torch.inference_mode()
def by_hand(pipe, frames, noise, seed, fps=8, all_frames=False):
    """{layer: [N, C]} of one half: reconstruction in 4 steps, noise on all, features under the first frame."""
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    dtype, scale = pipe.transformer.dtype, pipe.vae_scaling_factor_image
    # Contiguous as ours: with AVX-512 BF16, convolutions round otherwise where channels lie last, as in the library.
    video = pipe.video_processor.preprocess_video(images, height=SIZE[0], width=SIZE[1]).to(dtype).contiguous()
    latents = scale * pipe.vae.encode(video).latent_dist.mean.permute(0, 2, 1, 3, 4)
    image = pipe.video_processor.preprocess(images[0], height=SIZE[0], width=SIZE[1]).to(dtype).contiguous()
    first = scale * pipe.vae.encode(image[:, :, None]).latent_dist.mean.permute(0, 2, 1, 3, 4)
    rays = torch.zeros(1, 3, 24, 8, 12, dtype=dtype)
    text, _ = pipe.encode_prompt("", do_classifier_free_guidance=False)
    tables = rotary(fps)

    def transformer(x, condition, timestep):
        hidden = torch.cat([x, condition, rays], 2)
        return pipe.transformer(hidden, text, timestep[None], image_rotary_emb=tables, return_dict=False)[0]

    if seed is None:
        geometry = torch.zeros(1, 3, 40, 8, 12, dtype=dtype)
    else:
        generator = torch.Generator().manual_seed(seed)
        x, old = torch.randn(1, 3, 56, 8, 12, generator=generator, dtype=dtype), None
        pipe.scheduler.set_timesteps(4)
        times = pipe.scheduler.timesteps
        assert times.tolist() == [999, 749, 499, 249]
        for i, t in enumerate(times):
            out, back = transformer(x, latents, t).float(), times[i - 1] if i else None
            x, old = pipe.scheduler.step(out, old, t, back, x, generator=generator, return_dict=False)
            x = x.to(dtype)
        geometry = x[:, :, 16:]
    pipe.scheduler.set_timesteps(1000)
    timestep = pipe.scheduler.timesteps[749]
    noisy = pipe.scheduler.add_noise(torch.cat([latents, geometry], 2), noise.to(dtype), timestep[None])
    condition = latents if all_frames else torch.cat([first, torch.zeros_like(latents[:, 1:])], 1)
    blocks = dict(enumerate(pipe.transformer.transformer_blocks))
    assert len(blocks) == 4
    return {k: x[0] for k, x in families.hooked(blocks, lambda: transformer(noisy, condition, timestep)).items()}


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"geometry": "zero"}, torch.float32),
        ({"condition": "video", "fps": 15}, torch.float32),
    ],
)
def test_equals_the_studys_procedure(path, base, adapter, tmp_path, options, dtype):
    model, clip = adapter(**options), families.make_clip(17)
    model.load(3, families.CPU, dtype, tmp_path)
    plan = model.plan(17, tuple(range(17)))
    seeds = model.prepare(clip, plan).get("geometry_seed", torch.zeros(2)).tolist()
    seeds = [None, None] if options.get("geometry") == "zero" else seeds
    noise = families.make_noise(model, plan)
    mine = families.features(model, clip, (0, 2), step=749, noise=noise)
    pipe = library(path, base, dtype)
    for half, frames in enumerate(HALVES):
        theirs = by_hand(
            pipe, clip.frames[frames], noise[:, half], seeds[half], options.get("fps", 8), "condition" in options
        )
        for layer in (0, 2):
            own = mine[layer][0, 3 * half : 3 * half + 3].flatten(0, 2)
            assert own.isfinite().all()
            assert torch.equal(own, theirs[layer]), f"half {half}, layer {layer}"


def test_the_studys_frames_rows_and_step(adapter):
    model = adapter(size=(480, 720), half_frames=41)
    plan = model.plan(81, tuple(range(81)))
    assert (plan.grid, plan.passes) == ((22, 30, 45), 2)
    for f in range(81):
        half, row = (0, 0) if f == 0 else ((f - 1) % 2, ((f - 1) // 2) // 4 + 1)
        assert plan.rows[f] == 11 * half + row
    query = parse_query("0,1:76:4", 81)
    study = model.plan(81, query)
    assert (study.passes, study.shown, study.wanted_rows(query)) == (1, (0, *range(1, 80, 2)), tuple(range(11)))
    with pytest.raises(ValueError, match="at most 81 frames for two halves of 41"):
        model.plan(82, (0,))


def test_step_749_is_timestep_250(loaded):
    step = loaded["zero"].describe_step(749)
    assert step["timestep"] == 250
    assert (step["signal"], step["sigma"]) == pytest.approx((0.808, 0.590), abs=5e-4)


def test_the_reconstruction_depends_on_its_seed_the_clip_and_the_half_alone(adapter, loaded):
    clip = families.make_clip(17)
    plan = loaded["reconstruct"].plan(17, tuple(range(17)))
    other, renamed = adapter(geometry_seed=1), Clip("another", clip.frames, clip.index)
    pairs = [
        (loaded["reconstruct"], clip),
        (other, clip),
        (loaded["reconstruct"], renamed),
    ]
    seeds = [seed for model, c in pairs for seed in model.prepare(c, plan)["geometry_seed"].tolist()]
    assert len(set(seeds)) == 6
    model = loaded["reconstruct"]
    both = families.features(model, clip, (2,), step=749)[2]
    for query, own in (((0, 1), slice(0, 3)), ((2,), slice(3, 6))):
        alone = families.features(model, clip, (2,), step=749, query=query)[2]
        assert torch.equal(alone[:, own], both[:, own])
    assert not torch.allclose(both, families.features(model, renamed, (2,), step=749)[2])
    same = (families.features(loaded["zero"], c, (2,), step=749)[2] for c in (clip, renamed))
    assert torch.equal(*same)


@pytest.mark.parametrize("geometry", ["reconstruct", "zero"])
def test_a_batch_has_the_features_that_each_clip_has_alone(loaded, geometry):
    families.assert_batch_agrees(loaded[geometry], (0, 2), frames=17, step=749)


def test_only_without_a_reconstruction_are_blocks_left_out(adapter, loaded, tmp_path):
    block = sum(p.nbytes for p in loaded["zero"].blocks[0].parameters())
    read = families.bytes_by_depth(lambda: adapter(geometry="zero"), (1, 2, 4), tmp_path)
    assert (read[2] - read[1], read[4] - read[1]) == (block, 3 * block)
    whole = families.bytes_by_depth(adapter, (1, 4), tmp_path)
    assert whole[1] == whole[4] == read[4]
    assert len(loaded["reconstruct"].whole.transformer_blocks) == 4


def test_blocks_in_host_memory_change_no_value_and_what_cannot_fit_is_refused(adapter, loaded, tmp_path, monkeypatch):
    model, clip = adapter(), families.make_clip(17)
    model.load(2, families.CPU, torch.float32, tmp_path)
    place(model, families.CPU, "host")
    here, there = (families.features(m, clip, (1,), query=(0, 1), step=749)[1] for m in (loaded["reconstruct"], model))
    assert torch.equal(here[:, :3], there[:, :3])
    monkeypatch.setattr(placement, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"2 blocks need .* not one would fit"):
        placement.check_fits(adapter(), 2, torch.float32, families.CPU, "none")


def job(clips, path, base, out, **words) -> Job:
    options = {"size": f"{SIZE[0]}x{SIZE[1]}", "half_frames": LENGTH, "base": str(base)} | words.pop("options", {})
    defaults = {"clips": str(clips), "model": str(path), "out": str(out), "layers": [1], "window": 17}
    return Job.from_words(defaults | {"family": "aether", "options": options} | words)


def test_a_job_runs_exports_and_reads_back_by_the_published_row_rule(path, base, make_clip, tmp_path):
    make_clip(tmp_path / "clips/train/a", frames=17, seed=3)
    report, store = run_job(job(tmp_path / "clips", path, base, tmp_path / "store"))
    assert report.written == 1
    assert list(store.verify()) == []
    assert store.spec.options["base"] == f"content:{content_hash(base)}"
    assert store.spec.weights == f"content:{content_hash(path)}"
    export_probing(store, tmp_path / "out", "aether")
    dump = PublishedDump(
        tmp_path / "out/aether", family="aether", layers=[1], steps=[749], frames=FrameSelection(window=17)
    )
    with dump.open_clip("train/a") as clip, store.open_clip("train/a") as own:
        assert list(clip.rows) == list(own.rows)
        here, there = (x.read([(1, 749)], [*range(6)])[1, 749].data for x in (clip, own))
        assert torch.equal(here, there)
    report, _ = run_job(job(tmp_path / "clips", path, base, tmp_path / "store"))
    assert report.present == 1  # the base's name gives the same spec again
    with pytest.raises(ValueError, match="geometry_seed"):
        run_job(job(tmp_path / "clips", path, base, tmp_path / "store", options={"geometry_seed": 1}))


def test_whether_to_tile_can_be_chosen_as_on_a_gpu(path, base, make_clip, tmp_path):
    """It plans memory with a second adapter, which must find the base as the first one did."""
    make_clip(tmp_path / "clips" / "a", frames=17)
    spec = resolve(job(tmp_path / "clips", path, base, tmp_path / "s", options={"vae_tiling": "auto"})).spec
    assert spec.options["vae_tiling"] is False
    assert spec.options["base"] == f"content:{content_hash(base)}"


def test_parity_leaves_the_base_and_the_seed_to_the_user(path, base, make_clip, tmp_path):
    make_clip(tmp_path / "clips/a", frames=17)
    options = {"geometry_seed": 4, "size": "480x720", "half_frames": 41}
    asked = job(tmp_path / "clips", path, base, tmp_path / "s", compute="parity", options=options)
    spec = resolve(asked).spec
    assert (spec.compute_dtype, spec.options["vae_tiling"], spec.options["geometry_seed"]) == ("bfloat16", True, 4)
    with pytest.raises(ValueError, match="compute parity means geometry='reconstruct', but geometry='zero'"):
        resolve(job(tmp_path, path, base, tmp_path / "s", compute="parity", options=options | {"geometry": "zero"}))


# -- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"geometry": "none"}, "geometry must be one of reconstruct, zero, got 'none'"),
        ({"condition": "text"}, "condition must be one of image, video, got 'text'"),
        ({"fps": 9}, "fps must be one of 8, 10, 12, 15, 24, got 9"),
        ({"half_frames": 40}, r"half_frames must be 4k\+1"),
        ({"size": (60, 96)}, "size must be multiples of 16"),
    ],
)
def test_options_the_model_cannot_take(adapter, options, message):
    with pytest.raises(ValueError, match=message):
        adapter(**options).check_options()


def test_checkpoints_of_other_models(adapter, path, base, tmp_path):
    with pytest.raises(ValueError, match="must take the channels of an Aether, 96 in and 56 out, got 32 and 16"):
        adapter(base)
    with pytest.raises(ValueError, match=r"has no file vae/config\.json"):
        adapter(base=str(path))
    with pytest.raises(ValueError, match=r"THUDM/CogVideoX-5b-I2V is not in the local Hub cache"):
        adapter(base="")
    shutil.copytree(base, tmp_path / "one")
    shutil.rmtree(tmp_path / "one/transformer")
    shutil.copytree(path / "transformer", tmp_path / "one/transformer")
    assert adapter(tmp_path / "one", base="").options["base"] == ""  # all in one folder needs no other


def test_config_fields_that_nobody_knows_and_a_missing_shard(adapter, path, tmp_path):
    shutil.copytree(path, tmp_path / "model")
    file = tmp_path / "model/transformer/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"gated": True}))
    with pytest.raises(ValueError, match=r"transformer/config.json has fields that .* does not know: gated"):
        adapter(tmp_path / "model").load(1, families.CPU, torch.float32, tmp_path)
    file.write_text(json.dumps(config))
    shards = sorted((tmp_path / "model/transformer").glob("*.safetensors"))
    assert len(shards) > 2
    shards[-1].unlink()  # blocks that only the reconstruction runs
    with pytest.raises(ValueError, match=f"has no file transformer/{shards[-1].name}"):
        adapter(tmp_path / "model").load(1, families.CPU, torch.float32, tmp_path)


def test_weights_in_a_folder_of_their_own_are_hashed(path, tmp_path):
    shutil.copytree(path, tmp_path / "copy")
    assert content_hash(tmp_path / "copy") == content_hash(path)
    other = build_aether(tmp_path / "other", seed=1)
    assert content_hash(other) != content_hash(path)
