"""CogVideoX's features equal those that plain hooks take from the whole library pipeline, bit for bit, half by half."""

import json
import shutil

import families
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline, CogVideoXPipeline
from PIL import Image
from safetensors.torch import load_file

from spatialprobe.engine.adapters.cogvideox import CogVideoX
from spatialprobe.engine.demo.tiny.cogvideox import build_cogvideox
from spatialprobe.engine.job import Job
from spatialprobe.engine.parts.interleave import half_frames, interleaved_rows
from spatialprobe.engine.presets import detect_family
from spatialprobe.engine.reading.probing_files import export_probing
from spatialprobe.engine.reading.published import PublishedDump
from spatialprobe.engine.run import run_job
from spatialprobe.engine.types import Clip, FrameSelection, parse_query

SIZE, LENGTH = (64, 96), 9  # pixels; frames of a half, so that 17 fill both
KINDS = ("2b", "5b", "5b-i2v", "1.5-5b")
HALVES = ([0, 1, 3, 5, 7, 9, 11, 13, 15], [0, 2, 4, 6, 8, 10, 12, 14, 16])
STUDY = FrameSelection(window=97, query="0,1:76:4")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("cogvideox")
    return {kind: build_cogvideox(root / f"cogvideox-{kind}", kind) for kind in KINDS}


def adapter(path, **options) -> CogVideoX:
    return families.make_adapter(CogVideoX, path, **{"size": SIZE, "half_frames": LENGTH, **options})


@pytest.fixture(scope="module")
def loaded(paths, tmp_path_factory):
    """Three of the four blocks, in float32."""
    cache, models = tmp_path_factory.mktemp("cache"), {}
    for kind, path in paths.items():
        models[kind] = adapter(path)
        models[kind].load(3, families.CPU, torch.float32, cache)
    return models


def library(path, kind, dtype):
    cls = CogVideoXImageToVideoPipeline if kind.endswith("i2v") else CogVideoXPipeline
    pipe = cls.from_pretrained(path, torch_dtype=dtype)  # diffusers 0.37 knows no other name
    for model in (pipe.transformer, pipe.vae, pipe.text_encoder):
        families.aligned(model)
    pipe.scheduler.set_timesteps(1000)
    return pipe


@torch.inference_mode()
def by_hand(pipe, frames, step, noise):
    """{layer: [N, C]} of one half: what the study does, with the pipeline's own methods."""
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    dtype, config = pipe.transformer.dtype, pipe.transformer.config
    # Contiguous as ours: with AVX-512 BF16, convolutions round otherwise where channels lie last, as in the library.
    video = pipe.video_processor.preprocess_video(images, height=SIZE[0], width=SIZE[1]).to(dtype).contiguous()
    latents = pipe.vae_scaling_factor_image * pipe.vae.encode(video).latent_dist.mean.permute(0, 2, 1, 3, 4)
    if config.patch_size_t:
        latents = torch.cat([latents[:, : latents.shape[1] % config.patch_size_t], latents], 1)
    timestep = pipe.scheduler.timesteps[step][None]
    hidden = pipe.scheduler.add_noise(latents, noise.to(dtype), timestep)
    if config.in_channels == 32:
        image = pipe.video_processor.preprocess(images[0], height=SIZE[0], width=SIZE[1]).to(dtype).contiguous()
        condition = pipe.vae_scaling_factor_image * pipe.vae.encode(image[:, :, None]).latent_dist.mean
        rest = torch.zeros_like(latents[:, 1:])
        hidden = torch.cat([hidden, torch.cat([condition.permute(0, 2, 1, 3, 4), rest], 1)], 2)
    rotary = None
    if config.use_rotary_positional_embeddings:
        rotary = pipe._prepare_rotary_positional_embeddings(*SIZE, latents.shape[1], families.CPU)
    text, _ = pipe.encode_prompt("", do_classifier_free_guidance=False)
    blocks = dict(enumerate(pipe.transformer.transformer_blocks))
    assert len(blocks) == 4  # the whole model runs, the engine's has 3 blocks
    seen = families.hooked(blocks, lambda: pipe.transformer(hidden, text, timestep, image_rotary_emb=rotary))
    return {layer: x[0] for layer, x in seen.items()}


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, torch.float32) for kind in KINDS), ("5b-i2v", torch.bfloat16)])
def test_equals_hooks_on_the_whole_pipeline(paths, loaded, tmp_path, kind, dtype):
    model = loaded[kind]
    if dtype != torch.float32:
        model = adapter(paths[kind])
        model.load(3, families.CPU, dtype, tmp_path)
    clip = families.make_clip(2 * LENGTH - 1)
    noise = families.make_noise(model, model.plan(17, (0,)))
    mine = families.features(model, clip, (0, 2), step=749, noise=noise)
    pipe = library(paths[kind], kind, dtype)
    rows = mine[0].shape[1] // 2
    for half, frames in enumerate(HALVES):
        theirs = by_hand(pipe, clip.frames[frames], 749, noise[:, half])
        for layer in (0, 2):
            own = mine[layer][0, half * rows : (half + 1) * rows].flatten(0, 2)
            assert torch.equal(own, theirs[layer]), f"half {half}, layer {layer}"


# -- frames and rows ------------------------------------------------------------------------------------------------


def test_the_studys_window_frames_and_rows(paths):
    model = adapter(paths["5b"], size=(480, 720), half_frames=49)
    plan = model.plan(97, tuple(range(97)))
    assert (plan.grid[0], plan.passes, plan.shown) == (26, 2, tuple(range(97)))
    for f in range(97):
        half, row = (0, 0) if f == 0 else ((f - 1) % 2, ((f - 1) // 2) // 4 + 1)
        assert plan.rows[f] == 13 * half + row
    assert half_frames(0, 49, 97) == [0, *range(1, 96, 2)]
    assert half_frames(1, 49, 97) == [0, *range(2, 97, 2)]
    shorter = model.plan(81, tuple(range(81)))  # completed with repeats of frame 80: the same rows
    assert shorter.rows == plan.rows[:81]
    assert half_frames(0, 49, 81) == [0, *range(1, 80, 2), *[80] * 8]
    assert half_frames(1, 49, 81) == [0, *range(2, 81, 2), *[80] * 8]


def test_with_the_studys_query_the_second_half_is_not_shown(paths):
    model = adapter(paths["5b"], half_frames=49)
    plan = model.plan(97, parse_query(STUDY.query, 97))
    assert (plan.passes, plan.shown) == (1, (0, *range(1, 96, 2)))
    assert all((row >= 0) == (f == 0 or f % 2 == 1) for f, row in enumerate(plan.rows))
    assert plan.wanted_rows(parse_query(STUDY.query, 97)) == tuple(range(11))
    short = model.plan(81, parse_query(STUDY.query, 81))
    assert short.shown == (0, *range(1, 80, 2), 80)  # 80 is repeated, yet its own row is the other half's
    assert short.rows[80] == -1
    even = model.plan(97, (2, 96))
    assert (even.passes, even.shown[:3], even.rows[0], even.rows[2], even.rows[96]) == (1, (0, 2, 4), -1, 14, 25)


def test_rows_of_version_1_5_are_two_latent_frames_the_first_of_an_odd_number_twice():
    """Of 49 frames: row 0 is frame 0 twice, row 1 frames 1 to 8, row 2 frames 9 to 16."""
    rows = interleaved_rows(97, (0, 1), 7, lambda place: (1 + -(-place // 4)) // 2)
    first = [rows[f] for f in half_frames(0, 49, 97)]
    assert first == [0] + [1] * 8 + [2] * 8 + [3] * 8 + [4] * 8 + [5] * 8 + [6] * 8


def test_1_5_uses_that_rule(paths):
    model = adapter(paths["1.5-5b"], half_frames=49)
    plan = model.plan(97, tuple(range(97)))
    assert plan.grid[0] == 14
    assert [plan.rows[f] for f in half_frames(1, 49, 97)[1:]] == [7 + 1 + p // 8 for p in range(48)]
    even = adapter(paths["1.5-5b"], half_frames=13).plan(25, tuple(range(25)))  # 4 latent frames: none is repeated
    assert [even.rows[f] for f in half_frames(0, 13, 25)] == [0] * 5 + [1] * 8


@pytest.mark.parametrize(("kind", "rows"), [("5b", 6), ("1.5-5b", 4)])
def test_a_marked_patch_is_found_at_its_row_and_cell(loaded, kind, rows):
    """In the first row that changes much: the VAE is causal, so that a frame shows in rows after its own, too."""
    model, plain = loaded[kind], families.make_clip(17, SIZE)
    plain.frames.fill_(100)
    plan = model.plan(17, tuple(range(17)))
    noise = torch.zeros(1, *model.noise_shape(plan))
    before = families.features(model, plain, (0,), step=999, noise=noise)[0]
    assert plan.grid[0] == rows
    for row in range(rows):
        frames = [f for f in range(17) if plan.rows[f] == row]
        if row == rows // 2:  # frame 0 begins both halves, and is counted to the first
            assert frames == []
            continue
        marked = Clip(plain.id, plain.frames.clone(), plain.index)
        marked.frames[frames, :, 32:48, 64:80] = 255  # cell (2, 4)
        after = families.features(model, marked, (0,), step=999, noise=noise)[0]
        change = (after - before).abs().sum(-1)[0]  # [2T, 4, 6]
        peaks = change.flatten(1).amax(1)
        assert int((peaks > peaks.max() / 2).nonzero()[0]) == row
        assert divmod(int(change[row].argmax()), 6) == (2, 4)
        if row == 0:
            assert torch.equal(change[: rows // 2], change[rows // 2 :])


# -- halves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("query", "half"), [((0, 1, 5), 0), ((2, 16), 1)])
@pytest.mark.parametrize("kind", ["5b", "5b-i2v"])
def test_a_half_has_the_same_features_whether_or_not_the_other_runs(loaded, kind, query, half):
    model, clip = loaded[kind], families.make_clip(17)
    both = families.features(model, clip, (0, 2), step=749)
    alone = families.features(model, clip, (0, 2), step=749, query=query)
    own, other = slice(3 * half, 3 * half + 3), slice(3 - 3 * half, 6 - 3 * half)
    for layer in (0, 2):
        assert torch.equal(alone[layer][:, own], both[layer][:, own])
        assert alone[layer][:, other].isnan().all()


def job(clips, path, out, **words) -> Job:
    options = {"size": f"{SIZE[0]}x{SIZE[1]}", "half_frames": LENGTH} | words.pop("options", {})
    defaults = {"clips": str(clips), "model": str(path), "out": str(out), "layers": [0, 2], "window": 17}
    return Job.from_words(defaults | {"options": options} | words)


@pytest.fixture(scope="module")
def clips(make_clip, tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    for seed, name in enumerate(("train/a", "val/b")):
        make_clip(root / name, frames=17, seed=seed)
    return root


@pytest.mark.parametrize(("kind", "query", "encoded"), [("5b", "0,1:17:4", 1), ("5b", ":", 2), ("5b-i2v", "0,1,5", 2)])
def test_what_a_query_does_not_touch_is_not_read_encoded_or_run(
    paths, clips, tmp_path, monkeypatch, kind, query, encoded
):
    """Per clip: the frames of one half, one VAE call for it (and one for the image), one run of each block a step."""
    from spatialprobe.engine.clips import decode

    read, counts, load, read_image = [], {"encode": 0, "block": 0}, CogVideoX.load, decode._read_image
    monkeypatch.setattr(decode, "_read_image", lambda path: read.append(path.name) or read_image(path))

    def counting(self, *args):
        load(self, *args)
        encode = self.vae.encode
        self.vae.encode = lambda x: counts.update(encode=counts["encode"] + 1) or encode(x)
        for block in self.blocks:
            block.register_forward_hook(lambda *a: counts.update(block=counts["block"] + 1))

    monkeypatch.setattr(CogVideoX, "load", counting)
    report, store = run_job(job(clips, paths[kind], tmp_path / "s", query=query, steps=[749, 300]))
    halves = 2 if query == ":" else 1
    assert report.written == 2
    assert counts == {"encode": 2 * encoded, "block": 2 * halves * 2 * 3}
    shown = sorted(set(HALVES[0]) | set(HALVES[1] if halves == 2 else []))
    assert sorted(read) == sorted(f"{f:03d}.png" for f in shown * 2)
    assert store.provenance("train/a")["grid"] == [6, 4, 6]
    assert list(store.verify()) == []


def test_stored_rows_of_one_half_are_those_of_both(paths, clips, tmp_path):
    _, both = run_job(job(clips, paths["5b"], tmp_path / "both", query=":"))
    _, one = run_job(job(clips, paths["5b"], tmp_path / "one", query="2,16"))
    features = one.read("val/b", 2, 749)
    assert features.rows.tolist()[:5] == [-1, -1, 0, -1, 0]
    assert torch.equal(features.data, both.read("val/b", 2, 749).data[[4, 5]])


# -- the published layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [17, 13])
def test_exported_features_read_back_by_the_published_row_rule(paths, make_clip, tmp_path, frames):
    """Also of a window that does not fill both halves: the layout's halves are whole."""
    make_clip(tmp_path / "clips/train/a", frames=frames, seed=3)
    _, store = run_job(job(tmp_path / "clips", paths["5b"], tmp_path / "store", window=frames))
    export_probing(store, tmp_path / "out", "cogvideox-t2v-5b")
    feat = load_file(tmp_path / "out/cogvideox-t2v-5b/train/a/feature_t2v_5b_t749_layer2.sft")["feat"]
    data = store.read("train/a", 2, 749).data
    assert feat.shape == (2, 3, 4, 6, 64)
    assert torch.equal(feat.flatten(0, 1), data)
    selection = FrameSelection(window=frames)
    root = tmp_path / "out/cogvideox-t2v-5b"
    dump = PublishedDump(root, family="cogvideox", layers=[0, 2], steps=[749], frames=selection)
    with dump.open_clip("train/a") as clip, store.open_clip("train/a") as own:
        assert list(clip.rows) == list(own.rows)
        rows = [clip.rows[f] for f in range(frames)]
        here, there = (x.read([(2, 749)], rows)[2, 749].data for x in (clip, own))
        assert torch.equal(here, there)


# -- noise, schedule, prompt ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "signal", "sigma"), [("2b", 0.624, 0.782), ("5b", 0.808, 0.590)])
def test_step_749_is_timestep_250(paths, loaded, kind, signal, sigma):
    model = loaded[kind]
    step = model.describe_step(749)
    assert step["timestep"] == 250
    assert (step["signal"], step["sigma"]) == pytest.approx((signal, sigma), abs=5e-4)
    scheduler = CogVideoXDDIMScheduler.from_pretrained(paths[kind] / "scheduler")
    scheduler.set_timesteps(1000)
    zero, one = torch.zeros(1, 2), torch.ones(1, 2)
    for index in (0, 300, 749, 999):
        timestep = scheduler.timesteps[index][None]
        assert torch.equal(model.noised(one, index, zero), scheduler.add_noise(one, zero, timestep))
        assert torch.equal(model.noised(zero, index, one), scheduler.add_noise(zero, one, timestep))


def test_noise_covers_both_halves_whichever_runs(loaded):
    model = loaded["5b"]
    assert model.noise_shape(model.plan(17, (0, 1))) == model.noise_shape(model.plan(17, tuple(range(17))))
    assert model.noise_shape(model.plan(17, (0, 1))) == (2, 3, 16, 8, 12)


def test_the_prompt_is_embedded_once_and_its_encoder_dropped(paths, loaded, tmp_path, monkeypatch):
    model = adapter(paths["5b"], prompt="a sofa in a room")
    model.load(1, families.CPU, torch.float32, tmp_path)
    modules = [type(v).__name__ for v in vars(model).values() if isinstance(v, torch.nn.Module)]
    assert sorted(modules) == ["AutoencoderKLCogVideoX", "CogVideoXTransformer3DModel", "ModuleList"]
    assert model.vae.decoder is None
    assert not torch.equal(model.prompt, loaded["5b"].prompt)
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens and prompt_tokens is 4"):
        adapter(paths["5b"], prompt="a sofa in a room", prompt_tokens=4).load(1, families.CPU, torch.float32, tmp_path)
    monkeypatch.setattr("transformers.T5EncoderModel.from_pretrained", lambda *a, **k: pytest.fail("loaded again"))
    again = adapter(paths["5b"], prompt="a sofa in a room")
    again.load(1, families.CPU, torch.float32, tmp_path)
    assert torch.equal(again.prompt, model.prompt)


# -- batches, sizes, depth --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["5b-i2v", "1.5-5b"])
def test_a_batch_has_the_features_that_each_clip_has_alone(loaded, kind):
    families.assert_batch_agrees(loaded[kind], (0, 2), frames=17, step=749)


def test_a_window_that_does_not_fill_its_halves_repeats_its_last_frame(loaded):
    model = loaded["5b"]
    clip = families.make_clip(11, (50, 70))
    frames = torch.cat([clip.frames, clip.frames[-1:].expand(6, -1, -1, -1)])
    repeated = Clip(clip.id, frames, torch.arange(17))
    short, whole = (families.features(model, c, (2,), step=749)[2] for c in (clip, repeated))
    assert torch.equal(short, whole)
    one = families.features(model, families.make_clip(1), (2,), step=749)[2]
    assert one[:, :3].isfinite().all()


def test_other_sizes_than_the_positions_were_made_for(paths, tmp_path):
    """Sines are computed and rotary positions stretched for any size, as in the library's pipeline."""
    for kind in ("2b", "5b"):
        model = adapter(paths[kind], size=(48, 80))
        model.load(1, families.CPU, torch.float32, tmp_path)
        assert families.features(model, families.make_clip(9), (0,), step=749)[0].shape == (1, 6, 3, 5, 64)
    pipe = library(paths["5b"], "5b", torch.float32)
    for mine, theirs in zip(
        model.rotary, pipe._prepare_rotary_positional_embeddings(48, 80, 3, families.CPU), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_only_the_wanted_blocks_are_read(paths, loaded, tmp_path):
    read = families.bytes_by_depth(lambda: adapter(paths["5b-i2v"]), (1, 2, 4), tmp_path)
    block = sum(p.nbytes for p in loaded["5b-i2v"].blocks[0].parameters())
    assert (read[2] - read[1], read[4] - read[1]) == (block, 3 * block)
    with pytest.raises(ValueError, match="layer 3 is beyond the last loaded block, 2"):
        families.features(loaded["5b"], families.make_clip(9), (3,), step=749)


# -- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("5b", {"size": (60, 96)}, "size must be multiples of 16"),
        ("5b", {"half_frames": 8}, r"half_frames must be 4k\+1 and at least 5, got 8"),
        ("5b", {"half_frames": 1}, "at least 5, got 1"),
        ("5b", {"prompt_tokens": 0}, "prompt_tokens must be at least 1"),
        ("2b", {"prompt_tokens": 100}, "prompt_tokens must be 226, for which this model has positions, got 100"),
        ("5b-i2v", {"size": (64, 112)}, r"size must be \(64, 96\), for which .* learned, got \(64, 112\)"),
        ("5b-i2v", {"half_frames": 13}, "half_frames must be 9, for which .* learned, got 13"),
        ("1.5-5b", {"size": (80, 96)}, r"size must be at most \(64, 96\), where .* end, got \(80, 96\)"),
    ],
)
def test_options_the_model_cannot_take(paths, kind, options, message):
    with pytest.raises(ValueError, match=message):
        adapter(paths[kind], **options).check_options()


def test_a_window_longer_than_both_halves(paths):
    with pytest.raises(ValueError, match=r"at most 17 frames for two halves of 9 \(half_frames\), got 18"):
        adapter(paths["5b"]).plan(18, (0,))


@pytest.fixture
def edited(paths, tmp_path):
    def edit(file, **fields):
        shutil.copytree(paths["5b"], tmp_path / "model")
        path = tmp_path / "model" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return tmp_path / "model"

    return edit


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("transformer/config.json", {"in_channels": 96}, r"must have 16 input channels .* or 32 .*, got 96"),
        (
            "transformer/config.json",
            {"_class_name": "WanTransformer3DModel"},
            "must have a CogVideoXTransformer3DModel",
        ),
        (
            "vae/config.json",
            {"_class_name": "AutoencoderKLWan"},
            "must have a AutoencoderKLCogVideoX, got AutoencoderKLWan",
        ),
    ],
)
def test_checkpoints_of_other_models(edited, file, fields, message):
    with pytest.raises(ValueError, match=message):
        adapter(edited(file, **fields))


@pytest.mark.parametrize("file", ["transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_config_fields_that_nobody_knows(edited, tmp_path, file):
    model = adapter(edited(file, gated=True))
    with pytest.raises(ValueError, match=f"{file} has fields that .* does not know: gated"):
        model.load(1, families.CPU, torch.float32, tmp_path)


def test_a_missing_shard(edited, tmp_path):
    model = edited("model_index.json")
    shards = sorted((model / "transformer").glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"has no file transformer/{shards[1].name}"):
        adapter(model).load(4, families.CPU, torch.float32, tmp_path)


def test_published_checkpoints_are_recognised(paths):
    for path in paths.values():
        assert detect_family(adapter(path).checkpoint) == "cogvideox"


def test_tiny_checkpoints_are_the_same_for_the_same_seed(paths, tmp_path):
    again = build_cogvideox(tmp_path / "again", "5b-i2v")
    weights = sorted(again.rglob("*.safetensors"))
    assert len(weights) > 4
    for path in weights:
        assert path.read_bytes() == (paths["5b-i2v"] / path.relative_to(again)).read_bytes()
    with pytest.raises(ValueError, match=r"kind must be one of 2b, 5b, 5b-i2v, 1\.5-5b, got '3b'"):
        build_cogvideox(tmp_path / "x", "3b")
