"""Latents on disk: on a hit nothing is decoded or encoded, and features are the same bytes."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from tiny.ltx import build_ltx

from spatialprobe.engine import extract as pipeline
from spatialprobe.engine.demo.tiny.cogvideox import build_aether, build_cogvideox
from spatialprobe.engine.demo.tiny.wan import build_wan_i2v, build_wan_t2v
from spatialprobe.engine.job import Job
from spatialprobe.engine.pipeline.latents import LatentFolder, source_identity, weights_hash
from spatialprobe.engine.resolve import resolve
from spatialprobe.engine.run import run_job
from spatialprobe.engine.types import ClipRef


def job(clips, model, out, **words) -> Job:
    options = words.pop("options", {"size": "64x96"})
    defaults = {"layers": [1], "window": 9, "query": ":", "steps": [749], "loaders": 1}
    return Job.from_words(
        {"clips": str(clips), "model": str(model), "out": str(out)} | defaults | words | {"options": options}
    )


def files(store) -> dict[str, bytes]:
    return {clip_id: store.path(clip_id).read_bytes() for clip_id in store.ids()}


def latent_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


@pytest.fixture
def calls(monkeypatch):
    """How often clips were decoded and VAEs run."""
    counts = {"decode": 0, "vae": 0}

    def counting(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(pipeline, "load_clip", counting("decode", pipeline.load_clip))
    from diffusers import AutoencoderKLCogVideoX, AutoencoderKLLTXVideo, AutoencoderKLWan

    for cls in (AutoencoderKLWan, AutoencoderKLCogVideoX, AutoencoderKLLTXVideo):
        monkeypatch.setattr(cls, "encode", counting("vae", cls.encode))
    return counts


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    models = {
        "wan": build_wan_t2v(root / "wan"),
        "deeper": build_wan_t2v(root / "deeper", num_layers=6, seed=3),
        "other_vae": build_wan_t2v(root / "other_vae", seed=4),
        "wan_i2v": build_wan_i2v(root / "wan_i2v"),
        "cogvideox": build_cogvideox(root / "cogvideox"),
        "ltx": build_ltx(root / "ltx"),
    }
    for file in (models["wan"] / "vae").iterdir():  # as the 1.3B and the 14B share theirs, but for a note
        shutil.copy(file, models["deeper"] / "vae" / file.name)
    config = models["deeper"] / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_diffusers_version": "0.30.0"}))
    return models


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("wan", {}),
        ("wan", {"compute_dtype": "bfloat16"}),
        ("wan_i2v", {"family": "wan_i2v"}),
        ("cogvideox", {"options": {"size": "64x96", "half_frames": 9}}),
        ("ltx", {}),
    ],
)
def test_a_second_run_neither_decodes_nor_encodes_and_gives_the_same_bytes(
    family, words, models, clips_path, tmp_path, calls
):
    asked = {"model": models[family], "limit": 2} | words
    _, plain = run_job(job(clips_path, out=tmp_path / "plain", **asked))
    latents = {"latents": str(tmp_path / "latents")}
    report, first = run_job(job(clips_path, out=tmp_path / "first", **asked | latents))
    assert report.timing["latents"] == {"read": 0, "made": 2}
    calls.update(decode=0, vae=0)
    report, second = run_job(job(clips_path, out=tmp_path / "second", **asked | latents))
    assert calls == {"decode": 0, "vae": 0}
    assert report.timing["latents"] == {"read": 2, "made": 0}
    assert files(second) == files(first) == files(plain)
    assert list(second.verify()) == []


def test_other_layers_steps_and_a_model_with_the_same_vae_reuse_them(models, clips_path, tmp_path, calls):
    latents = {"latents": str(tmp_path / "latents"), "limit": 2}
    run_job(job(clips_path, models["wan"], tmp_path / "a", **latents))
    calls.update(decode=0, vae=0)
    run_job(job(clips_path, models["wan"], tmp_path / "b", layers=[0, 3], steps=[200, 600], pool="2x2", **latents))
    _, reused = run_job(job(clips_path, models["deeper"], tmp_path / "c", layers=[5], **latents))
    assert calls == {"decode": 0, "vae": 0}
    _, plain = run_job(job(clips_path, models["deeper"], tmp_path / "d", layers=[5], limit=2))
    assert files(reused) == files(plain)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("other_vae", {}),
        ("wan", {"options": {"size": "64x64"}}),
        ("wan", {"window": 5}),
        ("wan", {"start": 1}),
        ("wan", {"compute_dtype": "bfloat16"}),
        ("wan", {"options": {"size": "64x96", "vae_tiling": True}}),
    ],
)
def test_whatever_changes_latents_is_in_their_key(model, words, models, clips_path, tmp_path, calls):
    latents = {"latents": str(tmp_path / "latents"), "limit": 1}
    run_job(job(clips_path, models["wan"], tmp_path / "a", **latents))
    calls.update(decode=0, vae=0)
    run_job(job(clips_path, models[model], tmp_path / "b", **latents | words))
    assert calls["decode"] == 1
    assert calls["vae"] >= 1
    assert len([p for p in (tmp_path / "latents").iterdir() if p.name != "tmp"]) == 2


def test_what_clips_processor_does_is_in_the_key(models, clips_path, tmp_path, calls):
    other = tmp_path / "other"
    shutil.copytree(models["wan_i2v"], other)
    config = other / "image_processor/preprocessor_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    asked = {"limit": 1, "family": "wan_i2v"}
    latents = {"latents": str(tmp_path / "latents")}
    run_job(job(clips_path, models["wan_i2v"], tmp_path / "a", **asked, **latents))
    _, kept = run_job(job(clips_path, other, tmp_path / "b", **asked, **latents))
    _, plain = run_job(job(clips_path, other, tmp_path / "c", **asked))
    assert files(kept) == files(plain)


def test_a_changed_clip_is_encoded_again(models, clips_path, tmp_path, calls):
    clips, latents = tmp_path / "clips", {"latents": str(tmp_path / "latents")}
    shutil.copytree(clips_path / "clip0", clips / "clip0")
    run_job(job(clips, models["wan"], tmp_path / "a", **latents))
    shutil.copy(clips_path / "clip1" / "003.png", clips / "clip0" / "003.png")
    os.utime(clips / "clip0" / "003.png", ns=(1, 1))
    _, store = run_job(job(clips, models["wan"], tmp_path / "b", **latents))
    _, plain = run_job(job(clips, models["wan"], tmp_path / "c"))
    assert calls["decode"] == 3
    assert files(store) == files(plain)


def test_what_a_short_clip_means_is_asked_again(models, clips_path, tmp_path):
    words = {"window": 17, "limit": 1, "latents": str(tmp_path / "latents")}
    padded, _ = run_job(job(clips_path, models["wan"], tmp_path / "a", **words))
    failed, _ = run_job(job(clips_path, models["wan"], tmp_path / "b", short="error", **words))
    skipped, _ = run_job(job(clips_path, models["wan"], tmp_path / "c", short="skip", **words))
    assert (padded.written, failed.failed, skipped.skipped) == (1, 1, 1)


def test_a_clip_whose_latents_are_there_can_fail_alone(models, clips_path, tmp_path):
    words = {"window": "all", "limit": 2, "latents": str(tmp_path / "latents")}
    run_job(job(clips_path, models["wan"], tmp_path / "a", **words))
    report, _ = run_job(job(clips_path, models["wan"], tmp_path / "b", pool="40x40", **words))
    reason = "prepare: ValueError: pool must be at most the model's 4x6 tokens, got (40, 40)"
    assert report.failures == {"clip0": reason, "clip1": reason}


def test_models_of_one_vae_that_want_other_latents_keep_their_own(models, clips_path, tmp_path):
    words = {"limit": 1, "options": {"size": "64x96", "half_frames": 9}, "latents": str(tmp_path / "latents")}
    run_job(job(clips_path, models["cogvideox"], tmp_path / "a", **words))
    for kind in ("5b-i2v", "1.5-5b"):
        model = build_cogvideox(tmp_path / kind, kind)
        report, _ = run_job(job(clips_path, model, tmp_path / f"{kind}-store", **words))
        assert (report.written, report.timing["latents"]) == (1, {"read": 0, "made": 1})


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_file_is_made_again(damage, models, clips_path, tmp_path, calls):
    latents = {"latents": str(tmp_path / "latents"), "limit": 1}
    run_job(job(clips_path, models["wan"], tmp_path / "a", **latents))
    before = latent_files(tmp_path / "latents")
    (path,) = (tmp_path / "latents" / name for name in before)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes({"truncated": bytes(data[:-9]), "flipped": bytes(data), "empty": b""}[damage])
    calls.update(decode=0, vae=0)
    report, _ = run_job(job(clips_path, models["wan"], tmp_path / "b", **latents))
    assert calls["decode"] == 1
    assert report.timing["latents"] == {"read": 0, "made": 1}
    assert latent_files(tmp_path / "latents") == before


def test_a_family_that_cannot_say_is_refused(models, tmp_path, clips_path, qwen_path):
    aether, base = build_aether(tmp_path / "aether"), {"base": str(models["cogvideox"]), "size": "64x96"}
    words = {"latents": str(tmp_path / "latents")}
    with pytest.raises(ValueError, match="latents cannot be kept for family aether"):
        resolve(job(clips_path, aether, tmp_path / "a", family="aether", options=base, **words))
    with pytest.raises(ValueError, match="latents cannot be kept for family qwen3_vl"):
        resolve(job(clips_path, qwen_path, tmp_path / "b", steps=[], **words))
    assert not (tmp_path / "latents").exists()


def test_clips_that_fail_leave_no_latents(models, tmp_path, clips_path):
    clips = tmp_path / "clips"
    shutil.copytree(clips_path / "clip0", clips / "whole")
    shutil.copytree(clips_path / "clip1", clips / "torn")
    (clips / "torn" / "004.png").write_bytes(b"no image")
    report, _ = run_job(job(clips, models["wan"], tmp_path / "a", latents=str(tmp_path / "latents")))
    assert (report.written, report.failed) == (1, 1)
    assert [Path(name).name.split(".")[0] for name in latent_files(tmp_path / "latents")] == ["whole"]


def test_many_writers_of_one_clip_leave_one_whole_file(tmp_path):
    ref = ClipRef("a/b", str(tmp_path))
    folders = [LatentFolder(tmp_path / "latents", {"vae": 1}) for _ in range(3)]
    tensors = {"video": torch.arange(60000, dtype=torch.float32).view(3, 200, 100)}
    write = lambda folder: [folder.write(ref, "00ff", tensors, {"window": 9}) for _ in range(10)]  # noqa: E731
    threads = [threading.Thread(target=write, args=(folder,)) for folder in folders for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found = folders[0].read(ref, "00ff")
        assert found is None or torch.equal(found.tensors["video"], tensors["video"])
    found = folders[1].read(ref, "00ff")
    assert torch.equal(found.tensors["video"], tensors["video"])
    assert found.about["window"] == 9
    assert sum(folder.made for folder in folders) == 60
    for folder in folders:
        folder.close()
    assert sorted(p.name for p in (tmp_path / "latents").iterdir()) == [folders[0].hash]


def test_a_source_is_its_path_size_time_and_first_frame(tmp_path):
    file = tmp_path / "clip.mp4"
    file.write_bytes(b"1234")
    os.utime(file, ns=(5, 5))
    ref = ClipRef("clip", str(file))
    was = source_identity(ref)
    assert source_identity(ref) == was
    assert source_identity(ClipRef("clip", str(file), start_idx=3)) != was
    os.utime(file, ns=(5, 6))
    assert source_identity(ref) != was
    os.utime(file, ns=(5, 5))
    assert source_identity(ref) == was
    file.write_bytes(b"12345")
    os.utime(file, ns=(5, 5))
    assert source_identity(ref) != was


def test_weights_hash_sees_values_names_and_dtypes():
    first, second = (torch.nn.Linear(3, 2) for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert weights_hash(first) == weights_hash(second)
    with torch.no_grad():
        second.weight[1, 2] += 1e-6
    assert weights_hash(first) != weights_hash(second)
    assert weights_hash(first) != weights_hash(first.bfloat16())
