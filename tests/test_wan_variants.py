"""Wan image-to-video and Wan 2.2: features equal plain hooks while the library's pipeline itself makes the inputs."""

import json
import shutil
from functools import partial

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from families import (
    CPU,
    aligned,
    assert_batch_agrees,
    bytes_by_depth,
    features,
    hooked,
    make_adapter,
    make_clip,
    make_noise,
)
from PIL import Image
from transformers import CLIPVisionModel

from spatialprobe.engine.adapters.wan import Wan, WanI2V, condition_size
from spatialprobe.engine.demo.tiny.wan import build_wan_experts, build_wan_i2v, build_wan_ti2v
from spatialprobe.engine.job import Job
from spatialprobe.engine.reading.probing_files import probing_name, published
from spatialprobe.engine.resolve import resolve
from spatialprobe.engine.run import run_job
from spatialprobe.engine.types import Clip

SIZE = (64, 96)
HIGH, LOW = 100, 749  # steps on either side of both tiny models' boundaries
BUILDERS = {
    "i2v": build_wan_i2v,
    "ti2v": build_wan_ti2v,
    "t2v-a14b": build_wan_experts,
    "i2v-a14b": partial(build_wan_experts, image=True),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("wan-variants")
    return {name: build(root / name) for name, build in BUILDERS.items()}


def adapter(path, **options):
    cls = WanI2V if path.name.startswith("i2v") else Wan
    return make_adapter(cls, path, **{"size": SIZE} | options)


def as_pil(clip: Clip) -> list[Image.Image]:
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in clip.frames]


def run_pipeline(path, clip, noise, step, layers, dtype):
    """{layer: tokens} of the transformer that the pipeline chose, called by it with what it made of its arguments."""
    image_to_video = json.loads((path / "model_index.json").read_text())["_class_name"] == "WanImageToVideoPipeline"
    parts = {}
    if (path / "image_encoder").exists():
        parts["image_encoder"] = CLIPVisionModel.from_pretrained(path / "image_encoder", dtype=torch.float16)
    pipe = (WanImageToVideoPipeline if image_to_video else WanPipeline).from_pretrained(
        path, torch_dtype=dtype, **parts
    )
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            aligned(part)
    pipe.set_progress_bar_config(disable=True)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(1000)
    images = as_pil(clip)
    video = pipe.video_processor.preprocess_video(images, *SIZE).to(dtype)
    mean, std = (
        torch.tensor(x).view(1, -1, 1, 1, 1).to(dtype)
        for x in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    with torch.inference_mode():
        latents = (pipe.vae.encode(video).latent_dist.mean - mean) * (1.0 / std)
    timestep = scheduler.timesteps[step][None]
    text = WanPipeline(pipe.tokenizer, pipe.text_encoder, vae=None, scheduler=None)  # the other's wants ftfy installed
    prompt, _ = text.encode_prompt("", do_classifier_free_guidance=False, max_sequence_length=226)
    words = {"latents": scheduler.add_noise(latents, noise.to(dtype), timestep), "prompt_embeds": prompt}
    if image_to_video:  # as the model's published example prepares the image: the area of SIZE, its own aspect ratio
        ratio, area = images[0].height / images[0].width, SIZE[0] * SIZE[1]
        height, width = (round(x**0.5) // 16 * 16 for x in (area * ratio, area / ratio))
        words["image"] = images[0].resize((width, height))
    scheduler.set_timesteps = lambda *a, **k: None
    scheduler.timesteps = timestep
    scheduler.step = lambda prediction, t, latents, return_dict: (latents,)
    blocks = {}
    for name in ("transformer", "transformer_2"):
        for layer in layers:
            if getattr(pipe, name, None) is not None:
                blocks[name, layer] = getattr(pipe, name).blocks[layer]
    words |= {"height": SIZE[0], "width": SIZE[1], "num_frames": len(images), "num_inference_steps": 1}
    seen = hooked(blocks, lambda: pipe(**words, guidance_scale=1.0, output_type="latent"))
    (ran,) = {name for name, _ in seen}
    return ran, {layer: tokens for (_, layer), tokens in seen.items()}


@pytest.mark.parametrize(
    ("name", "step", "expert", "dtype"),
    [
        ("i2v", 749, "transformer", torch.float32),
        ("i2v", 749, "transformer", torch.bfloat16),
        ("ti2v", 749, "transformer", torch.float32),
        ("ti2v", 749, "transformer", torch.bfloat16),
        ("t2v-a14b", HIGH, "transformer", torch.float32),
        ("t2v-a14b", LOW, "transformer_2", torch.float32),
        ("i2v-a14b", LOW, "transformer_2", torch.float32),
    ],
)
def test_equals_hooks_while_the_pipeline_runs(paths, tmp_path, name, step, expert, dtype):
    wan = adapter(paths[name])
    wan.steps = (step,)
    wan.load(3, CPU, dtype, tmp_path)
    clip = make_clip(5)
    noise = make_noise(wan, wan.plan(5, (0,)))
    mine = features(wan, clip, (0, 2), step=step, noise=noise)
    ran, theirs = run_pipeline(paths[name], clip, noise, step, (0, 2), dtype)
    assert ran == expert
    for layer in (0, 2):
        assert torch.equal(mine[layer].flatten(1, 3), theirs[layer]), layer


# -- experts --------------------------------------------------------------------------------------------------------


def test_the_boundary_step_is_the_pipelines(paths):
    """875 of 1000 is the last timestep of the high-noise expert, in a schedule that has it."""
    wan = adapter(paths["t2v-a14b"])
    timesteps = wan.schedule.timesteps.tolist()
    first_low = next(step for step in range(1000) if wan.expert(step) == "transformer_2")
    assert timesteps[first_low] < 875 <= timesteps[first_low - 1]
    assert [wan.expert(step) for step in range(1000)] == ["transformer"] * first_low + ["transformer_2"] * (
        1000 - first_low
    )
    other = adapter(paths["i2v-a14b"])
    assert other.expert(first_low - 1) == "transformer_2"  # its boundary is .9


@pytest.mark.parametrize(
    ("steps", "loaded"),
    [((HIGH,), ["transformer"]), ((LOW, 900), ["transformer_2"]), ((HIGH, LOW), ["transformer", "transformer_2"])],
)
def test_only_the_experts_that_the_steps_run_are_loaded(paths, tmp_path, monkeypatch, steps, loaded):
    wan = adapter(paths["t2v-a14b"])
    wan.steps = steps
    wan.load(2, CPU, torch.float32, tmp_path)
    assert list(wan.experts) == loaded
    one = adapter(paths["t2v-a14b"])
    one.steps = (LOW,)
    vae = sum(p.numel() * 4 for p in one.skeleton(2)[0].parameters())
    expert = one.weight_bytes(2, torch.float32) - vae
    assert wan.weight_bytes(2, torch.float32) == vae + len(loaded) * expert
    assert wan.checkpoint.bytes_read == vae + len(loaded) * expert


def test_each_of_two_loaded_experts_runs_its_own_steps(paths, tmp_path):
    both = adapter(paths["t2v-a14b"])
    both.load(3, CPU, torch.float32, tmp_path)
    clip, found = make_clip(), {}
    for step in (HIGH, LOW, HIGH):
        alone = adapter(paths["t2v-a14b"])
        alone.steps = (step,)
        alone.load(3, CPU, torch.float32, tmp_path)
        found[step] = features(both, clip, (0, 2), step=step)
        for layer, x in features(alone, clip, (0, 2), step=step).items():
            assert torch.equal(found[step][layer], x)
    assert both.blocks[2].blocks.keys() == {"transformer", "transformer_2"}


def test_a_job_loads_what_its_steps_need_and_says_which_ran(paths, clips_path, tmp_path):
    words = {"clips": str(clips_path), "model": str(paths["t2v-a14b"]), "layers": [1], "window": 5, "limit": 1}
    words |= {"options": {"size": "64x96"}}
    resolved = resolve(Job.from_words(words | {"out": str(tmp_path / "none")}))
    assert resolved.adapter.wanted_experts() == ["transformer_2"]  # of the default step
    _, store = run_job(Job.from_words(words | {"steps": [HIGH, LOW], "out": str(tmp_path / "store")}))
    about = store.provenance("clip0")["steps"]
    assert [(s["step"], s["timestep"], s["expert"]) for s in about] == [
        (100, 964, "transformer"),
        (749, 502, "transformer_2"),
    ]
    assert list(store.verify()) == []
    high, low = (store.read("clip0", 1, step).data.float() for step in (HIGH, LOW))
    assert (high - low).norm() / high.norm() > 0.1


def test_experts_of_unequal_configs_are_refused(paths, tmp_path):
    shutil.copytree(paths["t2v-a14b"], tmp_path / "wan")
    config = tmp_path / "wan/transformer_2/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 5}))
    with pytest.raises(ValueError, match=r"two experts must be equal, but differ in \['num_layers'\]"):
        adapter(tmp_path / "wan")


# -- image-to-video -------------------------------------------------------------------------------------------------


def test_the_condition_is_the_first_frame_alone(paths, tmp_path):
    wan = adapter(paths["i2v"])
    wan.load(1, CPU, torch.float32, tmp_path)
    plan = wan.plan(9, tuple(range(9)))
    clip, other = make_clip(seed=1), make_clip(seed=2)
    other.frames[0] = clip.frames[0]
    with torch.inference_mode():
        states = [wan.encode({k: v[None] for k, v in wan.prepare(c, plan).items()}, plan) for c in (clip, other)]
    assert not torch.equal(states[0]["video"], states[1]["video"])
    for name in ("condition", "image"):
        assert torch.equal(states[0][name], states[1][name])
    mask, first = states[0]["condition"].split([4, 16], 1)
    assert torch.equal(mask, torch.cat([torch.ones(1, 4, 1, 8, 12), torch.zeros(1, 4, 2, 8, 12)], 2))
    assert first.shape == (1, 16, 3, 8, 12)


def test_the_checkpoints_own_shift_is_kept(paths):
    """5 in this checkpoint: step 749 is timestep 627, where text-to-video's 3 makes it 502."""
    assert WanI2V.PARITY["flow_shift"] == 0
    step = adapter(paths["i2v"]).describe_step(749)
    assert (step["timestep"], step["sigma"]) == (627, pytest.approx(0.627, abs=1e-3))
    assert adapter(paths["i2v"], flow_shift=3.0).describe_step(749)["timestep"] == 502


@pytest.mark.parametrize(
    ("source", "size"),
    [((540, 720), (544, 720)), ((480, 832), (480, 832)), ((270, 480), (464, 832)), ((9, 900), (48, 6304))],
)
def test_the_first_frame_keeps_its_aspect_ratio_on_the_way_in(source, size):
    assert condition_size(source, (480, 832), 16) == size


def test_clip_is_read_up_to_the_last_block_but_one(paths, tmp_path):
    wan = adapter(paths["i2v"])
    wan.load(1, CPU, torch.float32, tmp_path)
    assert len(wan.clip.encoder.layers if hasattr(wan.clip, "encoder") else wan.clip.vision_model.encoder.layers) == 2
    assert {p.dtype for p in wan.clip.parameters()} == {torch.float16}
    assert adapter(paths["i2v-a14b"]).clip_config is None


@pytest.mark.parametrize("name", BUILDERS)
def test_rows_and_cells_keep_their_place(paths, tmp_path, name):
    size = (128, 192) if name == "ti2v" else SIZE  # its tokens are 32 pixels wide
    wan = adapter(paths[name], size=size)
    wan.steps = (999,)
    wan.load(1, CPU, torch.float32, tmp_path)
    plan = wan.plan(9, (0,))
    assert plan.grid == (3, 4, 6)
    assert list(wan.plan(81, (0,)).rows) == [(f + 3) // 4 for f in range(81)]
    plain, marked = make_clip(), make_clip()
    marked.frames[5:, :, 24:, 40:] = 255  # bottom right, from frame 5 on
    noise = torch.zeros(1, *wan.noise_shape(plan))
    change = (
        features(wan, marked, (0,), step=999, noise=noise)[0] - features(wan, plain, (0,), step=999, noise=noise)[0]
    )
    where = change.abs().amax(-1)[0]  # [3, 4, 6]
    assert int(where.flatten(1).mean(1).argmax()) == plan.rows[5] == 2
    assert int(where[2].view(2, 2, 2, 3).mean((1, 3)).argmax()) == 3


@pytest.mark.parametrize("name", ["i2v", "ti2v", "t2v-a14b"])
def test_a_batch_agrees_and_short_clips_are_completed(paths, tmp_path, name):
    wan = adapter(paths[name])
    wan.steps = (749,)
    wan.load(3, CPU, torch.float32, tmp_path)
    assert_batch_agrees(wan, (0, 2), frames=6, step=749)
    clip = make_clip(6)
    repeated = torch.cat([clip.frames, clip.frames[-1:].expand(3, -1, -1, -1)])
    noise = make_noise(wan, wan.plan(6, (0,)))
    six = features(wan, clip, (2,), step=749, noise=noise)[2]
    nine = features(wan, Clip("a", repeated, torch.arange(9)), (2,), step=749, noise=noise)[2]
    assert torch.equal(six, nine)


@pytest.mark.parametrize("name", ["i2v", "ti2v", "t2v-a14b"])
def test_only_the_wanted_blocks_are_loaded(paths, tmp_path, name):
    read = bytes_by_depth(lambda: adapter(paths[name]), (1, 2, 4), tmp_path)
    assert read[4] - read[1] == 3 * (read[2] - read[1]) > 0


def test_image_to_video_through_a_job(paths, clips_path, tmp_path):
    words = {"clips": str(clips_path), "model": str(paths["i2v"]), "layers": [1], "window": 6, "limit": 2}
    words |= {"options": {"size": "64x96"}, "out": str(tmp_path / "store")}
    report, store = run_job(Job.from_words(words))
    assert (report.written, store.spec.family, store.spec.options["clip_dtype"]) == (2, "wan_i2v", "float16")
    assert store.read("clip1", 1, 749).data.shape == (3, 4, 6, 48)
    assert store.provenance("clip1")["steps"][0]["timestep"] == 627
    assert list(store.verify()) == []


def test_published_files_carry_the_studys_names():
    rule = published("wan_i2v")
    assert probing_name(20, 749, rule.tag) == "feature_i2v_t749_layer20.sft"
    assert rule.rows(9, (0,), 3) == [0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_checkpoints_of_another_kind_are_refused(paths, wan_path, tmp_path):
    for path, takes in ((wan_path, "16 channels, not 36"), (paths["ti2v"], "48 channels, not 100")):
        with pytest.raises(ValueError, match=f"no image-to-video Wan: its transformer takes {takes}"):
            make_adapter(WanI2V, path)
    with pytest.raises(ValueError, match="--family wan_i2v"):
        make_adapter(Wan, paths["i2v-a14b"])
    shutil.copytree(paths["i2v"], tmp_path / "i2v")
    config = tmp_path / "i2v/transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pos_embed_seq_len": 514}))
    with pytest.raises(ValueError, match="between a first and a last frame"):
        adapter(tmp_path / "i2v")


def test_missing_files_and_bad_options_are_named(paths, tmp_path):
    with pytest.raises(ValueError, match="clip_dtype must be one of float32, bfloat16, float16, got 'int8'"):
        adapter(paths["i2v"], clip_dtype="int8").check_options()
    with pytest.raises(ValueError, match="multiples of 32"):
        adapter(paths["ti2v"], size=(48, 96)).check_options()
    shutil.copytree(paths["i2v"], tmp_path / "i2v")
    (tmp_path / "i2v/image_encoder/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no file image_encoder/model\.safetensors"):
        adapter(tmp_path / "i2v").load(1, CPU, torch.float32, tmp_path)
    shutil.copytree(paths["t2v-a14b"], tmp_path / "t2v-a14b")
    next((tmp_path / "t2v-a14b/transformer_2").glob("*-00002-of-*.safetensors")).unlink()
    broken = adapter(tmp_path / "t2v-a14b")
    broken.steps = (HIGH,)
    broken.load(4, CPU, torch.float32, tmp_path)  # that expert is not needed
    broken.steps = (LOW,)
    with pytest.raises(ValueError, match=r"no file transformer_2/.*-00002-of-"):
        broken.load(4, CPU, torch.float32, tmp_path)
