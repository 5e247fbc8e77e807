"""The small checkpoints load with the genuine classes, are the same for the same seed, and have telling features."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from spatialprobe.engine.demo.run import TINY
from spatialprobe.engine.demo.tiny.qwen3_vl import build_qwen3_vl
from spatialprobe.engine.demo.tiny.wan import build_wan_t2v


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensors_on_disk(folder):
    """{name: dtype} over the shards, read through the index, and the number of shards."""
    (index,) = folder.glob("*.safetensors.index.json")
    found = {}
    shards = json.loads(index.read_text())["weight_map"]
    for shard in set(shards.values()):
        with safe_open(folder / shard, "pt") as opened:
            found |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
    assert set(found) == set(shards)
    return found, len(set(shards.values()))


def colours(rows: int, columns: int, seed: int) -> Tensor:  # [rows, columns, 3] in -1..1
    return torch.rand(rows, columns, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def enlarged(patches: Tensor, size: int) -> Tensor:  # [rows, columns, 3] -> [3, rows * size, columns * size]
    return patches.permute(2, 0, 1).repeat_interleave(size, 1).repeat_interleave(size, 2)


def readable_share(features: Tensor, targets: Tensor) -> float:
    """R2 on the last quarter of the tokens of a ridge regression fitted on the others; [N, C] and [N, 3]."""
    features = torch.cat([(features - features.mean(0)) / features.std(), torch.ones(len(features), 1)], 1)
    known = 3 * len(features) // 4
    x, y = features[:known], targets[:known]
    weights = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ y)
    error = features[known:] @ weights - targets[known:]
    return 1 - float(error.square().sum() / (targets[known:] - targets[known:].mean(0)).square().sum())


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def block_outputs(blocks, call):
    outputs = []
    hooks = [block.register_forward_hook(lambda module, args, output: outputs.append(output)) for block in blocks]
    with torch.no_grad():
        result = call()
    for hook in hooks:
        hook.remove()
    return outputs, result


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: build(root / name) for name, (build, _) in TINY.items()}


@pytest.fixture(scope="module")
def wan(folders):
    from diffusers import WanPipeline

    return WanPipeline.from_pretrained(folders["wan-t2v"], local_files_only=True)


@pytest.fixture(scope="module")
def qwen(folders):
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen3VLForConditionalGeneration

    folder = folders["qwen3-vl"]
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder)


@pytest.mark.parametrize("name", TINY)
def test_seed_decides_every_byte_and_nothing_else_is_drawn(folders, tmp_path, name):
    before = torch.random.get_rng_state()
    same = files(TINY[name][0](tmp_path / "same", seed=0))
    other = files(TINY[name][0](tmp_path / "other", seed=1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same == files(folders[name])
    assert set(same) == set(other)
    differing = {file for file in same if same[file] != other[file]}
    assert differing == {file for file in same if file.endswith(".safetensors")}
    assert sum(map(len, same.values())) < 4 * 2**20


def test_import_does_not_load_the_model_libraries():
    code = "import sys, spatialprobe.engine.demo.tiny.wan as _\n"
    code += "print({'diffusers', 'transformers'}.intersection(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize("name", TINY)
def test_refuses_a_folder_in_use(folders, name):
    before = files(folders[name])
    with pytest.raises(ValueError, match="wanted a new or empty folder"):
        TINY[name][0](folders[name], seed=1)
    assert files(folders[name]) == before


def test_interrupted_build_leaves_no_checkpoint(tmp_path, monkeypatch):
    from diffusers import WanTransformer3DModel

    monkeypatch.setattr(WanTransformer3DModel, "save_pretrained", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_wan_t2v(tmp_path / "wan")
    assert not (tmp_path / "wan").exists()
    monkeypatch.undo()
    assert (build_wan_t2v(tmp_path / "wan") / "model_index.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["wan"]


def test_wan_layout_on_disk(folders):
    folder = folders["wan-t2v"]
    parts = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    assert {p.name for p in folder.iterdir()} == parts
    found, shards = tensors_on_disk(folder / "transformer")
    assert shards >= 3
    assert set(found.values()) == {"F32"}
    assert {name.split(".")[1] for name in found if name.startswith("blocks.")} == {"0", "1", "2", "3"}
    assert {"patch_embedding.weight", "blocks.3.attn1.to_q.weight", "blocks.0.scale_shift_table"} < set(found)


def test_wan_schedule_is_the_published_one(wan):
    wan.scheduler.set_timesteps(1000)
    timestep = wan.scheduler.timesteps[749]
    assert timestep == 502
    clean, noise = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    noisy = wan.scheduler.add_noise(clean, noise, timestep[None])
    torch.testing.assert_close(noisy, torch.tensor([0.4977, 0.5023]), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def wan_clips(wan):
    """16 still clips of 2 x 3 colour patches of 32 pixels: normalised latents, and the colour at each token."""
    patches = torch.stack([colours(2, 3, seed) for seed in range(16)])
    videos = torch.stack([enlarged(p, 32) for p in patches])[:, :, None].expand(16, 3, 5, 64, 96)
    mean, std = (torch.tensor(wan.vae.config[key]).reshape(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    with torch.no_grad():
        latents = (wan.vae.encode(videos).latent_dist.mean - mean) / std
    assert latents.shape == (16, 16, 2, 8, 12)
    return latents, patches.repeat_interleave(2, 1).repeat_interleave(2, 2).reshape(16, 1, 24, 3).repeat(1, 2, 1, 1)


def wan_features(wan, latents, step):  # -> [layers, clips, 2 rows, 24 tokens, C]
    prompt, _ = wan.encode_prompt("", do_classifier_free_guidance=False, max_sequence_length=226)
    assert prompt.shape == (1, 226, 32)
    wan.scheduler.set_timesteps(1000)
    timestep = wan.scheduler.timesteps[step].expand(len(latents))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    noisy = wan.scheduler.add_noise(latents, noise, timestep)
    prompt = prompt.expand(len(latents), -1, -1)
    outputs, _ = block_outputs(wan.transformer.blocks, lambda: wan.transformer(noisy, timestep, prompt))
    return torch.stack(outputs).reshape(4, len(latents), 2, 24, 48)


def test_wan_latents_have_the_published_scale(wan_clips):
    latents, _ = wan_clips
    std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    assert mean.abs().max() < 1
    assert 0.6 < std.min() < std.max() < 1.6


def test_wan_features_tell_clips_steps_layers_and_places_apart(wan, wan_clips):
    latents, targets = wan_clips
    features = wan_features(wan, latents, 749)
    assert features.flatten(2, 3).std(dim=2).min() > 0.1  # every channel varies over the tokens of every clip
    assert features.abs().max() < 100
    assert distance(features[:, 1], features[:, 0]) > 0.3
    assert distance(wan_features(wan, latents[:1], 500), features[:, :1]) > 0.3
    assert min(distance(features[i + 1], features[i]) for i in range(3)) > 0.1
    shares = [readable_share(layer.reshape(-1, 48), targets.reshape(-1, 3)) for layer in features]
    assert min(shares) > 0.3, shares


def test_qwen_layout_on_disk(folders):
    folder = folders["qwen3-vl"]
    names = {p.name for p in folder.iterdir()}
    published = {"config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json"}
    assert published | {"tokenizer.json", "tokenizer_config.json"} < names
    assert "processor_config.json" not in names
    found, shards = tensors_on_disk(folder)
    assert shards >= 3
    assert set(found.values()) == {"BF16"}
    layers = {name.split(".")[3] for name in found if name.startswith("model.language_model.layers.")}
    assert layers == {"0", "1", "2", "3", "4"}
    assert "lm_head.weight" in found
    assert "model.visual.deepstack_merger_list.2.linear_fc2.weight" in found
    assert {name.split(".")[1] for name in found if name != "lm_head.weight"} == {"language_model", "visual"}


def test_qwen_tokenizer_and_chat_template(folders, qwen):
    model, tokenizer, processor = qwen
    config = model.config
    ids = [config.vision_start_token_id, config.image_token_id, config.video_token_id, config.vision_end_token_id]
    assert tokenizer("<|vision_start|><|image_pad|><|video_pad|><|vision_end|>").input_ids == ids
    text = "Describe this video. Größe 3 ≥ 2\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert max(tokenizer(text).input_ids) < len(tokenizer) <= config.text_config.vocab_size
    template = json.loads((folders["qwen3-vl"] / "chat_template.json").read_text())["chat_template"]
    messages = [{"role": "user", "content": [{"type": "text", "text": "Frame1:"}, {"type": "image"}]}]
    written = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    expected = "<|im_start|>user\nFrame1:<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    assert written == expected
    assert (processor.patch_size, processor.merge_size, processor.size.longest_edge) == (16, 2, 16777216)


def qwen_inputs(qwen, seeds):
    """Two images of 8 x 10 patches of 32 pixels (a token each), and the patches' colours."""
    model, tokenizer, processor = qwen
    patches = [colours(8, 10, seed) for seed in seeds]
    pixels = [((enlarged(p, 32) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for p in patches]
    images = processor(images=[Image.fromarray(p) for p in pixels], return_tensors="pt")
    assert images["image_grid_thw"].tolist() == [[1, 16, 20]] * len(seeds)
    text = "".join(f"Frame{i + 1}: <|vision_start|>{'<|image_pad|>' * 80}<|vision_end|>" for i in range(len(seeds)))
    ids = tokenizer(text, return_tensors="pt").input_ids
    is_image = ids == model.config.image_token_id
    inputs = {"input_ids": ids, "mm_token_type_ids": is_image.int(), **images}
    return inputs, is_image, torch.cat([p.reshape(-1, 3) for p in patches])


def qwen_features(qwen, seeds):
    inputs, is_image, targets = qwen_inputs(qwen, seeds)
    model = qwen[0].model
    outputs, result = block_outputs(
        model.language_model.layers, lambda: model(**inputs, use_cache=False, output_hidden_states=True)
    )
    return torch.cat(outputs), is_image[0], targets, result, inputs


def test_qwen_image_tokens_take_the_place_of_the_placeholders(qwen):
    _, is_image, _, result, inputs = qwen_features(qwen, (1, 2))
    model = qwen[0].model
    with torch.no_grad():
        vision = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
        words = model.get_input_embeddings()(inputs["input_ids"])[0]
    torch.testing.assert_close(result.hidden_states[0][0, is_image], torch.cat(vision.pooler_output), atol=0, rtol=0)
    torch.testing.assert_close(result.hidden_states[0][0, ~is_image], words[~is_image], atol=0, rtol=0)
    tokens = [len(x) if isinstance(x, torch.Tensor) else sum(map(len, x)) for x in vision.deepstack_features]
    assert tokens == [160, 160, 160]  # three blocks, two images of 80; transformers 5.17 does not split them by image
    short = {key: inputs[key][:, :-10] for key in ("input_ids", "mm_token_type_ids")}
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**inputs | short)


def test_qwen_features_tell_clips_layers_and_places_apart(qwen):
    features, is_image, targets, *_ = qwen_features(qwen, (1, 2))
    other = qwen_features(qwen, (1, 3))[0]
    first = torch.arange(len(is_image)) < 80
    torch.testing.assert_close(other[:, first], features[:, first], atol=1e-5, rtol=1e-5)  # attention is causal
    features, other = features[:, is_image], other[:, is_image]
    assert features.shape == (5, 160, 64)
    assert features.std(dim=1).min() > 0.1
    assert features.abs().max() < 100
    assert distance(other[:, 80:], features[:, 80:]) > 0.3
    assert min(distance(features[i + 1], features[i]) for i in range(4)) > 0.1
    shares = [readable_share(layer, targets) for layer in features]
    assert min(shares) > 0.5, shares


def test_sizes_are_arguments(tmp_path):
    from transformers import Qwen3VLForConditionalGeneration

    folder = build_wan_t2v(tmp_path / "wan", num_layers=2, heads=4, head_dim=64, shard_size="1MB")
    found, shards = tensors_on_disk(folder / "transformer")
    assert shards > 4
    assert not any(name.startswith("blocks.2.") for name in found)
    assert json.loads((folder / "transformer" / "config.json").read_text())["ffn_dim"] == 1024
    folder = build_qwen3_vl(
        tmp_path / "qwen", num_layers=3, heads=2, head_dim=128, tie_word_embeddings=True, dtype=torch.float32
    )
    assert "lm_head.weight" not in tensors_on_disk(folder)[0]
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.config.text_config.rope_parameters["mrope_section"] == [24, 20, 20]
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    with pytest.raises(ValueError, match="vision_layers of at least 3"):
        build_qwen3_vl(tmp_path / "none", vision_layers=2)
