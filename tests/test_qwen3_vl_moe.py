"""Qwen3-VL with experts: features equal hooks on transformers' whole model, whichever way the experts are stored."""

import json
import shutil

import pytest
import torch
from families import CPU, bytes_by_depth, features, make_adapter, make_clip
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny.qwen3_vl_moe import build_qwen3_vl_moe
from transformers import Qwen3VLMoeForConditionalGeneration
from vlm_reference import (
    QUERY,
    assert_both_taps_equal_the_whole_model,
    assert_marked_patch_is_at_its_cell,
)

from spatialprobe.engine.adapters.qwen3_vl import Qwen3VL
from spatialprobe.engine.adapters.qwen3_vl_moe import Qwen3VLMoe

SIZE = (96, 160)  # 3 x 5 cells


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build_qwen3_vl_moe(tmp_path_factory.mktemp("qwen3_moe") / "tiny")


def stored_shapes(path) -> dict[str, list[int]]:
    shapes = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            shapes |= {name: shard.get_slice(name).get_shape() for name in shard.keys()}
    return shapes


def test_experts_are_stored_as_published(path):
    """Two tensors per block, [experts, in, out]: 6 experts, 64 channels, 24 inside an expert."""
    shapes = stored_shapes(path)
    for i in range(4):
        assert shapes[f"model.language_model.layers.{i}.mlp.experts.gate_up_proj"] == [6, 64, 48]
        assert shapes[f"model.language_model.layers.{i}.mlp.experts.down_proj"] == [6, 24, 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_taps_equal_the_whole_model(path, tmp_path, dtype):
    budget = (4096 // 4, 25165824 // 4)
    assert_both_taps_equal_the_whole_model(
        Qwen3VLMoe, Qwen3VLMoeForConditionalGeneration, path, tmp_path, dtype, SIZE, budget, (0, 1, 2), (0, 1, 2)
    )


def test_experts_stored_the_other_way_round_give_the_same(path, tmp_path):
    """As newer releases of transformers write them."""
    copy = shutil.copytree(path, tmp_path / "copy")
    for file in copy.glob("*.safetensors"):
        tensors = {
            name: x.transpose(1, 2).contiguous() if "mlp.experts" in name else x for name, x in load_file(file).items()
        }
        save_file(tensors, file, {"format": "pt"})
    assert stored_shapes(copy)["model.language_model.layers.0.mlp.experts.down_proj"] == [6, 64, 24]
    got = []
    for folder in (path, copy):
        adapter = make_adapter(Qwen3VLMoe, folder, size=SIZE)
        adapter.load(3, CPU, torch.float32, tmp_path)
        got.append(features(adapter, make_clip(), [2], query=QUERY)[2])
    assert torch.equal(*got)


def test_only_the_wanted_blocks_experts_are_read(path, tmp_path):
    read = bytes_by_depth(lambda: make_adapter(Qwen3VLMoe, path), (1, 2, 4), tmp_path)
    assert read[4] - read[1] == 3 * (read[2] - read[1])
    experts = 2 * 6 * (64 * 48 + 24 * 64)  # bytes in bfloat16
    assert experts < read[2] - read[1] < 2 * experts
    towers = bytes_by_depth(lambda: make_adapter(Qwen3VLMoe, path, tap="vision"), (1, 2, 4), tmp_path)
    assert towers[4] - towers[1] == 3 * (towers[2] - towers[1]) > 0


@pytest.mark.parametrize(("tap", "grid"), [("decoder", (3, 5)), ("vision", (6, 10))])
def test_a_marked_patch_is_found_at_its_cell(path, tmp_path, tap, grid):
    assert_marked_patch_is_at_its_cell(Qwen3VLMoe, path, tmp_path, tap, SIZE, grid)


def test_the_dense_model_is_refused_and_the_other_way_round(path, qwen_path):
    with pytest.raises(ValueError, match="is a qwen3_vl; this adapter runs qwen3_vl_moe"):
        make_adapter(Qwen3VLMoe, qwen_path)
    with pytest.raises(ValueError, match=r"is a qwen3_vl_moe; this adapter runs qwen3_vl$"):
        make_adapter(Qwen3VL, path)


def test_routing_that_transformers_lacks_is_refused(path, tmp_path):
    copy = shutil.copytree(path, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["norm_topk_prob"] = False
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="norm_topk_prob=False, but transformers always does as with True"):
        make_adapter(Qwen3VLMoe, copy)


def test_a_missing_shard_is_named(path, tmp_path):
    copy = shutil.copytree(path, tmp_path / "copy")
    sorted(copy.glob("model-*.safetensors"))[-1].unlink()
    with pytest.raises(ValueError, match=r"has no file model-0000\d-of-0000\d.safetensors"):
        make_adapter(Qwen3VLMoe, copy).load(4, CPU, torch.float32, tmp_path)
