"""vae_tiling=auto: untiled where memory allows, decided once, before there is a store."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny.open_sora import build_open_sora

from spatialprobe.engine.clips.sources import list_clips
from spatialprobe.engine.device import tiling
from spatialprobe.engine.device.memory_plan import plan_memory
from spatialprobe.engine.extract import extract
from spatialprobe.engine.job import Job
from spatialprobe.engine.resolve import resolve
from spatialprobe.engine.run import open_store, run_job
from spatialprobe.engine.store import FeatureStore

CPU = torch.device("cpu")


def job(model, out, tiled="auto", **words) -> Job:
    asked = {"clips": "clips", "model": str(model), "out": str(out), "layers": [1], "steps": [749], "window": 9}
    return Job.from_words(asked | {"options": {"size": "64x96", "vae_tiling": tiled}} | words)


@pytest.mark.parametrize("family", ["wan", "open_sora"])
def test_the_plan_decides_and_the_spec_says_what_was_used(family, wan_path, tmp_path, monkeypatch):
    model = wan_path if family == "wan" else build_open_sora(tmp_path / "open_sora")
    asked = partial(job, model, tmp_path / "store", family=family)
    found = resolve(asked())
    assert found.spec == resolve(asked("false")).spec
    needed = plan_memory(found.adapter, found.spec, found.depth, 1, 9, tmp_path).running
    monkeypatch.setattr(tiling, "free_bytes", lambda device: needed)
    assert resolve(asked()).may_tile
    monkeypatch.setattr(tiling, "free_bytes", lambda device: needed - 1)
    found = resolve(asked())
    assert found.spec == resolve(asked("true")).spec
    assert found.adapter.options["vae_tiling"] is True


@pytest.mark.parametrize("first", [True, False])
def test_the_first_to_make_the_store_decides_for_all(first, wan_path, tmp_path, monkeypatch):
    """Two workers that chose before there was a store, on GPUs with other memory free."""
    workers = []
    for tiled in (first, not first):
        monkeypatch.setattr(tiling, "free_bytes", lambda device, tiled=tiled: 0 if tiled else 1 << 60)
        workers.append(resolve(job(wan_path, tmp_path / "store")))
        workers[-1].adapter.load(2, CPU, torch.float32, tmp_path)
        assert workers[-1].spec.options["vae_tiling"] is workers[-1].adapter.vae.use_tiling is tiled
    stores = [open_store(worker, tmp_path / "store") for worker in workers]
    assert stores[0].spec == stores[1].spec == workers[0].spec == workers[1].spec
    assert stores[0].spec.options["vae_tiling"] is first
    assert [worker.adapter.vae.use_tiling for worker in workers] == [first, first]
    assert workers[1].adapter.options["vae_tiling"] is first
    other = resolve(job(wan_path, tmp_path / "other", layers=[0]))
    with pytest.raises(ValueError, match=r"layers: \[1\] there, \[0\] asked"):
        open_store(other, tmp_path / "store")
    asked = resolve(job(wan_path, tmp_path / "other", str(not first).lower()))
    with pytest.raises(ValueError, match="vae_tiling: "):  # asked for, not left to us
        open_store(asked, tmp_path / "store")


@pytest.mark.parametrize("tiled", ["true", "false"])
def test_a_store_keeps_what_it_was_begun_with(tiled, wan_path, clips_path, tmp_path, monkeypatch):
    _, store = run_job(job(wan_path, tmp_path / "store", tiled, clips=str(clips_path), limit=1))
    monkeypatch.setattr(tiling, "free_bytes", lambda device: 0 if tiled == "false" else 1 << 60)
    report, again = run_job(job(wan_path, tmp_path / "store", "auto", clips=str(clips_path), limit=2))
    assert again.spec == store.spec
    assert again.spec.options["vae_tiling"] is (tiled == "true")
    assert (report.present, report.written) == (1, 1)


def test_what_cannot_be_planned_must_be_said(tmp_path, wan_path):
    with pytest.raises(ValueError, match="which a window of any length has not"):
        resolve(job(wan_path, tmp_path / "store", window="all"))
    with pytest.raises(ValueError, match="option vae_tiling must be bool, got 'maybe'"):
        resolve(job(wan_path, tmp_path / "store", "maybe"))


@pytest.mark.parametrize("fits", [True, False])
def test_a_trial_tiles_where_memory_runs_out(fits, wan_path, tmp_path, monkeypatch):
    found = resolve(job(wan_path, tmp_path / "store", "false"))
    found.adapter.load(2, CPU, torch.float32, tmp_path)
    encode = found.adapter.vae.encode

    def short_of_memory(pixels):
        if not fits and not found.adapter.vae.use_tiling:
            raise RuntimeError("FIND was unable to find an engine to execute this computation after trying 9 plans")
        return encode(pixels)

    monkeypatch.setattr(found.adapter.vae, "encode", short_of_memory)
    spec = tiling.fit(found.adapter, found.spec)
    assert spec == tiling.chosen(found.spec, not fits)
    assert (found.adapter.options["vae_tiling"], found.adapter.vae.use_tiling) == (not fits, not fits)


def test_a_run_that_has_begun_is_not_tiled_but_ends_and_says_so(wan_path, clips_path, tmp_path, monkeypatch):
    """A store must not hold both."""
    found = resolve(job(wan_path, tmp_path / "store", "false", clips=str(clips_path)))
    found.adapter.load(2, CPU, torch.float32, tmp_path)
    store, refs = FeatureStore.create(tmp_path / "store", found.spec), list_clips(str(clips_path))

    def full(*args):
        raise torch.OutOfMemoryError("Tried to allocate 7 GiB, of which 3 GiB are free")

    monkeypatch.setattr(found.adapter.vae, "encode", full)
    report = extract(refs, found.adapter, store)
    assert report.stopped == (
        "out of device memory at batch size 1: one clip alone does not fit (Tried to allocate 7 GiB, of which 3 GiB "
        "are free); its VAE ran untiled: a new store with --option vae_tiling=true needs less"
    )
    assert store.ids() == []


def test_advice_is_given_only_where_there_is_something_left():
    for own, chosen, words in (
        ({}, {}, ""),
        ({"vae_tiling": False}, {"vae_tiling": True}, ""),
        ({"vae_tiling": True}, {"vae_tiling": False}, "vae_tiling=true"),
    ):
        said = tiling.advice(SimpleNamespace(OPTIONS=own, options=chosen))
        assert (words in said) if words else (said == "")
