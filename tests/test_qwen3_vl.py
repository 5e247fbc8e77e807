"""Qwen3-VL's features equal transformers' hidden_states of the whole model, bit for bit."""

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from spatialprobe.engine.adapters.qwen3_vl import Qwen3VL
from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.image_grid import fit_pixels
from spatialprobe.engine.tap import Taps
from spatialprobe.engine.types import Clip

SIZE = (70, 100)
CPU = torch.device("cpu")
QUERY = (0, 1, 5)


def adapter(path, **options) -> Qwen3VL:
    return Qwen3VL(Checkpoint.open(str(path)), {**Qwen3VL.OPTIONS, "size": SIZE, **options})


def clip(seed=1) -> Clip:
    pixels = torch.randint(0, 256, (9, 3, 48, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Clip("a", pixels, torch.arange(9))


def features(qwen, clips, layers, query=QUERY) -> dict[int, torch.Tensor]:
    plan = qwen.plan(9, query)
    out = {}
    taps = Taps(qwen.blocks, layers)
    seen = [Clip(c.id, c.frames[list(query)], c.index[list(query)], window=9) for c in clips]
    prepared = [qwen.prepare(c, plan) for c in seen]
    with torch.inference_mode():
        state = qwen.encode({k: torch.stack([p[k] for p in prepared]) for k in prepared[0]}, plan)
        with taps.into(lambda layer, x: out.__setitem__(layer, qwen.grid(x, state, plan).clone())):
            qwen.forward(state, None, None)
    taps.remove()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_hidden_states_of_the_whole_model(qwen_path, tmp_path, dtype):
    qwen = adapter(qwen_path)
    qwen.load(4, CPU, dtype, tmp_path)
    sample = clip()
    mine = features(qwen, [sample], (0, 1, 2, 3))

    model = Qwen3VLForConditionalGeneration.from_pretrained(qwen_path, dtype=dtype).eval()
    for p in model.parameters():
        p.data = p.data.clone()
    processor = Qwen2VLImageProcessorPil.from_pretrained(qwen_path)
    tokenizer = AutoTokenizer.from_pretrained(qwen_path)
    images = [
        Image.fromarray(sample.frames[f].permute(1, 2, 0).numpy()).resize(SIZE[::-1], Image.BICUBIC) for f in QUERY
    ]
    budget = qwen.video_config["size"]
    share = 4  # 3 images, rounded up to whole temporal patches of 2
    size = {"shortest_edge": max(32, budget["shortest_edge"] // share), "longest_edge": budget["longest_edge"] // share}
    pixels = processor(images=images, size=size, return_tensors="pt")
    content = [{"type": "text", "text": "The following images are consecutive frames from a video.\n"}]
    for i in range(len(QUERY)):
        content += [{"type": "text", "text": f"Frame{i + 1}: "}, {"type": "image"}, {"type": "text", "text": "\n"}]
    content.append({"type": "text", "text": "Describe this video."})
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=Checkpoint.open(str(qwen_path)).json("chat_template.json")["chat_template"],
        tokenize=False,
        add_generation_prompt=True,
    )
    for grid in pixels["image_grid_thw"].tolist():
        tokens = grid[0] * grid[1] * grid[2] // 4
        text = text.replace("<|image_pad|>", "<|placeholder|>" * tokens, 1)
    ids = tokenizer(text.replace("<|placeholder|>", "<|image_pad|>"), return_tensors="pt")
    is_image = ids["input_ids"] == model.config.image_token_id
    with torch.inference_mode():
        out = model.model(**ids, **pixels, mm_token_type_ids=is_image.int(), output_hidden_states=True, use_cache=False)
    assert len(out.hidden_states) == 6  # embeddings and all 5 blocks
    for layer in (0, 1, 2, 3):  # 0 to 2: before the model adds DeepStack features, as in hidden_states
        assert torch.equal(mine[layer].flatten(0, 3), out.hidden_states[layer + 1][is_image])


def test_only_the_wanted_blocks_are_loaded_and_no_language_head(qwen_path, tmp_path):
    read = {}
    for depth in (1, 2, 5):
        qwen = adapter(qwen_path)
        qwen.load(depth, CPU, torch.float32, tmp_path)
        read[depth] = qwen.checkpoint.bytes_read
    assert len(qwen.blocks) == 5
    assert not any("lm_head" in name for name, _ in qwen.model.named_modules())
    assert read[5] - read[1] == 4 * (read[2] - read[1]) > 0


def test_rows_are_the_query_frames_and_cells_keep_their_place(qwen_path, tmp_path):
    qwen = adapter(qwen_path, size=(128, 192))
    plan = qwen.plan(9, QUERY)
    assert plan.grid == (3, 4, 6)
    assert plan.rows == (0, 1, -1, -1, -1, 2, -1, -1, -1)
    qwen.load(1, CPU, torch.float32, tmp_path)
    plain, marked = clip(), clip()
    marked.frames[5, :, 36:, :13] = 255 - marked.frames[5, :, 36:, :13]  # bottom left of frame 5
    change = features(qwen, [marked], (0,))[0] - features(qwen, [plain], (0,))[0]
    where = change.abs().amax(-1)[0]
    assert where[:2].max() == 0  # causal: earlier images do not see frame 5
    cell = int(where[2].argmax())
    assert (cell // 6, cell % 6) == (3, 0)


def test_a_batch_gives_what_single_clips_give(qwen_path, tmp_path):
    qwen = adapter(qwen_path)
    qwen.load(3, CPU, torch.float32, tmp_path)
    clips = [clip(seed) for seed in (1, 2, 3)]
    together = features(qwen, clips, (2,))[2]
    for b, one in enumerate(clips):
        torch.testing.assert_close(together[b : b + 1], features(qwen, [one], (2,))[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(540, 960), (1080, 1920), (33, 47), (720, 405), (64, 64)])
@pytest.mark.parametrize("images", [1, 3, 20])
def test_input_size_is_the_processors(qwen_path, size, images):
    qwen = adapter(qwen_path)
    least, most = qwen.pixel_budget(images)
    processor = Qwen2VLImageProcessorPil.from_pretrained(qwen_path)
    grid = processor(
        images=[Image.new("RGB", size[::-1])],
        size={"shortest_edge": least, "longest_edge": most},
        return_tensors="pt",
    )["image_grid_thw"][0]
    assert fit_pixels(*size, 32, least, most) == (int(grid[1]) * 16, int(grid[2]) * 16)


def test_published_size_gives_the_published_grid(qwen_path):
    assert adapter(qwen_path, size=(540, 960)).plan(81, tuple([0, *range(1, 76, 4)])).grid == (20, 17, 30)
