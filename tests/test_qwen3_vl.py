"""Qwen3-VL's features equal transformers' hidden_states of the whole model, bit for bit."""

import json
import shutil

import pytest
import torch
from families import CPU, aligned, bytes_by_depth, features, make_adapter, make_clip, shown
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vlm_reference import (
    QUERY,
    assert_both_taps_equal_the_whole_model,
    assert_marked_patch_is_at_its_cell,
    library_inputs,
)

from spatialprobe.engine.adapters.qwen3_vl import Qwen3VL
from spatialprobe.engine.job import Job
from spatialprobe.engine.parts.image_grid import fit_pixels
from spatialprobe.engine.run import run_job
from spatialprobe.engine.types import parse_query

SIZE = (70, 100)
BUDGET = (4096 // 4, 25165824 // 4)  # a video's, shared by 3 images: 4 with the stride of 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_hidden_states_of_the_whole_model(qwen_path, tmp_path, dtype):
    qwen = make_adapter(Qwen3VL, qwen_path, size=SIZE)
    qwen.load(4, CPU, dtype, tmp_path)
    mine = features(qwen, make_clip(), (0, 1, 2, 3), query=QUERY)
    inputs = library_inputs(qwen, qwen_path, make_clip(), SIZE, BUDGET)
    model = aligned(Qwen3VLForConditionalGeneration.from_pretrained(qwen_path, dtype=dtype))
    with torch.inference_mode():
        out = model.model(**inputs, output_hidden_states=True, use_cache=False)
    assert len(out.hidden_states) == 6  # embeddings and all 5 blocks
    is_image = inputs["mm_token_type_ids"].bool()
    for layer in (0, 1, 2, 3):  # 0 to 2: before the model adds DeepStack features, as in hidden_states
        assert torch.equal(mine[layer].flatten(0, 3), out.hidden_states[layer + 1][is_image])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_taps_equal_hooks_on_the_whole_model(qwen_path, tmp_path, dtype):
    assert_both_taps_equal_the_whole_model(
        Qwen3VL, Qwen3VLForConditionalGeneration, qwen_path, tmp_path, dtype, (96, 160), BUDGET, (0, 3), (0, 1, 2)
    )


@pytest.mark.parametrize("tap", ["decoder", "vision"])
def test_only_the_wanted_blocks_are_loaded(qwen_path, tmp_path, tap):
    read = bytes_by_depth(lambda: make_adapter(Qwen3VL, qwen_path, tap=tap), (1, 2, 4), tmp_path)
    assert read[4] - read[1] == 3 * (read[2] - read[1]) > 0


def test_nothing_above_the_tap_is_loaded(qwen_path, tmp_path):
    def parts(tap: str, depth: int) -> set[str]:
        qwen = make_adapter(Qwen3VL, qwen_path, tap=tap)
        qwen.load(1, CPU, torch.float32, tmp_path)
        return {".".join(name.split(".")[:depth]) for name, _ in qwen.model.named_parameters()}

    assert parts("vision", 1) == {"patch_embed", "pos_embed", "blocks"}
    assert {name for name in parts("decoder", 2) if not name.startswith("visual.")} == {
        "language_model.embed_tokens",
        "language_model.layers",
    }


@pytest.mark.parametrize(("tap", "grid"), [("decoder", (4, 6)), ("vision", (8, 12))])
def test_a_marked_patch_is_found_at_its_cell(qwen_path, tmp_path, tap, grid):
    assert_marked_patch_is_at_its_cell(Qwen3VL, qwen_path, tmp_path, tap, (128, 192), grid)


@pytest.mark.parametrize("size", [(540, 960), (1080, 1920), (33, 47), (720, 405), (64, 64)])
@pytest.mark.parametrize("images", [1, 3, 20])
def test_input_size_is_the_processors(qwen_path, size, images):
    least, most = make_adapter(Qwen3VL, qwen_path).pixel_budget(images)
    processor = Qwen2VLImageProcessorPil.from_pretrained(qwen_path)
    grid = processor(
        images=[Image.new("RGB", size[::-1])],
        size={"shortest_edge": least, "longest_edge": most},
        return_tensors="pt",
    )["image_grid_thw"][0]
    assert fit_pixels(*size, 32, least, most) == (int(grid[1]) * 16, int(grid[2]) * 16)


@pytest.mark.parametrize(("images", "share"), [(2, 2), (3, 4), (20, 20)])
def test_images_share_a_videos_budget_of_pixels(qwen_path, images, share):
    """As a video of so many frames would, in pairs."""
    qwen = make_adapter(Qwen3VL, qwen_path, size=(4320, 7680))
    budget = qwen.video_config["size"]
    assert qwen.pixel_budget(images) == (max(32, budget["shortest_edge"] // share), budget["longest_edge"] // share)
    assert qwen.pixel_budget(1) == tuple(qwen.image_config["size"][edge] for edge in ("shortest_edge", "longest_edge"))
    height, width = qwen.plan(20, tuple(range(images))).size
    assert height * width <= budget["longest_edge"] // share < (height + 32) * (width + 32)


def test_images_are_shrunk_to_their_share(qwen_path, tmp_path):
    qwen = make_adapter(Qwen3VL, qwen_path, size=(96, 160))
    qwen.video_config = qwen.video_config | {"size": {"shortest_edge": 4096, "longest_edge": 4 * 64 * 96}}
    qwen.load(1, CPU, torch.float32, tmp_path)
    plan = qwen.plan(9, QUERY)
    assert plan.size == (32, 96)
    sizes = qwen.prepare(shown(make_clip(), plan), plan)["image_grid_thw"]
    assert sizes.tolist() == [[1, 2, 6]] * 3


@pytest.mark.parametrize(("tap", "grid"), [("decoder", (20, 17, 30)), ("vision", (20, 34, 60))])
def test_published_size_gives_the_published_grid(qwen_path, tap, grid):
    plan = make_adapter(Qwen3VL, qwen_path, tap=tap).plan(81, parse_query("0,1:76:4", 81))
    assert plan.grid == grid
    assert (plan.rows[0], plan.rows[1], plan.rows[73], plan.rows[2], plan.rows[80]) == (0, 1, 19, -1, -1)


def test_a_job_taps_the_vision_tower(clips_path, qwen_path, tmp_path):
    words = {"clips": str(clips_path), "model": str(qwen_path), "out": str(tmp_path / "store"), "window": 9}
    words |= {"query": "0,5", "limit": 2, "options": {"size": "64x96", "tap": "vision"}}
    report, store = run_job(Job.from_words(words | {"layers": [0, 3]}))
    assert (report.written, report.failed) == (2, 0)
    assert store.read("clip1", 3).data.shape == (2, 4, 6, 32)
    assert list(store.verify()) == []
    with pytest.raises(ValueError, match=r"layers must be given where the study used none \(blocks 0 \.\. 3"):
        run_job(Job.from_words(words))
    with pytest.raises(ValueError, match=r'options\.tap: "vision" there, "decoder" asked'):
        run_job(Job.from_words(words | {"layers": [0, 3], "options": {"size": "64x96"}}))


def test_a_field_that_transformers_does_not_know_is_refused(qwen_path, tmp_path):
    copy = shutil.copytree(qwen_path, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["rope_bend"] = 2
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"Qwen3VLTextConfig of the installed transformers does not know: rope_bend"):
        make_adapter(Qwen3VL, copy)


def test_a_tokenizer_of_another_model_is_refused(qwen_path, tmp_path):
    copy = shutil.copytree(qwen_path, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["image_token_id"] += 1
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"its tokenizer does not know <\|image_pad\|> as token \d+"):
        make_adapter(Qwen3VL, copy).load(1, CPU, torch.float32, tmp_path)
