"""The loader against the stores it reads: the right rows of the right clips, each once, in one order."""

import json
import logging
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from spatialprobe.engine.reading import ranges
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import STORE_DTYPES, FeatureSpec, FrameSelection, tensor_name
from spatialprobe.kernels.pool_features import finish
from spatialprobe.probes.labels import ScanNetLabels
from spatialprobe.probes.loading.batches import Batch, FeatureKey
from spatialprobe.probes.loading.loader import FeatureLoader
from spatialprobe.probes.loading.sampling import FrameSampling, generator

FRAMES, VIEWS, K = 13, 3, 4
NEAR = FrameSampling(context=FRAMES, gap=4, query="0,1::4")  # 0, 1, 5, 9
GRID = (2, 3, 8)  # H, W, C


def spec(**fields) -> FeatureSpec:
    defaults = {"family": "wan", "weights": "content:0", "layers": (3,), "frames": FrameSelection(window=FRAMES)}
    return FeatureSpec(**defaults | {"pool": GRID[:2]} | fields)


def causal(frames: int) -> list[int]:
    return [(f + 3) // 4 for f in range(frames)]


def write(store: FeatureStore, clip_id: str, rows: list[int], grid=GRID) -> None:
    """Features that differ in every row, channel, layer and clip."""
    rng, tensors, length = generator("features", clip_id, store.spec.dtype), {}, max(rows) + 1
    for key in store.spec.tensors():
        x = torch.from_numpy(rng.standard_normal((length, *grid)).astype(np.float32))
        tensors |= finish(x, STORE_DTYPES[store.spec.dtype]).named(tensor_name(*key))
    provenance = {"grid": [length, *grid[:2]], "rows_kept": list(range(length)), "padded": 0}
    store.write(clip_id, tensors, torch.tensor(rows), provenance)


def make_store(root: Path, ids, *, rows=None, **fields) -> FeatureStore:
    store = FeatureStore.create(root, spec(**fields))
    for clip_id in ids:
        write(store, clip_id, causal(FRAMES) if rows is None else rows)
    return FeatureStore.open(root)


def make_labels(root: Path, ids) -> ScanNetLabels:
    """Tag counts and instance masks that tell clip and frame: count k of frame f is clip number, f and k in digits."""
    root.mkdir()
    (root / f"class_names_{K}.json").write_text(json.dumps({"names": list("abcd")}))
    for clip_id in ids:
        folder = root / clip_id
        folder.mkdir(parents=True)
        number = int(clip_id.split("clip")[1])
        counts = 10_000 * number + 100 * np.arange(FRAMES)[:, None] + np.arange(K)
        np.save(folder / f"tag_pixel_counts_{K}.npy", counts.astype(np.int32))
        masks = np.broadcast_to(counts[:, :1, None], (FRAMES, 6, 5)) % 65536
        np.save(folder / "instance_masks.npy", masks.astype(np.uint16))
        window = {"gt_num_frames": torch.tensor(FRAMES, dtype=torch.int32)}
        save_file(window, folder / "metadata.sft")
    return ScanNetLabels(root, classes=K)


IDS = [f"train/clip{i}" for i in range(11)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "store", IDS).root


@pytest.fixture(autouse=True)
def small_head(monkeypatch):
    """These files are small; so that features are read from the disk, and not with the header."""
    monkeypatch.setattr(ranges, "HEAD", 512)


@pytest.fixture
def store(made, tmp_path) -> FeatureStore:
    return FeatureStore.open(shutil.copytree(made, tmp_path / "store"))


@pytest.fixture
def labels(tmp_path) -> ScanNetLabels:
    return make_labels(tmp_path / "labels", IDS)


def load(sources, labels=None, **options) -> FeatureLoader:
    return FeatureLoader(sources, labels, **{"views": VIEWS, "sampling": NEAR, "batch": 4} | options)


def seen(batches) -> list[tuple]:
    """What tells two passes apart: ids, frames and every bit of the features."""
    return [
        (b.ids, b.frames.tolist(), {key: {n: bits(x) for n, x in vars(f).items()} for key, f in b.features.items()})
        for b in batches
    ]


def bits(x) -> bytes | None:
    return None if x is None else x.contiguous().view(torch.uint8).numpy().tobytes()


def ids_of(batches) -> list[str]:
    return [clip_id for batch in batches for clip_id in batch.ids]


def must_be_of(batch: Batch, key: FeatureKey, store: FeatureStore) -> None:
    """Features of a batch are, bit for bit, what the store's own whole-file reader has at the batch's frames."""
    for place, clip_id in enumerate(batch.ids):
        raw = store.read_raw(clip_id, *key[1:])
        rows = [int(raw["rows"][f]) for f in batch.frames[place].tolist()]
        for name, x in vars(batch.features[key]).items():
            assert bits(x if x is None else x[place]) == (bits(raw[name][rows]) if name in raw else None)


# -- what is in a batch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORE_DTYPES)
def test_batches_hold_the_rows_and_labels_of_the_sampled_frames(tmp_path, labels, dtype):
    store = make_store(tmp_path / "s", IDS, dtype=dtype, layers=(3, 5), steps=(200, 749))
    loader = load(store, labels, wanted=("tag_pixel_counts", "instance_masks"))
    batches = list(loader)
    assert [len(b.ids) for b in batches] == [4, 4, 3]
    assert sorted(ids_of(batches)) == sorted(IDS)
    assert loader.keys == [FeatureKey(0, layer, step) for layer in (3, 5) for step in (200, 749)]
    for batch in batches:
        assert list(batch.features) == loader.keys
        for key in loader.keys:
            assert batch.features[key].data.shape == (len(batch.ids), VIEWS, *GRID)
            must_be_of(batch, key, store)
        for place, clip_id in enumerate(batch.ids):
            frames, number = batch.frames[place], int(clip_id.split("clip")[1])
            expected = 10_000 * number + 100 * frames[:, None] + torch.arange(K)
            assert torch.equal(batch.labels["tag_pixel_counts"][place].long(), expected)
            masks = batch.labels["instance_masks"][place]
            assert masks.dtype == torch.int32
            assert torch.equal(masks[:, 5, 4].long(), expected[:, 0] % 65536)


def test_frames_are_those_of_the_sampling_rule_and_change_with_the_epoch_alone(store):
    loader = load(store, seed=7)
    for epoch in (0, 1):
        for batch in loader:
            for place, clip_id in enumerate(batch.ids):
                rng = generator("frames", 7, epoch, clip_id)
                assert batch.frames[place].tolist() == NEAR.sample(VIEWS, FRAMES, rng)


def test_validation_has_one_order_and_one_choice_of_frames(store):
    passes = [seen(load(store, train=False, seed=seed)) for seed in (0, 1)]
    loader = load(store, train=False)
    assert passes[0] == passes[1] == seen(loader) == seen(loader)
    assert ids_of(load(store, train=False)) == store.ids()


def test_some_layers_of_several_stores_side_by_side(tmp_path):
    a = make_store(tmp_path / "a", IDS, layers=(1, 2))
    sparse = [0 if f == 0 else -1 if f % 4 != 1 else (f + 3) // 4 for f in range(FRAMES)]  # as of a model of images
    b = make_store(tmp_path / "b", IDS, family="qwen3_vl", rows=sparse, dtype="int8", steps=(7, 9))
    opened: list[str] = []
    for source in (a, b):
        real = source.open_clip
        source.open_clip = lambda clip_id, *, real=real, **k: opened.append(clip_id) or real(clip_id, **k)
    keys = [FeatureKey(1, 3, 9), FeatureKey(0, 2), FeatureKey(1, 3, 7)]
    batches = list(load([a, b], keys=keys))
    for batch in batches:
        assert set(batch.features) == set(keys)
        for key in keys:
            must_be_of(batch, key, [a, b][key.source])
    assert sorted(opened) == sorted(IDS * 2)  # each file once


def test_shards_of_a_store_are_one_source(tmp_path):
    parts = [make_store(tmp_path / name, ids) for name, ids in (("a", IDS[:4]), ("b", IDS[4:]))]
    batches = list(load([parts]))
    assert sorted(ids_of(batches)) == sorted(IDS)
    whole = make_store(tmp_path / "whole", IDS)
    assert seen(batches) == seen(load(whole))


def test_rows_that_two_views_share(tmp_path):
    """One row for the whole clip: every view is that row."""
    store = make_store(tmp_path / "s", IDS[:2], rows=[0] * FRAMES)
    (batch,) = load(store)
    must_be_of(batch, FeatureKey(0, 3), store)
    (kept,) = load(store, keep_bytes=1 << 20)
    assert seen([kept]) == seen([batch])


def test_views_are_sampled_where_there_are_labels(store, labels):
    """Features of 13 frames, labels of the first 9: no view is frame 9."""
    for clip_id in IDS:
        window = {"gt_num_frames": torch.tensor(9, dtype=torch.int32)}
        save_file(window, labels.root / clip_id / "metadata.sft")
    loader = load(store, labels, wanted=("tag_pixel_counts",))
    assert {tuple(f) for _ in range(3) for b in loader for f in b.frames.tolist()} == {(0, 1, 5)}


# -- order ------------------------------------------------------------------------------------------------------------


def test_order_depends_on_seed_and_epoch_alone(store):
    reference = load(store, seed=1)
    first, second = seen(reference), seen(reference)
    assert first != second
    assert sorted(i for b in first for i in b[0]) == sorted(i for b in second for i in b[0]) == sorted(IDS)
    for options in ({"threads": 1}, {"threads": 9}, {"read_ahead_bytes": 0}, {"keep_bytes": 1 << 30}):
        loader = load(store, seed=1, **options)
        assert [seen(loader), seen(loader)] == [first, second]
    loader = load(store, seed=1)
    loader.set_epoch(1)
    assert seen(loader) == second
    assert seen(load(store, seed=2)) != first


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_the_clips_without_overlap_and_drop_none(store, world_size):
    shards = [ids_of(load(store, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert sorted(i for shard in shards for i in shard) == sorted(IDS)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_batches_of_equal_number_are_one_larger_batch_shared_out(store):
    alone = [set(b.ids) for b in load(store, batch=6)]
    ranks = [[b.ids for b in load(store, batch=3, rank=rank, world_size=2)] for rank in (0, 1)]
    assert [set(a) | set(b) for a, b in zip(*ranks, strict=True)] == alone


@pytest.mark.parametrize(("last", "clips"), [("keep", 11), ("pad", 16), ("drop", 8)])
def test_last_batches_may_be_filled_or_dropped(store, last, clips):
    ranks = [[b.ids for b in load(store, rank=rank, world_size=2, last=last)] for rank in (0, 1)]
    everything = [i for rank in ranks for batch in rank for i in batch]
    assert len(everything) == clips
    assert [len(rank) for rank in ranks] == [len(load(store, rank=r, world_size=2, last=last)) for r in (0, 1)]
    if last != "keep":
        assert {len(batch) for rank in ranks for batch in rank} == {4}
    assert len(set(everything)) == min(clips, 11)


def test_every_epoch_drops_other_clips(store):
    loader = load(store, last="drop")
    dropped = [set(IDS) - set(ids_of(loader)) for _ in range(6)]
    assert {len(clips) for clips in dropped} == {3}
    assert len(set.union(*dropped)) > 3


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_a_pass_goes_on_at_the_exact_next_batch(store, stop):
    whole = load(store, seed=3)
    list(whole)
    second, third = seen(whole), seen(whole)

    loader = load(store, seed=3)
    list(loader)
    batches = iter(loader)
    begun = [next(batches) for _ in range(stop)]
    state = json.loads(json.dumps(loader.state_dict()))
    batches.close()

    resumed = load(store, seed=3, threads=1)
    resumed.load_state_dict(state)
    resumed.set_epoch(1)  # as training loops do
    assert seen(begun) + seen(resumed) == second
    assert seen(resumed) == third


def test_an_epoch_that_is_left_early_begins_again(store):
    loader = load(store)
    first = next(iter(loader))
    assert seen(loader)[0] == seen([first])[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"batch": 2}, "batch was 4, is 2"),
        ({"ids": IDS[:9]}, "ids was"),
        ({"views": 2}, "views was 3, is 2"),
        ({"world_size": 2}, "world_size was 1, is 2"),
        ({"train": False}, "train was True, is False"),
    ],
)
def test_a_state_of_other_batches_is_refused(store, change, message):
    state = load(store).state_dict()
    with pytest.raises(ValueError, match=f"the state is of another loader: .*{message}"):
        load(store, **change).load_state_dict(state)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_kept_clips_never_touch_the_disk_again(tmp_path, labels, store, train):
    options = {"labels": labels, "wanted": ("tag_pixel_counts", "instance_masks"), "train": train}
    plain = load(store, **options)
    expected = [(seen([b]), {n: bits(x) for n, x in b.labels.items()}) for _ in range(3) for b in plain]
    loader = load(store, **options, keep_bytes=1 << 20)
    got = [(seen([b]), {n: bits(x) for n, x in b.labels.items()}) for b in loader]
    shutil.rmtree(store.root)
    shutil.rmtree(labels.root)
    got += [(seen([b]), {n: bits(x) for n, x in b.labels.items()}) for _ in range(2) for b in loader]
    assert got == expected


def test_only_as_much_is_kept_as_the_budget_allows(store):
    row = 2 * 3 * (8 * 2 + 2 * 4)  # tokens x (float16 channels, mean and rstd)
    opened = []
    real = store.open_clip
    store.open_clip = lambda clip_id, **k: opened.append(clip_id) or real(clip_id, **k)
    loader = load(store, keep_bytes=5 * 4 * row + row, batch=1)  # 4 rows see frames 0, 1, 5 and 9
    list(loader)
    assert len(opened) == 11
    expected = seen(load(FeatureStore.open(store.root), batch=1, ids=store.ids()))
    del opened[:]
    loader.set_epoch(0)
    assert seen(loader) == expected
    assert len(opened) == 6


def test_reading_ahead_is_bounded_in_bytes(store):
    """Of a consumer that takes one batch and waits, no more is read than the budget and the batch in its hands."""
    one = 4 * VIEWS * 2 * 3 * (8 * 2 + 2 * 4)
    for budget, most in ((0, 1), (one, 1), (2 * one + 1, 2)):
        read, done = [], threading.Semaphore(0)
        source = FeatureStore.open(store.root)
        real = source.open_clip

        def opening(clip_id, *, real=real, read=read, done=done, **k):
            read.append(clip_id)
            done.release()
            return real(clip_id, **k)

        source.open_clip = opening
        batches = iter(load(source, read_ahead_bytes=budget))
        next(batches)
        for _ in range(min(11, 4 + 4 * most)):
            assert done.acquire(timeout=10)
        assert not done.acquire(timeout=0.2)
        assert len(read) == min(11, 4 + 4 * most)
        batches.close()


def test_threads_end_with_the_pass(store):
    before = threading.active_count()
    batches = iter(load(store, threads=3))
    next(batches)
    batches.close()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("read")]
    assert threading.active_count() <= before + 8  # the readers of the store's files are the process's


# -- in other frameworks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_data_loader_gives_the_same_batches_for_any_number_of_workers(store, workers):
    loader = load(store, seed=4)
    expected = [seen(loader), seen(loader)]
    loader = load(store, seed=4)
    wrapped = DataLoader(loader, batch_size=None, num_workers=workers)
    assert len(wrapped) == 3
    got = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        got.append(seen(wrapped))
    assert got == expected


def test_a_resumed_loader_goes_on_in_workers_too(store):
    loader = load(store, batch=2)
    expected = seen(loader)
    loader = load(store, batch=2)
    loader.load_state_dict(loader.state_dict() | {"batch": 3})
    assert seen(DataLoader(loader, batch_size=None, num_workers=2)) == expected[3:]


def test_accelerate_moves_its_batches(store):
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
    prepared = accelerator.prepare(DataLoader(load(store), batch_size=None))
    assert seen(prepared) == seen(load(store))


def test_a_loader_can_be_sent_to_another_process(store):
    loader = load(store)
    list(loader)
    assert seen(pickle.loads(pickle.dumps(loader))) == seen(loader)


def test_a_batch_moves_as_one(store):
    (batch, *_) = load(store)
    moved = batch.to("meta")
    assert moved.ids == batch.ids
    assert {x.device.type for f in moved.features.values() for x in vars(f).values() if x is not None} == {"meta"}
    assert moved.frames.device.type == "meta"


# -- bad input --------------------------------------------------------------------------------------------------------


def damage(store: FeatureStore, clip_id: str, kind: str) -> None:
    path = store.path(clip_id)
    raw = bytearray(path.read_bytes())
    if kind == "truncated":
        raw = raw[: len(raw) - 5]
    elif kind == "header":
        raw[20:40] = b"x" * 20
    elif kind == "empty":
        raw = b""
    elif kind == "data":
        raw[-200] ^= 1
    path.write_bytes(bytes(raw))
    if kind == "gone":
        path.unlink()


@pytest.mark.parametrize("kind", ["truncated", "header", "empty", "gone", "data"])
def test_a_damaged_clip_is_named_or_skipped_and_listed(store, kind, caplog):
    bad, check = IDS[6], kind == "data"
    strict, lenient = load(store, check=check), load(store, check=check, on_error="skip")
    damage(store, bad, kind)
    with pytest.raises((ValueError, FileNotFoundError), match=f"clip {bad}"):
        list(strict)
    with caplog.at_level(logging.WARNING):
        batches = list(lenient)
    assert sorted(ids_of(batches)) == sorted(set(IDS) - {bad})
    for batch in batches:
        must_be_of(batch, FeatureKey(0, 3), store)
        assert len(batch.frames) == len(batch.ids)
    assert list(lenient.skipped) == [bad]
    assert bad in lenient.skipped[bad]
    assert f"1 clips were skipped:\n{lenient.skipped[bad]}" in caplog.text


def test_a_changed_byte_is_found_on_request_only(store):
    damage(store, IDS[0], "data")
    assert sorted(ids_of(load(store))) == sorted(IDS)
    with pytest.raises(ValueError, match=f"clip {IDS[0]}: .*checksum"):
        list(load(store, check=True))


def test_a_pass_in_which_every_clip_is_skipped_is_an_error(store):
    loader = load(store, on_error="skip")
    for clip_id in IDS:
        damage(store, clip_id, "empty")
    with pytest.raises(ValueError, match="every clip was skipped, such as: clip train/clip"):
        list(loader)


def test_clips_that_are_not_everywhere(store, tmp_path):
    fewer = make_labels(tmp_path / "fewer", IDS[:9])
    with pytest.raises(
        ValueError, match=rf"2 of 11 clips are not everywhere: clip {IDS[10]} is not in labels of {fewer.root}"
    ):
        load(store, fewer, wanted=("tag_pixel_counts",))
    loader = load(store, fewer, wanted=("tag_pixel_counts",), on_error="skip")
    assert sorted(ids_of(loader)) == sorted(IDS[:9])
    assert set(loader.skipped) == set(IDS[9:])
    more = make_labels(tmp_path / "more", [*IDS, "train/clip99"])
    with pytest.raises(
        ValueError, match=rf"1 of 12 clips are not everywhere: clip train/clip99 is not in {store.root}"
    ):
        load(store, more, wanted=("tag_pixel_counts",))
    assert load(store, more, wanted=("tag_pixel_counts",), ids=IDS[:5]).ids == IDS[:5]
    other = make_store(tmp_path / "other", IDS[1:])
    with pytest.raises(ValueError, match=rf"clip {IDS[0]} is not in {other.root}"):
        load([store, other])
    with pytest.raises(ValueError, match="ids must be distinct, got train/clip1 more than once"):
        load(store, ids=[*IDS, "train/clip1"])


def test_a_frame_that_no_row_sees(tmp_path):
    rows = causal(FRAMES)
    store = make_store(tmp_path / "s", IDS[:3])
    writer = FeatureStore.create(tmp_path / "s", spec())
    rows[5] = -1
    write(writer, IDS[1], rows)
    with pytest.raises(ValueError, match=rf"clip {IDS[1]}: {store.path(IDS[1])} has no row that sees frames \[5\]"):
        list(load(store))
    loader = load(store, on_error="skip")
    assert sorted(ids_of(loader)) == [IDS[0], IDS[2]]
    assert list(loader.skipped) == [IDS[1]]


def test_clips_too_short_for_their_views(tmp_path):
    store = make_store(tmp_path / "s", IDS[:3], rows=causal(FRAMES))
    with pytest.raises(
        ValueError, match=r"clip train/clip\d: 13 frames hold 1 \.\. 4 views 4 frames apart, got 5 views"
    ):
        list(load(store, views=5))


def test_specs_that_do_not_belong_together(tmp_path):
    a, b = make_store(tmp_path / "a", IDS[:2]), make_store(tmp_path / "b", IDS[2:], seed=1)
    with pytest.raises(ValueError, match=rf"{a.root} and {b.root} hold features of two specs: seed: 0 there, 1 asked"):
        load([[a, b]])
    with pytest.raises(ValueError, match=rf"clip {IDS[0]} is in both {a.root} and {a.root}"):
        load([[a, a]])
    late = make_store(tmp_path / "late", IDS[:2], frames=FrameSelection(window=FRAMES, start=4))
    with pytest.raises(ValueError, match="must see the same frames, got start start, stride 1 of source 0, start 4"):
        load([a, late])
    labels = make_labels(tmp_path / "l", IDS[:2])
    with pytest.raises(ValueError, match=r"are of frames at start start, stride 1, features at start 4, stride 1"):
        load(late, labels, wanted=("instance_masks",))
    fixed = make_store(tmp_path / "fixed", IDS[:2], frames=FrameSelection(window=FRAMES, start=0))
    assert len(list(load([a, fixed]))) == 1  # frame 0 is the start


def test_clips_of_two_grids_cannot_share_a_batch(tmp_path):
    store = FeatureStore.create(tmp_path / "s", spec(pool=None))
    for clip_id, grid in zip(IDS, [(2, 3, 8), (3, 2, 8)], strict=False):
        write(store, clip_id, causal(FRAMES), grid)
    for options in ({}, {"on_error": "skip"}):
        with pytest.raises(
            ValueError, match=r"equal shapes, but features \(0, 3, None\) are \[3, [23], [23], 8\] of clip"
        ):
            list(load(store, **options))
    assert len(list(load(store, batch=1))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"rank": 2, "world_size": 2}, "rank must be below world_size 2, got 2"),
        ({"rank": -1}, "rank must be at least 0"),
        ({"keep_bytes": -1}, "keep_bytes must be at least 0"),
        ({"keep_on": "cuda"}, "keep_on must be cpu or the device cpu, got cuda"),
        ({"last": "some"}, "last must be one of keep, pad, drop, got 'some'"),
        ({"on_error": "ignore"}, "on_error must be one of raise, skip"),
        ({"keys": [(0, 4, None)]}, r"keys must be .* of \[\(0, 3, None\)\], got \[\(0, 4, None\)\]"),
        ({"keys": []}, r"keys must name features of every source, got none of sources \[0\]"),
        ({"wanted": ("depth",)}, "labels and the names of those wanted belong together"),
        ({"ids": []}, "no batch is left of 0 clips"),
        ({"rank": 11, "world_size": 12}, "no batch is left of 11 clips: batch 4 x 12 ranks, keep"),
        ({"ids": ["nobody"]}, "1 of 1 clips are not everywhere: clip nobody is not in"),
        ({"last": "drop", "batch": 12}, "no batch is left of 11 clips: batch 12 x 1 ranks, drop"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_meant(store, options, message):
    with pytest.raises(ValueError, match=message):
        load(store, **options)


def test_labels_that_are_not_there(store, labels):
    with pytest.raises(ValueError, match=r"labels wanted must be some of tag_pixel_counts, .*, got depth"):
        load(store, labels, wanted=("depth",))
    with pytest.raises(ValueError, match="belong together"):
        load(store, labels)
    with pytest.raises(ValueError, match="sources must be at least one store"):
        FeatureLoader([])


def test_labels_that_cannot_be_read_are_skipped_with_their_clip(store, labels):
    (labels.root / IDS[2] / "instance_masks.npy").write_bytes(b"")
    loader = load(store, labels, wanted=("instance_masks",), on_error="skip")
    batches = list(loader)
    assert sorted(ids_of(batches)) == sorted(set(IDS) - {IDS[2]})
    assert all(len(b.labels["instance_masks"]) == len(b.ids) for b in batches)
    assert f"clip {IDS[2]}: labels in" in loader.skipped[IDS[2]]
    with pytest.raises(ValueError, match=f"clip {IDS[2]}: labels in"):
        list(load(store, labels, wanted=("instance_masks",)))


def test_keys_are_distinct_and_sources_are_stores(store):
    with pytest.raises(ValueError, match=r"keys must be distinct, got \[\(0, 3, None\), \(0, 3, None\)\]"):
        load(store, keys=[(0, 3, None), (0, 3, None)])
    with pytest.raises(ValueError, match=r"sources must be stores, got the path .*: open_source opens it"):
        load(store.root)


def test_a_state_beyond_the_epoch_is_refused(store):
    loader = load(store)
    with pytest.raises(ValueError, match=r"the state's batch must be 0 .. 3 of an epoch from 0 on"):
        loader.load_state_dict(loader.state_dict() | {"batch": 99})


def test_sources_of_one_name_are_told_apart(store, tmp_path):
    """A clip that only one of two sources has is missed, though both have the same root."""

    class Fewer:
        root, spec, spec_hash = store.root, store.spec, store.spec_hash
        open_clip = store.open_clip

        def ids(self):
            return store.ids()[1:]

    for sources in ([store, Fewer()], [Fewer(), store]):
        with pytest.raises(ValueError, match="1 of 11 clips are not everywhere: clip train/clip0 is not in"):
            load(sources)
