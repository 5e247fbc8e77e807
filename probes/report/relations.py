"""The relation task by level and by relation: a number per cell and a bar that repeats it."""

import math
from collections.abc import Iterator, Sequence

from spatialprobe.engine.questions.relations import RELATIONS
from spatialprobe.engine.questions.types import LEVELS
from spatialprobe.probes.labels.relations import KINDS, NAMES
from spatialprobe.probes.report.axes import Measure
from spatialprobe.probes.report.markup import Html, element, fold
from spatialprobe.probes.report.scores import Bench, Features, Probes, Scores
from spatialprobe.probes.report.tables import bar_cell, heading, titled_table, value_cell

BY_LEVEL = (
    Measure("balanced_accuracy", "Yes or no: balanced accuracy", True, "one half is what guessing scores"),
    Measure("within_50_200", "Lengths: share within 50 to 200% of the truth", True),
)
LENGTHS = (
    Measure("within_50_200", "50 to 200%", True),
    Measure("within_67_150", "67 to 150%", True),
    Measure("within_90_110", "90 to 110%", True),
    Measure("within_25", "off by 25% at most", True),
    Measure("median_relative_error", "median relative error", False),
    Measure("same_hour", "clock direction: right hour", True),
    Measure("within_one_hour", "within one hour", True),
)
MAIN = {  # kind -> the number of a relation that its bar shows
    "yes_or_no": Measure("balanced_accuracy", "balanced accuracy", True),
    "length": Measure("within_50_200", "within 50 to 200%", True),
    "hour": Measure("same_hour", "right hour", True),
}


def relation_tables(scores: Scores, bench: Bench, before: str) -> Iterator[Html]:
    """`before` is put before each heading."""
    rows = [(row, p) for row in scores.rows if (p := scores.best(row, bench))]
    for measure in BY_LEVEL:
        if any(p.values(measure.metric) for _, p in rows):
            yield element("h3", before + measure.heading)
            if measure.meaning:
                yield element("p", measure.meaning.capitalize() + ".", class_="note")
            yield level_table(measure, rows, before)
    if any(p.values(m.metric) for _, p in rows for m in LENGTHS):
        yield element("h3", f"{before}How far off lengths and clock directions are")
        yield plain_table(f"{before}Lengths and clock directions, as shares of the answers", LENGTHS, rows)
    yield fold("Relation by relation", type_table(rows))


def level_table(measure: Measure, rows: Sequence[tuple[Features, Probes]], before: str) -> Html:
    names = {level: f"{measure.metric}/level{level}" for level in range(len(LEVELS))}
    there = [level for level, name in names.items() if any(p.values(name) for _, p in rows)]
    columns = [
        *(Measure(names[level], f"level {level}: {LEVELS[level]}", measure.higher) for level in there),
        Measure(measure.metric, "all", measure.higher),
    ]
    return plain_table(f"{before}{measure.heading}, by level", columns, rows, bars=True)


def plain_table(
    caption: str, measures: Sequence[Measure], rows: Sequence[tuple[Features, Probes]], *, bars: bool = False
) -> Html:
    """Features x numbers, the best of each column in bold where there are two."""
    best = {m: m.top(p.mean(m.metric) for _, p in rows) for m in measures}
    cell = bar_cell if bars else value_cell
    lines = []
    for row, p in rows:
        values = [(m, p.mean(m.metric)) for m in measures]
        line = [cell(x, best=x == best[m], spread=p.spread(m.metric)) for m, x in values]
        lines.append(element("tr", element("th", row.name, scope="row"), line))
    head = [element("th", "features", scope="col")]
    head += [heading(m.heading + m.arrow) for m in measures]
    return titled_table(caption, [element("tr", head)], [element("tbody", lines)])


def type_table(rows: Sequence[tuple[Features, Probes]]) -> Html:
    """Relations by level x features; of each relation the number of its kind."""
    known = {name: (relation.level, kind) for name, relation, kind in zip(NAMES, RELATIONS, KINDS, strict=True)}
    groups = []
    for level, what in enumerate(LEVELS):
        lines = []
        for name, (of_level, kind) in known.items():
            metric = f"{MAIN[kind].metric}/{name}"
            values = [p.mean(metric) for _, p in rows]
            if of_level != level or not any(map(math.isfinite, values)):
                continue
            best = MAIN[kind].top(values)
            line = [
                element("th", name.replace("_from_", ", from ").replace("_", " "), scope="row"),
                element("td", MAIN[kind].heading, class_="from"),
            ]
            line += [bar_cell(x, best=x == best) for x in values]
            lines.append(element("tr", line))
        if lines:
            title = element("th", f"level {level}: {what}", scope="rowgroup", colspan=2 + len(rows), class_="kind")
            groups.append(element("tbody", element("tr", title), lines))
    head = [element("th", "relation", scope="col"), element("th", "number", scope="col", class_="from")]
    head += [heading(row.name) for row, _ in rows]
    return titled_table("Relations by features", [element("tr", head)], groups)
