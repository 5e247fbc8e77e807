"""Wan's features equal those that plain hooks take from the whole library pipeline, bit for bit."""

import json
import shutil

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from PIL import Image

from spatialprobe.engine.adapters.wan import Wan
from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.device.tap import Taps
from spatialprobe.engine.extract import batch_noise
from spatialprobe.engine.types import Clip

SIZE = (64, 96)
CPU = torch.device("cpu")


def adapter(path, **options) -> Wan:
    return Wan(Checkpoint.open(str(path)), {**Wan.OPTIONS, "size": SIZE, **options})


def clip(frames=9, size=(48, 80)) -> Clip:
    pixels = torch.randint(0, 256, (frames, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Clip("a", pixels, torch.arange(frames))


def features(wan, clip, layers, step, noise) -> dict[int, torch.Tensor]:
    plan = wan.plan(len(clip.frames), tuple(range(len(clip.frames))))
    out = {}
    taps = Taps(wan.blocks, layers)
    with torch.inference_mode():
        state = wan.encode({k: v[None] for k, v in wan.prepare(clip, plan).items()}, plan)
        with taps.into(lambda layer, x: out.__setitem__(layer, wan.grid(x, state, plan).clone())):
            wan.forward(state, step, noise)
    taps.remove()
    return out


@pytest.mark.parametrize("tiling", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_hooks_on_the_whole_pipeline(wan_path, tmp_path, dtype, tiling):
    size = (288, 64) if tiling else SIZE  # tiles are 256 pixels high
    wan = adapter(wan_path, size=size, vae_tiling=tiling)
    wan.load(3, CPU, dtype, tmp_path)
    sample = clip()
    noise = torch.randn(1, *wan.noise_shape(wan.plan(9, tuple(range(9)))), generator=torch.Generator().manual_seed(5))
    mine = features(wan, sample, (0, 2), 749, noise)

    pipe = WanPipeline.from_pretrained(wan_path, torch_dtype=dtype)  # diffusers 0.37 knows no other name
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=3.0)
    pipe.scheduler.set_timesteps(1000)
    for p in pipe.components.values():  # loaded weights are mapped from the file, mine are aligned copies
        if isinstance(p, torch.nn.Module):
            for q in p.parameters():
                q.data = q.data.clone()
    if tiling:
        pipe.vae.enable_tiling()
    theirs = {}
    for i in (0, 2):
        pipe.transformer.blocks[i].register_forward_hook(lambda m, a, out, i=i: theirs.__setitem__(i, out.clone()))
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in sample.frames]
    with torch.inference_mode():
        video = pipe.video_processor.preprocess_video(images, height=size[0], width=size[1]).to(dtype)
        shape = (1, -1, 1, 1, 1)
        mean = torch.tensor(pipe.vae.config.latents_mean).view(shape).to(dtype)
        inverse = 1.0 / torch.tensor(pipe.vae.config.latents_std).view(shape).to(dtype)
        latents = (pipe.vae.encode(video).latent_dist.mean - mean) * inverse
        timestep = pipe.scheduler.timesteps[749][None]
        text, _ = pipe.encode_prompt("", do_classifier_free_guidance=False, max_sequence_length=226)
        noisy = pipe.scheduler.add_noise(latents, noise.to(dtype), timestep)
        pipe.transformer(noisy.to(dtype), timestep, text)
    assert len(pipe.transformer.blocks) == 4  # the whole model ran, mine has 3 blocks
    for i in (0, 2):
        assert torch.equal(mine[i].flatten(1, 3), theirs[i])


def test_only_the_wanted_blocks_are_loaded(wan_path, tmp_path):
    read = {}
    for depth in (1, 2, 4):
        wan = adapter(wan_path)
        wan.load(depth, CPU, torch.float32, tmp_path)
        assert len(wan.blocks) == depth
        read[depth] = wan.checkpoint.bytes_read
    block = sum(p.nbytes for p in wan.blocks[0].parameters())
    assert read[2] - read[1] == block
    assert read[4] - read[1] == 3 * block


def test_no_text_encoder_is_left_and_none_is_loaded_again(wan_path, tmp_path, monkeypatch):
    wan = adapter(wan_path)
    wan.load(1, CPU, torch.float32, tmp_path)
    modules = [v for v in (*vars(wan).values(), *wan.experts.values()) if isinstance(v, torch.nn.Module)]
    names = {"WanTransformer3DModel", "AutoencoderKLWan", "ModuleList", "FlowSchedule"}
    assert {type(m).__name__ for m in modules} == names
    assert wan.vae.decoder is None
    monkeypatch.setattr("transformers.UMT5EncoderModel.from_pretrained", lambda *a, **k: pytest.fail("loaded again"))
    again = adapter(wan_path)
    again.load(1, CPU, torch.float32, tmp_path)
    assert torch.equal(again.text["prompt"], wan.text["prompt"])


def test_rows_follow_the_published_map_and_the_models_own_order(wan_path, tmp_path):
    wan = adapter(wan_path)
    plan = wan.plan(81, tuple(range(81)))
    assert list(plan.rows) == [(f + 3) // 4 for f in range(81)]
    assert wan.plan(10, (0,)).grid[0] == 4  # frame 9 opens a row of its own
    wan.load(2, CPU, torch.float32, tmp_path)
    plain, marked = clip(), clip()
    marked.frames[5:, :, 24:, 40:] = 255  # bottom right, from frame 5 on
    noise = torch.zeros(1, *wan.noise_shape(wan.plan(9, (0,))))
    change = features(wan, marked, (0,), 999, noise)[0] - features(wan, plain, (0,), 999, noise)[0]
    where = change.abs().amax(-1)[0]  # [3, 4, 6]
    assert int(where.flatten(1).mean(1).argmax()) == plan.rows[5] == 2
    quarters = where[2].view(2, 2, 2, 3).mean((1, 3))  # [top or bottom, left or right]
    assert int(quarters.argmax()) == 3


def test_step_749_is_timestep_502(wan_path, tmp_path):
    wan = adapter(wan_path)
    wan.load(1, CPU, torch.float32, tmp_path)
    step = wan.describe_step(749)
    assert step["timestep"] == 502
    latents, noise = torch.zeros(1, 16, 1, 1, 1), torch.ones(1, 16, 1, 1, 1)
    scheduler = wan.schedule.scheduler
    added = scheduler.add_noise(latents, noise, scheduler.timesteps[749][None])
    assert step["sigma"] == pytest.approx(float(added.max()), abs=1e-6)
    assert step["sigma"] == pytest.approx(0.5023, abs=1e-4)


def test_noise_is_per_seed_clip_and_step():
    def draw(seed, clip_id, step):
        return batch_noise([clip_id], (2, 3), seed, step, CPU)

    base = draw(0, "a", 1)
    assert torch.equal(base, draw(0, "a", 1))
    for other in (draw(1, "a", 1), draw(0, "b", 1), draw(0, "a", 2)):
        assert not torch.equal(base, other)
    pair = batch_noise(["b", "a"], (2, 3), 0, 1, CPU)
    assert torch.equal(pair[1:], base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (60, 96)}, "multiples of 16"),
        ({"prompt_tokens": 0}, "prompt_tokens"),
        ({"flow_shift": -1.0}, "flow_shift"),
    ],
)
def test_options_the_model_cannot_take(wan_path, options, message):
    with pytest.raises(ValueError, match=message):
        adapter(wan_path, **options).check_options()


def changed(path, root, file, **fields):
    """A copy of a checkpoint with some fields of one of its configs set."""
    shutil.copytree(path, root / "wan")
    config = root / "wan" / file
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return root / "wan"


@pytest.mark.parametrize(
    "change", [{"boundary_ratio": 0.875}, {"transformer_2": ["diffusers", "WanTransformer3DModel"]}]
)
def test_half_a_pair_of_experts_is_refused(wan_path, tmp_path, change):
    with pytest.raises(ValueError, match="both transformer_2 and boundary_ratio, or neither"):
        adapter(changed(wan_path, tmp_path, "model_index.json", **change))


def test_a_pipeline_of_another_family_is_refused(wan_path, tmp_path):
    message = "pipeline must be WanPipeline or WanImageToVideoPipeline, got CogVideoXPipeline"
    with pytest.raises(ValueError, match=message):
        adapter(changed(wan_path, tmp_path, "model_index.json", _class_name="CogVideoXPipeline"))


def test_image_to_video_is_another_family(wan_path, tmp_path):
    with pytest.raises(ValueError, match="is an image-to-video Wan; name its family, --family wan_i2v"):
        adapter(changed(wan_path, tmp_path, "transformer/config.json", in_channels=36))


@pytest.mark.parametrize("file", ["transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_unknown_config_fields_are_refused(wan_path, tmp_path, file):
    wan = adapter(changed(wan_path, tmp_path, file, warp=1))
    with pytest.raises(ValueError, match=f"{file} has fields that .* does not know: warp"):
        wan.load(1, CPU, torch.float32, tmp_path)


def test_a_schedule_without_a_shift_of_its_own_wants_one(wan_path, tmp_path):
    path = changed(wan_path, tmp_path, "model_index.json")
    file = path / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "flow_shift"}))
    with pytest.raises(ValueError, match="has no flow_shift"):
        adapter(path).check_options()
    wan = adapter(path, flow_shift=3.0)
    wan.check_options()
    assert wan.describe_step(749)["timestep"] == 502


def test_the_prompt_is_what_was_asked_and_a_damaged_cache_is_made_again(wan_path, tmp_path):
    prompts = {}
    for prompt in ("", "a sofa in a room"):
        wan = adapter(wan_path, prompt=prompt)
        wan.load(1, CPU, torch.float32, tmp_path)
        prompts[prompt] = wan.text["prompt"]
    assert not torch.equal(prompts[""], prompts["a sofa in a room"])
    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        raw = bytearray(path.read_bytes())
        raw[-50:] = bytes(50)
        path.write_bytes(raw)
    again = adapter(wan_path, prompt="a sofa in a room")
    again.load(1, CPU, torch.float32, tmp_path)
    assert torch.equal(again.text["prompt"], prompts["a sofa in a room"])


def test_a_group_of_frames_is_completed_not_dropped(wan_path, tmp_path):
    """10 frames make rows 0, 1-4, 5-8 and 9 with its repeats: as if the clip had frames 10 to 12 equal to frame 9."""
    wan = adapter(wan_path)
    wan.load(1, CPU, torch.float32, tmp_path)
    sample = clip(10)
    repeated = Clip("a", torch.cat([sample.frames, sample.frames[-1:].expand(3, -1, -1, -1)]), torch.arange(13))
    noise = torch.randn(1, *wan.noise_shape(wan.plan(10, (0,))))
    ten, thirteen = (features(wan, c, (0,), 749, noise)[0] for c in (sample, repeated))
    assert ten.shape[1] == 4
    assert torch.equal(ten, thirteen)
