"""GLM-4.1V's features equal hooks on transformers' whole model, bit for bit: decoder and vision tower."""

import json
import shutil

import pytest
import torch
from families import CPU, bytes_by_depth, make_adapter
from PIL import Image
from tiny.glm4v import build_glm4v
from transformers import Glm4vForConditionalGeneration
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from vlm_reference import assert_both_taps_equal_the_whole_model, assert_marked_patch_is_at_its_cell

from spatialprobe.engine.adapters.glm4v import Glm4v
from spatialprobe.engine.types import parse_query

SIZE = (84, 140)  # 3 x 5 cells


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build_glm4v(tmp_path_factory.mktemp("glm4v") / "tiny")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_taps_equal_the_whole_model(path, tmp_path, dtype):
    assert_both_taps_equal_the_whole_model(
        Glm4v, Glm4vForConditionalGeneration, path, tmp_path, dtype, SIZE, None, (0, 1, 2), (0, 1)
    )


@pytest.mark.parametrize("size", [(540, 960), (1080, 1920), (33, 47), (20, 90), (720, 405), (64, 64), (1500, 3400)])
def test_input_size_is_the_processors(path, size):
    grid = Glm4vImageProcessorPil.from_pretrained(path)(images=[Image.new("RGB", size[::-1])], return_tensors="pt")
    for images in (1, 3, 20):  # which share nothing
        plan = make_adapter(Glm4v, path, size=size, tap="vision").plan(20, tuple(range(images)))
        assert [1, *plan.grid[1:]] == grid["image_grid_thw"][0].tolist()


@pytest.mark.parametrize(("tap", "grid"), [("decoder", (3, 5)), ("vision", (6, 10))])
def test_a_marked_patch_is_found_at_its_cell(path, tmp_path, tap, grid):
    assert_marked_patch_is_at_its_cell(Glm4v, path, tmp_path, tap, SIZE, grid)


@pytest.mark.parametrize("tap", ["decoder", "vision"])
def test_only_the_wanted_blocks_are_read(path, tmp_path, tap):
    read = bytes_by_depth(lambda: make_adapter(Glm4v, path, tap=tap), (1, 2, 3), tmp_path)
    assert read[3] - read[2] == read[2] - read[1] > 0


def test_the_vision_tap_loads_no_decoder_and_nothing_above_its_blocks(path, tmp_path):
    adapter = make_adapter(Glm4v, path, tap="vision")
    adapter.load(1, CPU, torch.float32, tmp_path)
    names = {name.partition(".")[0] for name, _ in adapter.model.named_parameters()}
    assert names == {"embeddings", "patch_embed", "blocks", "post_conv_layernorm"}


def test_rows_are_the_query_frames_of_the_study(path):
    plan = make_adapter(Glm4v, path).plan(81, parse_query("0,1:76:4", 81))
    assert plan.grid == (20, 19, 34)
    assert (plan.rows[0], plan.rows[1], plan.rows[73], plan.rows[2], plan.rows[80]) == (0, 1, 19, -1, -1)


@pytest.mark.parametrize(
    ("part", "fields", "reason"),
    [
        (None, {"model_type": "glm4v_moe"}, "is a glm4v_moe; this adapter runs glm4v$"),
        ("text_config", {"attention_bias": False}, "attention_bias=False, but transformers always does as with True"),
        ("vision_config", {"windows": 2}, r"config.json \(vision_config\) has fields .* does not know: windows"),
    ],
)
def test_other_variants_are_refused(path, tmp_path, part, fields, reason):
    copy = shutil.copytree(path, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (config[part] if part else config).update(fields)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=reason):
        make_adapter(Glm4v, copy)


@pytest.mark.parametrize("prompt", ["[gMASK] what", "a <|image|>", "<sop>"])
def test_special_tokens_in_the_prompt_are_refused(path, prompt):
    with pytest.raises(ValueError, match="prompt must hold no special tokens"):
        make_adapter(Glm4v, path, prompt=prompt).check_options()
