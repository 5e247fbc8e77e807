"""What LTX-Video, Mochi and Cosmos-Predict2 have in common: rows, batches, prompts, jobs, and what they refuse.

Their VAEs take the first frame alone, then groups of `group`. That features are those of the library's pipelines is
tested family by family.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import families
import pytest
import torch
from tiny.cosmos import build_cosmos
from tiny.ltx import build_ltx
from tiny.mochi import build_mochi

from spatialprobe.engine.adapter import Adapter
from spatialprobe.engine.job import Job
from spatialprobe.engine.presets import FAMILIES, adapter_class
from spatialprobe.engine.run import run_job
from spatialprobe.engine.types import Clip


@dataclass(frozen=True)
class Family:
    name: str
    build: Callable[[Path], Path]
    size: tuple[int, int]  # pixels
    grid: tuple[int, int]  # tokens of a row
    group: int  # frames of a row, but for the first
    blocks: int
    shortest: int  # window, frames
    modules: tuple[str, str]  # transformer, VAE

    @property
    def step(self) -> int:
        return FAMILIES[self.name].default_step

    def adapter(self, path: Path, **options) -> Adapter:
        return families.make_adapter(adapter_class(self.name), path, **{"size": self.size, **options})


LTX = Family("ltx", build_ltx, (128, 192), (4, 6), 8, 4, 1, ("LTXVideoTransformer3DModel", "AutoencoderKLLTXVideo"))
MOCHI = Family("mochi", build_mochi, (32, 64), (2, 4), 6, 3, 1, ("MochiTransformer3DModel", "AutoencoderKLMochi"))
COSMOS = Family("cosmos", build_cosmos, (64, 96), (4, 6), 4, 4, 2, ("CosmosTransformer3DModel", "AutoencoderKLWan"))
ALL = (LTX, MOCHI, COSMOS)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[Family, Path]:
    root = tmp_path_factory.mktemp("video")
    return {family: family.build(root / family.name) for family in ALL}


@pytest.fixture(scope="module", params=ALL, ids=lambda family: family.name)
def family(request) -> Family:
    return request.param


@pytest.fixture(scope="module")
def path(family, paths) -> Path:
    return paths[family]


@pytest.fixture(scope="module")
def model(family, path, tmp_path_factory) -> Adapter:
    """All of its blocks but the last."""
    loaded = family.adapter(path)
    loaded.load(family.blocks - 1, families.CPU, torch.float32, tmp_path_factory.mktemp("cache"))
    return loaded


def test_rows_follow_the_vae(family, model):
    plan = model.plan(81, (0,))
    assert list(plan.rows) == [(f + family.group - 1) // family.group for f in range(81)]
    assert plan.grid == (1 + 80 // family.group + (80 % family.group > 0), *family.grid)
    assert model.plan(1 + family.group, (0,)).grid[0] == 2
    assert model.plan(2 + family.group, (0,)).grid[0] == 3  # its last frame opens a row of its own
    assert model.plan(family.shortest, (0,)).grid[0] == family.shortest


def test_a_marked_patch_is_found_at_its_row_and_cell(family, model):
    frames, (height, width), (rows, columns) = 1 + 2 * family.group, family.size, family.grid
    plain, marked = (families.make_clip(frames, family.size) for _ in range(2))
    marked.frames[1 + family.group :, :, height // 2 :, width // 2 :] = 255  # bottom right, in the last row's frames
    plan = model.plan(frames, (0,))
    noise = torch.zeros(1, *model.noise_shape(plan))
    a, b = (families.features(model, clip, (0,), step=999, noise=noise)[0] for clip in (plain, marked))
    change = (a - b).abs().mean(-1)[0]  # [3, H, W]
    assert int(change.mean((1, 2)).argmax()) == plan.rows[-1] == 2
    quarters = change[2].view(2, rows // 2, 2, columns // 2).mean((1, 3))  # [top or bottom, left or right]
    assert int(quarters.argmax()) == 3
    assert quarters[1, 1] > 1.5 * quarters.flatten()[:3].max()
    with torch.inference_mode():
        videos = [model.prepare(clip, plan)["video"][None] for clip in (plain, marked)]
        states = [model.encode({"video": video}, plan) for video in videos]
        before, after = (getattr(state, "clean", state) for state in states)
    assert torch.equal(before[:, :, :2], after[:, :, :2])  # the VAE looks at no later frame
    assert not torch.equal(before[:, :, 2], after[:, :, 2])


def test_a_batch_agrees_with_single_clips(family, model):
    families.assert_batch_agrees(model, (0, family.blocks - 2), frames=1 + family.group, step=family.step)


def test_a_group_of_frames_is_completed_not_dropped(family, model):
    for frames in (family.shortest, 2, 2 * family.group - 1):
        clip = families.make_clip(frames)
        rows = 1 + -(-(frames - 1) // family.group)
        missing = 1 + (rows - 1) * family.group - frames
        pixels = torch.cat([clip.frames, clip.frames[-1:].expand(missing, -1, -1, -1)])
        repeated = Clip("a", pixels, torch.arange(len(pixels)))
        short, full = (families.features(model, c, (0,), step=family.step)[0] for c in (clip, repeated))
        assert short.shape[1] == rows, frames
        assert torch.equal(short, full), frames


def test_only_the_wanted_blocks_are_loaded(family, path, tmp_path, model):
    read = families.bytes_by_depth(lambda: family.adapter(path), range(1, family.blocks + 1), tmp_path)
    block = sum(p.nbytes for p in model.blocks[0].parameters())
    *others, last = (read[depth + 1] - read[depth] for depth in range(1, family.blocks))
    assert others == [block] * (family.blocks - 2)
    if family is MOCHI:
        assert 0 < last < block  # the last block has no text branch after its attention
    else:
        assert last == block
    assert model.vae.decoder is None
    kinds = {type(v).__name__ for v in vars(model).values() if isinstance(v, torch.nn.Module)}
    assert kinds == {*family.modules, "ModuleList"}


def test_the_prompt_is_embedded_once(family, path, tmp_path, monkeypatch):
    first, again = family.adapter(path), family.adapter(path)
    first.load(1, families.CPU, torch.float32, tmp_path)
    monkeypatch.setattr("transformers.T5EncoderModel.from_pretrained", lambda *a, **k: pytest.fail("loaded again"))
    again.load(1, families.CPU, torch.float32, tmp_path)
    assert again.text.keys() == first.text.keys()
    for name, tensor in first.text.items():
        assert torch.equal(again.text[name], tensor), name
    assert again.text["prompt"].shape == (1, first.options["prompt_tokens"], 32)
    if "mask" in first.text:
        assert first.text["mask"].sum() == 1  # of an empty prompt: </s>, then padding


def test_clips_become_a_store(family, path, clips_path, tmp_path):
    words = {"clips": str(clips_path), "model": str(path), "out": str(tmp_path / "store"), "window": 9, "limit": 2}
    options = {"size": "x".join(map(str, family.size))}
    report, store = run_job(Job.from_words(words | {"layers": [1], "options": options}))
    assert (report.written, report.failed) == (2, 0)
    assert list(store.verify()) == []
    rows = [(f + family.group - 1) // family.group for f in range(9)]
    features = store.read("clip1", 1, family.step)
    assert features.data.shape == (1 + max(rows), *family.grid, 48)
    assert features.rows.tolist() == rows
    (step,) = store.provenance("clip1")["steps"]
    adapter = family.adapter(path)
    adapter.load(1, families.CPU, torch.float32, tmp_path / "cache")
    assert step == {"step": family.step, **adapter.describe_clip_step(family.step, adapter.plan(9, (0,)))}


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (LTX, {"size": (64, 90)}, r"size must be multiples of 32 pixels, got \(64, 90\)"),
        (MOCHI, {"size": (32, 90)}, r"size must be multiples of 16 pixels, got \(32, 90\)"),
        (COSMOS, {"size": (64, 90)}, r"size must be multiples of 16 pixels, got \(64, 90\)"),
        *((each, {"size": (0, 96)}, r"size must be multiples of \d\d") for each in ALL),
        *((each, {"prompt_tokens": 0}, "prompt_tokens must be at least 1, got 0") for each in ALL),
        (MOCHI, {"prompt_tokens": 257}, "prompt_tokens must be at most 256, got 257"),
        (LTX, {"frame_rate": 0.0}, r"frame_rate must be positive, got 0\.0"),
        (LTX, {"frame_rate": float("inf")}, "frame_rate must be positive"),
        (COSMOS, {"condition_rows": 0}, "condition_rows must be at least 1, got 0"),
        (COSMOS, {"fps": -1.0}, r"fps must be positive, got -1\.0"),
    ],
)
def test_options_the_model_cannot_take(paths, family, options, message):
    with pytest.raises(ValueError, match=message):
        family.adapter(paths[family], **options).check_options()


INDEX, TRANSFORMER, VAE, SCHEDULER = (
    "model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json",
)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "file", "change", "message"),
    [
        (LTX, INDEX, {"_class_name": "LTXConditionPipeline"}, "pipeline must be LTXPipeline, got LTXCondition"),
        (MOCHI, INDEX, {"_class_name": "LTXPipeline"}, "pipeline must be MochiPipeline, got LTXPipeline"),
        (COSMOS, INDEX, {"_class_name": "Cosmos2TextToImagePipeline"}, "must be Cosmos2Video.* got Cosmos2Text"),
        *(
            (each, file, {"warp": 1}, rf"{file} has fields .* does not know: warp")
            for each in ALL
            for file in (TRANSFORMER, VAE, SCHEDULER)
        ),
        *((each, TRANSFORMER, {"num_attention_heads": 4}, "must have shape") for each in ALL),
        (LTX, TRANSFORMER, {"patch_size": 2}, r"one latent per token, got patches of \(2, 1\)"),
        (LTX, SCHEDULER, {"_class_name": "DDIMScheduler"}, "must be a FlowMatchEuler.* got DDIM"),
        (MOCHI, SCHEDULER, {"invert_sigmas": False}, "inverted sigmas"),
        (COSMOS, TRANSFORMER, {"in_channels": 16}, "must take 16 latents and a mask .* got in_channels 16"),
        (COSMOS, TRANSFORMER, {"patch_size": [2, 2, 2]}, "patches of one frame"),
        (COSMOS, SCHEDULER, {"use_karras_sigmas": False}, "use_karras_sigmas"),
    ],
)
def test_another_checkpoint_is_refused(paths, tmp_path, family, file, change, message):
    other = families.changed(paths[family], tmp_path / "other", file, change)
    with pytest.raises(ValueError, match=message):
        family.adapter(other).load(1, families.CPU, torch.float32, tmp_path / "cache")


def test_a_missing_shard_is_named(family, path, tmp_path):
    copy = shutil.copytree(path, tmp_path / "copy")
    next((copy / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"has no file transformer/diffusion_pytorch_model-0000"):
        family.adapter(copy).load(family.blocks, families.CPU, torch.float32, tmp_path / "cache")


def test_a_layer_beyond_the_stack_is_refused(family, path, clips_path, tmp_path):
    last = family.blocks - 1
    words = {"clips": str(clips_path), "model": str(path), "out": str(tmp_path / "store"), "layers": [family.blocks]}
    with pytest.raises(ValueError, match=rf"layers must be blocks 0 \.\. {last}, got \[{family.blocks}\]"):
        run_job(Job.from_words(words))
