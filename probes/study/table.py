"""A study's findings as one table: a line for each encoder, its positions and the probe's, a column for each axis."""

import math
from collections.abc import Iterator, Sequence

from spatialprobe.probes.report.axes import AXES
from spatialprobe.probes.results import Result
from spatialprobe.probes.study.job import Part
from spatialprobe.probes.study.run import Findings

PLACE = ("layer", "step")  # shown where a store has several


def findings_table(found: Findings) -> str:
    """Means over seeds, with the standard deviation where there are several; "-" where there is no number."""
    measures = [(axis.task, m) for axis in AXES for m in axis.measures if any(t == axis.task for _, t in found.results)]
    lines = list(table_lines(found, measures))
    places = [name for name in PLACE if any(line[1][name] is not None for line in lines)]
    head = ["encoder", "pos_embed", "position", *places, *(m.heading + m.arrow for _, m in measures)]
    rows = [head]
    for part, config, cells in lines:
        known = ["" if config[name] is None else str(config[name]) for name in places]
        rows.append([part.encoder, part.pos_embed, config["position"], *known, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    sides = [str.ljust] * 3 + [str.rjust] * (len(head) - 3)
    return "\n".join(
        "  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)).rstrip()
        for row in rows
    )


def table_lines(found: Findings, measures: Sequence) -> Iterator[tuple[Part, dict, list[str]]]:
    """(part, settings, a cell for each measure) of every place and position that was probed, in the study's order."""
    for part in dict.fromkeys(part for part, _ in found.results):
        by_point: dict[tuple, dict[str, list[Result]]] = {}
        for (_, task), results in ((key, results) for key, results in found.results.items() if key[0] == part):
            for result in results:
                point = tuple(result.config[name] for name in (*PLACE, "position"))
                by_point.setdefault(point, {}).setdefault(task, []).append(result)
        for point, by_task in by_point.items():
            cells = [cell([r.metrics.get(m.metric) for r in by_task.get(task, [])]) for task, m in measures]
            yield part, dict(zip((*PLACE, "position"), point, strict=True)), cells


def cell(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None and math.isfinite(value)]
    if not there or len(there) < len(values):  # a mean over some seeds would hide that the others diverged
        return "-"
    mean = sum(there) / len(there)
    if len(there) == 1:
        return f"{mean:.4g}"
    return f"{mean:.4g} ± {math.sqrt(sum((x - mean) ** 2 for x in there) / (len(there) - 1)):.2g}"
