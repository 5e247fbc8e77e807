"""How fast the features came and what they take on disk, as the stores' own records say."""

from collections.abc import Iterator, Mapping
from typing import Any

from spatialprobe.probes.report.collect import StoreFacts
from spatialprobe.probes.report.markup import Html, element, fold
from spatialprobe.probes.report.scores import Scores
from spatialprobe.probes.report.tables import titled_table
from spatialprobe.probes.report.words import NONE, number, size

COLUMNS = (
    "clips in the store", "on disk", "per clip", "written by the run", "seconds", "clips/s", "device busy",
    "peak memory", "longest stage",
)  # fmt: skip


def machine_tables(scores: Scores) -> Iterator[Html]:
    """A line per store and run, then the seconds of every stage behind a fold."""
    lines, stages = [], []
    for key, facts in scores.collection.stores.items():
        timed = {name: record for name, record in facts.runs.items() if timing_of(record).get("seconds")}
        for i, (name, record) in enumerate((timed or {"": {}}).items()):
            title = scores.names[key] + (f", {name.removesuffix('.json')}" if len(timed) > 1 else "")
            disk = disk_cells(facts) if i == 0 else [NONE] * 3
            cells = [element("td", cell) for cell in [*disk, *speed_cells(record)]]
            lines.append(element("tr", element("th", title, scope="row"), cells))
            if timing_of(record).get("stages"):
                stages.append(stage_table(title, timing_of(record)["stages"]))
    head = element("tr", element("th", "features", scope="col"), [element("th", c, scope="col") for c in COLUMNS])
    yield titled_table("Extraction runs and stores", [head], [element("tbody", lines)], class_="plain")
    if stages:
        yield fold("Seconds of every stage", element("div", stages, class_="pair"))


def timing_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    timing = record.get("timing")
    return timing if isinstance(timing, dict) else {}


def disk_cells(facts: StoreFacts) -> list[str]:
    if facts.clips is None:
        return [NONE] * 3
    return [f"{facts.clips:,}", size(facts.bytes), size(round(facts.bytes / facts.clips)) if facts.clips else NONE]


def speed_cells(record: Mapping[str, Any]) -> list[str]:
    """Of a run's record; clips/s are what it wrote over its seconds."""
    timing, written = timing_of(record), record.get("written")
    seconds, busy = timing.get("seconds"), timing.get("busy")
    rate = number(written / seconds, 2) if written and seconds else NONE
    by_time = sorted((s["seconds"], name) for name, s in timing.get("stages", {}).items())
    longest = f"{by_time[-1][1]}, {by_time[-1][0]:.1f} s" if by_time else NONE
    return [
        NONE if written is None else f"{written:,}",
        NONE if seconds is None else f"{seconds:,.1f}",
        rate,
        NONE if busy is None else f"{busy:.0%}",
        size(timing.get("peak_memory_bytes")),
        longest,
    ]


def stage_table(title: str, stages: Mapping[str, Mapping[str, float]]) -> Html:
    longest = max(stage["seconds"] for stage in stages.values()) or 1
    lines = []
    for name, stage in stages.items():
        share = max(0, stage["seconds"]) / longest
        bar = element("span", class_="bar", style=f"--share:{share:.4f}", aria_hidden="true")
        lines.append(element("tr", element("th", name, scope="row"), element("td", f"{stage['seconds']:.2f}", bar)))
    head = element("tr", element("th", "stage", scope="col"), element("th", "seconds", scope="col"))
    table = titled_table(f"Stages of {title}", [head], [element("tbody", lines)])
    return element("figure", element("figcaption", title), table)
