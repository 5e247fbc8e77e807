"""Layers by noise steps: the headline number of an axis at each place, printed, with a colour that repeats it."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from spatialprobe.probes.report.axes import Measure
from spatialprobe.probes.report.markup import Html, element
from spatialprobe.probes.report.scores import Features, Scores, best_of
from spatialprobe.probes.report.tables import titled_table, value_cell

SHADES = 9  # of a map's cells


def layer_maps(scores: Scores, row: Features) -> Iterator[Html]:
    """For each bench with probes of several layers or steps: the first number at each, of the best probe there."""
    for bench in scores.benches if len(row.key) == 1 else ():
        measure, by_place = bench.axis.headline, defaultdict(list)
        for probes in scores.cells.get((row, bench), ()):
            by_place[probes.places].append(probes)
        if len(by_place) > 1:
            at = {places[0]: best_of(there) for places, there in by_place.items()}
            values = {where: p.mean(measure.metric) for where, p in at.items() if p}
            yield layer_map(f"{scores.with_title(bench)}: {measure.heading}", row, measure, values)


def layer_map(title: str, row: Features, measure: Measure, values: dict[tuple[int, int | None], float]) -> Html:
    layers = sorted({layer for layer, _ in values})
    steps = sorted({step for _, step in values}, key=lambda step: -1 if step is None else step)
    shade = shades(values.values(), measure)
    best = measure.top(values.values())
    lines = []
    for layer in layers:
        line = [element("th", f"block {layer}", scope="row")]
        for step in steps:
            x = values.get((layer, step), math.nan)
            line.append(value_cell(x, best=x == best, shade=shade(x)))
        lines.append(element("tr", line))
    head = [element("th", "block", scope="col")]
    head += [element("th", "no steps" if s is None else f"step {s}", scope="col", class_="number") for s in steps]
    table = titled_table(f"{title} of {row.name}, by block and step", [element("tr", head)], [
        element("tbody", lines)
    ], class_="map")  # fmt: skip
    return element("figure", element("figcaption", title + measure.arrow), table)


def shades(values: Iterable[float], measure: Measure) -> Callable[[float], int | None]:
    """value -> 0 (the worst) to SHADES - 1 (the best); None for what is no number, and where all are equal."""
    there = [x for x in values if math.isfinite(x)]
    low, high = (min(there), max(there)) if there else (0.0, 0.0)

    def shade(x: float) -> int | None:
        if not math.isfinite(x) or high == low:
            return None
        share = (x - low) / (high - low)
        return round((1 - share if measure.higher is False else share) * (SHADES - 1))

    return shade
