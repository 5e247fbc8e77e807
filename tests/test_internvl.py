"""InternVL's features equal hooks on transformers' whole model, bit for bit, from either published layout."""

import json
import shutil

import numpy as np
import pytest
import torch
from families import CPU, aligned, bytes_by_depth, features, hooked, make_adapter, make_clip, shown
from PIL import Image
from safetensors.torch import load_file
from tiny.internvl import build_internvl
from transformers import AutoTokenizer, InternVLForConditionalGeneration
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from spatialprobe.engine.adapters.internvl import InternVL
from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.job import Job
from spatialprobe.engine.run import run_job
from spatialprobe.engine.types import parse_query

QUERY = (0, 1, 5)
SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("internvl")
    return {
        "native": build_internvl(root / "native"),
        "original": build_internvl(root / "original", layout="original"),
        "3.5": build_internvl(root / "3.5", text="qwen3"),
    }


def loaded(path, depth, cache, dtype=torch.float32, **options) -> InternVL:
    adapter = make_adapter(InternVL, path, **options)
    adapter.check_options()
    adapter.load(depth, CPU, dtype, cache)
    return adapter


def reference(path, clip, dtype, prompt):
    """{"decoder", "vision"} -> {block: what a hook on the whole model sees}, and where its image tokens are."""
    model = aligned(InternVLForConditionalGeneration.from_pretrained(path, dtype=dtype))
    images = [Image.fromarray(clip.frames[f].permute(1, 2, 0).numpy()) for f in QUERY]
    pixels = GotOcr2ImageProcessorPil.from_pretrained(path)(images=images, return_tensors="pt")["pixel_values"]
    question = []
    for i in range(len(QUERY)):
        question += [{"type": "text", "text": f"Frame{i + 1}: "}, {"type": "image"}]
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": [*question, {"type": "text", "text": prompt}]},
    ]
    tokenizer = AutoTokenizer.from_pretrained(path)
    template = json.loads((path / "chat_template.json").read_text())["chat_template"]
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    tokens = model.config.image_seq_length
    ids = tokenizer(text.replace("<IMG_CONTEXT>", f"<img>{'<IMG_CONTEXT>' * tokens}</img>"), return_tensors="pt")
    blocks = {("decoder", i): block for i, block in enumerate(model.model.language_model.layers)}
    blocks |= {("vision", i): block for i, block in enumerate(model.model.vision_tower.encoder.layer)}
    seen = hooked(blocks, lambda: model(**ids, pixel_values=pixels.to(dtype)))
    return seen, ids["input_ids"][0] == model.config.image_token_id


@pytest.mark.parametrize(
    ("name", "dtype"), [("native", torch.float32), ("3.5", torch.float32), ("3.5", torch.bfloat16)]
)
def test_equals_hooks_on_the_whole_model(name, dtype, paths, tmp_path):
    clip, prompt = make_clip(), "Describe this video."
    seen, is_image = reference(paths[name], clip, dtype, prompt)
    adapter = loaded(paths[name], 5, tmp_path, dtype, prompt=prompt)
    mine = features(adapter, clip, range(5), query=QUERY)
    for layer in range(5):
        assert torch.equal(mine[layer].flatten(0, 3), seen["decoder", layer][0, is_image])
    assert mine[0].std() > 0.1
    tower = loaded(paths[name], 3, tmp_path, dtype, tap="vision")
    mine = features(tower, clip, range(3), query=QUERY)
    for layer in range(3):
        assert torch.equal(mine[layer][0].flatten(1, 2), seen["vision", layer][:, 1:])
    assert (tower.num_layers, tower.channels) == (3, 32)


@pytest.mark.parametrize("tap", ["decoder", "vision"])
def test_both_layouts_of_the_same_weights_have_equal_features(tap, paths, tmp_path):
    clip = make_clip()
    depth = {"decoder": 5, "vision": 3}[tap]
    native, original = (
        features(loaded(paths[name], depth, tmp_path, tap=tap), clip, range(depth), query=QUERY)
        for name in ("native", "original")
    )
    for layer in range(depth):
        assert torch.equal(native[layer], original[layer])
    assert not torch.equal(native[0], native[1])


def test_the_prompt_is_the_studys(paths, tmp_path):
    adapter = loaded(paths["original"], 1, tmp_path)
    plan = adapter.plan(81, (0, 4))
    image = f"<img>{'<IMG_CONTEXT>' * 9}</img>"
    start = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nFrame1: {image}\nFrame2: {image}"
    assert adapter._text(plan) == f"{start}<|im_end|>\n<|im_start|>assistant\n"
    adapter.options |= {"prompt": "Where?"}
    assert adapter._text(plan) == f"{start}\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    adapter.options |= {"system": ""}
    assert adapter._text(plan).startswith("<|im_start|>user\nFrame1: ")
    ids = adapter.prepare(shown(make_clip(), plan), plan)["input_ids"]
    back = AutoTokenizer.from_pretrained(paths["native"])(adapter._text(plan))["input_ids"]
    assert ids.tolist() == back


@pytest.mark.parametrize("name", ["native", "original"])
def test_frames_are_squashed_to_one_tile_and_normalised_as_the_study_does(name, paths, tmp_path):
    adapter = loaded(paths[name], 1, tmp_path, tap="vision")
    clip = make_clip(size=(90, 160))
    plan = adapter.plan(9, QUERY)
    pixels = adapter.prepare(shown(clip, plan), plan)["pixels"]
    got = adapter.encode({"pixels": pixels[None]}, plan)["pixel_values"]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for row, frame in enumerate(QUERY):
        image = Image.fromarray(clip.frames[frame].permute(1, 2, 0).numpy()).resize((84, 84), Image.BICUBIC)
        wanted = (np.asarray(image) / 255.0 - mean) / std
        np.testing.assert_allclose(got[row].permute(1, 2, 0).numpy(), wanted, atol=1e-6)


def test_published_size_and_window_give_20_rows_of_256_tokens(tmp_path):
    path = build_internvl(tmp_path / "448", image_size=448, num_layers=1, vision_layers=1)
    adapter = make_adapter(InternVL, path)
    query = parse_query("0,1:76:4", 81)
    plan = adapter.plan(81, query)
    assert (plan.grid, plan.size, plan.shown) == ((20, 16, 16), (448, 448), query)
    assert [plan.rows[f] for f in (0, 1, 2, 5, 73, 80)] == [0, 1, -1, 2, 19, -1]
    assert make_adapter(InternVL, path, tap="vision").plan(81, query).grid == (20, 32, 32)


@pytest.mark.parametrize(("tap", "cell"), [("decoder", (2, 0)), ("vision", (5, 0))])
def test_rows_are_the_query_frames_and_cells_keep_their_place(tap, cell, paths, tmp_path):
    adapter = loaded(paths["original"], 1, tmp_path, tap=tap)
    plain, marked = make_clip(size=(84, 84)), make_clip(size=(84, 84))
    marked.frames[5, :, 72:, :12] = 255 - marked.frames[5, :, 72:, :12]  # bottom left patch of frame 5
    a, b = (features(adapter, clip, (0,), query=QUERY)[0] for clip in (plain, marked))
    where = (b - a).abs().amax(-1)[0]
    assert where[:2].max() == 0  # earlier images do not see frame 5
    assert divmod(int(where[2].argmax()), where.shape[2]) == cell


@pytest.mark.parametrize("size", [(30, 200), (101, 37)])
def test_frames_of_any_shape_and_short_clips_work(size, paths, tmp_path):
    adapter = loaded(paths["native"], 2, tmp_path)
    for frames in (1, 2):
        got = features(adapter, make_clip(frames, size), (1,))[1]
        assert got.isfinite().all()
        assert got.shape == (1, frames, 3, 3, 64)


@pytest.mark.parametrize("name", ["native", "original"])
def test_only_the_wanted_blocks_are_read(name, paths, tmp_path):
    tensors = {k: v for file in paths[name].glob("*.safetensors") for k, v in load_file(file).items()}
    nbytes = lambda *starts: sum(v.nbytes for k, v in tensors.items() if k.startswith(starts))  # noqa: E731
    layers, blocks = (
        "language_model.model.layers",
        {"native": "vision_tower.encoder.layer"}.get(name, "vision_model.encoder.layers"),
    )
    read = bytes_by_depth(lambda: make_adapter(InternVL, paths[name]), (1, 2, 5), tmp_path)
    assert read[2] - read[1] == nbytes(f"{layers}.1.")
    assert read[5] == nbytes("language_model.model.", "vision_", "multi_modal", "mlp1") - nbytes(
        "language_model.model.norm"
    )
    read = bytes_by_depth(lambda: make_adapter(InternVL, paths[name], tap="vision"), (1, 2), tmp_path)
    assert read[1] == nbytes("vision_") - nbytes(f"{blocks}.1.", f"{blocks}.2.")
    assert read[2] == nbytes("vision_") - nbytes(f"{blocks}.2.")


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def edited(paths, tmp_path):
    """A copy of a checkpoint with some fields of its config changed; "part__field" reaches into a table."""

    def edit(name, **fields):
        path = tmp_path / f"edited-{name}"
        shutil.copytree(paths[name], path, dirs_exist_ok=True)
        config = json.loads((paths[name] / "config.json").read_text())
        for key, value in fields.items():
            table, inside, field = key.partition("__")
            (config[table] if inside else config)[field if inside else key] = value
        (path / "config.json").write_text(json.dumps(config))
        return path

    return edit


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("native", {"model_type": "qwen3_vl"}, "is no InternVL: its model_type is 'qwen3_vl'"),
        ("native", {"warp": 1}, r"config\.json has fields that InternVLConfig .* does not know: warp"),
        ("native", {"vision_config__warp": 1}, "vision_config has fields that InternVLVisionConfig .*: warp"),
        ("native", {"text_config__warp": 1}, "text config has fields that Qwen2Config .*: warp"),
        ("native", {"text_config__model_type": "qwen3_moe"}, "must be qwen2 or qwen3, got 'qwen3_moe'"),
        ("native", {"vision_config__image_size": [84, 98]}, r"must be square, got \[84, 98\]"),
        ("native", {"vision_config__image_size": 70}, "5 patches a side cannot be joined at 0.5"),
        ("original", {"warp": 1}, r"config\.json has fields that .* does not know: warp"),
        ("original", {"vision_config__warp": 1}, "vision_config has fields that .*: warp"),
        ("original", {"llm_config__warp": 1}, "text config has fields that Qwen2Config .*: warp"),
        ("original", {"template": "internlm2-chat"}, "template must be 'internvl2_5', got 'internlm2-chat'"),
        ("original", {"select_layer": -4}, "select_layer must be -1, got -4"),
        ("original", {"force_image_size": 224}, "force_image_size must be 84, got 224"),
        ("original", {"use_llm_lora": 16}, "use_llm_lora must be 0, got 16"),
        ("original", {"vision_config__use_moe": True}, "vision tower with experts"),
        ("original", {"llm_config__model_type": "internlm2"}, "must be qwen2 or qwen3, got 'internlm2'"),
    ],
)
def test_configs_it_cannot_run_are_named(name, fields, message, edited):
    with pytest.raises(ValueError, match=message):
        make_adapter(InternVL, edited(name, **fields))


PUBLISHED = {  # beside what the tiny checkpoints have, in published configs of InternVL3 and InternVL3.5
    "native": {
        "vision_config": "dropout initializer_factor torch_dtype",
        "text_config": "_name_or_path rope_theta rope_scaling moe_config debug ep_size micro_forward skip_checkpoint "
        "use_deepep use_bfloat16 torch_dtype",
    },
    "original": {
        "vision_config": "_name_or_path capacity_factor eval_capacity_factor laux_allreduce moe_coeff_ratio "
        "moe_intermediate_size moe_output_scale noisy_gate_policy num_experts num_routed_experts num_shared_experts "
        "shared_expert_intermediate_size use_fa3 use_residual use_rts use_weighted_residual output_attentions",
        "llm_config": "debug ep_size micro_forward skip_checkpoint use_deepep add_cross_attention bad_words_ids "
        "chunk_size_feed_forward diversity_penalty id2label is_decoder length_penalty num_beams torchscript typical_p",
        "": "hidden_size image_fold output_attentions transformers_version tie_word_embeddings",
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_fields_of_published_configs_are_known(name, edited):
    for table, names in PUBLISHED[name].items():
        fields = {f"{table}__{field}" if table else field: None for field in names.split()}
        adapter = make_adapter(InternVL, edited(name, **fields))
        assert (adapter.num_layers, adapter.channels) == (5, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tap": "head"}, "tap must be one of decoder, vision, got 'head'"),
        ({"prompt": "a <IMG_CONTEXT>"}, "prompt must hold no special tokens, got '<IMG_CONTEXT>'"),
        ({"system": "<|im_end|>"}, r"system must hold no special tokens, got '<\|'"),
    ],
)
def test_bad_options_are_named(options, message, paths):
    with pytest.raises(ValueError, match=message):
        make_adapter(InternVL, paths["native"], **options).check_options()


def test_wrong_tokens_layers_and_missing_shards_are_named(paths, edited, tmp_path):
    with pytest.raises(ValueError, match="does not know <IMG_CONTEXT> as the config's token"):
        make_adapter(InternVL, edited("native", image_token_id=7)).load(1, CPU, torch.float32, tmp_path)
    words = {"clips": str(tmp_path), "model": str(paths["native"]), "out": str(tmp_path / "s"), "layers": [5]}
    with pytest.raises(ValueError, match=r"layers must be blocks 0 \.\. 4, got \[5\]"):
        run_job(Job.from_words(words))
    path = edited("original")
    last = sorted(path.glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(ValueError, match=f"has no file {last.name}"):
        make_adapter(InternVL, path).load(5, CPU, torch.float32, tmp_path)


def test_another_size_in_the_processors_file_is_named(paths, tmp_path):
    path = tmp_path / "other"
    shutil.copytree(paths["native"], path)
    pixels = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps(pixels | {"size": {"height": 448, "width": 448}}))
    with pytest.raises(ValueError, match=r"must have size .*84.*, got \(448, 448\)"):
        make_adapter(InternVL, path).load(1, CPU, torch.float32, tmp_path)


def test_names_that_newer_libraries_write_are_read_too(paths, tmp_path):
    """`model.language_model.` and `model.vision_tower.` instead of `language_model.model.` and `vision_tower.`."""
    from safetensors.torch import save_file

    path = tmp_path / "newer"
    shutil.copytree(paths["native"], path, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {k: v for file in paths["native"].glob("*.safetensors") for k, v in load_file(file).items()}
    newer = {k.replace("language_model.model.", "language_model."): v for k, v in tensors.items()}
    save_file({f"model.{k}": v for k, v in newer.items()}, path / "model.safetensors")
    clip = make_clip(3)
    a, b = (features(loaded(p, 1, tmp_path), clip, (0,))[0] for p in (paths["native"], path))
    assert torch.equal(a, b)
    assert Checkpoint.open(str(path)).tensor_files().keys() != tensors.keys()
