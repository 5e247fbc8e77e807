"""Gemma 3's features equal hooks on transformers' whole model, bit for bit."""

import json
import shutil

import numpy as np
import pytest
import torch
from families import CPU, aligned, bytes_by_depth, features, hooked, make_adapter, make_clip, shown
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny.gemma3 import build_gemma3
from transformers import AutoTokenizer, Gemma3ForConditionalGeneration
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from spatialprobe.engine.adapters.gemma3 import Gemma3
from spatialprobe.engine.job import Job
from spatialprobe.engine.run import run_job
from spatialprobe.engine.types import parse_query

QUERY = (0, 1, 5)
QUESTION = (
    "The following images are consecutive frames from a video.\n"
    "Frame1: <start_of_image>\nFrame2: <start_of_image>\nFrame3: <start_of_image>\nDescribe this video."
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build_gemma3(tmp_path_factory.mktemp("gemma") / "gemma3-tiny")


def loaded(path, depth, cache, dtype=torch.float32, **options) -> Gemma3:
    adapter = make_adapter(Gemma3, path, **options)
    adapter.check_options()
    adapter.load(depth, CPU, dtype, cache)
    return adapter


def prompt_ids(path, tokens: int):
    """The chat template's text, with what transformers' processor puts in the place of each image."""
    template = json.loads((path / "chat_template.json").read_text())["chat_template"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    image = f"\n\n<start_of_image>{'<image_soft_token>' * tokens}<end_of_image>\n\n"
    return tokenizer(text.replace("<start_of_image>", image), add_special_tokens=False, return_tensors="pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_hooks_on_the_whole_model(dtype, path, tmp_path):
    clip = make_clip()
    model = aligned(Gemma3ForConditionalGeneration.from_pretrained(path, dtype=dtype))
    images = [Image.fromarray(clip.frames[f].permute(1, 2, 0).numpy()) for f in QUERY]
    pixels = Gemma3ImageProcessorPil.from_pretrained(path)(images=images, return_tensors="pt")["pixel_values"]
    ids = prompt_ids(path, 9)
    is_image = ids["input_ids"] == model.config.image_token_index
    tower = model.model.vision_tower
    blocks = {("decoder", i): block for i, block in enumerate(model.model.language_model.layers)}
    blocks |= {("vision", i): block for i, block in enumerate(getattr(tower, "vision_model", tower).encoder.layers)}
    seen = hooked(blocks, lambda: model(**ids, pixel_values=pixels.to(dtype), token_type_ids=is_image.int()))

    for depth in (1, 5):
        mine = features(loaded(path, depth, tmp_path, dtype), clip, range(depth), query=QUERY)
        for layer in range(depth):
            assert torch.equal(mine[layer].flatten(0, 3), seen["decoder", layer][is_image])
    assert mine[4].std() > 0.1
    tower = loaded(path, 3, tmp_path, dtype, tap="vision")
    mine = features(tower, clip, range(3), query=QUERY)
    for layer in range(3):
        assert torch.equal(mine[layer][0].flatten(1, 2), seen["vision", layer])
    assert (tower.num_layers, tower.channels) == (3, 32)


def test_the_library_reads_the_published_spelling_of_rotary_positions_and_windows(path, tmp_path):
    adapter = make_adapter(Gemma3, path)
    config = adapter.skeleton(5)[0].language_model.config
    assert config.rope_parameters["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000}
    assert config.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000}
    assert [kind[:4] for kind in config.layer_types] == ["slid", "slid", "full", "slid", "slid"]


def test_frames_are_squashed_and_normalised(path, tmp_path):
    adapter = loaded(path, 1, tmp_path, tap="vision")
    clip = make_clip(size=(90, 160))
    plan = adapter.plan(9, QUERY)
    pixels = adapter.prepare(shown(clip, plan), plan)["pixels"]
    got = adapter.encode({"pixels": pixels[None]}, plan)["pixel_values"]
    for row, frame in enumerate(QUERY):
        image = Image.fromarray(clip.frames[frame].permute(1, 2, 0).numpy()).resize((84, 84), Image.BILINEAR)
        np.testing.assert_allclose(got[row].permute(1, 2, 0).numpy(), np.asarray(image) / 127.5 - 1, atol=1e-6)


def test_published_size_and_window_give_20_rows_of_256_tokens(tmp_path):
    path = build_gemma3(tmp_path / "896", image_size=896, tokens=256, num_layers=1, vision_layers=1)
    query = parse_query("0,1:76:4", 81)
    plan = make_adapter(Gemma3, path).plan(81, query)
    assert (plan.grid, plan.size, plan.shown) == ((20, 16, 16), (896, 896), query)
    assert [plan.rows[f] for f in (0, 1, 2, 5, 73, 80)] == [0, 1, -1, 2, 19, -1]
    assert make_adapter(Gemma3, path, tap="vision").plan(81, query).grid == (20, 64, 64)


@pytest.mark.parametrize(("tap", "cell"), [("decoder", (2, 0)), ("vision", (5, 0))])
def test_rows_are_the_query_frames_and_cells_keep_their_place(tap, cell, path, tmp_path):
    adapter = loaded(path, 1, tmp_path, tap=tap)
    plain, marked = make_clip(size=(84, 84)), make_clip(size=(84, 84))
    marked.frames[1, :, 70:, :14] = 255 - marked.frames[1, :, 70:, :14]  # bottom left patch of frame 1
    a, b = (features(adapter, clip, (0,), query=QUERY)[0] for clip in (plain, marked))
    where = (b - a).abs().amax(-1)[0]
    assert where[0].max() == 0  # the image before does not see it
    assert divmod(int(where[1].argmax()), where.shape[2]) == cell


@pytest.mark.parametrize("size", [(30, 200), (101, 37)])
def test_frames_of_any_shape_and_short_clips_work(size, path, tmp_path):
    adapter = loaded(path, 2, tmp_path)
    for frames in (1, 2):
        got = features(adapter, make_clip(frames, size), (1,))[1]
        assert got.isfinite().all()
        assert got.shape == (1, frames, 3, 3, 64)


def test_only_the_wanted_blocks_are_read(path, tmp_path):
    tensors = {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}
    nbytes = lambda *starts: sum(v.nbytes for k, v in tensors.items() if k.startswith(starts))  # noqa: E731
    read = bytes_by_depth(lambda: make_adapter(Gemma3, path), (1, 2, 5), tmp_path)
    assert read[2] - read[1] == nbytes("language_model.model.layers.1.")
    assert read[5] == nbytes("") - nbytes("language_model.model.norm")
    read = bytes_by_depth(lambda: make_adapter(Gemma3, path, tap="vision"), (1, 2), tmp_path)
    tower = "vision_tower.vision_model."
    above = [f"{tower}encoder.layers.{i}." for i in (1, 2)]
    assert read[1] == nbytes(tower) - nbytes(*above, f"{tower}post_layernorm")
    assert read[2] == read[1] + nbytes(above[0])


def test_names_that_newer_libraries_write_are_read_too(path, tmp_path):
    other = tmp_path / "newer"
    shutil.copytree(path, other, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}
    newer = {k.replace("language_model.model.", "language_model."): v for k, v in tensors.items()}
    newer = {f"model.{k.replace('vision_tower.vision_model.', 'vision_tower.')}": v for k, v in newer.items()}
    save_file(newer, other / "model.safetensors")
    clip = make_clip(3)
    for tap in ("decoder", "vision"):
        a, b = (features(loaded(p, 1, tmp_path, tap=tap), clip, (0,))[0] for p in (path, other))
        assert torch.equal(a, b)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def edited(path, tmp_path):
    """A copy of the checkpoint with some fields of a file changed; "part__field" reaches into a table."""

    def edit(file="config.json", **fields):
        copy = tmp_path / "edited"
        shutil.copytree(path, copy, dirs_exist_ok=True)
        config = json.loads((path / file).read_text())
        for key, value in fields.items():
            table, _, field = key.rpartition("__")
            (config[table] if table else config)[field] = value
        (copy / file).write_text(json.dumps(config))
        return copy

    return edit


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen3_vl"}, "is no Gemma 3 with vision: its model_type is 'qwen3_vl'"),
        ({"warp": 1}, r"config\.json has fields that Gemma3Config .* does not know: warp"),
        ({"vision_config__warp": 1}, "vision_config has fields that SiglipVisionConfig .*: warp"),
        ({"text_config__warp": 1}, "text_config has fields that Gemma3TextConfig .*: warp"),
        ({"mm_tokens_per_image": 16}, "6 patches a side cannot be pooled to 16 tokens"),
        ({"mm_tokens_per_image": 8}, "6 patches a side cannot be pooled to 8 tokens"),
    ],
)
def test_configs_it_cannot_run_are_named(fields, message, edited):
    with pytest.raises(ValueError, match=message):
        make_adapter(Gemma3, edited(**fields))


def test_a_gemma_without_vision_is_named(edited):
    copy = edited()
    config = json.loads((copy / "config.json").read_text())
    del config["vision_config"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is no Gemma 3 with vision: .*without a vision_config"):
        make_adapter(Gemma3, copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tap": "head"}, "tap must be one of decoder, vision, got 'head'"),
        ({"prompt": "a <end_of_turn>"}, "prompt must hold no special tokens, got '<end_of_'"),
    ],
)
def test_bad_options_are_named(options, message, path):
    with pytest.raises(ValueError, match=message):
        make_adapter(Gemma3, path, **options).check_options()


def test_wrong_tokens_sizes_layers_and_missing_shards_are_named(path, edited, tmp_path):
    with pytest.raises(ValueError, match="does not know <image_soft_token> as token 7"):
        make_adapter(Gemma3, edited(image_token_index=7)).load(1, CPU, torch.float32, tmp_path)
    other = edited("preprocessor_config.json", size={"height": 224, "width": 224})
    (other / "config.json").write_text((path / "config.json").read_text())
    with pytest.raises(ValueError, match=r"must have size .*84.*, got .*224"):
        make_adapter(Gemma3, other).load(1, CPU, torch.float32, tmp_path)
    words = {"clips": str(tmp_path), "model": str(path), "out": str(tmp_path / "s"), "layers": [5]}
    with pytest.raises(ValueError, match=r"layers must be blocks 0 \.\. 4, got \[5\]"):
        run_job(Job.from_words(words))
    last = sorted(other.glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(ValueError, match=f"has no file {last.name}"):
        make_adapter(Gemma3, other).load(5, CPU, torch.float32, tmp_path)
