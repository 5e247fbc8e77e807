"""Qwen2.5-VL's features equal hooks on transformers' whole model, bit for bit: decoder and windowed vision tower."""

import json
import shutil

import pytest
import torch
from families import CPU, bytes_by_depth, features, make_adapter, make_clip, shown
from tiny.qwen2_5_vl import build_qwen2_5_vl
from transformers import Qwen2_5_VLForConditionalGeneration
from vlm_reference import (
    QUERY,
    assert_both_taps_equal_the_whole_model,
    assert_marked_patch_is_at_its_cell,
)

from spatialprobe.engine.adapters.qwen2_5_vl import Qwen25VL
from spatialprobe.engine.parts.image_grid import patch_places
from spatialprobe.engine.types import parse_query

SIZE = (84, 140)  # 3 x 5 cells, in windows of 2 x 2


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build_qwen2_5_vl(tmp_path_factory.mktemp("qwen2_5") / "tiny")


def changed(path, tmp_path, **fields):
    """A copy of the checkpoint whose config.json has these fields too."""
    copy = shutil.copytree(path, tmp_path / "changed")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | fields))
    return copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_taps_equal_the_whole_model(path, tmp_path, dtype):
    budget = (max(28, 3136 // 4), 12845056 // 4)  # a video's, shared by 3 images: 4 with the stride of 2
    assert_both_taps_equal_the_whole_model(
        Qwen25VL, Qwen2_5_VLForConditionalGeneration, path, tmp_path, dtype, SIZE, budget, (0, 2), (0, 1, 2), windows=2
    )


@pytest.mark.parametrize(("tap", "grid"), [("decoder", (3, 5)), ("vision", (6, 10))])
def test_a_marked_patch_is_found_at_its_cell(path, tmp_path, tap, grid):
    assert_marked_patch_is_at_its_cell(Qwen25VL, path, tmp_path, tap, SIZE, grid)


def test_image_tokens_have_positions_in_the_image(path, tmp_path):
    """Without mm_token_type_ids the model counts them on as text, and says nothing."""
    adapter = make_adapter(Qwen25VL, path, size=SIZE)
    adapter.load(2, CPU, torch.float32, tmp_path)
    plan, clip = adapter.plan(9, QUERY), make_clip()
    mine = features(adapter, clip, [1], query=QUERY)[1]
    state = {name: x[None] for name, x in adapter.prepare(shown(clip, plan), plan).items()}
    ids, grids = state["input_ids"], state["image_grid_thw"][0]
    of_images, _ = adapter.model.get_rope_index(ids, (ids == adapter.config.image_token_id).int(), grids)
    first = int(state["places"][0, 0])
    assert of_images[:, 0, first : first + 15].tolist() == [
        [first] * 15,
        [first + i for i in range(3) for _ in range(5)],
        [first + j for _ in range(3) for j in range(5)],
    ]
    got = {}
    for name, positions in (
        ("images", of_images),
        ("text", torch.arange(ids.shape[1]).expand(3, 1, -1)),
        ("none", None),
    ):
        hook = adapter.blocks[1].register_forward_hook(lambda m, a, out, name=name: got.update({name: out}))
        with torch.inference_mode():
            adapter.model(
                input_ids=ids,
                position_ids=positions,
                pixel_values=state["pixel_values"][0],
                image_grid_thw=grids,
                use_cache=False,
            )
        hook.remove()
    assert torch.equal(adapter.grid(got["images"], state, plan), mine)
    assert torch.equal(got["none"], got["text"])
    assert (got["text"] - got["images"]).norm() > 0.01 * got["images"].norm()


@pytest.mark.parametrize("tap", ["decoder", "vision"])
def test_only_the_wanted_blocks_are_read(path, tmp_path, tap):
    read = bytes_by_depth(lambda: make_adapter(Qwen25VL, path, tap=tap), (1, 2, 4), tmp_path)
    assert read[4] - read[1] == 3 * (read[2] - read[1]) > 0


def test_the_vision_tap_loads_no_decoder_and_no_merger(path, tmp_path):
    adapter = make_adapter(Qwen25VL, path, tap="vision")
    adapter.load(1, CPU, torch.float32, tmp_path)
    names = {name.partition(".")[0] for name, _ in adapter.model.named_parameters()}
    assert names == {"patch_embed", "blocks"}
    assert (adapter.num_layers, adapter.channels) == (4, 32)


def test_rows_are_the_query_frames_of_the_study(path):
    query = parse_query("0,1:76:4", 81)
    adapter = make_adapter(Qwen25VL, path)
    plan = adapter.plan(81, query)
    assert plan.grid == (20, 19, 34)
    assert (plan.rows[0], plan.rows[1], plan.rows[73], plan.rows[2], plan.rows[80]) == (0, 1, 19, -1, -1)
    assert make_adapter(Qwen25VL, path, tap="vision").plan(81, query).grid == (20, 38, 68)


def test_places_of_patches_are_a_permutation():
    for height, width, window in ((2, 2, 4), (6, 10, 2), (38, 68, 4), (10, 6, 3)):
        assert sorted(patch_places(height, width, 2, window).tolist()) == list(range(height * width))
    assert patch_places(2, 4, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert patch_places(4, 4, 2, window=1).tolist() == patch_places(4, 4, 2).tolist()


def test_a_config_in_tables_is_read_as_one_at_the_top_level(path, tmp_path):
    """As transformers itself writes it, and as releases wrote it that said some fields twice."""
    flat = json.loads((path / "config.json").read_text())
    own = ("architectures", "model_type", "vision_config", "image_token_id", "video_token_id", "vision_token_id")
    text = {name: value for name, value in flat.items() if name not in own}
    copy = changed(path, tmp_path, text_config=text)
    adapters = [make_adapter(Qwen25VL, folder, size=SIZE) for folder in (path, copy)]
    for adapter in adapters:
        adapter.load(2, CPU, torch.float32, tmp_path)
    a, b = (features(adapter, make_clip(), [1], query=QUERY)[1] for adapter in adapters)
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "qwen2_vl"}, "is a qwen2_vl; this adapter runs qwen2_5_vl"),
        ({"rope_bend": 3}, r"does not know: rope_bend"),
        ({"vision_config": {"depth": 4, "hidden_size": 32, "in_chans": 1}}, "in_chans=1, but transformers always .* 3"),
    ],
)
def test_other_checkpoints_are_refused(path, tmp_path, fields, reason):
    with pytest.raises(ValueError, match=reason):
        make_adapter(Qwen25VL, changed(path, tmp_path, **fields))


def test_a_missing_shard_is_named(path, tmp_path):
    copy = shutil.copytree(path, tmp_path / "copy")
    next(iter(sorted(copy.glob("model-*.safetensors")))).unlink()
    with pytest.raises(ValueError, match=r"has no file model-00001-of-0000\d.safetensors"):
        make_adapter(Qwen25VL, copy).load(4, CPU, torch.float32, tmp_path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tap": "merger"}, "tap must be one of decoder, vision, got 'merger'"),
        ({"size": (0, 10)}, "size must be positive"),
        ({"prompt": "a <|image_pad|>"}, "prompt must hold no special tokens"),
    ],
)
def test_bad_options_are_refused(path, options, reason):
    with pytest.raises(ValueError, match=reason):
        make_adapter(Qwen25VL, path, **options).check_options()
