"""Behind folds: every spec, every probe with its settings and numbers, its curves, and pictures drawn beside them."""

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from spatialprobe.probes.report.charts import curves
from spatialprobe.probes.report.collect import ProbeRun
from spatialprobe.probes.report.markup import Html, element, fold
from spatialprobe.probes.report.scores import Scores, model_name
from spatialprobe.probes.report.tables import titled_table, value_cell
from spatialprobe.probes.report.words import place
from spatialprobe.probes.results import Result, varied

PICTURES = 24_000_000  # bytes of pictures that a page may hold
PROBES = 400  # lines of one run's table


def spec_folds(scores: Scores) -> Iterator[Html]:
    for key, facts in scores.collection.stores.items():
        inside = [element("p", "Store ", element("code", facts.name), ", spec ", element("code", facts.spec_hash))]
        if facts.spec is not None:
            inside.append(code(facts.about | asdict(facts.spec), f"Spec of {scores.names[key]}"))
        if facts.missing:
            inside.append(element("p", "Missing: ", "; ".join(facts.missing), ".", class_="note"))
        yield fold(scores.names[key], inside)


def run_folds(scores: Scores) -> Iterator[Html]:
    """A fold per `results.json`. Pictures are embedded as far as PICTURES goes, and named beyond it."""
    shown = {
        id(result) for row in scores.rows for b in scores.benches if (p := scores.best(row, b)) for result in p.results
    }
    room = PICTURES
    for run in scores.collection.runs:
        pictures = []
        for path in run.pictures:
            data = path.read_bytes()
            fits = len(data) <= room
            room -= len(data) if fits else 0
            pictures.append(picture(path, data) if fits else element("p", f"{path} is too large for this page."))
        yield fold(run_title(scores, run), probe_run(run, shown), pictures)


def run_title(scores: Scores, run: ProbeRun) -> str:
    first, count = run.results[0], len(run.results)
    models = " + ".join(dict.fromkeys(model_name(facts) for facts in scores.collection.parts(first)))
    return f"{first.task}, {models}: {count} {'probe' if count == 1 else 'probes'}"


def probe_run(run: ProbeRun, shown: set[int]) -> Iterator[Html]:
    first = run.results[0]
    yield element("p", element("code", run.path))
    yield element(
        "p",
        f"Labels {first.labels}; {first.train_clips} training and {first.val_clips} validation clips",
        f", {len(first.skipped)} clips left out" if first.skipped else "",
        f"; {first.seconds:.0f} s for all probes of the run.",
    )
    yield probe_table(run.results, shown)
    chart = curves(run.results, next((result for result in run.results if id(result) in shown), None))
    if chart is not None:
        yield chart
    settings = {k: v for k, v in first.config.items() if k not in varied(run.results)[0]}
    several = len(run.results) > 1
    yield code(settings, f"Settings{' that all of them share' if several else ''}")
    if first.skipped:
        yield code(first.skipped, "Clips left out, and why")


def probe_table(results: Sequence[Result], shown: set[int]) -> Html:
    """A line per probe: what it reads, its varied settings and its numbers, but those per level and relation."""
    settings = varied(results)
    names = list(dict.fromkeys(n for r in results for n in r.metrics if "/" not in n))
    lines = []
    for one, result in list(zip(settings, results, strict=True))[:PROBES]:
        words = [" + ".join(place(layer, step) for _, layer, step in result.keys)]
        words += [f"{name} {value}" for name, value in one.items() if name not in ("layer", "step")]
        words += ["in the tables above"] if id(result) in shown else []
        cells = [value_cell(result.metrics.get(name, float("nan"))) for name in names]
        told = f"epoch {result.best_epoch + 1}" if result.best_epoch is not None else ""
        told = "; ".join(filter(None, (told, result.stopped)))
        lines.append(
            element("tr", element("th", "; ".join(words), scope="row"), cells, element("td", told, class_="from"))
        )
    if len(results) > PROBES:
        lines.append(
            element("tr", element("td", f"and {len(results) - PROBES} more, in the file", colspan=2 + len(names)))
        )
    head = [element("th", "probe", scope="col")]
    head += [element("th", name, scope="col", class_="number") for name in names]
    head.append(element("th", "weights of", scope="col", class_="from"))
    return titled_table("Probes of this run", [element("tr", head)], [element("tbody", lines)])


def code(fields: dict, label: str) -> Html:
    """JSON in a box that scrolls."""
    body = json.dumps(fields, indent=1, default=str, ensure_ascii=False)
    return element(
        "figure", element("figcaption", label), element("pre", body, tabindex=0, role="group", aria_label=label)
    )


def picture(path: Path, data: bytes) -> Html:
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    words = {"instance": "A validation clip, its objects, and the groups found in what the best probe says",
             "depth": "A validation clip's depth, and what the best probe says, scaled to the true median"}  # fmt: skip
    said = words.get(path.stem, path.stem)
    return element("figure", element("img", alt=said, src=uri), element("figcaption", f"{said} ({path.name})."))
