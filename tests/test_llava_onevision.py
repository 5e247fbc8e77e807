"""LLaVA-OneVision-1.5: its tower against one written out here, its decoder against transformers' Qwen3, bit for bit."""

import json
import shutil

import pytest
import torch
from families import CPU, aligned, bytes_by_depth, features, hooked, make_adapter, make_clip, shown
from PIL import Image
from safetensors.torch import load_file
from tiny.llava_onevision import build_llava_onevision
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from spatialprobe.engine.adapters.llava_onevision import LlavaOneVision
from spatialprobe.engine.job import Job
from spatialprobe.engine.run import run_job
from spatialprobe.engine.types import parse_query

QUERY = (0, 1, 5)
SIZE = (70, 100)  # 2 x 4 cells of 28 pixels


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build_llava_onevision(tmp_path_factory.mktemp("llava") / "llava-tiny")


@pytest.fixture(scope="module")
def tensors(path) -> dict[str, Tensor]:
    return {k: v.float() for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def loaded(path, depth, cache, dtype=torch.float32, **options) -> LlavaOneVision:
    adapter = make_adapter(LlavaOneVision, path, **({"size": SIZE} | options))
    adapter.check_options()
    adapter.load(depth, CPU, dtype, cache)
    return adapter


def layer_norm(x: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def linear(x: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def reference_tower(image: Tensor, tensors: dict[str, Tensor], heads: int) -> tuple[list[Tensor], Tensor]:
    """Of one image [3, H, W]: what each block puts out, [rows, columns, C] of patches, and the merged tokens.

    As the model's own code does it, patch by patch: a list of (row, column) in the order in which it reads them.
    """
    t = {k.removeprefix("visual."): v for k, v in tensors.items() if k.startswith("visual.")}
    rows, columns = image.shape[1] // 14, image.shape[2] // 14
    places = [(r + i, c + j) for r in range(0, rows, 2) for c in range(0, columns, 2) for i in (0, 1) for j in (0, 1)]
    patches = [image[:, 14 * r : 14 * r + 14, 14 * c : 14 * c + 14] for r, c in places]
    x = torch.stack([torch.einsum("chw,ochw->o", patch, t["patch_embed.proj.weight"]) for patch in patches])
    x = layer_norm(torch.cat([t["class_embedding"][None], x]), t, "pre_layernorm")
    size = x.shape[1] // heads
    speeds = torch.tensor([10000 ** -(i / (size // 4)) for i in range(size // 4)])
    angles = torch.stack([torch.cat([r * speeds, c * speeds]) for r, c in places])
    turn = torch.polar(torch.ones(len(x), size // 2), torch.cat([t["class_pos_emb"], angles]))

    out, depth = [], 1 + max(int(k.split(".")[1]) for k in t if k.startswith("blocks."))
    for b in (f"blocks.{i}" for i in range(depth)):
        mixed = []
        q, k, v = linear(layer_norm(x, t, f"{b}.norm1"), t, f"{b}.attn.qkv").chunk(3, dim=1)
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            turned = [torch.complex(*y[:, part].contiguous().chunk(2, dim=1)) * turn for y in (q, k)]
            turned = [torch.cat([y.real, y.imag], dim=1) for y in turned]
            mixed.append(((turned[0] @ turned[1].T) / size**0.5).softmax(1) @ v[:, part])
        x = x + linear(torch.cat(mixed, dim=1), t, f"{b}.attn.proj")
        hidden = torch.nn.functional.gelu(linear(layer_norm(x, t, f"{b}.norm2"), t, f"{b}.mlp.fc1"))
        x = x + linear(hidden, t, f"{b}.mlp.fc2")
        grid = torch.zeros(rows, columns, x.shape[1])
        for token, (r, c) in zip(x[1:], places, strict=True):
            grid[r, c] = token
        out.append(grid)
    merged = layer_norm(x[1:], t, "merger.ln_q").reshape(len(places) // 4, -1)
    return out, linear(torch.nn.functional.gelu(linear(merged, t, "merger.mlp.0")), t, "merger.mlp.2")


def reference_pixels(clip) -> list[Tensor]:
    """Squashed to the wanted size, then to whole cells, as the study does for Qwen-VL; CLIP's mean and std."""
    mean, std = (
        torch.tensor(x)[:, None, None]
        for x in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    )
    out = []
    for f in QUERY:
        image = Image.fromarray(clip.frames[f].permute(1, 2, 0).numpy())
        image = image.resize(SIZE[::-1], Image.BICUBIC).resize((112, 56), Image.BICUBIC)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(56, 112, 3).permute(2, 0, 1)
        out.append((pixels / 255 - mean) / std)
    return out


def test_the_towers_blocks_are_those_written_out_here(path, tensors, tmp_path):
    clip = make_clip()
    mine = features(loaded(path, 3, tmp_path, tap="vision"), clip, range(3), query=QUERY)
    for row, image in enumerate(reference_pixels(clip)):
        blocks, _ = reference_tower(image, tensors, heads=2)
        for layer in range(3):
            torch.testing.assert_close(mine[layer][0, row], blocks[layer], rtol=1e-4, atol=1e-4)
    assert mine[2].std() > 0.1


def test_a_tower_cut_short_gives_the_whole_ones_blocks_bit_for_bit(path, tmp_path):
    clip = make_clip()
    whole = loaded(path, 1, tmp_path)
    prepared = whole.prepare(shown(clip, whole.plan(9, QUERY)), whole.plan(9, QUERY))
    state = whole.encode({k: v[None] for k, v in prepared.items()}, whole.plan(9, QUERY))
    seen = hooked(dict(enumerate(whole.tower.blocks)), lambda: whole.forward(state, None, None))
    for depth in (1, 3):
        cut = loaded(path, depth, tmp_path, tap="vision")
        got = features(cut, clip, (depth - 1,), query=QUERY)[depth - 1]
        assert torch.equal(got, cut.grid(seen[depth - 1], {}, cut.plan(9, QUERY)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decoder_equals_hooks_on_the_whole_qwen3(dtype, path, tensors, tmp_path):
    clip, adapter = make_clip(), loaded(path, 3, tmp_path, dtype)
    images = []
    hook = adapter.tower.register_forward_hook(lambda module, args, out: images.append(out.clone()))
    mine = features(adapter, clip, range(3), query=QUERY)
    hook.remove()
    if dtype == torch.float32:
        merged = torch.stack([reference_tower(image, tensors, heads=2)[1] for image in reference_pixels(clip)])
        torch.testing.assert_close(images[0], merged, rtol=1e-4, atol=1e-4)

    config = json.loads((path / "config.json").read_text())
    text = {k: v for k, v in config["text_config"].items() if k != "model_type"}
    weights = {k: v.to(dtype) for k, v in tensors.items() if not k.startswith("visual.")}
    model = Qwen3ForCausalLM.from_pretrained(None, config=Qwen3Config(**text), state_dict=weights, dtype=dtype)
    model = aligned(model)
    ids = Qwen2Tokenizer.from_pretrained(path)(adapter._text(adapter.plan(9, QUERY)), return_tensors="pt")["input_ids"]
    is_image = ids == config["image_token_id"]
    words = model.model.embed_tokens(ids).masked_scatter(is_image[..., None], images[0])
    seen = hooked(dict(enumerate(model.model.layers)), lambda: model(inputs_embeds=words))
    for layer in range(3):
        assert torch.equal(mine[layer].flatten(0, 3), seen[layer][is_image])


def test_the_prompt_has_a_numbered_image_per_frame(path, tmp_path):
    adapter = loaded(path, 1, tmp_path)
    image = f"<|vision_start|>{'<|image_pad|>' * 8}<|vision_end|>"
    question = "The following images are consecutive frames from a video.\n"
    question += f"Frame1: {image}\nFrame2: {image}\nDescribe this video."
    user = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert adapter._text(adapter.plan(9, (0, 4))) == system + user
    adapter.options |= {"system": ""}
    assert adapter._text(adapter.plan(9, (0, 4))) == user


def test_published_size_and_window_give_20_rows(path):
    query = parse_query("0,1:76:4", 81)
    plan = make_adapter(LlavaOneVision, path).plan(81, query)
    assert (plan.grid, plan.size, plan.shown) == ((20, 19, 34), (532, 952), query)
    assert [plan.rows[f] for f in (0, 1, 2, 5, 73, 80)] == [0, 1, -1, 2, 19, -1]
    assert make_adapter(LlavaOneVision, path, tap="vision").plan(81, query).grid == (20, 38, 68)


@pytest.mark.parametrize(("tap", "cell"), [("decoder", (1, 0)), ("vision", (3, 0))])
def test_rows_are_the_query_frames_and_cells_keep_their_place(tap, cell, path, tmp_path):
    adapter = loaded(path, 1, tmp_path, tap=tap, size=(56, 112))
    plain, marked = make_clip(size=(56, 112)), make_clip(size=(56, 112))
    marked.frames[5, :, 43:, :13] = 255 - marked.frames[5, :, 43:, :13]  # bottom left patch of frame 5
    a, b = (features(adapter, clip, (0,), query=QUERY)[0] for clip in (plain, marked))
    where = (b - a).abs().amax(-1)[0]
    assert where[:2].max() == 0  # earlier images do not see frame 5
    assert divmod(int(where[2].argmax()), where.shape[2]) == cell


def test_frames_of_any_shape_and_short_clips_work(path, tmp_path):
    adapter = loaded(path, 2, tmp_path)
    for frames, size in ((1, (30, 200)), (2, (101, 37))):
        got = features(adapter, make_clip(frames, size), (1,))[1]
        assert got.isfinite().all()
        assert got.shape == (1, frames, 2, 4, 64)


def test_only_the_wanted_blocks_are_read(path, tmp_path):
    stored = {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}
    nbytes = lambda *starts: sum(v.nbytes for k, v in stored.items() if k.startswith(starts))  # noqa: E731
    read = bytes_by_depth(lambda: make_adapter(LlavaOneVision, path), (1, 2, 4), tmp_path)
    assert read[2] - read[1] == nbytes("model.layers.1.")
    assert read[4] == nbytes("") - nbytes("lm_head", "model.norm")
    read = bytes_by_depth(lambda: make_adapter(LlavaOneVision, path, tap="vision"), (1, 2), tmp_path)
    assert read[1] == nbytes("visual.") - nbytes("visual.merger", "visual.blocks.1.", "visual.blocks.2.")
    assert read[2] == read[1] + nbytes("visual.blocks.1.")


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def edited(path, tmp_path):
    """A copy of the checkpoint with some fields of its config changed; "part__field" reaches into a table."""

    def edit(**fields):
        copy = tmp_path / "edited"
        shutil.copytree(path, copy, dirs_exist_ok=True)
        config = json.loads((path / "config.json").read_text())
        for key, value in fields.items():
            table, _, field = key.rpartition("__")
            (config[table] if table else config)[field] = value
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    return edit


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llava_onevision"}, "model_type must be llavaonevision1_5, got 'llava_onevision'"),
        ({"warp": 1}, r"config\.json has fields that .* does not know: warp"),
        ({"vision_config__warp": 1}, "vision_config has fields that RiceConfig .*: warp"),
        ({"text_config__warp": 1}, "text_config has fields that Qwen3Config .*: warp"),
        ({"vision_config__hidden_act": "silu"}, "hidden_act must be 'gelu', got 'silu'"),
        ({"vision_config__temporal_patch_size": 2}, "temporal_patch_size must be 1, got 2"),
        ({"vision_config__num_heads": 3}, "hidden_size must be a multiple of 4 x 3 heads, got 32"),
        ({"vision_config__text_hidden_size": 9}, "must be the decoder's hidden_size, 64, got 9"),
    ],
)
def test_configs_it_cannot_run_are_named(fields, message, edited):
    with pytest.raises(ValueError, match=message):
        make_adapter(LlavaOneVision, edited(**fields))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tap": "head"}, "tap must be one of decoder, vision, got 'head'"),
        ({"prompt": "a <|im_end|>"}, r"prompt must hold no special tokens, got '<\|'"),
        ({"size": (1, 300)}, r"aspect ratio below 200, got \(1, 300\)"),
    ],
)
def test_bad_options_are_named(options, message, path):
    with pytest.raises(ValueError, match=message):
        make_adapter(LlavaOneVision, path, **options).check_options()


def test_wrong_tokens_layers_and_missing_shards_are_named(path, edited, tmp_path):
    with pytest.raises(ValueError, match=r"does not know <\|image_pad\|> as token 7"):
        make_adapter(LlavaOneVision, edited(image_token_id=7)).load(1, CPU, torch.float32, tmp_path)
    words = {"clips": str(tmp_path), "model": str(path), "out": str(tmp_path / "s"), "layers": [4]}
    with pytest.raises(ValueError, match=r"layers must be blocks 0 \.\. 3, got \[4\]"):
        run_job(Job.from_words(words))
    copy = edited()
    last = sorted(copy.glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(ValueError, match=f"has no file {last.name}"):
        make_adapter(LlavaOneVision, copy).load(4, CPU, torch.float32, tmp_path)
