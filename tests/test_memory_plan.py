"""Memory counted on the meta device is what a real pass allocates, and what it is made of adds up."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from allocated import Allocated
from safetensors.torch import load_file
from tiny.cosmos import build_cosmos
from tiny.encoders import build_encoder
from tiny.gemma3 import build_gemma3
from tiny.glm4v import build_glm4v
from tiny.hunyuan_video import build_hunyuan_video
from tiny.internvl import build_internvl
from tiny.llava_onevision import build_llava_onevision
from tiny.ltx import build_ltx
from tiny.mochi import build_mochi
from tiny.open_sora import build_open_sora
from tiny.qwen2_5_vl import build_qwen2_5_vl
from tiny.qwen3_5 import build_qwen3_5
from tiny.qwen3_vl_moe import build_qwen3_vl_moe
from torch.nn.attention import SDPBackend, sdpa_kernel

from spatialprobe.engine.adapter import plan_clip
from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.demo.tiny.cogvideox import build_aether, build_cogvideox
from spatialprobe.engine.demo.tiny.qwen3_vl import build_qwen3_vl
from spatialprobe.engine.demo.tiny.wan import build_wan_experts, build_wan_i2v, build_wan_t2v, build_wan_ti2v
from spatialprobe.engine.device.blocks import set_up_blocks
from spatialprobe.engine.device.live_bytes import META, LiveBytes
from spatialprobe.engine.device.memory_plan import MemoryPlan, modules_of, plan_memory, run_once, shapes_of
from spatialprobe.engine.device.tap import Taps
from spatialprobe.engine.job import Job
from spatialprobe.engine.parts.text_encoder import encoder_bytes
from spatialprobe.engine.resolve import resolve
from spatialprobe.engine.types import COMPUTE_DTYPES

BUILD = {
    "wan": build_wan_t2v,
    "wan_i2v": build_wan_i2v,
    "wan_ti2v": build_wan_ti2v,
    "wan_experts": build_wan_experts,
    "cogvideox": build_cogvideox,
    "aether": build_aether,
    "open_sora": build_open_sora,
    "hunyuan_video": build_hunyuan_video,
    "ltx": build_ltx,
    "mochi": build_mochi,
    "cosmos": build_cosmos,
    "qwen3_vl": build_qwen3_vl,
    "qwen3_vl_moe": build_qwen3_vl_moe,
    "qwen2_5_vl": build_qwen2_5_vl,
    "qwen3_5": build_qwen3_5,
    "glm4v": build_glm4v,
    "gemma3": build_gemma3,
    "internvl": build_internvl,
    "internvl_original": partial(build_internvl, layout="original"),
    "llava_onevision": build_llava_onevision,
}
ENCODERS = ("clip", "siglip", "siglip2", "aimv2", "dinov2", "dinov3", "vjepa2", "videomae")
BUILD |= {name: partial(build_encoder, name=name) for name in ENCODERS}
VGM = {"steps": [749, 300], "options": {"size": "64x96"}}
VLM = {"options": {"size": "112x168"}}
WORDS = dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "qwen3_5", "glm4v", "llava_onevision"), VLM) | {
    "wan": VGM,
    "wan_i2v": VGM | {"family": "wan_i2v"},
    "wan_ti2v": VGM,
    "wan_experts": VGM,
    "open_sora": VGM | {"family": "open_sora", "layers": [1, 3]},  # a block of two streams, and one of one
    "hunyuan_video": VGM,
    "ltx": VGM,
    "mochi": VGM,
    "cosmos": VGM,
    "cogvideox": {"steps": [749], "options": {"size": "64x96", "half_frames": 9}},
    "aether": {"steps": [749], "family": "aether", "options": {"size": "64x96", "half_frames": 9}},
    "videomae": {"window": 8},  # its own
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {family: build(root / family) for family, build in BUILD.items()}
    base = build_cogvideox(root / "base", "5b-i2v", num_layers=1)
    for part in ("tokenizer", "text_encoder", "vae", "scheduler"):
        (made["aether"] / part).symlink_to(base / part)
    return made


def resolved(paths, family, tmp_path, **words):
    asked = {"clips": "clips", "model": str(paths[family]), "out": str(tmp_path / "store"), "window": 9, "query": ":"}
    return resolve(Job.from_words(asked | {"layers": [0, 1]} | WORDS.get(family, {}) | words))


def planned(found, cache, batch: int = 1) -> MemoryPlan:
    return plan_memory(found.adapter, found.spec, found.depth, batch, found.spec.frames.window, cache)


def measured(found, cache, batch: int) -> MemoryPlan:
    """The same batch with real weights and pixels, as the allocator saw it."""
    adapter, spec, peaks = found.adapter, found.spec, {}
    with torch.inference_mode():
        adapter.load(found.depth, torch.device("cpu"), COMPUTE_DTYPES[spec.compute_dtype], cache)
        set_up_blocks(adapter.blocks, attention=spec.attention)
        plan, rows = plan_clip(spec.frames.window, adapter, spec)
        adapter.PREPARES_ON_DEVICE = False  # so that the pixels are real
        inputs = {name: torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else x
                  for name, x in shapes_of(adapter, plan, batch).items()}  # fmt: skip
        held = {x.untyped_storage() for m in modules_of(adapter) for x in (*m.parameters(), *m.buffers())}
        weights = sum(storage.nbytes() for storage in held)
        count = Allocated(weights + sum(x.nbytes for x in inputs.values()))
        taps = Taps(adapter.blocks, spec.layers)
        run_once(adapter, spec, plan, rows, taps, inputs, count, peaks, torch.device("cpu"))
        taps.remove()
    return MemoryPlan(weights, 0, peaks["encode"], peaks["blocks"], 0)


@pytest.mark.parametrize("family", BUILD)
@pytest.mark.parametrize(("batch", "words"), [(1, {}), (2, {"compute_dtype": "bfloat16", "store_dtype": "int8"})])
def test_the_plan_is_within_15_percent_of_a_real_pass(family, batch, words, paths, tmp_path):
    found = resolved(paths, family, tmp_path, **words)
    plan, real = planned(found, tmp_path, batch), measured(found, tmp_path / "cache", batch)
    for name in ("weights", "encode", "blocks"):
        assert getattr(plan, name) == pytest.approx(getattr(real, name), rel=0.15), name
    assert plan.encode > plan.weights > 0
    assert plan.blocks > plan.weights


@pytest.mark.parametrize("family", ["qwen3_vl", "glm4v", "gemma3", "internvl", "internvl_original", "llava_onevision"])
def test_so_it_is_of_a_vision_tower(family, paths, tmp_path):
    options = WORDS.get(family, {}).get("options", {}) | {"tap": "vision"}
    found = resolved(paths, family, tmp_path, options=options)
    plan, real = planned(found, tmp_path), measured(found, tmp_path / "cache", 1)
    assert (plan.encode, plan.blocks) == pytest.approx((real.encode, real.blocks), rel=0.15)


def test_so_it_is_of_shorter_and_longer_windows(paths, tmp_path):
    found = [resolved(paths, "vjepa2", tmp_path, window=window) for window in (1, 4, 9, 20)]
    plans = [planned(each, tmp_path) for each in found]
    real = [measured(each, tmp_path / "cache", 1) for each in found]
    assert [x.encode for x in plans] == pytest.approx([x.encode for x in real], rel=0.15)
    assert [x.blocks for x in plans] == pytest.approx([x.blocks for x in real], rel=0.15)
    assert plans[-1].blocks > 3 * plans[0].blocks


def test_attention_by_its_definition_has_all_scores_in_memory(paths, tmp_path):
    found = [
        resolved(paths, "vjepa2", tmp_path, options={"size": "160x160"}, attention=name) for name in ("math", "auto")
    ]
    math, auto = (planned(each, tmp_path) for each in found)
    tokens, heads = 5 * 10 * 10, found[0].adapter.config.num_attention_heads
    assert math.blocks - auto.blocks > heads * tokens**2 * 4  # float32
    assert math.blocks == pytest.approx(measured(found[0], tmp_path / "cache", 1).blocks, rel=0.15)


@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "ltx", "mochi", "cosmos"])
@pytest.mark.parametrize("words", [{}, {"compute_dtype": "bfloat16"}])
def test_the_prompt_of_a_plan_is_made_like_the_real_one(family, words, paths, tmp_path):
    found = resolved(paths, family, tmp_path, **words)
    made = []
    for device in (torch.device("cpu"), META):
        model = type(found.adapter)(found.adapter.checkpoint, dict(found.adapter.options))
        model.load(1, device, COMPUTE_DTYPES[found.spec.compute_dtype], tmp_path)
        made.append({name: (x.shape, x.dtype) for name, x in model.text.items()})
    assert made[0] == made[1] != {}


def test_the_prompt_of_open_sora_is_made_like_the_real_one(paths, tmp_path):
    found = resolved(paths, "open_sora", tmp_path, compute_dtype="bfloat16")
    made = []
    for device in (torch.device("cpu"), META):
        model = type(found.adapter)(found.adapter.checkpoint, dict(found.adapter.options))
        model.load(1, device, torch.bfloat16, tmp_path)
        made.append([(x.shape, x.dtype) for x in (model.text, model.pooled)])
    assert made[0] == made[1]


def test_more_clips_deeper_layers_and_larger_frames_need_more(paths, tmp_path):
    def peak(batch=1, **words):
        found = resolved(paths, "wan", tmp_path, **words)
        return plan_memory(found.adapter, found.spec, found.depth, batch, 9, tmp_path)

    one = peak()
    assert peak(batch=4).blocks > one.blocks
    assert peak(layers=[3]).weights > one.weights
    assert peak(options={"size": "128x192"}).encode > 3 * (one.encode - one.weights)
    whole, tiled = (peak(options={"size": "320x320", "vae_tiling": tiled}) for tiled in (False, True))
    assert tiled.encode < whole.encode  # tiles are 256 pixels wide


@pytest.mark.parametrize("family", ["hunyuan_video", "ltx", "mochi", "cosmos"])
def test_a_tiled_vae_needs_less(family, paths, tmp_path):
    """Of frames that are more than one tile: tiles are up to 512 pixels wide."""

    def encode(tiled: bool) -> int:
        found = resolved(paths, family, tmp_path, options={"size": "128x1024", "vae_tiling": tiled})
        return plan_memory(found.adapter, found.spec, found.depth, 1, 9, tmp_path).encode

    assert encode(True) < 0.9 * encode(False)


def test_linear_layers_in_fp8_take_half(paths, tmp_path):
    found = resolved(paths, "wan", tmp_path, compute_dtype="bfloat16")
    full, fp8 = (
        plan_memory(found.adapter, replace(found.spec, precision=name), found.depth, 1, 9, tmp_path)
        for name in ("full", "fp8")
    )
    (_, transformer) = found.adapter.skeleton(found.depth)
    linears = [m for m in transformer.blocks.modules() if isinstance(m, torch.nn.Linear)]
    saved = sum(m.weight.numel() - 4 * m.out_features for m in linears)  # a byte of each two, less a float32 a row
    assert full.weights - fp8.weights == saved > 0
    assert fp8.blocks - fp8.weights > full.blocks - full.weights  # rounding an input wants it in float32


def test_the_text_encoder_counts_until_its_prompt_is_kept(paths, tmp_path):
    found = resolved(paths, "wan", tmp_path)
    before = plan_memory(found.adapter, found.spec, found.depth, 1, 9, tmp_path)
    assert before.prompt > 0
    resolved(paths, "wan", tmp_path).adapter.load(2, torch.device("cpu"), torch.float32, tmp_path)
    assert plan_memory(found.adapter, found.spec, found.depth, 1, 9, tmp_path).prompt == 0


def test_text_encoders_that_run_one_after_the_other_need_what_the_larger_does(paths, tmp_path):
    found = resolved(paths, "open_sora", tmp_path)
    sizes = [
        sum(x.nbytes for x in load_file(paths["open_sora"] / name / "model.safetensors").values())
        for name in ("google/t5-v1_1-xxl", "openai/clip-vit-large-patch14")
    ]
    assert planned(found, tmp_path).prompt == max(sizes) > min(sizes)
    found.adapter.load(1, torch.device("cpu"), torch.float32, tmp_path)
    assert planned(found, tmp_path).prompt == 0


def test_the_text_part_of_a_whole_clip_is_weighed(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
    held = []
    for folder, config in (("text", sizes), ("", {"model_type": "clip", "hidden_size": 999, "text_config": sizes})):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        held.append(encoder_bytes(Checkpoint.open(str(tmp_path)), {folder: "CLIPTextModel"}, torch.float32))
    assert held[0] == held[1] > 0


@pytest.mark.parametrize("family", ["wan", "cogvideox", "hunyuan_video", "ltx", "mochi", "cosmos"])
def test_text_encoders_weigh_what_their_files_hold(family, paths, tmp_path):
    found = resolved(paths, family, tmp_path)
    files = list(paths[family].glob("text_encoder*/*.safetensors"))
    held = sum(x.nbytes for file in files for x in load_file(file).values())
    assert found.adapter.text_encoder_bytes(tmp_path, torch.float32) == held > 0
    assert found.adapter.text_encoder_bytes(tmp_path, torch.bfloat16) == held // 2


def test_live_bytes_are_those_of_storages_that_are_there():
    with LiveBytes() as count:
        x = torch.zeros(1000, dtype=torch.float32, device=META)
        view = x.view(10, 100)[2:]
        assert count.live == 4000
        y = view + 1
        assert count.live == 4000 + 3200
        z = torch.cat([y, y])
        del x, view, y
        assert (count.live, count.peak) == (6400, 4000 + 3200 + 6400)
        z.add_(1)
        assert count.live == 6400


def test_what_composite_operations_make_on_the_way_is_counted():
    """`group_norm` copies an input that is not contiguous, an `einsum` may too."""
    with torch.inference_mode(), LiveBytes() as count:
        x = torch.empty(1, 4, 30, 20, device=META)
        nbytes = 4 * x.numel()
        y = torch.nn.functional.group_norm(x.transpose(2, 3), 2)
        assert count.peak == 3 * nbytes + 2 * 2 * 4  # x, its copy, y, and mean and rstd of two groups
        assert count.live == 2 * nbytes
        assert y.shape == (1, 4, 20, 30)


def test_attention_is_one_kernel_but_for_its_mask():
    with torch.inference_mode(), LiveBytes() as count:
        q = torch.empty(2, 3, 50, 8, device=META, dtype=torch.bfloat16)
        value = torch.empty(2, 3, 50, 16, device=META, dtype=torch.bfloat16)
        mask = torch.empty(2, 1, 50, 50, device=META, dtype=torch.bool)
        before, scores = count.live, 2 * 3 * 50 * 50 * 2
        for mask_bytes, given in ((0, {}), (2 * 50 * 50 * 2, {"attn_mask": mask}), (0, {"is_causal": True})):
            count.peak = count.live
            out = torch.nn.functional.scaled_dot_product_attention(q, q, value, **given)
            assert out.shape == value.shape
            assert count.peak - before == out.numel() * 2 + 2 * 3 * 50 * 4 + mask_bytes
            del out
        assert count.live == before
        count.peak = count.live
        with sdpa_kernel(SDPBackend.MATH):
            torch.nn.functional.scaled_dot_product_attention(q, q, value)
        assert count.peak - before > scores


def test_data_stays_real_beside_weights_without_memory():
    with LiveBytes():
        ids, table = torch.tensor([1, 2, 2]), torch.empty(9, 4, device=META)
        mask = (ids == 2).to(META)
        assert mask.tolist() == [False, True, True]
        found = torch.nn.functional.embedding(ids, table)
        assert found.is_meta
        assert found[mask].shape == (2, 4)


def test_a_plan_says_its_parts():
    plan = MemoryPlan(weights=2 * 10**9, prompt=11 * 10**9, encode=8 * 10**9, blocks=5 * 10**9, workspace=0)
    assert plan.peak == 11 * 10**9
    assert str(plan) == "peak 11.00 GB (weights 2.00 GB, encode 8.00 GB, blocks 5.00 GB, text encoder alone 11.00 GB)"
