"""The demo's page: the report of its probes, and before it the clips with what two models make of them."""

import io
import shlex
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spatialprobe.engine.clips.decode import load_clip
from spatialprobe.engine.demo.questions import PER_CLIP, question_section
from spatialprobe.engine.files.durable import write_whole
from spatialprobe.engine.job import Job
from spatialprobe.engine.pipeline.outcomes import Report
from spatialprobe.engine.run import job_clips
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import FrameSelection
from spatialprobe.probes.labels import open_labels
from spatialprobe.probes.report.collect import collect
from spatialprobe.probes.report.markup import Html, element, fold, scroll
from spatialprobe.probes.report.page import Section, render
from spatialprobe.probes.report.scores import make_scores

SHOWN = (0, 8, 16)  # frames of each clip; every model has rows that see them
OPEN = 2  # clips that are seen at once; the others unfold


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


def write_page(root: Path, shows: Sequence[Showcase], commands: Sequence[str], frames: int, seconds: float) -> Path:
    """Writes `root`/index.html and returns its path. `commands`: what makes the same again."""
    clips = list(clip_figures(shows, frames))
    asked = question_section(root / "questions", open_labels(root / "scenes"))
    first = [
        Section("clips", "Clips and features", list(clip_section(shows, clips))),
        Section("questions", "Questions about these rooms", list(asked)),
    ]
    last = [Section("again", "Make it yourself", [again(root, shows, commands)])]
    intro = element(
        "div",
        element(
            "p",
            f"{len(clips)} rendered rooms, two models with ",
            element("strong", "random weights"),
            f", and the engine's own path from clips to features on disk and from there to trained probes, in "
            f"{seconds:.0f} s. The weights are random, so no number says anything about Wan or Qwen3-VL, and few clips "
            "cannot tell similar rows apart: only a wide gap to the row of noise means that something was read from "
            "features. What the page shows is the whole path at work, and what a report of trained models looks like.",
        ),
        class_="lead",
    )
    scores = make_scores(collect([root / "probes"]))
    page = root / "index.html"
    write_whole(
        page, render(scores, f"What two models make of {len(clips)} rooms", intro=intro, first=first, last=last)
    )
    return page


def clip_section(shows: Sequence[Showcase], clips: Sequence[Html]) -> Iterator[Html]:
    yield element(
        "p",
        "A feature image shows the first three principal components of a block's features, over all clips, as red, "
        "green and blue. Of random weights it shows that features keep their place and time, not what a trained model "
        "knows.",
    )
    yield from clips[:OPEN]
    if clips[OPEN:]:
        yield fold(f"{len(clips) - OPEN} more clips", clips[OPEN:])
    for show in shows:
        info = show.store.info()
        shapes = {tensor: " x ".join(map(str, next(iter(there)))) for tensor, there in info.shapes.items()}
        same = "; ".join(f"{tensor} {shape}" for tensor, shape in shapes.items())
        verified = "every file read back whole" if not show.problems else "; ".join(show.problems)
        yield element("p", f"{show.name}: {same}, {show.store.spec.dtype}; verified: {verified}.", class_="note")


def clip_figures(shows: Sequence[Showcase], frames: int) -> Iterator[Html]:
    """Of each clip the SHOWN frames, and every model's features of them."""
    images = {
        f"{show.name} block {layer}" + ("" if step is None else f", step {step}"): feature_images(
            show.store, layer, step
        )
        for show in shows
        for layer, step in show.store.spec.tensors()
    }
    for ref in job_clips(shows[0].job):
        clip = load_clip(ref, FrameSelection(window=frames))
        kind = "video" if Path(ref.source).is_file() else "image folder"
        columns = {"frame": [clip.frames[f].permute(1, 2, 0).numpy() for f in SHOWN]}
        columns |= {label: by_clip[ref.id] for label, by_clip in images.items()}
        caption = element("figcaption", element("strong", ref.id), f" {kind}, {frames} frames")
        yield element("figure", caption, image_grid(ref.id, columns))


def again(root: Path, shows: Sequence[Showcase], commands: Sequence[str]) -> Html:
    report = shlex.join(["engine", "report", str(root / "probes"), "--out", "page.html"])
    lifted, questions = root / "lifted", root / "questions"
    ask = [
        ["engine", "lift", str(root / "scenes"), "--out", f"{lifted}-again"],
        ["engine", "ask", str(lifted), "--out", f"{questions}-again", "--per-clip", str(PER_CLIP)],
    ]
    lines = map(wrapped, [*map(shlex.join, ask), *(show.command for show in shows), *commands, report])
    return element("pre", "\n\n".join(lines), tabindex=0, role="group", aria_label="Commands that make the same")


def wrapped(command: str, width: int = 72) -> str:
    """The same command for a shell, going on in a new line before the first flag beyond `width` characters."""
    lines = [""]
    for word in map(shlex.quote, shlex.split(command)):
        if word.startswith("--") and len(lines[-1]) > width:
            lines.append(word)
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n    ".join(lines)


# -- pictures ---------------------------------------------------------------------------------------------------------


def feature_images(store: FeatureStore, layer: int, step: int | None) -> dict[str, list[np.ndarray]]:
    """{clip id: images uint8 [H, W, 3] for the SHOWN frames}, by one projection for all clips."""
    features = {clip_id: store.read(clip_id, layer, step).at(torch.tensor(SHOWN)).float() for clip_id in store.ids()}
    project = principal_colours(torch.cat([x.flatten(0, 2) for x in features.values()]))
    return {clip_id: list(project(x)) for clip_id, x in features.items()}


def principal_colours(tokens: Tensor) -> Callable[[Tensor], np.ndarray]:  # float32 [N, C]
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


def image_grid(clip_id: str, columns: dict[str, list[np.ndarray]]) -> Html:
    """One column per label, one row per shown frame."""
    cells = [element("span"), *(element("span", label) for label in columns)]
    for i, frame in enumerate(SHOWN):
        cells.append(element("span", frame))
        cells += [image(f"{label}, frame {frame} of {clip_id}", images[i]) for label, images in columns.items()]
    style = f"grid-template-columns: 1.5rem repeat({len(columns)}, 1fr)"
    return scroll(f"Frames and features of {clip_id}", element("div", cells, class_="grid", style=style))


def image(words: str, pixels: np.ndarray) -> Html:  # uint8 [H, W, 3]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return element("img", alt=words, src="data:image/png;base64," + b64encode(buffer.getvalue()).decode())
