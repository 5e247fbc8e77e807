"""Vision encoders' features equal those of transformers' whole models, bit for bit, whatever their positions."""

import importlib
import json
import shutil

import pytest
import torch
import transformers
from families import CPU, aligned, assert_batch_agrees, bytes_by_depth, features, hooked, make_adapter, make_clip
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny.encoders import ENCODERS, build_encoder
from torch.nn.functional import interpolate

from spatialprobe.engine.checkpoint import Checkpoint
from spatialprobe.engine.job import Job
from spatialprobe.engine.parts.image_encoder import shuffle
from spatialprobe.engine.parts.image_processor import ImageProcessor, normalise
from spatialprobe.engine.presets import adapter_class, detect_family
from spatialprobe.engine.run import run_job

QUERY = (0, 1, 5)
FRAMES = 8  # of every clip: what the small VideoMAE takes
VIDEOS = ("vjepa2", "videomae")
NATIVE_SIZE = {"size": (56, 84)}  # a checkpoint without a size of its own must be given one
# name -> transformers' class of the whole model, its encoder, the encoder's blocks, its processor on Pillow
WHOLE = {
    "clip": ("CLIPModel", "vision_model", "encoder.layers", "clip.CLIP"),
    "clip-alone": ("CLIPVisionModel", "", "encoder.layers", "clip.CLIP"),
    "siglip": ("SiglipModel", "vision_model", "encoder.layers", "siglip.Siglip"),
    "siglip-alone": ("SiglipVisionModel", "", "encoder.layers", "siglip.Siglip"),
    "aimv2": ("Aimv2VisionModel", "", "encoder.layers", "clip.CLIP"),
    "aimv2-native": ("Aimv2VisionModel", "", "encoder.layers", "clip.CLIP"),
    "dinov2": ("Dinov2Model", "", "encoder.layer", "bit.Bit"),
    "dinov2-registers": ("Dinov2WithRegistersModel", "", "encoder.layer", "bit.Bit"),
    "dinov3": ("DINOv3ViTModel", "", "model.layer", None),
    "vjepa2": ("VJEPA2Model", "", "encoder.layer", "bit.Bit"),  # its own is torchvision's, the steps are these
    "videomae": ("VideoMAEForPreTraining", "videomae", "encoder.layer", "videomae.VideoMAE"),
}
SPECIAL = {"clip": 1, "clip-alone": 1, "dinov2": 1, "dinov2-registers": 5, "dinov3": 5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    built = {name: build_encoder(root / name, name) for name in ENCODERS if name != "siglip2"}  # it has its own file
    for name in ("clip", "siglip"):
        built[f"{name}-alone"] = build_encoder(root / f"{name}-alone", name, part="vision_model")
    assert set(built) == set(WHOLE)
    return built


def make(folder, **options):
    cls = adapter_class(detect_family(Checkpoint.open(str(folder))))
    adapter = make_adapter(cls, folder, **options)
    adapter.check_options()
    return adapter


def defaults(name: str) -> dict:
    return NATIVE_SIZE if name == "aimv2-native" else {}


def part_of(model, path: str):
    for name in filter(None, path.split(".")):
        model = getattr(model, name)
    return model


def whole_model(name: str, folder, dtype=torch.float32):
    model = getattr(transformers, WHOLE[name][0]).from_pretrained(folder, dtype=dtype)
    if name == "videomae":  # whose biases transformers 5.0 to 5.17 at least do not find under their published names
        stored = load_file(folder / "model.safetensors")
        for i, block in enumerate(model.videomae.encoder.layer):
            attention, prefix = block.attention.attention, f"videomae.encoder.layer.{i}.attention.attention"
            attention.query.bias.data = stored[f"{prefix}.q_bias"].to(dtype)
            attention.value.bias.data = stored[f"{prefix}.v_bias"].to(dtype)
            attention.key.bias = None
    return aligned(model)


def library_pixels(name: str, folder, images, size, crop: bool):  # -> float32 [S, 3, H, W]
    """What transformers' own processor makes of a list of images; squashed to `size` unless it crops."""
    if WHOLE[name][2] == "model.layer":  # DINOv3 scales, resizes and normalises on torchvision; by its definition
        x = torch.stack(
            [torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).view(*i.size[::-1], 3) for i in images]
        )
        x = x.permute(0, 3, 1, 2).contiguous() * (1 / 255)
        x = x if x.shape[2:] == size else interpolate(x, size, mode="bilinear", antialias=True)
        mean, std = ([[[v]] for v in values] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        return (x - torch.tensor(mean)) / torch.tensor(std)
    module, cls = WHOLE[name][3].split(".")
    module = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    (file,) = folder.glob("*preprocessor_config.json")
    steps = {k: v for k, v in json.loads(file.read_text()).items() if not k.endswith("_type")}
    if not crop:
        steps |= {"size": {"height": size[0], "width": size[1]}, "do_center_crop": False}
    pixels = getattr(module, f"{cls}ImageProcessorPil")(**steps)(images, return_tensors="pt")["pixel_values"]
    return pixels[0] if name == "videomae" else pixels


def reference(name: str, folder, clip, query, layers, *, dtype=torch.float32, size=None, crop=False, change=None):
    """{layer: [S, tokens, C]} of the whole model on the library's own pixels, after `change(encoder)`."""
    _, encoder, blocks, _ = WHOLE[name]
    model = whole_model(name, folder, dtype)
    encoder = part_of(model, encoder)
    if change:
        with torch.no_grad():
            change(encoder)
    frames = list(range(len(clip.frames))) if name in VIDEOS else query
    images = [Image.fromarray(clip.frames[f].permute(1, 2, 0).numpy()) for f in frames]
    x = library_pixels(name, folder, images, size, crop).to(dtype)
    more = {"interpolate_pos_encoding": True} if name.startswith(("clip", "siglip")) else {}
    blocks = part_of(getattr(encoder, "vision_model", encoder), blocks)
    assert len(blocks) == 4
    return hooked({layer: blocks[layer] for layer in layers}, lambda: encoder(x[None] if name in VIDEOS else x, **more))


def assert_equal_to_reference(
    name: str, folder, tmp_path, *, dtype=torch.float32, change=None, frames=(48, 80), **options
):
    options = defaults(name) | options
    adapter = make(folder, **options)
    adapter.load(3, CPU, dtype, tmp_path)
    clip = make_clip(FRAMES, frames)
    query = tuple(range(FRAMES)) if name in VIDEOS else QUERY
    mine = features(adapter, clip, (0, 2), query=query)
    size, crop = adapter.size, options.get("crop", False)
    theirs = reference(name, folder, clip, query, (0, 2), dtype=dtype, size=size, crop=crop, change=change)
    for layer in (0, 2):
        patches = theirs[layer] if name in VIDEOS else theirs[layer][:, SPECIAL.get(name, 0) :]
        assert torch.equal(
            mine[layer].flatten(2, 3).flatten(0, 1), patches.reshape(-1, *mine[layer].flatten(2, 3).shape[2:])
        )


# -- the whole model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WHOLE)
def test_equals_hooks_on_the_whole_model(folders, tmp_path, name, dtype):
    assert_equal_to_reference(name, folders[name], tmp_path, dtype=dtype)


@pytest.mark.parametrize(
    "name", [n for n in WHOLE if n.partition("-")[0] not in ("siglip", "dinov3") and n != "aimv2-native"]
)
def test_crop_is_the_processors_own(folders, tmp_path, name):
    assert_equal_to_reference(name, folders[name], tmp_path, crop=True)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("clip", (32, 96)),
        ("siglip", (28, 70)),
        ("aimv2-native", (28, 56)),
        ("dinov2", (70, 70)),
        ("dinov2", (42, 84)),
        ("dinov2-registers", (42, 84)),
        ("dinov3", (48, 96)),
    ],
)
def test_other_sizes_have_the_models_resampled_positions(folders, tmp_path, name, size):
    assert_equal_to_reference(name, folders[name], tmp_path, size=size, frames=(90, 51))


def test_vjepa2_of_another_size_is_the_model_made_for_it(folders, tmp_path):
    def for_96_pixels(model):
        for block in model.encoder.layer:
            block.attention.grid_size = 96 // 16

    assert_equal_to_reference("vjepa2", folders["vjepa2"], tmp_path, size=(96, 96), change=for_96_pixels)


def test_names_on_disk_with_and_without_a_prefix(folders, tmp_path):
    """The same weights alone, alone without a prefix, and within the whole model give the same features."""
    for name in ("clip", "siglip"):
        bare = shutil.copytree(folders[f"{name}-alone"], tmp_path / name)
        tensors = load_file(bare / "model.safetensors")
        assert all(stored.startswith("vision_model.") for stored in tensors)
        save_file({k.removeprefix("vision_model."): v for k, v in tensors.items()}, bare / "model.safetensors")
        seen = []
        for folder in (folders[name], folders[f"{name}-alone"], bare):
            adapter = make(folder)
            adapter.load(2, CPU, torch.float32, tmp_path)
            seen.append(features(adapter, make_clip(FRAMES), (1,), query=QUERY)[1])
        assert torch.equal(seen[0], seen[1])
        assert torch.equal(seen[0], seen[2])


def test_published_names_of_tensors(folders):
    """What the renames are for: the small checkpoints are named as the published ones, not as the library's modules."""
    for name, tensor in {
        "dinov2": "encoder.layer.3.attention.attention.query.weight",
        "dinov2-registers": "encoder.layer.3.attention.output.dense.bias",
        "dinov3": "layer.3.attention.q_proj.weight",
        "videomae": "videomae.encoder.layer.3.attention.attention.q_bias",
        "vjepa2": "encoder.layer.3.attention.query.weight",
        "aimv2": "encoder.layers.3.attention.q_proj.weight",
        "clip": "vision_model.encoder.layers.3.self_attn.q_proj.weight",
    }.items():
        assert tensor in load_file(folders[name] / "model.safetensors"), name


# -- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "vjepa2", "videomae"])
@pytest.mark.parametrize("shape", [(48, 80), (81, 47), (64, 64), (33, 200), (73, 73), (1, 1)])
@pytest.mark.parametrize("crop", [False, True])
def test_pixels_are_the_library_processors(folders, name, shape, crop):
    (file,) = folders[name].glob("*preprocessor_config.json")
    processor = ImageProcessor.from_config(json.loads(file.read_text()), str(file))
    if crop and processor.edge is None:
        assert name == "siglip"
        return
    clip = make_clip(2, shape)
    pixels = processor.pixels(clip.frames, processor.size, crop)
    assert pixels.dtype == torch.uint8
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in clip.frames]
    theirs = library_pixels(name, folders[name], images, processor.size, crop)
    assert torch.equal(normalise(pixels, processor.table()), theirs)


def test_dinov3_resizes_as_pillow_does_in_floating_point(folders, tmp_path):
    adapter = make(folders["dinov3"])
    adapter.dtype = torch.float32
    clip = make_clip(1, (90, 141))
    x = adapter.prepare(clip, adapter.plan(1, (0,)))["pixels"][0]
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        plane = Image.fromarray(clip.frames[0, c].float().div(255).numpy()).resize((64, 64), Image.BILINEAR)
        plane = torch.frombuffer(bytearray(plane.tobytes()), dtype=torch.float32).view(64, 64)
        torch.testing.assert_close(x[c], (plane - mean) / std, rtol=0, atol=1e-5)


def test_a_processor_file_of_2021_is_read():
    """CLIP's published one: numbers for squares, no word on scaling."""
    config = {"crop_size": 224, "size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True}
    config |= {"feature_extractor_type": "CLIPFeatureExtractor", "resample": 3}
    config |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.1]}
    processor = ImageProcessor.from_config(config, "file")
    assert (processor.size, processor.edge, processor.scale) == ((224, 224), 224, 1 / 255)


# -- positions --------------------------------------------------------------------------------------------------------


def table_of(name: str, encoder):
    if name.startswith("dinov2") or name == "videomae":
        return encoder.embeddings.position_embeddings[0]
    return encoder.embeddings.position_embedding.weight


def by_hand(name: str, how: str):
    """Changes a whole model as `pos_embed` says, through its table of positions or its rotation."""

    def change(encoder):
        encoder = getattr(encoder, "vision_model", encoder)
        if name == "dinov3":
            if how == "none":
                encoder.rope_embeddings.inv_freq.zero_()
            else:
                native = encoder.rope_embeddings.forward
                encoder.rope_embeddings.forward = lambda x: tuple(t[shuffle(16)] for t in native(x))
            return
        if name == "vjepa2":
            for block in encoder.encoder.layer:
                count = FRAMES // 2 * 16
                order = shuffle(count) if how == "shuffled" else torch.zeros(count, dtype=torch.int64)
                ids = (order // 16, order // 4 % 4, order % 4)
                block.attention.get_position_ids = lambda x, masks=None, ids=ids: ids
            return
        table = table_of(name, encoder)
        special = min(SPECIAL.get(name, 0), 1)
        if how == "none":
            table.zero_()
        else:
            table[special:] = table[special:].clone()[shuffle(len(table) - special)]

    return change


@pytest.mark.parametrize("how", ["none", "shuffled"])
@pytest.mark.parametrize("name", ["clip", "clip-alone", "siglip", "aimv2", "dinov3", "vjepa2", "videomae"])
def test_changed_positions_are_a_model_changed_by_hand(folders, tmp_path, name, how):
    change = by_hand(name, how)
    assert_equal_to_reference(name, folders[name], tmp_path, pos_embed=how, change=change)


@pytest.mark.parametrize("how", ["none", "shuffled"])
@pytest.mark.parametrize("name", ["dinov2", "dinov2-registers"])
def test_a_resampled_table_is_changed_after_it_was_resampled(folders, tmp_path, name, how):
    def resample_then_change(encoder):  # a table that fits is not resampled again
        table = encoder.embeddings.position_embeddings
        grid = table[:, 1:].view(1, 5, 5, -1).permute(0, 3, 1, 2)
        grid = interpolate(grid, (4, 4), mode="bicubic", antialias=name == "dinov2-registers")
        grid = grid.permute(0, 2, 3, 1).reshape(1, 16, -1)
        encoder.embeddings.position_embeddings = torch.nn.Parameter(torch.cat([table[:, :1], grid], 1))
        by_hand(name, how)(encoder)

    assert_equal_to_reference(name, folders[name], tmp_path, pos_embed=how, change=resample_then_change)


def patches_of(video: torch.Tensor, group: int, patch: int):  # [F, 3, H, W] -> [N, group, 3, patch, patch]
    x = video.unflatten(0, (-1, group)).unflatten(3, (-1, patch)).unflatten(5, (-1, patch))
    return x.permute(0, 3, 5, 1, 2, 4, 6).flatten(0, 2)


def video_of(patches: torch.Tensor, group: int, patch: int, grid: tuple[int, int, int]):
    x = patches.unflatten(0, grid).permute(0, 3, 4, 1, 5, 2, 6)
    return x.flatten(5, 6).flatten(3, 4).flatten(0, 1)


@pytest.mark.parametrize("how", ["none", "shuffled"])
@pytest.mark.parametrize("name", [n for n in WHOLE if "alone" not in n])
def test_positions_are_all_that_tells_patches_apart(folders, tmp_path, name, how):
    """Patches moved to where the shuffle has their positions from look the same to the model with its own positions.

    Without positions it does not matter where any patch lies.
    """
    folder = folders[name]
    adapters = {p: make(folder, pos_embed=p, **({"size": (56, 56)} if defaults(name) else {})) for p in ("native", how)}
    for adapter in adapters.values():
        adapter.load(4, CPU, torch.float32, tmp_path)
    side, group = adapters[how].patch * 4, 2 if name in VIDEOS else 1
    frames = 8 if name in VIDEOS else 1
    clip = make_clip(frames, adapters[how].size)
    grid = (frames // group, 4, 4)
    patches = patches_of(clip.frames[:, :, :side, :side], group, side // 4)
    order = shuffle(len(patches))
    moved = torch.empty_like(patches)
    moved[order] = patches
    other = make_clip(frames, adapters[how].size)
    other.frames[:, :, :side, :side] = video_of(moved, group, side // 4, grid)
    assert torch.equal(video_of(patches, group, side // 4, grid), clip.frames[:, :, :side, :side])

    here = features(adapters[how], clip, (3,))[3].flatten(0, 3)
    there = features(adapters["native" if how == "shuffled" else "none"], other, (3,))[3].flatten(0, 3)[order]
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)
    native = features(adapters["native"], clip, (3,))[3].flatten(0, 3)
    assert not torch.allclose(native, here, atol=0.05)


def test_the_shuffle_is_the_same_everywhere():
    assert shuffle(5).tolist() == [4, 0, 1, 3, 2]
    assert sorted(shuffle(729).tolist()) == list(range(729))


# -- rows, cells, depth -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in WHOLE if n not in VIDEOS])
def test_every_query_frame_is_a_row_and_patches_keep_their_cells(folders, tmp_path, name):
    adapter = make(folders[name], **defaults(name))
    adapter.load(1, CPU, torch.float32, tmp_path)
    query = tuple([0, *range(1, 76, 4)])
    plan = adapter.plan(81, query)
    height, width = plan.grid[1:]
    assert plan.grid == (20, 4, 6 if name == "aimv2-native" else 4)
    assert plan.rows == tuple(query.index(f) if f in query else -1 for f in range(81))
    plain, marked = make_clip(FRAMES, adapter.size), make_clip(FRAMES, adapter.size)
    cell = (slice(2 * adapter.patch, 3 * adapter.patch), slice(adapter.patch, 2 * adapter.patch))
    marked.frames[5, :, *cell] = 255 - marked.frames[5, :, *cell]
    change = features(adapter, marked, (0,), query=QUERY)[0] - features(adapter, plain, (0,), query=QUERY)[0]
    where = change.abs().amax(-1)[0]
    assert where[:2].max() == 0  # frames are seen by themselves
    assert int(where[2].argmax()) == 2 * width + 1
    assert height == 4


@pytest.mark.parametrize("name", VIDEOS)
def test_two_frames_are_a_row_and_patches_keep_their_cells(folders, tmp_path, name):
    adapter = make(folders[name])
    adapter.load(1, CPU, torch.float32, tmp_path)
    plan = adapter.plan(FRAMES, tuple(range(FRAMES)))
    assert plan.rows == (0, 0, 1, 1, 2, 2, 3, 3)
    plain, marked = make_clip(FRAMES, (64, 64)), make_clip(FRAMES, (64, 64))
    marked.frames[5, :, 16:32, 48:] = 255 - marked.frames[5, :, 16:32, 48:]
    change = features(adapter, marked, (0,))[0] - features(adapter, plain, (0,))[0]
    where = change.abs().amax(-1)[0]
    assert int(where.argmax()) == 2 * 16 + 1 * 4 + 3


def test_an_odd_last_frame_of_vjepa2_is_repeated(folders, tmp_path):
    adapter = make(folders["vjepa2"])
    adapter.load(2, CPU, torch.float32, tmp_path)
    odd = make_clip(7)
    even = make_clip(8)
    even.frames = torch.cat([odd.frames, odd.frames[-1:]])
    assert torch.equal(features(adapter, odd, (1,))[1], features(adapter, even, (1,))[1])
    assert adapter.plan(81, (0,)).rows == tuple(f // 2 for f in range(81))


@pytest.mark.parametrize("name", [n for n in WHOLE if "alone" not in n])
def test_a_batch_gives_what_single_clips_give(folders, tmp_path, name):
    adapter = make(folders[name], **defaults(name), pos_embed="shuffled")
    adapter.load(2, CPU, torch.float32, tmp_path)
    assert_batch_agrees(adapter, (0, 1), frames=FRAMES)


@pytest.mark.parametrize("name", WHOLE)
def test_only_the_wanted_blocks_are_read_and_nothing_above_them(folders, tmp_path, name):
    read = bytes_by_depth(lambda: make(folders[name], **defaults(name)), (1, 2, 4), tmp_path)
    stored = {n: t.nbytes for n, t in load_file(folders[name] / "model.safetensors").items()}
    encoder = {n: size for n, size in stored.items() if not any(p in n for p in ("decoder", "predictor", "text_model"))}
    block = sum(size for n, size in encoder.items() if ".layers.1." in n or "layer.1." in n)
    before = sum(size for n, size in encoder.items() if "embeddings" in n or "pre_layrnorm" in n)
    assert read == {depth: before + depth * block for depth in (1, 2, 4)}
    assert block > 0


# -- a whole job, and bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "siglip-alone", "dinov2", "dinov3", "vjepa2"])
def test_a_job_fills_a_store(folders, clips_path, tmp_path, name):
    words = {"clips": str(clips_path), "model": str(folders[name]), "out": str(tmp_path / "store"), "layers": [0, 2]}
    words |= {"window": 9, "query": ":" if name in VIDEOS else "0,5", "options": {"pos_embed": "shuffled"}}
    report, store = run_job(Job.from_words(words))
    assert (report.asked, report.written, report.failed) == (5, 5, 0)
    assert list(store.verify()) == []
    features_ = store.read("clip3", layer=2)
    assert features_.data.shape == (5 if name in VIDEOS else 2, 4, 4, 32)
    assert features_.rows.tolist() == ([f // 2 for f in range(9)] if name in VIDEOS else [0, *[-1] * 4, 1, -1, -1, -1])
    assert store.spec.options["pos_embed"] == "shuffled"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip", {"pos_embed": "zero"}, "pos_embed must be one of native, none, shuffled, got 'zero'"),
        ("clip", {"size": (60, 64)}, r"size must be multiples of 16 pixels, got \(60, 64\)"),
        ("clip", {"size": (32, 32), "crop": True}, r"crop must have the processor's own size of 64x64, got \(32, 32\)"),
        ("siglip", {"crop": True}, "crop is for models whose processor crops"),
        ("siglip", {"size": (60, 70)}, "size must be multiples of 14"),
        ("dinov3", {"crop": True}, "crop is for models whose processor crops"),
        ("aimv2", {"size": (28, 28)}, r"size must be the 56x56 that this AIMv2 has positions for, got \(28, 28\)"),
        ("aimv2-native", {}, "size must be given"),
        ("videomae", {"size": (32, 32)}, "size must be the 64x64 that this VideoMAE has positions for"),
        ("vjepa2", {"size": (32, 64)}, "size must be square"),
    ],
)
def test_options_that_a_model_cannot_take(folders, name, options, message):
    with pytest.raises(ValueError, match=message):
        make(folders[name], **options)


@pytest.mark.parametrize("frames", [7, 9])
def test_videomae_takes_its_own_number_of_frames(folders, frames):
    with pytest.raises(ValueError, match=rf"window must be the 8 frames of this VideoMAE, got {frames}"):
        make(folders["videomae"]).plan(frames, (0,))


@pytest.mark.parametrize("name", [n for n in WHOLE if "-" not in n])
def test_a_checkpoint_of_another_family_is_refused(folders, name):
    other = "dinov3" if name == "clip" else "clip"
    cls = adapter_class(detect_family(Checkpoint.open(str(folders[other]))))
    kind = json.loads((folders[name] / "config.json").read_text())["model_type"]
    with pytest.raises(ValueError, match=rf"says it is {kind}; {cls.__name__} runs"):
        make_adapter(cls, folders[name])


def edited(folder, to, file: str, **fields):
    shutil.copytree(folder, to)
    raw = json.loads((to / file).read_text())
    for name, value in fields.items():
        owner = raw["vision_config"] if name == "vision_gate" else raw
        owner[name] = value
    (to / file).write_text(json.dumps(raw))
    return to


@pytest.mark.parametrize(
    ("name", "file", "fields", "message"),
    [
        ("dinov2", "config.json", {"gate": 1}, "Dinov2Config of the installed transformers does not know: gate"),
        ("siglip", "config.json", {"vision_gate": 1}, "SiglipVisionConfig .* does not know: vision_gate"),
        ("dinov2", "config.json", {"use_swiglu_ffn": True}, "has gated blocks"),
        ("clip", "preprocessor_config.json", {"do_invert": True}, "fields that this reader does not know: do_invert"),
        ("clip", "preprocessor_config.json", {"do_resize": False}, "wanted do_resize to be true, got False"),
        ("clip", "preprocessor_config.json", {"size": {"longest_edge": 9}}, "wanted a size of height and width"),
        ("clip", "preprocessor_config.json", {"size": 32}, "wanted a shortest edge of at least the crop's 64, got 32"),
        ("dinov3", "preprocessor_config.json", {"resample": 3}, "wanted a bilinear processor, got BICUBIC"),
    ],
)
def test_files_that_would_make_other_features(folders, tmp_path, name, file, fields, message):
    with pytest.raises(ValueError, match=message):
        make(edited(folders[name], tmp_path / "model", file, **fields))


def test_a_missing_file_or_block_is_named(folders, tmp_path):
    for name in ("clip", "dinov2"):
        folder = shutil.copytree(folders[name], tmp_path / name)
        tensors = load_file(folder / "model.safetensors")
        gone = next(n for n in tensors if "layers.2." in n or ("layer.2." in n and "text" not in n))
        save_file({n: t for n, t in tensors.items() if n != gone}, folder / "model.safetensors")
        make(folder).load(2, CPU, torch.float32, tmp_path)
        with pytest.raises(ValueError, match=rf"lacks 1 of the .* first {gone.replace('.', '[.]')}"):
            make(folder).load(3, CPU, torch.float32, tmp_path)
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="no safetensors weights"):
            make(folder).load(1, CPU, torch.float32, tmp_path)


def test_a_layer_beyond_the_stack(folders, clips_path, tmp_path):
    words = {"clips": str(clips_path), "model": str(folders["clip"]), "out": str(tmp_path / "store"), "layers": [4]}
    with pytest.raises(ValueError, match=r"layers must be blocks 0 \.\. 3, got \[4\]"):
        run_job(Job.from_words(words | {"window": 9, "query": "0"}))
