"""The study's table: features in rows, the axes in columns, with family means and published figures told apart."""

import math
from collections.abc import Iterable, Iterator, Sequence

from spatialprobe.probes.report.markup import Html, element, scroll
from spatialprobe.probes.report.published import SOURCE, published
from spatialprobe.probes.report.scores import KINDS, Bench, Features, Probes, Scores, best_of
from spatialprobe.probes.report.words import number, told


def value_cell(x: float, *, best: bool = False, spread: float | None = None, shade: int | None = None) -> Html:
    """A number; the best of its column in bold and marked."""
    if not math.isfinite(x):
        return element("td", number(x), class_="none")
    shown = element("data", number(x), value=repr(x))
    if best:
        shown = element("strong", shown)
    if spread is not None:
        shown = element("span", shown, " ", element("small", f"± {number(spread)}"))
    return element("td", shown, class_=None if shade is None else f"heat h{shade}")


def bar_cell(x: float, *, best: bool = False, spread: float | None = None) -> Html:
    """A share of 1 as a number, with a bar under it as long."""
    cell = value_cell(x, best=best, spread=spread)
    if not 0 <= x <= 1:
        return cell
    bar = element("span", class_="bar", style=f"--share:{x:.4f}", aria_hidden="true")
    return Html(cell.removesuffix("</td>") + bar + "</td>")


# -- the table --------------------------------------------------------------------------------------------------------


def scores_table(scores: Scores) -> Html:
    """Features x axes. Bold is the best measured number of a column; family means and published figures never are."""
    columns = [(bench, measure) for bench in scores.benches for measure in bench.axis.measures]
    probes = {place: best_of(there) for place, there in scores.cells.items()}
    best = {
        (bench, measure): measure.top(p.mean(measure.metric) for (_, b), p in probes.items() if p and b == bench)
        for bench, measure in columns
    }
    groups = []
    for kind, rows in scores.by_kind.items():
        width = 1 + len(columns) + len(scores.benches)
        lines = [element("tr", element("th", kind, scope="rowgroup", colspan=width, class_="kind"))]
        for row in rows:
            cells = []
            for bench in scores.benches:
                p = probes.get((row, bench))
                for measure in bench.axis.measures:
                    x = p.mean(measure.metric) if p else math.nan
                    cells.append(
                        value_cell(x, best=x == best[bench, measure], spread=p.spread(measure.metric) if p else None)
                    )
                cells.append(element("td", told(p, scores.cells[row, bench]) if p else None, class_="from"))
            lines.append(element("tr", element("th", row.name, scope="row"), cells))
            lines += published_row(row, scores.benches)
        if kind in KINDS and len(rows) > 1:
            lines.append(mean_row(rows, scores.benches, probes))
        groups.append(element("tbody", lines))
    groups += chance_rows(scores)
    return titled_table("Features by axes", bench_head(scores, scores.benches), groups, class_="study")


def published_row(row: Features, benches: Sequence[Bench]) -> Iterator[Html]:
    """What the published study reports of the row's model, if it is one of its models, under what was measured."""
    figures = published(row.presets[0]) if len(row.presets) == 1 else {}
    if not any(task == bench.task for bench in benches for task, _ in figures):
        return
    cells = []
    for bench in benches:
        cells += [value_cell(figures.get((bench.task, m.metric), math.nan)) for m in bench.axis.measures]
        cells.append(element("td", SOURCE if any(task == bench.task for task, _ in figures) else None, class_="from"))
    name = element("th", element("em", "published"), f" for {row.presets[0]}", scope="row")
    yield element("tr", name, cells, class_="published")


def mean_row(
    rows: Sequence[Features], benches: Sequence[Bench], probes: dict[tuple[Features, Bench], Probes | None]
) -> Html:
    """Of those of a family's rows that have the number, two or more; it says how many where it is not all."""
    cells = []
    for bench in benches:
        for measure in bench.axis.measures:
            there = [p.mean(measure.metric) for row in rows if (p := probes.get((row, bench)))]
            there = [x for x in there if math.isfinite(x)]
            cell = value_cell(sum(there) / len(there) if len(there) > 1 else math.nan)
            if 1 < len(there) < len(rows):
                cell = Html(cell.replace("</td>", f" <small>of {len(there)}</small></td>"))
            cells.append(cell)
        cells.append(element("td", class_="from"))
    return element("tr", element("th", f"mean of the {len(rows)}", scope="row"), cells, class_="mean")


def chance_rows(scores: Scores) -> Iterator[Html]:
    """What answers in random order are expected to score, where results say so."""
    cells, known = [], False
    for bench in scores.benches:
        found = {
            result.metrics[bench.axis.chance]
            for (_, b), there in scores.cells.items()
            for probes in there
            for result in probes.results
            if b == bench and bench.axis.chance in result.metrics
        }
        x = found.pop() if len(found) == 1 else math.nan  # of one bench's clips there is one
        known = known or math.isfinite(x)
        cells += [value_cell(x), *(value_cell(math.nan) for _ in bench.axis.measures[1:])]
        cells.append(element("td", class_="from"))
    if known:
        title = element("th", "without features", scope="rowgroup", colspan=1 + len(cells), class_="kind")
        line = element("tr", element("th", "random order, computed", scope="row"), cells)
        yield element("tbody", element("tr", title), line)


def bench_head(scores: Scores, benches: Sequence[Bench]) -> list[Html]:
    """Two lines of headings: the axes, and their measures with where they are read from."""
    top, names = [element("th", "features", scope="col", rowspan=2)], []
    for bench in benches:
        top.append(element("th", scores.with_title(bench), scope="colgroup", colspan=1 + len(bench.axis.measures)))
        names += [heading(m.heading + m.arrow) for m in bench.axis.measures]
        names.append(element("th", "read from", scope="col", class_="from"))
    return [element("tr", top), element("tr", names)]


def heading(words: str) -> Html:
    """Of a column of numbers; broken where it is of several words."""
    return element("th", words, scope="col", class_="number long" if " " in words else "number")


def titled_table(caption: str, head: Iterable[Html], groups: Iterable[Html], class_: str = "") -> Html:
    """In a box of its own that scrolls; the caption is for those who do not see the heading above it."""
    inside = element("caption", caption), element("thead", head), groups
    return scroll(caption, element("table", inside, class_=class_ or None))
