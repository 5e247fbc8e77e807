"""Comparisons of rows: joined features with each part alone, and an encoder's positions with the probe's."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import get_args

from spatialprobe.probes.backbone import Position
from spatialprobe.probes.report.axes import Measure
from spatialprobe.probes.report.markup import Html, element
from spatialprobe.probes.report.scores import JOINED, Bench, Features, Probes, Scores, best_of
from spatialprobe.probes.report.tables import bench_head, titled_table, value_cell
from spatialprobe.probes.report.words import number, place, told


def fusion_tables(scores: Scores) -> Iterator[Html]:
    """For each set of joined features: each part alone, on the same clips and where it can be in the same place; the
    joined; and what joining adds to the better part."""
    alone = {row.key[0]: row for row in scores.rows if len(row.key) == 1}
    for row in scores.by_kind.get(JOINED, []):
        benches = [bench for bench in scores.benches if scores.best(row, bench)]
        lines: list[list[Html]] = [[] for _ in row.key]
        joined, gains = [], []
        for bench in benches:
            both = scores.best(row, bench)
            there = zip(row.key, both.places, strict=True)
            singles = [single(scores, alone.get(part), bench, where) for part, where in there]
            for m in bench.axis.measures:
                values = [p.mean(m.metric) if p else math.nan for p in singles]
                x, better = both.mean(m.metric), m.best(values)
                top = m.top([x, *values])
                for line, value in zip(lines, values, strict=True):
                    line.append(value_cell(value, best=value == top))
                joined.append(value_cell(x, best=x == top, spread=both.spread(m.metric)))
                gains.append(gain_cell(x, better if all(map(math.isfinite, values)) else None, m))
            for line, p in zip(lines, singles, strict=True):
                line.append(element("td", told_place(p) if p else "not measured alone", class_="from"))
            joined.append(element("td", told(both, scores.cells[row, bench]), class_="from"))
            gains.append(element("td", class_="from"))
        body = [
            element("tr", element("th", f"{name}, alone", scope="row"), line)
            for name, line in zip(row.parts, lines, strict=True)
        ]
        body.append(element("tr", element("th", "joined", scope="row"), joined))
        body.append(element("tr", element("th", "gain over the better part", scope="row"), gains, class_="mean"))
        yield titled_table(f"{row.name}: alone and joined", bench_head(scores, benches), [element("tbody", body)])


def single(scores: Scores, row: Features | None, bench: Bench, where: tuple[int, int | None]) -> Probes | None:
    """A part's own probe: of the same layer and step as in the joined, else its best."""
    there = scores.cells.get((row, bench), []) if row else []
    return best_of([p for p in there if p.places == (where,)]) or best_of(there)


def told_place(probes: Probes) -> str:
    return " + ".join(place(*each) for each in probes.places)


def gain_cell(x: float, better: float | None, measure: Measure) -> Html:
    """A difference with its sign, and a word for which way it goes."""
    if better is None or not math.isfinite(x) or measure.higher is None:
        return value_cell(math.nan)
    gain = x - better
    word = "no change" if gain == 0 else "better" if (gain > 0) == measure.higher else "worse"
    sign = "+" if gain > 0 else "\u2212" if gain < 0 else ""
    shown = element("data", sign + number(abs(gain)), value=repr(gain))
    return element("td", shown, " ", element("small", word), class_=word.replace(" ", "-"))


# -- encoders by positions --------------------------------------------------------------------------------------------


def encoder_grids(scores: Scores) -> Iterator[tuple[Bench, Html]]:
    """(bench, grid of encoders and their positions x the probe's positions), where results differ in either."""
    for bench in scores.benches:
        grid: dict[tuple[str, str, str], dict[str, list[Probes]]] = defaultdict(lambda: defaultdict(list))
        for row in scores.rows:
            for probes in scores.cells.get((row, bench), ()):
                if len(row.key) == 1 and (encoder := without_positions(row)):
                    grid[encoder][str(probes.first.config.get("position"))].append(probes)
        varied = {e for e in grid if len(grid[e]) > 1 or any(other[:2] == e[:2] and other != e for other in grid)}
        if varied:
            yield bench, encoder_grid(bench, {encoder: grid[encoder] for encoder in sorted(varied)})


def without_positions(row: Features) -> tuple[str, str, str] | None:
    """(its model, the identity it would have whatever its positions, its positions); None without a spec."""
    if not row.key[0].startswith("{"):
        return None
    fields = json.loads(row.key[0])
    positions = fields["options"].pop("pos_embed", "native")
    return row.models[0], json.dumps(fields, sort_keys=True), str(positions)


def encoder_grid(bench: Bench, grid: dict[tuple[str, str, str], dict[str, list[Probes]]]) -> Html:
    """For each measure a column per kind of positions in the probe; bold is the best of all columns of a measure."""
    there = {position for by_position in grid.values() for position in by_position}
    positions = [p for p in get_args(Position) if p in there] + sorted(there - set(get_args(Position)))
    best = {
        (encoder, position): best_of(probes)
        for encoder, by_position in grid.items()
        for position, probes in by_position.items()
    }
    top = {m: m.top(p.mean(m.metric) for p in best.values() if p) for m in bench.axis.measures}
    lines = []
    for encoder in grid:
        model, _, own = encoder
        line = [element("th", f"{model}, positions {own}", scope="row")]
        for m in bench.axis.measures:
            for position in positions:
                p = best.get((encoder, position))
                x = p.mean(m.metric) if p else math.nan
                line.append(value_cell(x, best=x == top[m], spread=p.spread(m.metric) if p else None))
        lines.append(element("tr", line))
    head = [element("th", "encoder", scope="col", rowspan=2)]
    head += [element("th", m.heading + m.arrow, scope="colgroup", colspan=len(positions)) for m in bench.axis.measures]
    names = [
        element("th", position, scope="col", class_="number") for _ in bench.axis.measures for position in positions
    ]
    caption = f"{bench.axis.title}: encoders and their positions, by positions in the probe"
    return titled_table(caption, [element("tr", head), element("tr", names)], [element("tbody", lines)])
