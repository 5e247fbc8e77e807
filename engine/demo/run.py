"""`engine demo`: scenes, questions, tiny models, extraction, verification, probes and a page; no network, no GPU."""

import json
import shutil
import time
from pathlib import Path

from spatialprobe.engine.demo.page import Showcase, write_page
from spatialprobe.engine.demo.probes import SETTINGS, train_task, write_noise
from spatialprobe.engine.demo.questions import lift_and_ask
from spatialprobe.engine.demo.scene_files import write_demo
from spatialprobe.engine.demo.scenes import make_scene
from spatialprobe.engine.demo.tiny.qwen3_vl import build_qwen3_vl
from spatialprobe.engine.demo.tiny.wan import build_wan_t2v
from spatialprobe.engine.files.durable import must_be_no_file
from spatialprobe.engine.job import Job
from spatialprobe.engine.pipeline.progress import summary
from spatialprobe.engine.run import run_job

FRAMES, HEIGHT, WIDTH = 17, 160, 256
SCENES = 12  # half of them videos, half image folders

MARK = ".made-by-engine-demo"
MADE = {MARK, "scenes", "clips.jsonl", "lifted", "questions", "checkpoints", "stores", "probes", "index.html"}

TINY = {  # name -> what builds it, and what differs from the published sizes
    "wan-t2v": (build_wan_t2v, "4 blocks of 2 heads x 24, VAE of 8 channels, UMT5 of 2 layers x 32"),
    "qwen3-vl": (build_qwen3_vl, "5 layers of 4 heads x 16, ViT of 4 layers x 32, about 400 tokens"),
}
MODELS = {  # name of the tiny checkpoint -> the words of its job: a video generator, then a vision-language model
    "wan-t2v": {"layers": "1,3", "steps": "749,900", "options": {"size": f"{HEIGHT}x{WIDTH}"}},
    # a token of Qwen3-VL is 32 pixels wide, Wan's 16: twice the size gives the same grid
    "qwen3-vl": {"layers": "3", "query": "::4", "options": {"size": f"{2 * HEIGHT}x{2 * WIDTH}"}},
}


def run_demo(out: str) -> int:
    """Writes everything below `out`; returns 0 if all clips were lifted and extracted, every file reads back whole and
    no probe's loss stopped being finite."""
    root, started = Path(out), time.perf_counter()
    must_be_no_file(root, "the demo is a folder")
    foreign = sorted(path.name for path in root.iterdir() if path.name not in MADE) if root.is_dir() else []
    if foreign or (root.exists() and not (root / MARK).exists() and any(root.iterdir())):
        raise ValueError(f"{root} holds files the demo did not make; choose another folder with --out")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    (root / MARK).write_text("made by `engine demo`, which removes this folder when it runs again\n")
    clips = render_scenes(root)
    print(f"lifting {SCENES} scenes to 3D, and asking about their objects")
    lifted = lift_and_ask(root / "scenes", root / "lifted", root / "questions")
    shows = []
    for name, words in MODELS.items():
        build, small = TINY[name]
        print(f"building {name}, {small}")
        checkpoint = build(root / "checkpoints" / name)
        job = Job.from_words(
            {"clips": str(clips), "model": str(checkpoint), "out": str(root / "stores" / name), "window": FRAMES}
            | words
        )
        report, store = run_job(job)
        print(summary(report, store.root))
        shows.append(Showcase(name, job, report, store, store.verify()))
    vgm, vlm = (show.store for show in shows)
    others = {"vlm": vlm, "noise": write_noise(root / "stores" / "noise", vgm)}
    trained = {}
    for task in SETTINGS:
        print(f"training {task} probes")
        labels = root / ("lifted" if task == "relation" else "scenes")
        trained[task] = train_task(task, root / "probes" / task, vgm, others, labels)
    commands = [by_features["vgm"].command for by_features in trained.values()]
    page = write_page(root, shows, commands, FRAMES, time.perf_counter() - started)
    print(f"{time.perf_counter() - started:.0f} s in all; now open {page}")
    whole = all(report.written == SCENES for report in lifted)
    whole = whole and all(show.report.written == SCENES and not show.problems for show in shows)
    diverged = any(probes.diverged for by_features in trained.values() for probes in by_features.values())
    return 0 if whole and not diverged else 1


def render_scenes(root: Path) -> Path:
    """Renders the scenes with their labels; returns the list file of the clips."""
    print(f"rendering {SCENES} scenes of {FRAMES} frames, {HEIGHT}x{WIDTH}")
    lines = []
    for seed in range(SCENES):
        scene = make_scene(seed, frames=FRAMES, height=HEIGHT, width=WIDTH)
        path = write_demo(root / "scenes", scene, kind="video" if seed % 2 == 0 else "images")
        lines.append(json.dumps({"id": scene.id, "path": str(path.relative_to(root))}))
    clips = root / "clips.jsonl"
    clips.write_text("\n".join(lines) + "\n")
    return clips
