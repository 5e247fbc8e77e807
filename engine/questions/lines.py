"""Questions as JSON lines: a record with every number used, and the chat format that fine-tuning tools read.

A record: id, clip, frames (of the window: the image's, and that of a second image where there is one), type, level,
form, question, answer, right (the answer in no sentence); choices, letter and choice_values of a multiple choice;
truth and stated of a statement; word (what was asked of things, or is said of them); objects (id in the masks, tag, the
name that the question uses, box in the first image as first u, v and last u, v) or points (u, v), in the order of the
value's numbers, the one that was picked or asked about first; size (width, height) of the image that points are in;
value (a number or several), unit; margin, margin_of.

A chat line: id, images, messages with role and content, "<image>" in the content for each of the images.
"""

from collections.abc import Iterator
from json.encoder import encode_basestring_ascii as quoted

from spatialprobe.engine.lifting.objects import ObjectTable
from spatialprobe.engine.questions.ask import Asked, Question
from spatialprobe.engine.questions.forms import Composed
from spatialprobe.engine.questions.numbers import UNITS
from spatialprobe.engine.questions.types import TYPES

# What stands in every record of a type: its middle, and its end
MIDDLES = {kind.name: f'"type": "{kind.name}", "level": {kind.level}, "form": ' for kind in TYPES}
ENDS = {
    kind.name: f', "unit": {quoted(UNITS[kind.unit].symbol if kind.unit else "")}, '
    f'"margin": {round(kind.margin.value, 6)}, "margin_of": {quoted(kind.margin.of)}}}\n'
    for kind in TYPES
}
WORDS = {(kind.name, k): f', "word": {quoted(inside)}' for kind in TYPES for k, (_, inside) in enumerate(kind.words)}


def record_lines(asked: Asked) -> Iterator[str]:
    """One line for each question, with its line end."""
    table, frames, known = asked.table, asked.table.frames.tolist(), {}
    start, clip = f'{{"id": {quoted(table.clip)[:-1]}#', f'", "clip": {quoted(table.clip)}, "frames": '
    for number, q in enumerate(asked.questions):
        shown = f"[{frames[q.view]}]" if q.other is None else f"[{frames[q.view]}, {frames[q.other]}]"
        said, kind = q.said, q.kind
        yield (
            f'{start}{number}{clip}{shown}, {MIDDLES[kind.name]}"{q.form}", "question": {quoted(said.question)}, '
            f'"answer": {quoted(said.answer)}, "right": {quoted(said.right)}{said_fields(said)}'
            f"{WORDS[kind.name, q.outcome] if kind.words else ''}{thing_fields(q, table, known)}, "
            f'"value": {q.value!r}{ENDS[kind.name]}'  # of rounded numbers: what JSON calls them too
        )


def said_fields(said: Composed) -> str:
    if said.choices is not None:
        values = "" if said.choice_values is None else f', "choice_values": {said.choice_values!r}'
        return f', "choices": [{", ".join(map(quoted, said.choices))}], "letter": "{said.letter}"{values}'
    if said.truth is not None:
        stated = quoted(said.stated) if isinstance(said.stated, str) else repr(said.stated)
        return f', "truth": {"true" if said.truth else "false"}, "stated": {stated}'
    return ""


def thing_fields(q: Question, table: ObjectTable, known: dict[tuple, str]) -> str:
    if q.kind.points:
        height, width = table.size
        return f', "points": {table.sample_pixels[q.view][q.things].tolist()}, "size": [{width}, {height}]'
    objects = []
    for key in zip(q.things, [q.view] * len(q.things), q.names, strict=True):
        if key not in known:
            i, view, name = key
            box = [round(edge) for edge in table.box[i, view].tolist()]
            about = f'"tag": {quoted(table.tags[i])}, "name": {quoted(name)}, "box": {box}'
            known[key] = f'{{"id": {int(table.ids[i])}, {about}}}'
        objects.append(known[key])
    return f', "objects": [{", ".join(objects)}]'


def chat_lines(asked: Asked, images: str) -> Iterator[str]:
    """One line for each question. `images` is a path with {clip} and {frame} (of the window) in it."""
    clip, frames, start = asked.table.clip, asked.table.frames.tolist(), f'{{"id": {quoted(asked.table.clip)[:-1]}#'
    paths = {view: quoted(images.format(clip=clip, frame=frame)) for view, frame in enumerate(frames)}
    for number, q in enumerate(asked.questions):
        shown = paths[q.view] if q.other is None else f"{paths[q.view]}, {paths[q.other]}"
        tokens = "<image>\n" if q.other is None else "<image>\n<image>\n"
        yield (
            f'{start}{number}", "images": [{shown}], "messages": [{{"role": "user", "content": '
            f'{quoted(tokens + q.said.question)}}}, {{"role": "assistant", "content": {quoted(q.said.answer)}}}]}}\n'
        )
