"""Charts as inline SVG in the page's own colours: semantics against geometry, and learning curves.

Each has a title and a description that say in words what is drawn; names and values are in tables beside them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from spatialprobe.probes.report.axes import Measure
from spatialprobe.probes.report.markup import Html, element, scroll
from spatialprobe.probes.report.scores import KINDS, Bench, Features, Scores
from spatialprobe.probes.report.words import number
from spatialprobe.probes.results import Result, varied

WIDTH, HEIGHT = 520, 380  # user units; a chart is as wide as its column
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 48  # margins
LETTER, LONGEST = 6.7, 34  # width of a letter of a name, and how many of them are shown
PLACES = (  # of a name beside its mark, the first is preferred: x, y, what of it is there
    (11, 4, "start"), (-11, 4, "end"), (9, -8, "start"), (-9, -8, "end"), (9, 16, "start"), (-9, 16, "end"),
    (0, -12, "middle"), (0, 22, "middle"), (9, -20, "start"), (-9, -20, "end"), (9, 28, "start"), (-9, 28, "end"),
)  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond")  # of KINDS, then of the rest


@dataclass(frozen=True)
class Scale:
    """Values to user units, with ticks at round numbers."""

    low: float
    high: float
    start: float
    end: float
    whole: bool = False  # ticks at whole numbers alone

    def __call__(self, x: float) -> float:
        return self.start + (x - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        low, high = sorted((self.low, self.high))
        step = 10 ** math.floor(math.log10((high - low) / 3))
        step = max(step, 1) if self.whole else step
        step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 5)
        first = math.ceil(low / step - 1e-9)
        return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def scale(values: Sequence[float], start: float, end: float, *, higher: bool = True) -> Scale:
    """Of all values with a tenth of room at either end; the better end is `end`."""
    low, high = min(values), max(values)
    room = 0.1 * (high - low) or 0.1 * abs(high) or 0.1
    low, high = low - room, high + room
    return Scale(low, high, start, end) if higher else Scale(high, low, start, end)


def epoch_scale(last: int) -> Scale:
    """Epochs from 1 on."""
    return Scale(0.5 if last == 1 else 1, last + (0.5 if last == 1 else 0), LEFT, WIDTH - RIGHT, whole=True)


def svg(title: str, description: str, *content: Html, height: int = HEIGHT) -> Html:
    inside = element("title", title), element("desc", description), content
    return element(
        "svg", inside, role="img", aria_label=f"{title}. {description}", viewBox=f"0 0 {WIDTH} {height}", class_="chart"
    )


def label(content: str, x: float, y: float, *, anchor: str = "start", class_: str | None = None) -> Html:
    return element("text", content, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return element("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=class_)


def axes(x: Scale, y: Scale, x_title: str, y_title: str) -> list[Html]:
    """Grid lines with their values, and what the axes are."""
    out = []
    for tick in x.ticks:
        out += [line(x(tick), TOP, x(tick), HEIGHT - BOTTOM, "grid")]
        out += [label(f"{tick:.3g}", x(tick), HEIGHT - BOTTOM + 18, anchor="middle")]
    for tick in y.ticks:
        out += [line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid")]
        out += [label(f"{tick:.3g}", LEFT - 8, y(tick) + 4, anchor="end")]
    out.append(label(x_title, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, anchor="middle", class_="axis"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = element(
        "g", label(y_title, 0, 0, anchor="middle", class_="axis"), transform=f"translate(14 {middle:.0f}) rotate(-90)"
    )
    return [*out, turned]


# -- semantics against geometry ---------------------------------------------------------------------------------------


def scatter(scores: Scores, across: tuple[Bench, Measure], up: tuple[Bench, Measure]) -> Html | None:
    """A mark for each row with both numbers, better to the right and up; None for fewer than two."""
    points = []
    for row in scores.rows:
        probes = scores.best(row, across[0]), scores.best(row, up[0])
        if all(probes):
            x, y = probes[0].mean(across[1].metric), probes[1].mean(up[1].metric)
            points += [(row, x, y)] * (math.isfinite(x) and math.isfinite(y))
    if len(points) < 2:
        return None
    x = scale([p[1] for p in points], LEFT, WIDTH - RIGHT, higher=across[1].higher)
    y = scale([p[2] for p in points], HEIGHT - BOTTOM, TOP, higher=up[1].higher)
    titles = [
        f"{scores.with_title(b)}: {m.heading}, {'more' if m.higher else 'less'} is better" for b, m in (across, up)
    ]
    marks = [mark(row, x(a), y(b)) for row, a, b in points]
    said = "; ".join(f"{row.name} {number(a)}, {number(b)}" for row, a, b in points)
    drawing = svg(
        f"{titles[1]}, against {titles[0]}",
        f"Each mark is one row of the study's table, the better the further right and up. {said}.",
        *axes(x, y, f"{titles[0]} →", f"{titles[1]} →"),
        *marks,
        *names([(row.name, x(a), y(b)) for row, a, b in points]),
    )
    return element("figure", scroll("Chart", drawing), legend([row for row, _, _ in points]))


def shape_of(row: Features) -> str:
    return SHAPES[list(KINDS).index(row.kind) if row.kind in KINDS else len(KINDS)]


def mark(row: Features, x: float, y: float, size: float = 6) -> Html:
    shape = shape_of(row)
    if shape == "circle":
        return element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=size, class_="mark")
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "triangle": ((0, -1.2), (1.1, 1), (-1.1, 1)),
        "diamond": ((0, -1.4), (1.2, 0), (0, 1.4), (-1.2, 0)),
    }[shape]
    points = " ".join(f"{x + size * a:.1f},{y + size * b:.1f}" for a, b in corners)
    return element("polygon", points=points, class_="mark")


def names(points: Sequence[tuple[str, float, float]]) -> list[Html]:
    """Names beside their marks: for each the first of PLACES where it covers nothing else, or the least."""
    marks = [(x - 8, y - 8, x + 8, y + 8) for _, x, y in points]
    placed: list[tuple[float, float, float, float]] = []
    out = []
    for name, x, y in sorted(points, key=lambda p: p[2]):
        shown = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
        wide, places = LETTER * len(shown), []
        for dx, dy, anchor in PLACES:
            left = x + dx - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
            box = (left, y + dy - 11, left + wide, y + dy + 3)
            out_of_sight = max(0, LEFT - box[0]) + max(0, box[2] - WIDTH + 4) + max(0, TOP - 4 - box[1])
            others = [mark for mark in marks if mark[:2] != (x - 8, y - 8)]
            places.append(
                (10 * out_of_sight + sum(overlap(box, other) for other in [*placed, *others]), box, dx, dy, anchor)
            )
        _, box, dx, dy, anchor = min(places, key=lambda place: place[0])
        placed.append(box)
        out.append(label(shown, x + dx, y + dy, anchor=anchor, class_="name"))
    return out


def overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Area that two boxes (left, top, right, bottom) share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def legend(rows: Sequence[Features]) -> Html:
    """Which shape is which kind."""
    kinds = dict.fromkeys(row.kind if row.kind in KINDS else "joined and other inputs" for row in rows)
    of = {
        kind: next(r for r in rows if (r.kind if r.kind in KINDS else "joined and other inputs") == kind)
        for kind in kinds
    }
    items = [
        element("span", element("svg", mark(of[kind], 8, 8, 5), viewBox="0 0 16 16", aria_hidden="true"), " ", kind)
        for kind in kinds
    ]
    return element("figcaption", items, class_="legend")


# -- learning curves --------------------------------------------------------------------------------------------------


def curves(results: Sequence[Result], best: Result | None) -> Html | None:
    """Validation loss per epoch of every probe of a run, the one in the study's table emphasised; None without any."""
    series = []
    for settings, result in zip(varied(results), results, strict=True):
        points = [(i + 1, row.get("val_loss")) for i, row in enumerate(result.curve)]
        points = [(epoch, x) for epoch, x in points if x is not None and math.isfinite(x)]
        if points:
            series.append((", ".join(f"{k} {v}" for k, v in settings.items()) or result.task, points, result is best))
    if not series:
        return None
    x = epoch_scale(max(epoch for _, points, _ in series for epoch, _ in points))
    y = scale([loss for _, points, _ in series for _, loss in points], HEIGHT - BOTTOM, TOP)
    lines = [
        element(
            "polyline",
            points=" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points),
            class_="curve best" if top else "curve",
        )
        for _, points, top in sorted(series, key=lambda one: one[2])
    ]
    if len(series[0][1]) == 1:
        lines += [
            element("circle", cx=f"{x(p[0][0]):.1f}", cy=f"{y(p[0][1]):.1f}", r=4, class_="mark") for _, p, _ in series
        ]
    said = [f"{name}: {number(p[0][1])} to {number(p[-1][1])}" for name, p, _ in series[:12]]
    more = f"; and {len(series) - 12} more" if len(series) > 12 else ""
    drawing = svg(
        f"Validation loss of {len(series)} {'probe' if len(series) == 1 else 'probes'} by epoch",
        f"From the first to the last epoch, {'; '.join(said)}{more}.",
        *axes(x, y, "epoch", "validation loss"),
        *lines,
    )
    caption = "The thick line is the probe that the tables above show." if any(top for *_, top in series) else None
    return element("figure", scroll("Chart", drawing), element("figcaption", "Validation loss by epoch. ", caption))
