"""The demo, small: whole stores, and a page that stands alone and shows every clip."""

import io
import json
import re
import shlex
import subprocess
from base64 import b64decode
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from object_tables import table_of_scene
from PIL import Image

from spatialprobe.engine.cli import main
from spatialprobe.engine.demo import probes as demo_probes
from spatialprobe.engine.demo import run as demo
from spatialprobe.engine.demo.page import principal_colours, wrapped
from spatialprobe.engine.demo.probes import SETTINGS
from spatialprobe.engine.demo.questions import question_section, samples
from spatialprobe.engine.demo.render import render_clip
from spatialprobe.engine.demo.scene_files import write_demo
from spatialprobe.engine.demo.scenes import make_scene
from spatialprobe.engine.questions.ask import ask
from spatialprobe.engine.questions.forms import FORMS
from spatialprobe.engine.questions.lines import record_lines
from spatialprobe.engine.questions.settings import Settings
from spatialprobe.engine.store import FeatureStore
from spatialprobe.probes.labels import open_labels
from spatialprobe.probes.report.axes import AXES, criterion
from spatialprobe.probes.report.words import number

FEATURES = {"wan-t2v": "vgm", "qwen3-vl": "vlm", "wan-t2v + qwen3-vl": "joined", "noise": "noise"}  # row -> folder


def test_the_demo_writes_stores_and_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "SCENES", 3)
    monkeypatch.setattr(demo, "HEIGHT", 64)
    monkeypatch.setattr(demo, "WIDTH", 96)
    sized = {name: words | {"options": {"size": "64x96"}} for name, words in demo.MODELS.items()}
    monkeypatch.setattr(demo, "MODELS", sized)
    quick = {task: {"epochs": 1} for task in SETTINGS} | {"instance": {"epochs": 1, "pixels": 64}}
    monkeypatch.setattr(demo_probes, "SETTINGS", {task: words | quick[task] for task, words in SETTINGS.items()})
    monkeypatch.setattr(demo, "SETTINGS", demo_probes.SETTINGS)
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out)]) == 0
    stores = {name: FeatureStore.open(out / "stores" / name) for name in demo.MODELS}
    assert [len(store.spec.tensors()) for store in stores.values()] == [4, 1]  # two steps of two layers, one layer
    assert all(len(store) == 3 and store.verify() == [] for store in stores.values())
    assert FeatureStore.open(out / "stores" / "noise").verify() == []
    records = [json.loads(line) for line in (out / "questions" / "part-00000.jsonl").open()]
    assert {record["clip"] for record in records} == set(stores["wan-t2v"].ids())
    page = (out / "index.html").read_text()
    for clip_id in stores["wan-t2v"].ids():
        assert clip_id in page
    pictures = 2 * 4  # groups and depth, of each choice of features
    images = 3 * 3 * (1 + 4 + 1)  # clips x frames x (pixels, wan, qwen)
    assert page.count('src="data:image/png;base64,') == images + pictures
    check_results(page, out / "probes")
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # nothing from anywhere else
    assert "random weights" in page
    assert "every file read back whole" in page
    assert str(out / "index.html") in capsys.readouterr().out
    monkeypatch.setattr(demo, "SETTINGS", {"relation": {}})
    assert main(["demo", "--out", str(out)]) == 0  # again, over its own folder: nothing of before is left
    assert [path.name for path in (out / "probes").iterdir()] == ["relation"]


def check_results(page: str, folder: Path) -> None:
    """The study's table has the numbers of the result files, of the probe that the task's own criterion picks."""
    rows = {}
    for name, features in FEATURES.items():
        cells = re.search(f'<th scope="row">{re.escape(name)}</th>(.*?)</tr>', page).group(1)
        rows[name] = re.sub("<[^>]*>", "", re.sub('<td class="from">.*?</td>', "", cells).replace("</td>", " ")).split()
        expected = []
        for axis in AXES:
            if axis.task not in demo.SETTINGS:
                continue
            results = json.loads((folder / axis.task / features / "results.json").read_text())
            assert len(results) == (4 if features == "vgm" else 1)
            by = criterion(axis.task)
            sign = -1 if by.higher else 1
            best = min(results, key=lambda r: sign * r["metrics"][by.metric])["metrics"]
            expected += [number(best[m.metric]) for m in axis.measures]
        assert rows[name] == expected
    assert len({tuple(cells) for cells in rows.values()}) == len(rows)  # each its own probes


def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path, capsys):
    for name in ("thesis.txt", "clips.jsonl"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        assert main(["demo", "--out", str(folder)]) == 2
        assert "holds files the demo did not make" in capsys.readouterr().err
        assert (folder / name).read_text() == "mine"


def test_long_commands_are_the_same_for_a_shell():
    flags = [word for i in range(9) for word in ("--set", f"name{i}=[1, 2]")]
    words = ["engine", "probe", "--labels", "a b/'c'", *flags]
    said = wrapped(shlex.join(words))
    assert 2 < len(said.split("\n"))
    assert max(map(len, said.split("\n"))) < 110
    printed = subprocess.run(["sh", "-c", "printf '%s\\n' " + said], capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines() == words


def test_principal_colours_follow_the_strongest_directions():
    generator = torch.Generator().manual_seed(0)
    strong = torch.randn(500, 3, generator=generator) * torch.tensor([30.0, 10.0, 3.0])
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0][:3]
    tokens = strong @ basis + 0.01 * torch.randn(500, 16, generator=generator)
    colours = principal_colours(tokens)(tokens)
    assert colours.dtype == np.uint8
    for c in range(3):
        assert abs(np.corrcoef(colours[:, c], strong[:, c])[0, 1]) == pytest.approx(1, abs=0.03)


def test_questions_stand_on_the_frames_they_are_about(tmp_path):
    scenes = [make_scene(seed, frames=4, height=64, width=96) for seed in range(2)]
    lines = []
    for scene in scenes:
        write_demo(tmp_path / "scenes", scene, kind="images")
        lines += record_lines(ask(table_of_scene(scene), Settings(per_clip=40)))
    (tmp_path / "part-00000.jsonl").write_text("".join(lines))
    records = [json.loads(line) for line in lines]
    chosen = list(samples(records))
    assert [(r["level"], r["form"]) for r in chosen] == [(level, form) for level in range(4) for form in FORMS]
    assert len({r["type"] for r in chosen}) == len(chosen)
    page = "".join(question_section(tmp_path, open_labels(tmp_path / "scenes")))
    for record in chosen:
        (article,) = [a for a in page.split("<article>") if escape(record["question"].split("\n")[0]) in a]
        assert escape(record["answer"]) in article
        box = r'x="(\d+)" y="(\d+)" width="(\d+)" height="(\d+)" class="box"'
        boxes = [tuple(map(int, found)) for found in re.findall(box, article)]
        edges = [thing["box"] for thing in record.get("objects", ())]
        assert boxes == [(x, y, right - x + 1, bottom - y + 1) for x, y, right, bottom in edges]
        first = re.search(r"base64,([^\"]*)", article).group(1)
        shown = np.asarray(Image.open(io.BytesIO(b64decode(first))))
        (scene,) = [scene for scene in scenes if scene.id == record["clip"]]
        assert (shown == render_clip(scene).rgb[record["frames"][0]]).all()
