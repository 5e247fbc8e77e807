"""The demo's questions: its scenes lifted to 3D and asked about, and a few questions on the frames they are about."""

import io
import json
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spatialprobe.engine.lifting.run import LiftJob, run_lift
from spatialprobe.engine.pipeline.outcomes import Report
from spatialprobe.engine.questions.forms import FORMS
from spatialprobe.engine.questions.run import AskJob, run_ask
from spatialprobe.engine.questions.settings import Settings
from spatialprobe.engine.questions.types import LEVELS
from spatialprobe.probes.labels import Labels, open_labels
from spatialprobe.probes.report.markup import Html, element, fold

PER_CLIP = 60

Record = Mapping[str, Any]


def lift_and_ask(scenes: Path, lifted: Path, questions: Path) -> list[Report]:
    """What became of the clips: of `engine lift` with what the scenes' labels say, and of `engine ask`."""
    made, _ = run_lift(open_labels(scenes), None, LiftJob(str(lifted)))
    asked, _, _ = run_ask(AskJob(str(lifted), str(questions), Settings(per_clip=PER_CLIP)))
    return [made, asked]


def question_section(folder: Path, labels: Labels) -> Iterator[Html]:
    """Of all questions of `folder` a few, each on its frames, with what it is about outlined and numbered."""
    records = [json.loads(line) for part in sorted(folder.glob("part-*.jsonl")) for line in part.open()]
    kinds, clips = len({r["type"] for r in records}), len({r["clip"] for r in records})
    yield element(
        "p",
        f"{len(records):,} questions of {kinds} types about {clips} clips, made by templates from what depth and masks "
        "say of the objects in 3D. What is ambiguous or undecided was left out. Here are a few; the numbers in the "
        "pictures are only for readers of this page.",
    )
    seen, folded = [], []
    for record in samples(records):
        first = record["form"] == FORMS[(record["level"] + 1) % len(FORMS)]  # one of each level, of all forms
        (seen if first else folded).append(question(record, labels))
    yield element("div", seen, class_="cards")
    if folded:
        yield fold(f"{len(folded)} more questions", element("div", folded, class_="cards"))


def samples(records: Sequence[Record]) -> Iterator[Record]:
    """For each level one question of each form, of types and clips that were not shown before where there are such."""
    types, clips = set(), set()
    for level in range(len(LEVELS)):
        for form in FORMS:
            there = [r for r in records if r["level"] == level and r["form"] == form]
            if there:
                chosen = min(there, key=lambda r: (r["type"] in types, r["clip"] in clips, len(r["question"])))
                types.add(chosen["type"])
                clips.add(chosen["clip"])
                yield chosen


def question(record: Record, labels: Labels) -> Html:
    frames = labels.read(record["clip"], record["frames"], ("images",))["images"].permute(0, 2, 3, 1).numpy()
    shown = [scene(record, frame, frames[i], marked=i == 0) for i, frame in enumerate(record["frames"])]
    level = f"level {record['level']}: {LEVELS[record['level']]}"
    about = f"{level}; {record['type'].replace('_', ' ')}, {record['form']}"
    asked, *choices = record["question"].split("\n")
    return element(
        "article",
        shown,
        element("p", about, class_="note"),
        element("p", element("strong", asked), [(element("br"), choice) for choice in choices], class_="asked"),
        element("p", record["answer"], class_="answer"),
    )


def scene(record: Record, frame: int, pixels: np.ndarray, *, marked: bool) -> Html:  # uint8 [H, W, 3]
    """A frame, with the objects' boxes or the points that are asked about."""
    height, width = pixels.shape[:2]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    parts = [
        element(
            "image", href="data:image/png;base64," + b64encode(buffer.getvalue()).decode(), width=width, height=height
        )
    ]
    told = []
    for i, thing in enumerate(record.get("objects", ()) if marked else ()):
        left, top, right, bottom = thing["box"]
        parts.append(element("rect", x=left, y=top, width=right - left + 1, height=bottom - top + 1, class_="box"))
        parts.append(number(i + 1, left, top))
        told.append(f"{i + 1} is {thing['name']}")
    for i, (x, y) in enumerate(record.get("points", ()) if marked else ()):
        parts.append(element("circle", cx=x, cy=y, r=3, class_="box"))
        parts.append(number(i + 1, x + 4, y - 14))
        told.append(f"{i + 1} is the point ({x}, {y})")
    words = f"Frame {frame} of {record['clip']}" + (f": {', '.join(told)}" if told else "")
    return element(
        "svg",
        element("title", words),
        parts,
        role="img",
        aria_label=words,
        viewBox=f"0 0 {width} {height}",
        class_="scene",
    )


def number(i: int, x: int, y: int) -> Html:
    """A figure on a plate, so that it can be read on any picture."""
    y = max(0, y)
    plate = element("rect", x=x, y=y, width=11, height=13, class_="plate")
    return element("g", plate, element("text", i, x=x + 5.5, y=y + 10, text_anchor="middle"), class_="number")
