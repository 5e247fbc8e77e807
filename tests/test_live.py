"""Features straight from extraction: the bits a store would hold, bounded, and an end that is clean from both sides."""

import threading
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from spatialprobe.engine import extract as pipeline
from spatialprobe.engine.adapter import Adapter
from spatialprobe.engine.extract import extract
from spatialprobe.engine.job import Job
from spatialprobe.engine.live import LiveStore, live
from spatialprobe.engine.reading.rows import StoredRows
from spatialprobe.engine.resolve import resolve
from spatialprobe.engine.run import job_clips, run_job
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import COMPUTE_DTYPES, Clip, ClipError, ClipRef, FeatureSpec, FrameSelection, Plan
from spatialprobe.probes.loading.batches import FeatureKey
from spatialprobe.probes.loading.live import LiveLoader
from spatialprobe.probes.loading.sampling import FrameSampling, generator

FRAMES = 9
NEAR = FrameSampling(context=FRAMES, gap=2, query=":")


class Ramp(Adapter):
    """A model of two blocks whose features are the clip's brightness plus the layer, different in every channel."""

    OPTIONS, PARITY, LIBRARIES = {}, {}, ()
    num_layers, num_steps, channels = 2, 0, 8

    def __init__(self):
        self.device, self.blocks = torch.device("cpu"), nn.ModuleList([nn.Identity(), nn.Identity()])

    def plan(self, frames, query):
        return Plan(frames, tuple(range(frames)), (8, 8), (3, 4, 4), tuple((f + 3) // 4 for f in range(frames)))

    def load(self, depth, device, dtype, cache): ...

    def check_options(self): ...

    def skeleton(self, depth):
        return [self.blocks]

    def prepare(self, clip, plan):
        return {"brightness": clip.frames.float().mean()[None]}

    def encode(self, inputs, plan):
        return inputs["brightness"]

    def forward(self, state, step, noise):
        x = state[:, None] + torch.arange(48 * 8).view(48, 8) / 1000
        for i, block in enumerate(self.blocks):
            x = block(x + i)

    def grid(self, tokens, state, plan):
        return tokens.unflatten(1, plan.grid)


def spec(**fields) -> FeatureSpec:
    defaults = {"family": "wan", "weights": "content:0", "layers": (0, 1), "frames": FrameSelection(window=FRAMES)}
    return FeatureSpec(**defaults | {"compute_dtype": "float32", "device": "cpu"} | fields)


@pytest.fixture
def decoded(monkeypatch):
    """Clips by id: brightness is the number in the id, and "bad" fails. The ids that were decoded."""
    ids = []

    def load(ref: ClipRef, selection: FrameSelection, shown=None) -> Clip:
        ids.append(ref.id)
        if "bad" in ref.id:
            raise ClipError(f"{ref.source} is broken")
        value = int("".join(c for c in ref.id if c.isdigit()))
        return Clip(ref.id, torch.full((FRAMES, 3, 8, 8), value % 256, dtype=torch.uint8), torch.arange(FRAMES))

    monkeypatch.setattr(pipeline, "load_clip", load)
    return ids


def refs(*ids: str) -> list[ClipRef]:
    return [ClipRef(i, f"/data/{i}") for i in ids]


def same(a: StoredRows, b: StoredRows | dict) -> bool:
    """Equal bit for bit."""
    for name, x in vars(a).items():
        y = b.get(name) if isinstance(b, dict) else getattr(b, name)
        if (x is None) != (y is None) or (x is not None and not torch.equal(x.view(torch.uint8), y.view(torch.uint8))):
            return False
    return True


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3", "int8"])
def test_what_arrives_is_what_would_be_stored(decoded, tmp_path, dtype):
    clips, store = refs("a1", "a2", "a7"), FeatureStore.create(tmp_path / "s", spec(dtype=dtype))
    extract(clips, Ramp(), store)
    with live(clips, Ramp(), store.spec) as arriving:
        there = {clip.clip_id: clip for clip in arriving}
    assert sorted(there) == store.ids()
    assert arriving.spec_hash == store.spec_hash
    for clip_id, clip in there.items():
        for key in store.spec.tensors():
            raw = store.read_raw(clip_id, *key)
            assert clip.rows == raw["rows"].tolist()
            assert same(clip.features[key], raw)
            assert same(clip.read([key], [2, 0, 2])[key], {n: x[[2, 0, 2]] for n, x in raw.items() if n != "rows"})
    assert (arriving.report.written, arriving.report.asked) == (3, 3)


def test_a_real_models_features_arrive_bit_for_bit(clips_path, wan_path, tmp_path):
    words = {"clips": str(clips_path), "model": str(wan_path), "out": str(tmp_path / "s"), "layers": [0, 2]}
    job = Job.from_words(words | {"window": 9, "query": ":", "steps": [749, 300], "options": {"size": "64x96"}})
    _, store = run_job(job)
    resolved = resolve(job)
    resolved.adapter.load(
        resolved.depth, resolved.device, COMPUTE_DTYPES[resolved.spec.compute_dtype], tmp_path / "cache"
    )
    arrived = {}
    with live(job_clips(job), resolved.adapter, resolved.spec) as arriving:
        for clip in arriving:
            arrived[clip.clip_id] = all(
                same(clip.features[key], store.read_raw(clip.clip_id, *key)) for key in store.spec.tensors()
            )
    assert arrived == dict.fromkeys(store.ids(), True)


def test_training_can_use_what_arrives(decoded):
    """Extraction computes in inference mode, whose tensors autograd refuses to save, and for a whole batch at once."""
    with live(refs("a1", "a2", "a3"), Ramp(), spec(), batch_size=3) as arriving:
        clip, *_ = arriving
    weight = torch.ones((), requires_grad=True)
    mean = clip.features[0, None].mean
    (mean * weight).sum().backward()
    assert weight.grad == mean.sum()
    assert mean.untyped_storage().nbytes() == mean.nbytes  # not a part of its batch's memory


def test_the_queue_is_bounded_in_bytes(decoded):
    """A reader that does not read stalls extraction: no more is decoded than what the queues hold."""
    ids = [f"a{n}" for n in range(100)]
    one = 2 * 3 * 4 * 4 * (8 * 2 + 2 * 4)  # layers x tokens x (float16 channels, mean and rstd)
    with live(refs(*ids), Ramp(), spec(), queue_bytes=3 * one + 1, loaders=1, writers=1) as arriving:
        clips = iter(arriving)
        assert next(clips).nbytes == one
        before = -1
        while before != len(decoded):
            before = len(decoded)
            time.sleep(0.2)
        # one is read, three wait, one write at a time and two behind it, one on the device, two loading
        assert len(decoded) <= 12
        assert sum(1 for _ in clips) == 99


def test_a_clip_larger_than_the_queue_comes_through(decoded):
    with live(refs("a1", "a2", "a3"), Ramp(), spec(), queue_bytes=1) as arriving:
        assert sorted(clip.clip_id for clip in arriving) == ["a1", "a2", "a3"]


def test_bad_clips_are_counted_and_the_others_arrive(decoded):
    with live(refs("a1", "bad1", "a2", "bad2"), Ramp(), spec()) as arriving:
        assert sorted(clip.clip_id for clip in arriving) == ["a1", "a2"]
    assert arriving.failed == {f"bad{n}": f"decode: /data/bad{n} is broken" for n in (1, 2)}
    assert (arriving.report.written, arriving.report.failed) == (2, 2)


def test_an_error_of_extraction_is_raised_where_the_clips_are_read(decoded):
    class Broken(Ramp):
        def forward(self, state, step, noise):
            if (state == 3).any():
                raise ZeroDivisionError("the model is broken")
            super().forward(state, step, noise)

    read = []
    with pytest.raises(ZeroDivisionError, match="the model is broken"), live(
        refs("a1", "a2", "a3", "a4"), Broken(), spec()
    ) as arriving:  # fmt: skip
        read += [clip.clip_id for clip in arriving]
    assert "a4" not in read


def test_an_extraction_that_had_to_stop_does_not_pass_for_a_whole_one(decoded):
    class Large(Ramp):
        def encode(self, inputs, plan):
            if (inputs["brightness"] == 2).any():
                raise torch.OutOfMemoryError("tried to allocate more than there is")
            return super().encode(inputs, plan)

    with live(refs("a1", "a2", "a3"), Large(), spec()) as arriving, pytest.raises(
        RuntimeError, match=r"extraction stopped after \d clips: out of device memory at batch size 1"
    ):  # fmt: skip
        list(arriving)


@pytest.mark.parametrize("error", [None, KeyError("training failed")])
def test_a_reader_that_leaves_ends_the_extraction(decoded, error):
    threads = threading.active_count()
    ids = [f"a{n}" for n in range(1000)]

    def train():
        with live(refs(*ids), Ramp(), spec(), queue_bytes=1000) as arriving:
            for count, _ in enumerate(arriving):
                if count == 5:
                    if error is not None:
                        raise error
                    return

    if error is None:
        train()
    else:
        with pytest.raises(KeyError, match="training failed"):
            train()
    assert len(decoded) < 60
    assert threading.active_count() == threads


def test_a_stream_is_read_once(decoded):
    with live(refs("a1"), Ramp(), spec()) as arriving:
        assert len(list(arriving)) == 1
        with pytest.raises(RuntimeError, match="read once"):
            list(arriving)
    with pytest.raises(ValueError, match="queue_bytes must be at least 1, got 0"):
        LiveStore(spec(), 0)


def test_rows_that_are_not_there_are_refused(decoded):
    with live(refs("a1"), Ramp(), spec()) as arriving:
        (clip,) = arriving
    assert clip.shape((1, None)) == (3, 4, 4, 8)
    for rows in ([0, 3], [-1]):
        with pytest.raises(ValueError, match=r"clip a1: extraction has rows 0 \.\. 2, got \[(3|-1)\]"):
            clip.read([(1, None)], rows)
    with pytest.raises(ValueError, match=r"clip a1: extraction has \(0, None\), \(1, None\), not \(2, None\)"):
        clip.shape((2, None))


# -- as batches -------------------------------------------------------------------------------------------------------


def test_batches_hold_the_sampled_rows_in_the_order_of_arrival(decoded):
    ids = [f"a{n}" for n in range(7)]
    with live(refs(*ids), Ramp(), spec(dtype="int8")) as arriving:
        loader = LiveLoader(arriving, views=3, sampling=NEAR, batch=3, seed=5, epoch=2)
        batches = list(loader)
    assert [len(batch.ids) for batch in batches] == [3, 3, 1]
    assert sorted(i for batch in batches for i in batch.ids) == ids
    with live(refs(*ids), Ramp(), spec(dtype="int8")) as arriving:
        clips = {clip.clip_id: clip for clip in arriving}
    for batch in batches:
        assert list(batch.features) == loader.keys == [FeatureKey(0, 0), FeatureKey(0, 1)]
        for place, clip_id in enumerate(batch.ids):
            frames = NEAR.sample(3, FRAMES, generator("frames", 5, 2, clip_id))
            assert batch.frames[place].tolist() == frames
            for key, features in batch.features.items():
                here = StoredRows(**{name: x[place] for name, x in vars(features).items()})
                assert same(here, clips[clip_id].read([key[1:]], [(f + 3) // 4 for f in frames])[key[1:]])


def test_clips_that_fail_end_the_training_or_are_skipped(decoded):
    ids = ("a1", "bad1", "a2")
    with live(refs(*ids), Ramp(), spec()) as arriving, pytest.raises(
        ValueError, match="clip bad1 could not be extracted: decode: /data/bad1 is broken"
    ):  # fmt: skip
        list(LiveLoader(arriving, views=2, sampling=NEAR))
    with live(refs(*ids), Ramp(), spec()) as arriving:
        loader = LiveLoader(arriving, views=2, sampling=NEAR, on_error="skip")
        assert sorted(i for batch in loader for i in batch.ids) == ["a1", "a2"]
    assert loader.skipped == {"bad1": "clip bad1 could not be extracted: decode: /data/bad1 is broken"}


def test_too_many_views_are_an_error_that_names_the_clip(decoded):
    with live(refs("a1"), Ramp(), spec()) as arriving, pytest.raises(ValueError, match="clip a1: 9 frames hold"):
        list(LiveLoader(arriving, views=6, sampling=NEAR))


def test_live_batches_are_asked_for_sensibly_and_in_one_process(decoded):
    with live(refs("a1"), Ramp(), spec()) as arriving:
        with pytest.raises(
            ValueError, match="batch must be at least 1 and on_error one of raise, skip, got 0 and 'skp'"
        ):
            LiveLoader(arriving, batch=0, on_error="skp")
        loader = LiveLoader(arriving, views=1, sampling=FrameSampling(context=1, gap=1, query="0"))
        with pytest.raises(ValueError, match="give the DataLoader num_workers=0"):
            list(DataLoader(loader, batch_size=None, num_workers=1))
