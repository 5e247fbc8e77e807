"""The command line: words, exit codes, and one clear line for everything that is wrong."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from tiny.cosmos import build_cosmos
from tiny.encoders import build_encoder
from tiny.hunyuan_video import build_hunyuan_video
from tiny.ltx import build_ltx
from tiny.mochi import build_mochi
from tiny.open_sora import build_open_sora

from spatialprobe.engine.cli import main, parser
from spatialprobe.engine.commands.flags import read_job
from spatialprobe.engine.demo.tiny.wan import build_wan_t2v
from spatialprobe.engine.dryrun import waiting_bytes
from spatialprobe.engine.job import Job, select_shard
from spatialprobe.engine.presets import PRESETS
from spatialprobe.engine.resolve import resolve
from spatialprobe.engine.store import FeatureStore


@pytest.fixture
def words(clips_path, wan_path, tmp_path):
    """Arguments of an extraction that works."""
    return [
        "extract", str(clips_path), "--model", str(wan_path), "--out", str(tmp_path / "store"), "--layers", "0,hs3",
        "--steps", "749", "--window", "9", "--size", "64x96", "--batch", "2",
    ]  # fmt: skip


def replaced(words: list[str], **changes: str | None) -> list[str]:
    out = list(words)
    for name, value in changes.items():
        flag = f"--{name.replace('_', '-')}"
        if flag in out:
            at = out.index(flag)
            out[at : at + 2] = []
        if value is not None:
            out += [flag, value]
    return out


def test_extract_info_verify(words, capsys):
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "5 written, 0 there before, 0 failed" in out
    assert "clips/s, device busy" in out
    store = words[5]
    assert FeatureStore.open(store).spec.layers == (0, 2)  # hs3 is the output of block 2
    assert main(words) == 0
    assert "0 written, 5 there before" in capsys.readouterr().out
    assert main(["info", store]) == 0
    out = capsys.readouterr().out
    assert "layer2/step749: [3, 4, 6, 48] float16 in 5 clips" in out
    assert main(["verify", store]) == 0
    assert "5 clips read, 0 problems" in capsys.readouterr().out


def test_verify_finds_a_flipped_bit(words, capsys):
    assert main(words) == 0
    path = FeatureStore.open(words[5]).path("clip2")
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 4
    path.write_bytes(raw)
    capsys.readouterr()
    assert main(["verify", words[5]]) == 1
    out = capsys.readouterr().out
    assert "clip2" in out
    assert "1 problems" in out


def test_failed_clips_are_listed_retried_and_exit_1(words, clips_path, make_clip, tmp_path, capsys):
    clips = tmp_path / "clips"
    make_clip(clips / "whole", frames=9)
    make_clip(clips / "broken", frames=9, seed=1)
    image = clips / "broken/004.png"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    words[1] = str(clips)
    assert main(words) == 1
    err = capsys.readouterr().err
    assert "1 clips failed" in err
    assert "broken  decode: " in err
    assert "004.png" in err
    assert f"to retry them: {shlex.join([sys.argv[0], *words, '--retry-failed'])}" in err
    store = FeatureStore.open(words[5])
    assert store.ids() == ["whole"]
    log = [json.loads(line) for line in (store.root / "log.jsonl").read_text().splitlines()]
    assert {line["id"]: line["outcome"] for line in log} == {"whole": "written", "broken": "failed"}
    image.write_bytes(whole)
    assert main([*words, "--retry-failed"]) == 0
    assert "1 written, 0 there before, 0 failed, 0 skipped of 1 clips" in capsys.readouterr().out
    assert store.failures() == {}


def test_export_and_import_bring_a_store_back(words, tmp_path, capsys):
    assert main(words) == 0
    store = FeatureStore.open(words[5])
    assert main(["export", words[5], str(tmp_path / "dump"), "--layout", "probing", "--name", "tiny"]) == 0
    assert "5 clips written, 0 there before, 0 failed" in capsys.readouterr().out
    assert (tmp_path / "dump/tiny/clip3/feature_t749_layer2.sft").is_file()
    arguments = ["--family", "wan", "--layers", "0,2", "--steps", "749", "--window", "9"]
    assert main(["import", str(tmp_path / "dump/tiny"), str(tmp_path / "back"), *arguments]) == 0
    back = FeatureStore.open(tmp_path / "back")
    assert back.ids() == store.ids()
    a, b = (s.read_raw("clip3", 2, 749) for s in (store, back))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.equal(b[name]), name
    capsys.readouterr()
    assert main(["export", str(tmp_path / "nowhere"), str(tmp_path / "dump"), "--layout", "probing"]) == 2
    assert "is not a feature store" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "4"}, "layers must be blocks 0 .. 3, got [4]"),
        ({"layers": "x"}, "layers must be a whole number from 0, got 'x'"),
        ({"layers": "hs0"}, "hsK, K must be a whole number from 1"),
        ({"layers": None}, "layers must be given where the study used none"),
        ({"steps": "1000"}, "steps must be indices 0 .. 999"),
        ({"steps": "-1"}, "steps must be a whole number from 0, got '-1'"),
        ({"window": "0"}, "window, if not 'all', must be a whole number from 1"),
        ({"stride": "0"}, "stride must be a whole number from 1"),
        ({"query": "12"}, "query frame 12 is outside the window of 9 frames"),
        ({"query": "a:b"}, "query must be frame numbers and slices"),
        ({"short": "maybe"}, "short must be one of pad, error, skip, got 'maybe'"),
        ({"start": "middle"}, "start must be 'start', 'center', 'start_idx' or a frame number, got 'middle'"),
        ({"pool": "3"}, "pool must be HEIGHTxWIDTH like 15x26, got '3'"),
        ({"option": "flow_shift=nan"}, "flow_shift must be positive"),
        ({"pool": "9x9"}, "pool must be at most the model's 4x6 tokens, got (9, 9)"),
        ({"size": "65x96"}, "size must be multiples of 16 pixels"),
        ({"option": "colour=red"}, "unknown option 'colour' of Wan; its options are size, prompt"),
        ({"option": "vae_tiling=maybe"}, "option vae_tiling must be bool, got 'maybe'"),
        ({"store_dtype": "float64"}, "store_dtype must be one of float16, bfloat16, float8_e4m3, int8"),
        ({"compute": "exact"}, "compute must be 'default' or 'parity'"),
        ({"compute_dtype": "int8"}, "compute_dtype must be one of float32, bfloat16, float16"),
        ({"device": "cuda:7"}, "device 'cuda:7' is not there"),
        ({"device": "tpu"}, "device must be cpu, cuda or cuda:N"),
        ({"shard": "4/4"}, "shard must be i/n with 0 <= i < n, got '4/4'"),
        ({"batch": "-2"}, "batch, if not 'auto', must be a whole number from 1"),
        ({"model": "no-such-model"}, "no preset, local folder or Hub id; presets are wan2.1-t2v-1.3b"),
        ({"model": "qwen3-vl-2b"}, "Qwen/Qwen3-VL-2B-Instruct is not in the local Hub cache"),
        ({"layout": "cubes"}, "layout"),
        ({"job": "/no/such/job.toml"}, "job file /no/such/job.toml cannot be read"),
    ],
)
def test_bad_arguments_exit_2_with_one_line_and_write_nothing(words, tmp_path, capsys, changes, message):
    assert main(replaced(words, **changes)) == 2
    err = capsys.readouterr().err.splitlines()
    assert message in err[-1]
    assert len(err) == 1
    assert not (tmp_path / "store").exists()


def test_a_file_where_a_folder_is_wanted(words, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    below = f"{file} is a file; {file}/x cannot be below it"

    def said(*command: str) -> str:
        assert main([*command]) == 2
        return capsys.readouterr().err.removeprefix("engine: error: ").rstrip()

    assert said(*replaced(words, out=str(file))) == f"{file} is a file; a store is a folder"
    assert said(*replaced(words, out=f"{file}/x")) == below
    assert said(*words, "--latents", str(file)) == f"{file} is a file; latents are a folder"
    assert said("demo", "--out", str(file)) == f"{file} is a file; the demo is a folder"
    assert said("demo", "--out", f"{file}/x") == below
    assert main(words) == 0
    capsys.readouterr()
    assert said("export", words[5], str(file), "--layout", "probing") == f"{file} is a file; a folder is wanted"
    assert said("export", words[5], f"{file}/x", "--layout", "probing") == below
    assert file.read_text() == "mine"


def test_clips_that_are_not_there(words, capsys, tmp_path):
    words[1] = str(tmp_path / "nowhere")
    assert main(words) == 2
    assert "nowhere" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    words[1] = str(tmp_path / "empty")
    assert main(words) == 2
    assert "empty" in capsys.readouterr().err


def test_an_unknown_flag_or_word(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        main([*words, "--layer", "3"])
    assert raised.value.code == 2
    (tmp_path / "job.toml").write_text('colour = "red"')
    assert main([*words, "--job", str(tmp_path / "job.toml")]) == 2
    assert "unknown word 'colour' in the job" in capsys.readouterr().err


def test_another_spec_is_refused_with_the_fields_that_differ(words, capsys):
    assert main(words) == 0
    store = FeatureStore.open(words[5])
    before = {i: store.path(i).read_bytes() for i in store.ids()}
    assert main(replaced(words, seed="3", window="5")) == 2
    err = capsys.readouterr().err
    assert "seed: 0 there, 3 asked" in err
    assert "frames.window: 9 there, 5 asked" in err
    assert {i: store.path(i).read_bytes() for i in store.ids()} == before


def test_a_job_file_says_the_same_as_flags(words, clips_path, wan_path, tmp_path):
    (tmp_path / "job.toml").write_text(
        f'clips = "{clips_path}"\nmodel = "{wan_path}"\nout = "{tmp_path}/store"\nlayers = [0, "hs3"]\n'
        'steps = 749\nwindow = 9\nbatch = 2\nshort = "skip"\nsize = "32x32"\nstore-dtype = "float16"\n'
        '[options]\nprompt = ""\n'
    )
    from_file = Job.from_words({"short": "pad", "options": {"size": "64x96"}}, str(tmp_path / "job.toml"))
    assert resolve(from_file).spec == resolve(read_job(parser().parse_args(words))).spec


def test_dry_run_says_where_memory_is_only_guessed(clips_path, tmp_path, capsys):
    words = ["extract", str(clips_path), "--out", str(tmp_path / "s"), "--layers", "0", "--device", "cpu", "--dry-run"]
    video = ["--window", "9", "--option", "size=64x96"]
    for model, more, why in (
        (build_open_sora(tmp_path / "open_sora"), [*video, "--family", "open_sora"], ""),
        (build_hunyuan_video(tmp_path / "hunyuan_video"), video, ""),
        (build_ltx(tmp_path / "ltx"), video, ""),
        (build_mochi(tmp_path / "mochi"), video, ""),
        (build_cosmos(tmp_path / "cosmos"), [*video, "--option", "vae_tiling=auto"], ""),
        (
            build_wan_t2v(tmp_path / "wan"),
            [*video, "--offload", "host"],
            "(a guess: the peak with offloaded blocks is not",
        ),
        (
            build_encoder(tmp_path / "clip", "clip"),
            ["--window", "all", "--query", ":"],
            "the peak of windows of any length",
        ),
        (build_encoder(tmp_path / "dino", "dinov2"), ["--window", "9", "--query", ":"], ""),
    ):
        assert main([*words, "--model", str(model), *more]) == 0
        out = capsys.readouterr().out
        assert why in out
        assert ("a guess" in out) == bool(why)
        assert ("memory   peak " in out) == (not why)
        assert "host  " not in out  # nothing is pinned on the CPU
    assert waiting_bytes(1000, batch=3, writers=4) == 14_000


def test_dry_run_tells_the_plan_and_writes_nothing(words, tmp_path, capsys):
    assert main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "5 in " in out
    assert "0 done, 5 to do" in out
    assert "3 of 4 loaded and run, for layers 0, 2" in out
    assert "tokens   3x4x6, kept 3x4x6, 48 channels" in out
    assert not (tmp_path / "store").exists()
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "5 done, 0 to do" in out
    # the disk estimate is the tensors' bytes: a file adds a header
    megabytes = float(out.split("disk     ")[1].split(" MB per clip")[0])
    size = FeatureStore.open(words[5]).path("clip0").stat().st_size
    assert megabytes * 1e6 <= size <= megabytes * 1e6 + 8192


def test_dry_run_says_why_extract_would_refuse_the_store(words, tmp_path, capsys):
    assert main(words) == 0
    capsys.readouterr()
    assert main([*replaced(words, seed="3"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"store    extract would refuse it: {words[5]} holds features of another spec" in out
    assert "seed: 0 there, 3 asked" in out
    assert "0 done, 5 to do" in out
    (tmp_path / "file").write_text("mine")
    for place, why in ((tmp_path, "is not empty and not a store"), (tmp_path / "file", "is a file; a store is a")):
        assert main([*replaced(words, out=str(place)), "--dry-run"]) == 0
        assert f"extract would refuse it: {place} {why}" in capsys.readouterr().out


def test_encoders_have_layers_of_their_own_accord(clips_path, tmp_path):
    model = build_encoder(tmp_path / "clip", "clip")
    job = Job.from_words({"clips": str(clips_path), "model": str(model), "out": "x"})
    assert (resolve(job).adapter.num_layers, resolve(job).spec.layers) == (4, (2, 3))
    assert resolve(dataclasses.replace(job, layers=[0])).spec.layers == (0,)


def test_parity_is_the_studys_choices(words, clips_path, wan_path, qwen_path):
    wan = resolve(Job.from_words({"clips": str(clips_path), "model": str(wan_path), "out": "x", "layers": "1",
                                  "compute": "parity"})).spec  # fmt: skip
    assert wan.compute_dtype == "bfloat16"
    assert wan.options == {
        "size": [480, 832], "prompt": "", "prompt_tokens": 226, "flow_shift": 3.0, "vae_tiling": True,
        "vae_channels_last": False,
    }  # fmt: skip
    assert (wan.frames.window, wan.steps) == (81, (749,))
    qwen = resolve(Job.from_words({"clips": str(clips_path), "model": str(qwen_path), "out": "x", "layers": "hs3",
                                   "compute": "parity"})).spec  # fmt: skip
    assert (qwen.compute_dtype, qwen.layers, qwen.steps) == ("bfloat16", (2,), ())
    assert qwen.options == {"size": [540, 960], "prompt": "Describe this video.", "tap": "decoder"}
    from spatialprobe.engine.types import parse_query

    assert parse_query(qwen.frames.query, 81) == (0, *range(1, 76, 4))
    with pytest.raises(ValueError, match=r"parity means flow_shift=3\.0, but flow_shift=5\.0 was asked for"):
        resolve(Job.from_words({"clips": "c", "model": str(wan_path), "out": "x", "layers": "1",
                                "compute": "parity", "options": {"flow_shift": 5}}))  # fmt: skip


def test_nothing_to_retry_makes_no_store(words, tmp_path, capsys):
    assert main([*words, "--retry-failed"]) == 2
    assert "there is nothing to retry" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_weights_that_cannot_be_loaded_leave_no_store(words, wan_path, tmp_path, capsys):
    shutil.copytree(wan_path, tmp_path / "broken")
    shard = sorted((tmp_path / "broken/transformer").glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert main(replaced(words, model=str(tmp_path / "broken"))) == 2
    assert "is not a whole safetensors file" in capsys.readouterr().err
    shard.write_bytes(whole)
    assert main(replaced(words, model=str(tmp_path / "broken"))) == 0


def test_a_store_kept_inside_the_model_folder_does_not_change_the_model(words, wan_path, tmp_path):
    shutil.copytree(wan_path, tmp_path / "model")
    inside = replaced(words, model=str(tmp_path / "model"), out=str(tmp_path / "model/store"))
    assert main(inside) == 0
    assert main(inside) == 0


def test_a_full_disk_and_a_bug_have_exit_codes_of_their_own(words, monkeypatch, capsys):
    from spatialprobe.engine.files.durable import StoreFull

    def full(self, *args):
        raise StoreFull(28, "No space left on device: 1 MB needed, 0 MB free", "clips/x")

    monkeypatch.setattr(FeatureStore, "write", full)
    assert main(words) == 1
    assert "stopped: [Errno 28] No space left on device: 1 MB needed" in capsys.readouterr().err

    def bug(self, *args):
        raise ValueError("a bug")

    monkeypatch.setattr(FeatureStore, "write", bug)
    with pytest.raises(RuntimeError, match="extraction failed"):
        main(words)


def test_an_interrupted_run_exits_130_and_says_so(words, monkeypatch, capsys):
    from spatialprobe.engine import run
    from spatialprobe.engine.pipeline.outcomes import Report

    monkeypatch.setattr(run, "extract", lambda *a, **k: Report(5, 0, written=2, interrupted=True))
    assert main(words) == 130
    assert "interrupted: run the same command again" in capsys.readouterr().err


def test_shards_leave_reports_of_their_own_and_the_log_grows(words, tmp_path):
    for shard in ("0/2", "1/2"):
        assert main([*words, "--shard", shard]) == 0
    store = tmp_path / "store"
    assert json.loads((store / "run-0of2.json").read_text())["written"] == 3
    assert json.loads((store / "run-1of2.json").read_text())["written"] == 2
    assert len((store / "log.jsonl").read_text().splitlines()) == 5


def test_a_lost_gpu_ends_a_run_with_a_line(words, monkeypatch, capsys):
    from spatialprobe.engine.run import Run

    def lost(run):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(Run, "extract", lost)
    assert main(words) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-1] == "engine: stopped: lost its GPU; run the same command again to go on"
    assert "RuntimeError: CUDA error: uncorrectable ECC error encountered" in err


def test_presets_and_devices_set_the_defaults(clips_path, wan_path, monkeypatch):
    from spatialprobe.engine import resolve as resolving

    preset = dataclasses.replace(PRESETS["wan2.1-t2v-1.3b"], repo=str(wan_path), layers={"geometry": 2, "tagging": 1})
    monkeypatch.setitem(PRESETS, "tiny", preset)
    monkeypatch.setattr(resolving, "device_of", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(resolving.tiling, "choose", lambda *asked: False)  # memory of a GPU that is not there
    words = {"clips": str(clips_path), "model": "tiny", "out": "x", "batch": 3}
    resolved = resolve(Job.from_words(words))
    assert (resolved.spec.layers, resolved.spec.pool, resolved.depth) == ((1, 2), (15, 26), 3)
    assert (resolved.spec.compute_dtype, resolved.spec.device, resolved.batch) == ("bfloat16", "cuda", 3)
    assert (resolved.may_tile, resolved.spec.options["vae_tiling"]) == (True, False)
    assert resolve(Job.from_words(words | {"pool": "none"})).spec.pool is None
    with pytest.raises(ValueError, match="parity means compute_dtype=bfloat16"):
        resolve(Job.from_words(words | {"compute": "parity", "compute_dtype": "float32"}))


@pytest.mark.parametrize("steps", [{"steps": "749"}, {"merge_steps": True}])
def test_a_model_without_noise_takes_no_steps(clips_path, qwen_path, steps):
    words = {"clips": str(clips_path), "model": str(qwen_path), "out": "x", "layers": "1"} | steps
    with pytest.raises(ValueError, match="Qwen3VL has no noise schedule"):
        resolve(Job.from_words(words))


def test_shards_are_disjoint_and_complete():
    clips = list(range(23))
    for count in (1, 2, 5, 30):
        parts = [select_shard(clips, f"{i}/{count}", None) for i in range(count)]
        assert sorted(clip for part in parts for clip in part) == clips
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert select_shard(clips, "1/2", 5) == [1, 3]


def test_quiet_and_whole_when_not_on_a_terminal(words):
    done = subprocess.run([sys.executable, "-m", "spatialprobe.engine.cli", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "5 written" in done.stdout


def test_output_that_nobody_reads_any_more_is_no_fault():
    """As `engine models | head -1` leaves it."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "spatialprobe.engine.cli", "models"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")
