"""SigLIP 2 of any aspect ratio: equal to transformers' whole model on its own processor's patches."""

import pytest
import torch
from families import CPU, aligned, assert_batch_agrees, bytes_by_depth, features, hooked, make_adapter, make_clip
from PIL import Image
from tiny.encoders import build_encoder
from transformers import Siglip2Model
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    Siglip2ImageProcessorPil,
    get_image_size_for_max_num_patches,
)

from spatialprobe.engine.adapters.siglip2 import SigLIP2, fit_patches
from spatialprobe.engine.job import Job
from spatialprobe.engine.parts.image_encoder import shuffle
from spatialprobe.engine.run import run_job

QUERY = (0, 1, 5)
FRAME = (48, 80)  # pixels, of the clips and as option: the processor then sees the shape that the adapter plans for
GRID = (4, 7)  # of at most 28 patches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_encoder(tmp_path_factory.mktemp("siglip2") / "model", "siglip2")


def make(folder, **options):
    adapter = make_adapter(SigLIP2, folder, **{"size": FRAME, "patches": 28, **options})
    adapter.check_options()
    return adapter


def whole(folder, clip, patches: int, dtype=torch.float32, change=None):
    """Block outputs [S, patches, C] of the whole encoder, of its own processor's `patches`, the last ones padding."""
    model = aligned(Siglip2Model.from_pretrained(folder, dtype=dtype)).vision_model
    inner = getattr(model, "vision_model", model)
    if change:
        change(inner.embeddings)
    images = [Image.fromarray(clip.frames[f].permute(1, 2, 0).numpy()) for f in QUERY]
    steps = {"resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16}
    x = Siglip2ImageProcessorPil(**steps, max_num_patches=patches)(images=images, return_tensors="pt")
    assert x["spatial_shapes"].tolist() == [list(GRID)] * 3
    x["pixel_values"] = x["pixel_values"].to(dtype)
    return hooked({i: inner.encoder.layers[i] for i in (0, 2)}, lambda: model(**x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_hooks_on_the_whole_model(folder, tmp_path, dtype):
    adapter = make(folder)
    adapter.load(3, CPU, dtype, tmp_path)
    clip = make_clip(8, FRAME)
    mine = features(adapter, clip, (0, 2), query=QUERY)
    theirs = whole(folder, clip, 28, dtype)
    for layer in (0, 2):
        assert torch.equal(mine[layer][0].flatten(1, 2), theirs[layer])


def test_padding_would_change_nothing(folder, tmp_path):
    adapter = make(folder, patches=30)  # another row or column would make more than 30: two are left over
    adapter.load(3, CPU, torch.float32, tmp_path)
    clip = make_clip(8, FRAME)
    padded = whole(folder, clip, 30)[2]
    assert padded.shape[1] == 30
    mine = features(adapter, clip, (2,), query=QUERY)[2][0].flatten(1, 2)
    torch.testing.assert_close(mine, padded[:, :28], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["none", "shuffled"])
def test_changed_positions_are_a_model_changed_by_hand(folder, tmp_path, how):
    def change(embeddings):
        native = embeddings.resize_positional_embeddings

        def resize(*args, **kwargs):
            table = native(*args, **kwargs)
            return torch.zeros_like(table) if how == "none" else table[:, shuffle(28)]

        embeddings.resize_positional_embeddings = resize

    adapter = make(folder, pos_embed=how)
    adapter.load(3, CPU, torch.float32, tmp_path)
    clip = make_clip(8, FRAME)
    mine = features(adapter, clip, (2,), query=QUERY)[2][0].flatten(1, 2)
    assert torch.equal(mine, whole(folder, clip, 28, change=change)[2])
    assert not torch.allclose(mine, whole(folder, clip, 28)[2], atol=0.05)


@pytest.mark.parametrize("size", [(540, 960), (1080, 1920), (480, 640), (33, 470), (720, 405), (64, 64), (1, 1)])
@pytest.mark.parametrize("most", [1, 7, 256, 729])
def test_input_size_is_the_processors(size, most):
    assert fit_patches(*size, 16, most) == get_image_size_for_max_num_patches(*size, 16, most)


def test_rows_are_the_query_frames_and_patches_keep_their_cells(folder, tmp_path):
    adapter = make(folder)
    adapter.load(1, CPU, torch.float32, tmp_path)
    plan = adapter.plan(8, QUERY)
    assert (plan.grid, plan.rows) == ((3, *GRID), (0, 1, -1, -1, -1, 2, -1, -1))
    plain, marked = make_clip(8, adapter.size), make_clip(8, adapter.size)
    marked.frames[5, :, 32:48, 80:96] = 255 - marked.frames[5, :, 32:48, 80:96]
    change = features(adapter, marked, (0,), query=QUERY)[0] - features(adapter, plain, (0,), query=QUERY)[0]
    where = change.abs().amax(-1)[0]
    assert where[:2].max() == 0
    assert int(where[2].argmax()) == 2 * 7 + 5


def test_a_batch_gives_what_single_clips_give(folder, tmp_path):
    adapter = make(folder)
    adapter.load(2, CPU, torch.float32, tmp_path)
    assert_batch_agrees(adapter, (0, 1), query=QUERY)


def test_only_the_wanted_blocks_are_read(folder, tmp_path):
    read = bytes_by_depth(lambda: make(folder), (1, 2, 4), tmp_path)
    assert read[4] - read[1] == 3 * (read[2] - read[1]) > 0
    embeddings = 4 * 32 * (16 * 16 * 3 + 1 + 25)  # patches with a bias, and the table
    assert read[1] == embeddings + (read[2] - read[1])


def test_a_job_fills_a_store(folder, clips_path, tmp_path):
    words = {"clips": str(clips_path), "model": str(folder), "out": str(tmp_path / "store"), "layers": [1]}
    words |= {"window": 9, "query": "0,5", "options": {"patches": "12"}}
    report, store = run_job(Job.from_words(words))
    assert (report.asked, report.written) == (5, 5)
    assert list(store.verify()) == []
    assert store.read("clip3", layer=1).data.shape == (2, 3, 4, 32)  # of frames of 540 x 960


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patches": 0}, "patches must be at least 1, got 0"),
        ({"size": (0, 0)}, "size must be positive"),
        ({"crop": True}, "crop is for models whose processor crops"),
        ({"pos_embed": "2d"}, "pos_embed must be one of native, none, shuffled, got '2d'"),
    ],
)
def test_options_that_the_model_cannot_take(folder, options, message):
    with pytest.raises(ValueError, match=message):
        make(folder, **options)


def test_a_checkpoint_of_another_family_is_refused(tmp_path):
    with pytest.raises(ValueError, match="says it is siglip; SigLIP2 runs siglip2 and siglip2_vision_model"):
        make(build_encoder(tmp_path / "siglip", "siglip"))
