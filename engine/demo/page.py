"""The demo's page: one self-contained HTML file with frames, feature images, stage times and store sizes.

What probes say is `probe_section.py`'s and comes as HTML.
"""

import base64
import io
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spatialprobe.engine.decode import load_clip
from spatialprobe.engine.job import Job
from spatialprobe.engine.report import Report
from spatialprobe.engine.run import job_clips
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import FrameSelection

SHOWN = (0, 8, 16)  # frames of each clip; every model has rows that see them
OPEN = 2  # clips that are seen at once; the others unfold

CSS = """
:root { --ink: #1c2024; --soft: #60666d; --line: #dfe3e8; --back: #fbfbfa; --bar: #3b7dd8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #9aa1a9; --line: #33383e; --back: #16181b; --bar: #6ba4f0; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p, figcaption, td, th { color: var(--soft); } b, h1, h2, td:first-child { color: var(--ink); }
.clip { border-top: 1px solid var(--line); padding-top: .8rem; margin-top: 1.2rem; }
.grid { display: grid; gap: .3rem; align-items: center; font-size: .8rem; color: var(--soft); }
.grid img { width: 100%; display: block; image-rendering: pixelated; border-radius: 3px; }
.scroll { overflow-x: auto; } .scroll .grid { min-width: 46rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); font-weight: 400; }
.numbers { min-width: 40rem; } .numbers :is(td, th):not(:first-child) { text-align: right; }
.numbers td { color: var(--ink); } .numbers [colspan] { border-bottom: 0; }
summary { cursor: pointer; margin-top: 1.2rem; }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--least)), 1fr)); }
figure { margin: 0; } figure img { width: 100%; display: block; border-radius: 3px; } figcaption { font-size: .8rem; }
td.bar { width: 45%; } td.bar div { background: var(--bar); height: .7rem; border-radius: 2px; }
code, pre { font: .85rem/1.45 ui-monospace, monospace; } pre { overflow-x: auto; white-space: pre-wrap; }
"""


@dataclass
class Showcase:
    """One model's part of the demo."""

    name: str
    job: Job
    report: Report
    store: FeatureStore
    problems: list[str]  # of `verify`

    @property
    def command(self) -> str:
        job = self.job
        words = ["engine", "extract", job.clips, "--model", job.model, "--out", job.out, "--window", str(job.window)]
        words += ["--layers", ",".join(map(str, job.layers))]
        words += ["--steps", ",".join(map(str, job.steps))] if job.steps else []
        words += ["--query", job.query] if job.query else []
        return shlex.join([*words, *(f"--{k}={v}" for k, v in job.options.items())])


def write_page(root: Path, shows: list[Showcase], probes: Iterable[str], frames: int, seconds: float) -> Path:
    """Writes `root`/index.html and returns its path. `probes`: lines of HTML between the clips and the runs."""
    images = {
        (show.name, layer, step): feature_images(show.store, layer, step)
        for show in shows
        for layer, step in show.store.spec.tensors()
    }
    clips = []
    for ref in job_clips(shows[0].job):
        clip = load_clip(ref, FrameSelection(window=frames))
        kind = "video" if Path(ref.source).is_file() else "image folder"
        columns = {"frame": [clip.frames[f].permute(1, 2, 0).numpy() for f in SHOWN]}
        for (name, layer, step), by_clip in images.items():
            columns[f"{name} block {layer}" + ("" if step is None else f", step {step}")] = by_clip[ref.id]
        title = f"<b>{escape(ref.id)}</b> <small>{kind}, {frames} frames</small>"
        clips.append(f'<div class="clip">{title}{image_grid(columns)}</div>')
    body = [
        f"<h1>spatialprobe: what two models make of {len(clips)} rooms</h1>",
        f"<p>Rendered scenes, <b>models with random weights</b>, genuine checkpoint layouts and the engine's own path "
        f"from clip to disk and from disk to trained probes, in {seconds:.0f} s. A feature image shows the first three "
        f"principal components of a layer's features, over all clips, as red, green and blue. With random weights it "
        f"shows that features keep their place and time, not what a trained model knows.</p>",
        "<h2>Clips and features</h2>",
        *clips[:OPEN],
    ]
    if clips[OPEN:]:
        body += [f"<details><summary>{len(clips) - OPEN} more</summary>", *clips[OPEN:], "</details>"]
    body += probes
    for show in shows:
        body += run_section(show)
    page = root / "index.html"
    page.write_text(
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>spatialprobe demo</title><style>{CSS}</style>\n" + "\n".join(body) + "\n</html>\n"
    )
    return page


def run_section(show: Showcase) -> Iterator[str]:
    info, timing = show.store.info(), show.report.timing
    rate = show.report.written / timing["seconds"]
    yield f"<h2>{escape(show.name)}: {show.report.written} clips, {rate:.1f} clips/s</h2>"
    yield f"<pre>{escape(show.command)}</pre>"
    longest = max(stage["seconds"] for stage in timing["stages"].values())
    yield "<table><tr><th>stage</th><th>seconds</th><th>share of the longest</th></tr>"
    for name, stage in timing["stages"].items():
        width = 100 * stage["seconds"] / longest
        bar = f'<div style="width:{width:.1f}%"></div>'
        yield f'<tr><td>{escape(name)}</td><td>{stage["seconds"]:.2f}</td><td class="bar">{bar}</td></tr>'
    yield "</table>"
    yield (
        f"<p>Device busy {timing['busy']:.0%} of {timing['seconds']:.1f} s, peak memory of the process "
        f"{timing['peak_memory_bytes'] / 1e9:.2f} GB. Loader and writer stages run beside the device.</p>"
    )
    yield "<table><tr><th>tensor</th><th>rows x height x width x channels</th><th>dtype</th></tr>"
    for tensor, shapes in info.shapes.items():
        shape = " x ".join(map(str, next(iter(shapes))))
        yield f"<tr><td>{tensor}</td><td>{shape}</td><td>{show.store.spec.dtype}</td></tr>"
    yield "</table>"
    verified = "every file read back whole" if not show.problems else "; ".join(map(escape, show.problems))
    yield f"<p>Store {show.store.spec_hash}: {info.clips} files, {info.bytes / 1e6:.2f} MB; verified: {verified}.</p>"


def feature_images(store: FeatureStore, layer: int, step: int | None) -> dict[str, list[np.ndarray]]:
    """{clip id: images uint8 [H, W, 3] for the SHOWN frames}, by one projection for all clips."""
    features = {clip_id: store.read(clip_id, layer, step).at(torch.tensor(SHOWN)).float() for clip_id in store.ids()}
    project = principal_colours(torch.cat([x.flatten(0, 2) for x in features.values()]))
    return {clip_id: list(project(x)) for clip_id, x in features.items()}


def principal_colours(tokens: Tensor):  # float32 [N, C]
    """A function from features [..., C] to RGB uint8 [..., 3]: the first three principal components of `tokens`."""
    mean = tokens.mean(0)
    _, _, components = torch.linalg.svd(tokens - mean, full_matrices=False)
    axes = components[:3].T  # [C, 3]
    axes = axes * axes.sum(0).sign()  # the sign of a component is arbitrary: fix it, so that reruns look the same
    coordinates = (tokens - mean) @ axes
    low, high = (torch.quantile(coordinates, q, dim=0) for q in (0.02, 0.98))

    def project(x: Tensor) -> np.ndarray:
        colours = ((x - mean) @ axes - low) / (high - low)
        return (colours.clamp(0, 1) * 255).round().to(torch.uint8).numpy()

    return project


def image_grid(columns: dict[str, list[np.ndarray]]) -> str:
    """One column per label, one row per shown frame."""
    cells = ["<span></span>", *(f"<span>{escape(label)}</span>" for label in columns)]
    for i, frame in enumerate(SHOWN):
        cells.append(f"<span>{frame}</span>")
        for label, images in columns.items():
            cells.append(f'<img alt="{escape(label)}, frame {frame}" src="{data_uri(images[i])}">')
    style = f"grid-template-columns: 1.5rem repeat({len(columns)}, 1fr)"
    return f'<div class="scroll"><div class="grid" style="{style}">' + "".join(cells) + "</div></div>"


def data_uri(image: np.ndarray) -> str:  # uint8 [H, W, 3]
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return png_uri(buffer.getvalue())


def png_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
