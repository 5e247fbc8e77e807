"""The table of presets agrees with what the adapters compute from the published configs, kept in `published/`."""

import inspect
import json
from pathlib import Path

import diffusers
import pytest
import torch

from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.presets import FAMILIES, PRESETS, adapter_class, encoder_layers
from spatialprobe.engine.types import parse_query

PUBLISHED = Path(__file__).parent / "published"  # per preset {file: the fields that geometry and weights depend on}


def test_every_preset_has_its_published_configs():
    assert sorted(path.stem for path in PUBLISHED.iterdir()) == sorted(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_matches_its_adapter(name, tmp_path):
    preset, family = PRESETS[name], FAMILIES[PRESETS[name].family]
    for file, content in json.loads((PUBLISHED / f"{name}.json").read_text()).items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        raw = header(content) if file.endswith(".safetensors") else json.dumps(content).encode()
        (tmp_path / file).write_bytes(raw)
    cls = adapter_class(preset.family)
    adapter = cls(Checkpoint.open(str(tmp_path)), cls.OPTIONS | preset.options)
    adapter.check_options()
    adapter.steps = () if family.default_step is None else (family.default_step,)
    query = parse_query(family.query, family.window)
    plan = adapter.plan(family.window, query)
    assert (adapter.num_layers, adapter.channels) == (preset.blocks, preset.channels)
    assert (len(plan.wanted_rows(query)), *plan.grid[1:]) == preset.grid
    assert max(preset.layers.values(), default=0) < preset.blocks
    assert plan.wanted_rows(query) == tuple(range(preset.grid[0]))
    one, two = (adapter.weight_bytes(depth, torch.bfloat16) / 1e9 for depth in (1, 2))
    before, block = preset.weights
    assert (before, block) == pytest.approx((2 * one - two, two - one), rel=0.02, abs=0.006)
    if preset.later is not None:
        first, later = preset.later
        same, more = (adapter.weight_bytes(first + n, torch.bfloat16) / 1e9 for n in (0, 1))
        assert later == pytest.approx(more - same, rel=0.02)
        assert preset.memory_gb(first) == pytest.approx(more, rel=0.02)


@pytest.mark.parametrize(
    ("family", "pipeline", "options"),
    [
        ("cogvideox", "CogVideoXPipeline", {"prompt_tokens": "max_sequence_length"}),
        ("hunyuan_video", "HunyuanVideoPipeline", {"prompt_tokens": "max_sequence_length", "guidance_scale": None}),
        ("ltx", "LTXPipeline", {"prompt_tokens": "max_sequence_length", "frame_rate": None}),
        ("mochi", "MochiPipeline", {"prompt_tokens": "max_sequence_length"}),
        ("cosmos", "Cosmos2VideoToWorldPipeline", {"prompt_tokens": "max_sequence_length", "fps": None}),
    ],
)
def test_what_a_model_is_told_beside_the_clip_is_the_pipelines_default(family, pipeline, options):
    words = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    for own, theirs in options.items():
        assert adapter_class(family).OPTIONS[own] == words[theirs or own].default, own


@pytest.mark.parametrize(
    ("family", "size", "prompt_tokens", "others"),
    [
        ("wan", (480, 832), 226, {"flow_shift": 3.0, "vae_tiling": True}),
        ("wan_i2v", (480, 832), 226, {"flow_shift": 0.0, "vae_tiling": False, "clip_dtype": "float16"}),
        ("cogvideox", (480, 720), 226, {"half_frames": 49, "vae_tiling": False}),
        ("aether", (480, 720), 226, {"half_frames": 41, "fps": 8, "geometry": "reconstruct", "condition": "image"}),
        ("open_sora", (480, 848), 512, {"vae_sample": True, "first_frame": True, "vae_tiling": True}),
    ],
)
def test_parity_is_the_studys_protocol(family, size, prompt_tokens, others):
    """The study's code, read: its frames' size, padding of the empty prompt, shift, and how the VAE ran."""
    wanted = {"size": size, "prompt": "", "prompt_tokens": prompt_tokens} | others
    parity = adapter_class(family).PARITY
    assert {name: parity[name] for name in wanted} == wanted


@pytest.mark.parametrize(("blocks", "layers"), [(24, (17, 23)), (27, (20, 26)), (2, (1, 1)), (1, (0, 0))])
def test_of_an_encoder_the_block_three_quarters_up_and_the_last(blocks, layers):
    assert encoder_layers(blocks) == layers


def header(shapes: dict[str, list[int]]) -> bytes:
    """The beginning of a safetensors file of such tensors, which come after it."""
    text = json.dumps({name: {"dtype": "BF16", "shape": s, "data_offsets": [0, 0]} for name, s in shapes.items()})
    return len(text).to_bytes(8, "little") + text.encode()
