"""Qwen3.5's features equal hooks on transformers' whole model: linear and full attention blocks, vision tower."""

import json
import shutil

import pytest
import torch
from families import CPU, bytes_by_depth, features, make_adapter, make_clip
from safetensors import safe_open
from tiny.qwen3_5 import build_qwen3_5
from transformers import Qwen3_5ForConditionalGeneration
from vlm_reference import (
    assert_both_taps_equal_the_whole_model,
    assert_marked_patch_is_at_its_cell,
)

from spatialprobe.engine.adapters.qwen3_5 import Qwen35

SIZE = (96, 160)  # 3 x 5 cells


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build_qwen3_5(tmp_path_factory.mktemp("qwen3_5") / "tiny")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_taps_equal_the_whole_model(path, tmp_path, dtype):
    budget = (4096 // 4, 25165824 // 4)
    assert_both_taps_equal_the_whole_model(  # block 3 is the first with full attention
        Qwen35, Qwen3_5ForConditionalGeneration, path, tmp_path, dtype, SIZE, budget, (0, 2, 3), (0, 1)
    )


def test_blocks_are_of_both_kinds(path, tmp_path):
    adapter = make_adapter(Qwen35, path)
    adapter.load(4, CPU, torch.float32, tmp_path)
    assert [hasattr(block, "linear_attn") for block in adapter.blocks] == [True, True, True, False]


def test_only_the_wanted_blocks_are_read(path, tmp_path):
    read = bytes_by_depth(lambda: make_adapter(Qwen35, path), (1, 2, 3, 4), tmp_path)
    assert read[3] - read[2] == read[2] - read[1]
    full = 0  # bytes of block 3
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            full += sum(shard.get_tensor(name).nbytes for name in shard.keys() if ".language_model.layers.3." in name)
    assert read[4] - read[3] == full > 0
    towers = bytes_by_depth(lambda: make_adapter(Qwen35, path, tap="vision"), (1, 2, 3), tmp_path)
    assert towers[3] - towers[2] == towers[2] - towers[1] > 0


@pytest.mark.parametrize(("tap", "grid"), [("decoder", (3, 5)), ("vision", (6, 10))])
def test_a_marked_patch_is_found_at_its_cell(path, tmp_path, tap, grid):
    # Linear attention normalises what it puts out, so every token of the frame changes much: a sum over clips tells.
    assert_marked_patch_is_at_its_cell(Qwen35, path, tmp_path, tap, SIZE, grid, clips=6)


def test_two_spellings_of_the_pixel_budget_are_one(path, tmp_path):
    """Published files of this family also say min_pixels and max_pixels inside size."""
    copy = shutil.copytree(path, tmp_path / "copy")
    config = json.loads((copy / "preprocessor_config.json").read_text())
    config["size"] = {"min_pixels": 65536, "max_pixels": 16777216}
    (copy / "preprocessor_config.json").write_text(json.dumps(config))
    got = []
    for folder in (path, copy):
        adapter = make_adapter(Qwen35, folder, size=(100, 100))
        adapter.load(1, CPU, torch.float32, tmp_path)
        assert adapter.plan(9, (3,)).grid == (1, 8, 8)  # a single image has at least 65536 pixels
        got.append(features(adapter, make_clip(), [0], query=(3,))[0])
    assert torch.equal(*got)


@pytest.mark.parametrize(
    ("part", "fields", "reason"),
    [
        (None, {"model_type": "qwen3_5_moe"}, "is a qwen3_5_moe; this adapter runs qwen3_5$"),
        (
            "text_config",
            {"attn_output_gate": False},
            "attn_output_gate=False, but transformers always does as with True",
        ),
        ("vision_config", {"deepstack_visual_indexes": [5]}, r"deepstack_visual_indexes=\[5\], but .* with \[\]"),
        ("text_config", {"gate_shape": 1}, r"config.json \(text_config\) has fields .* does not know: gate_shape"),
    ],
)
def test_other_variants_are_refused(path, tmp_path, part, fields, reason):
    copy = shutil.copytree(path, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (config[part] if part else config).update(fields)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=reason):
        make_adapter(Qwen35, copy)
