"""The other side of the tests of Qwen-VL and its kin: transformers' whole model, its processor and a chat template."""

from collections.abc import Sequence
from pathlib import Path

import torch
from families import CPU, aligned, features, hooked, make_adapter, make_clip
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer

from spatialprobe.engine.adapter import Adapter
from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.types import Clip

QUERY = (0, 1, 5)


def library_inputs(
    adapter: Adapter, path: Path, clip: Clip, size: tuple[int, int], budget: tuple[int, int] | None
) -> dict[str, Tensor]:
    """What transformers' processor and the checkpoint's own chat template make of the frames QUERY."""
    frames = [clip.frames[f].permute(1, 2, 0).numpy() for f in QUERY]
    images = [Image.fromarray(frame).resize(size[::-1], Image.BICUBIC) for frame in frames]
    limits = {} if budget is None else {"size": dict(zip(("shortest_edge", "longest_edge"), budget, strict=True))}
    pixels = type(adapter.processor).from_pretrained(path)(images=images, return_tensors="pt", **limits)
    content = [{"type": "text", "text": "The following images are consecutive frames from a video.\n"}]
    for i in range(len(QUERY)):
        content += [{"type": "text", "text": f"Frame{i + 1}: "}, {"type": "image"}, {"type": "text", "text": "\n"}]
    content.append({"type": "text", "text": "Describe this video."})
    tokenizer, files = AutoTokenizer.from_pretrained(path), Checkpoint.open(str(path))
    template = files.json("chat_template.json")["chat_template"] if files.has("chat_template.json") else None
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    token = tokenizer.convert_ids_to_tokens(adapter.config.image_token_id)
    for grid in pixels["image_grid_thw"].tolist():
        text = text.replace(token, "<placeholder>" * (grid[0] * grid[1] * grid[2] // 4), 1)
    ids = tokenizer(text.replace("<placeholder>", token), return_tensors="pt")["input_ids"]
    is_image = (ids == adapter.config.image_token_id).int()
    return {"input_ids": ids, "mm_token_type_ids": is_image, **pixels}


def raster(
    patches: Tensor, grid: tuple[int, int, int], windows: int | None = None
) -> Tensor:  # [T*H*W, C] -> [T, H, W, C]
    """Patches that come in cells of 2 x 2, and these in windows of `windows` x `windows` cells, in rows again."""
    frames, height, width = grid
    side = windows or max(height, width)
    order = [
        (2 * i + a, 2 * j + b)
        for top in range(0, height // 2, side)
        for left in range(0, width // 2, side)
        for i in range(top, min(top + side, height // 2))
        for j in range(left, min(left + side, width // 2))
        for a in (0, 1)
        for b in (0, 1)
    ]
    out = torch.empty(frames, height, width, patches.shape[-1], dtype=patches.dtype)
    for place, (i, j) in enumerate(order):
        out[:, i, j] = patches.unflatten(0, (frames, -1))[:, place]
    return out


def assert_both_taps_equal_the_whole_model(
    cls: type[Adapter],
    model_cls: type[nn.Module],
    path: Path,
    cache: Path,
    dtype: torch.dtype,
    size: tuple[int, int],
    budget: tuple[int, int] | None,  # of a processor's call; None for its own
    layers: Sequence[int],  # of the decoder
    vision_layers: Sequence[int],
    windows: int | None = None,
) -> None:
    """Bit for bit, with no block loaded beyond the last of `layers`."""
    sample, mine = make_clip(), {}
    for tap, wanted in (("decoder", layers), ("vision", vision_layers)):
        adapter = make_adapter(cls, path, size=size, tap=tap)
        adapter.load(max(wanted) + 1, CPU, dtype, cache)
        assert max(wanted) + 1 < adapter.num_layers
        mine[tap] = features(adapter, sample, wanted, query=QUERY)
    grid = adapter.plan(9, QUERY).grid
    inputs = library_inputs(adapter, path, sample, size, budget)
    model = aligned(model_cls.from_pretrained(path, dtype=dtype))
    tower, decoder = model.model.visual.blocks, model.model.language_model.layers
    blocks = {("decoder", i): decoder[i] for i in layers} | {("vision", i): tower[i] for i in vision_layers}
    seen = hooked(blocks, lambda: model(**inputs, use_cache=False))
    is_image = inputs["mm_token_type_ids"].bool()
    for layer in layers:
        assert torch.equal(mine["decoder"][layer].flatten(0, 3), seen["decoder", layer][is_image]), f"decoder {layer}"
    for layer in vision_layers:
        assert torch.equal(mine["vision"][layer][0], raster(seen["vision", layer], grid, windows)), f"vision {layer}"


def assert_marked_patch_is_at_its_cell(
    cls: type[Adapter],
    path: Path,
    cache: Path,
    tap: str,
    size: tuple[int, int],
    grid: tuple[int, int],
    clips: int = 1,  # over which changes are summed, for blocks that make much of small ones
) -> None:
    """For some cells of the grid: the pixels of frame 1 there change its features there the most.

    In the decoder, which is causal, they change nothing in the frame before; in the tower, nothing in any other frame.
    """
    adapter = make_adapter(cls, path, size=size, tap=tap)
    adapter.load(1, CPU, torch.float32, cache)
    plan = adapter.plan(9, QUERY)
    assert plan.grid == (3, *grid)
    assert plan.rows == (0, 1, -1, -1, -1, 2, -1, -1, -1)
    before = [features(adapter, make_clip(size=size, seed=seed), [0], query=QUERY)[0][0] for seed in range(clips)]
    height, width = size[0] // grid[0], size[1] // grid[1]
    for i, j in {(0, 0), (0, grid[1] - 1), (grid[0] - 1, 0), (grid[0] // 2, grid[1] // 3), (grid[0] - 1, grid[1] - 2)}:
        change = torch.zeros(3, *grid)
        for seed in range(clips):
            marked = make_clip(size=size, seed=seed)
            marked.frames[1, :, i * height : (i + 1) * height, j * width : (j + 1) * width] = 255
            change += (features(adapter, marked, [0], query=QUERY)[0][0] - before[seed]).norm(dim=-1)
        assert change[0].max() == 0
        assert tap == "decoder" or change[2].max() == 0
        assert divmod(int(change[1].argmax()), grid[1]) == (i, j)
