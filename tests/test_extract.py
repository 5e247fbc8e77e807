"""The pipeline around a model that costs nothing: bounded queues, flat memory, failures that cost only their clip."""

import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from spatialprobe.engine import extract as pipeline
from spatialprobe.engine.adapter import Adapter
from spatialprobe.engine.extract import extract
from spatialprobe.engine.files.durable import StoreFull
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import Clip, ClipError, ClipRef, FeatureSpec, FrameSelection, Plan, ShortClip

TOKENS = (2, 4, 4)


class Ramp(Adapter):
    """A model of two blocks whose features are the clip's mean brightness plus the layer, in every token."""

    OPTIONS, PARITY, LIBRARIES = {}, {}, ()
    AUTO_BATCH = 4
    num_layers, num_steps, channels = 2, 0, 8
    full: RuntimeError = torch.OutOfMemoryError("out of memory: tried to allocate more than there is")

    def __init__(self, most_in_memory: int = 1000):
        self.device, self.most_in_memory, self.batches = torch.device("cpu"), most_in_memory, []
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])

    def plan(self, frames, query):
        return Plan(frames, tuple(range(frames)), (8, 8), TOKENS, tuple(min(f, 1) for f in range(frames)))

    def load(self, depth, device, dtype, cache): ...

    def check_options(self): ...

    def skeleton(self, depth):
        return [self.blocks]

    def prepare(self, clip, plan):
        return {"brightness": clip.frames.float().mean()[None]}

    def encode(self, inputs, plan):
        self.batches.append(len(inputs["brightness"]))
        if len(inputs["brightness"]) > self.most_in_memory:
            raise self.full
        return inputs["brightness"]

    def forward(self, state, step, noise):
        x = state[:, None].expand(-1, 32, 8)
        for i, block in enumerate(self.blocks):
            x = block(x + i)

    def grid(self, tokens, state, plan):
        return tokens.unflatten(1, plan.grid)


def spec(**fields) -> FeatureSpec:
    defaults = {"family": "ramp", "weights": "content:0", "layers": (0, 1), "frames": FrameSelection(window=2)}
    return FeatureSpec(**defaults | {"compute_dtype": "float32", "device": "cpu"} | fields)


@pytest.fixture
def clips(monkeypatch):
    """Clips by id: brightness is the number in the id; "bad" fails to decode, "short" is short of its window."""

    def load(ref: ClipRef, selection: FrameSelection, shown=None) -> Clip:
        if "bad" in ref.id:
            raise ClipError(f"{ref.source} is broken")
        if "short" in ref.id:
            raise ShortClip("window of 2 frames, got 1")
        value = int("".join(c for c in ref.id if c.isdigit()))
        return Clip(ref.id, torch.full((2, 3, 8, 8), value % 256, dtype=torch.uint8), torch.arange(2))

    monkeypatch.setattr(pipeline, "load_clip", load)


def refs(*ids: str) -> list[ClipRef]:
    return [ClipRef(i, f"/data/{i}") for i in ids]


def test_values_arrive_at_their_clip_and_layer(clips, tmp_path):
    store = FeatureStore.create(tmp_path / "s", spec())
    report = extract(refs("a1", "a2", "a3"), Ramp(), store, batch_size=2)
    assert report.written == 3
    for n in (1, 2, 3):
        for layer in (0, 1):
            assert store.read(f"a{n}", layer).data.unique().tolist() == [n + layer]


def test_bad_clips_cost_only_themselves(clips, tmp_path):
    outcomes = []
    store = FeatureStore.create(tmp_path / "s", spec())
    report = extract(
        refs("a1", "bad1", "a2", "bad2"), Ramp(), store, batch_size=2, progress=lambda *o: outcomes.append(o)
    )
    assert (report.written, report.failed) == (2, 2)
    assert store.ids() == ["a1", "a2"]
    assert store.failures()["bad1"] == {"id": "bad1", "stage": "decode", "reason": "/data/bad1 is broken"}
    assert report.failures == {f"bad{i}": f"decode: /data/bad{i} is broken" for i in (1, 2)}
    assert sorted(o[:2] for o in outcomes) == [
        ("a1", "written"), ("a2", "written"), ("bad1", "failed"), ("bad2", "failed"),
    ]  # fmt: skip


@pytest.mark.parametrize(("short", "skipped", "failed"), [("skip", 1, 0), ("error", 0, 1)])
def test_short_clips_are_skipped_or_fail_as_asked(clips, tmp_path, short, skipped, failed):
    store = FeatureStore.create(tmp_path / "s", spec(frames=FrameSelection(window=2, short=short)))
    report = extract(refs("a1", "short1"), Ramp(), store)
    assert (report.written, report.skipped, report.failed) == (1, skipped, failed)


def test_overflow_and_non_finite_features_fail_their_clip_and_name_the_layer(clips, tmp_path):
    class Wild(Ramp):
        def forward(self, state, step, noise):
            x = state[:, None].expand(-1, 32, 8)
            self.blocks[0](x)
            self.blocks[1](torch.where(x == 7, 1e5, torch.where(x == 8, float("nan"), x)))

    store = FeatureStore.create(tmp_path / "s", spec())
    report = extract(refs("a1", "a7", "a8"), Wild(), store, batch_size=3)
    assert store.ids() == ["a1"]
    assert report.failures == {
        "a7": "features: features of layer1 overflow float16: largest magnitude 100000; try bfloat16",
        "a8": "features: features of layer1 are not finite",
    }
    wide = FeatureStore.create(tmp_path / "wide", spec(dtype="bfloat16"))
    assert extract(refs("a7"), Wild(), wide).written == 1


CUDA_LIBRARIES = [
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
]


@pytest.mark.parametrize("full", [Ramp.full, *CUDA_LIBRARIES], ids=["allocator", "cublas", "cudnn"])
def test_auto_batch_halves_when_memory_runs_out_and_loses_no_clip(full, clips, tmp_path):
    ids = [f"a{n}" for n in range(9)]
    adapter, store = Ramp(most_in_memory=1), FeatureStore.create(tmp_path / "s", spec())
    adapter.full = full
    report = extract(refs(*ids), adapter, store, batch_size="auto")
    assert (report.written, report.batch_size) == (9, 1)
    assert adapter.batches[:3] == [4, 2, 1]
    assert [store.read(i, 0).data.unique().item() for i in ids] == list(range(9))


def test_an_error_of_another_kind_halves_nothing(clips, tmp_path):
    adapter, store = Ramp(most_in_memory=3), FeatureStore.create(tmp_path / "s", spec())
    adapter.full = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        extract(refs(*(f"a{n}" for n in range(9))), adapter, store, batch_size="auto")
    assert adapter.batches == [4]


@pytest.mark.parametrize(
    ("batch", "most", "message"),
    [
        (4, 2, "batch size 4: use a smaller"),
        (1, 0, "batch size 1: one clip alone"),
        ("auto", 0, "batch size 1: one clip alone"),
    ],
)
def test_memory_that_cannot_do_ends_the_run_with_the_numbers(clips, tmp_path, batch, most, message):
    store = FeatureStore.create(tmp_path / "s", spec())
    ids = [f"a{n}" for n in range(4)]
    report = extract(refs(*ids), Ramp(most_in_memory=most), store, batch_size=batch)
    assert message in report.stopped
    assert store.failures() == {}  # running again with another batch size takes these clips


def test_queues_are_bounded_when_writing_is_slow(clips, tmp_path, monkeypatch):
    """A slow writer stalls the loaders: decoded clips never pile up."""
    alive, most, lock = set(), [0], threading.Lock()
    load, store_write = pipeline.load_clip, FeatureStore.write

    def loading(ref, selection, shown):
        with lock:
            alive.add(ref.id)
            most[0] = max(most[0], len(alive))
        return load(ref, selection, shown)

    def slow_write(self, clip_id, *args):
        time.sleep(0.01)
        size = store_write(self, clip_id, *args)
        with lock:
            alive.discard(clip_id)
        return size

    monkeypatch.setattr(pipeline, "load_clip", loading)
    monkeypatch.setattr(FeatureStore, "write", slow_write)
    store = FeatureStore.create(tmp_path / "s", spec())
    report = extract(refs(*(f"a{n}" for n in range(60))), Ramp(), store, batch_size=2, loaders=2, writers=1)
    assert report.written == 60
    assert most[0] <= 2 + 2 + 2 + 2 * 1 + 2  # ahead (loaders + batch), a batch on the device, writes under way


def test_memory_is_flat_over_hundreds_of_clips(clips, tmp_path):
    """500 clips of 0.5 MB each: the second half adds less than a tenth of what passed through."""

    class Wide(Ramp):
        channels = 4096

        def forward(self, state, step, noise):
            x = state[:, None].expand(-1, 32, 4096).clone()
            for block in self.blocks:
                x = block(x)

    resident = []

    def watch(*outcome):
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)

    store = FeatureStore.create(tmp_path / "s", spec())
    report = extract(refs(*(f"a{n}" for n in range(500))), Wide(), store, batch_size=4, progress=watch)
    assert report.written == 500
    passed = sum(store.path(i).stat().st_size for i in store.ids()) / 2
    assert passed > 100e6
    assert max(resident[250:]) - max(resident[:250]) < passed / 10


def test_an_interrupt_keeps_what_was_done_and_reports_it(clips, tmp_path):
    settled = []

    def stop_after_three(clip_id, outcome, reason):
        settled.append(clip_id)
        if len(settled) == 3:
            raise KeyboardInterrupt

    store = FeatureStore.create(tmp_path / "s", spec())
    ids = [f"a{n}" for n in range(50)]
    report = extract(refs(*ids), Ramp(), store, progress=stop_after_three)
    assert report.interrupted
    done = len(store)
    assert 3 <= done == report.written < 50
    assert store.verify() == []
    rest = extract(refs(*ids), Ramp(), store)
    assert (rest.present, rest.written, len(store)) == (done, 50 - done, 50)


@pytest.mark.parametrize("stored", [False, True])
def test_an_interrupt_in_the_middle_of_a_write_miscounts_nothing(clips, tmp_path, monkeypatch, stored):
    """Short writes are done by the thread that an interrupt strikes, before or after the file has its name."""
    store_write, struck, outcomes = FeatureStore.write, [], []

    def strike(self, clip_id, *args):
        if clip_id >= "a20" and not struck and threading.current_thread() is threading.main_thread():
            struck.append(clip_id)
            if stored:
                store_write(self, clip_id, *args)
            raise KeyboardInterrupt
        return store_write(self, clip_id, *args)

    monkeypatch.setattr(pipeline, "SHORT_WRITE", 1.0)
    monkeypatch.setattr(FeatureStore, "write", strike)
    store = FeatureStore.create(tmp_path / "s", spec())
    report = extract(refs(*(f"a{n}" for n in range(10, 60))), Ramp(), store, progress=lambda *o: outcomes.append(o))
    assert struck
    assert report.interrupted
    assert struck[0] in store
    assert len(store) == report.written < 50
    assert sorted(outcomes) == [(clip_id, "written", "") for clip_id in store.ids()]


@pytest.mark.parametrize("ended_by", ["an interrupt", "a full disk"])
def test_what_is_under_way_when_a_run_ends_is_settled_and_counted(clips, tmp_path, monkeypatch, ended_by):
    """Nothing of the first batch is written before the second one comes; of that batch one clip finds no room, and one
    may not be written."""
    store_write, second, outcomes, threads = FeatureStore.write, threading.Event(), [], threading.active_count()

    class Ending(Ramp):
        def encode(self, inputs, plan):
            if self.batches:
                second.set()
                if ended_by == "an interrupt":
                    raise KeyboardInterrupt
            return super().encode(inputs, plan)

    def write(self, clip_id, *args):
        assert second.wait(60)
        if clip_id == "a10":
            raise StoreFull(28, "No space left on device", str(self.path(clip_id)))
        if clip_id == "a13":
            raise PermissionError(13, "Permission denied", str(self.path(clip_id)))
        if clip_id == "a15":
            raise ClipError("its features are odd")
        return store_write(self, clip_id, *args)

    monkeypatch.setattr(FeatureStore, "write", write)
    store, ids = FeatureStore.create(tmp_path / "s", spec()), [f"a{n}" for n in range(10, 26)]
    report = extract(refs(*ids), Ending(), store, batch_size=8, progress=lambda *o: outcomes.append(o))
    assert report.interrupted == (ended_by == "an interrupt")
    full = f"[Errno 28] No space left on device: '{store.path('a10')}'; "
    denied = f"[Errno 13] Permission denied: '{store.path('a13')}'"
    assert report.stopped == ("" if report.interrupted else full) + denied
    given = ids[:8] if report.interrupted else ids  # to the writers
    assert outcomes == [
        (clip_id, *(("failed", "its features are odd") if clip_id == "a15" else ("written", "")))
        for clip_id in given
        if clip_id not in ("a10", "a13")
    ]
    assert store.ids() == [clip_id for clip_id, outcome, _ in outcomes if outcome == "written"]
    assert (report.written, report.failed) == (len(given) - 3, 1)
    assert report.failures == {"a15": "features: its features are odd"}
    assert list(store.failures()) == ["a15"]
    assert threading.active_count() <= threads
    monkeypatch.setattr(FeatureStore, "write", store_write)
    assert extract(refs(*ids), Ramp(), store).written == 19 - len(given)
    assert store.ids() == ids


@pytest.mark.parametrize("batch", [1, 8])
def test_a_disk_without_room_for_a_line_in_the_log_ends_the_run_with_a_report(clips, tmp_path, batch):
    def progress(*outcome):
        raise StoreFull(28, "No space left on device", "log.jsonl")

    store = FeatureStore.create(tmp_path / "s", spec())
    report = extract(refs(*(f"a{n}" for n in range(40))), Ramp(), store, batch_size=batch, progress=progress)
    assert report.stopped == "[Errno 28] No space left on device: 'log.jsonl'"
    assert 0 < report.written == len(store) < 40


def test_decode_compute_and_write_overlap(clips, tmp_path, monkeypatch):
    """40 ms each of decoding, computing and writing per clip: far less than their sum, near the slowest alone."""
    load, store_write = pipeline.load_clip, FeatureStore.write

    class Slow(Ramp):
        def forward(self, state, step, noise):
            time.sleep(0.04)
            super().forward(state, step, noise)

    monkeypatch.setattr(pipeline, "load_clip", lambda *args: time.sleep(0.04) or load(*args))
    monkeypatch.setattr(FeatureStore, "write", lambda *args: time.sleep(0.04) or store_write(*args))
    store = FeatureStore.create(tmp_path / "s", spec())
    start = time.perf_counter()
    report = extract(refs(*(f"a{n}" for n in range(30))), Slow(), store, loaders=1, writers=1)
    assert report.written == 30
    assert time.perf_counter() - start < 0.8 * 30 * 3 * 0.04  # one after the other they take 30 * 3 * 0.04


def test_clips_of_different_lengths_share_batches_of_their_own_and_none_is_lost(clips, tmp_path, monkeypatch):
    def load(ref, selection, shown):
        frames = 2 + int(ref.id[1:]) % 7
        return Clip(ref.id, torch.full((frames, 3, 8, 8), int(ref.id[1:]), dtype=torch.uint8), torch.arange(frames))

    monkeypatch.setattr(pipeline, "load_clip", load)
    adapter = Ramp()
    store = FeatureStore.create(tmp_path / "s", spec(frames=FrameSelection()))
    report = extract(refs(*(f"a{n}" for n in range(40))), adapter, store, batch_size=4)
    assert (report.written, len(store)) == (40, 40)
    assert sum(adapter.batches) == 40  # no clip is computed twice
    for n in range(40):
        assert store.read(f"a{n}", 0).data.unique().tolist() == [n]
        assert len(store.read(f"a{n}", 0).rows) == 2 + n % 7


@pytest.mark.parametrize("ids", [1, 5])
def test_no_clip_is_encoded_twice_to_fill_a_batch(clips, tmp_path, ids):
    adapter = Ramp()
    store = FeatureStore.create(tmp_path / "s", spec())
    extract(refs(*(f"a{n}" for n in range(ids))), adapter, store, batch_size=4)
    assert sum(adapter.batches) == ids
    assert store.provenance("a0")["batch"] == min(4, ids)


def test_the_gpu_is_in_a_clips_provenance_where_there_is_one(clips, tmp_path, monkeypatch):
    class OnGpu(pipeline.HostCopies):
        def __init__(self, device):
            super().__init__(device)
            self.gpu = {"gpu": "NVIDIA H200"}

    plain, there = (FeatureStore.create(tmp_path / name, spec()) for name in ("plain", "there"))
    extract(refs("a0"), Ramp(), plain)
    monkeypatch.setattr(pipeline, "HostCopies", OnGpu)
    extract(refs("a0"), Ramp(), there)
    was, told = plain.provenance("a0"), there.provenance("a0")
    assert told.keys() - was.keys() == {"gpu"}
    assert told["gpu"] == "NVIDIA H200"


def test_a_full_disk_ends_the_run_with_a_report_of_what_was_written(clips, tmp_path, monkeypatch):
    written, store_write = [], FeatureStore.write

    def full_after_ten(self, clip_id, *args):
        if len(written) >= 10:
            raise StoreFull(28, "No space left on device", str(self.path(clip_id)))
        written.append(clip_id)
        return store_write(self, clip_id, *args)

    monkeypatch.setattr(FeatureStore, "write", full_after_ten)
    store = FeatureStore.create(tmp_path / "s", spec())
    outcomes, threads = [], threading.active_count()
    report = extract(refs(*(f"a{n}" for n in range(50))), Ramp(), store, progress=lambda *o: outcomes.append(o))
    assert "No space left" in report.stopped
    assert report.written == len(store) == len(outcomes) == 10
    assert threading.active_count() <= threads
    monkeypatch.setattr(FeatureStore, "write", store_write)
    assert extract(refs(*(f"a{n}" for n in range(50))), Ramp(), store).written == 40


def test_a_processor_that_refuses_a_clip_fails_that_clip(clips, tmp_path):
    class Picky(Ramp):
        def prepare(self, clip, plan):
            if clip.id == "a2":
                raise ValueError("absolute aspect ratio must be smaller than 200")
            return super().prepare(clip, plan)

    store = FeatureStore.create(tmp_path / "s", spec())
    report = extract(refs("a1", "a2", "a3"), Picky(), store)
    assert store.ids() == ["a1", "a3"]
    assert report.failures == {"a2": "prepare: ValueError: absolute aspect ratio must be smaller than 200"}


def test_no_hook_is_left_behind(clips, tmp_path):
    adapter = Ramp()
    extract(refs("a1"), adapter, FeatureStore.create(tmp_path / "s", spec()))
    assert not any(block._forward_hooks for block in adapter.blocks)


def test_the_first_of_several_outputs_of_a_block_is_taken(clips, tmp_path):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x + 100

    class Two(Ramp):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Pair(), Pair()])

        def forward(self, state, step, noise):
            x = state[:, None].expand(-1, 32, 8)
            for i, block in enumerate(self.blocks):
                x, _ = block(x + i)

    store = FeatureStore.create(tmp_path / "s", spec())
    extract(refs("a5"), Two(), store)
    assert store.read("a5", 1).data.unique().tolist() == [6]
