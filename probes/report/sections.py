"""What the report says, section by section: words and notes around the tables and charts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from spatialprobe.probes.report.axes import BY_TASK, criterion
from spatialprobe.probes.report.charts import scatter
from spatialprobe.probes.report.comparisons import encoder_grids, fusion_tables
from spatialprobe.probes.report.details import run_folds, spec_folds
from spatialprobe.probes.report.machines import machine_tables
from spatialprobe.probes.report.maps import layer_maps
from spatialprobe.probes.report.markup import Html, element, fold
from spatialprobe.probes.report.published import FIGURES, SOURCE
from spatialprobe.probes.report.relations import relation_tables
from spatialprobe.probes.report.scores import Bench, Scores, best_of
from spatialprobe.probes.report.tables import scores_table
from spatialprobe.probes.report.words import HAS_ITS_OWN_PLACE, NONE, number
from spatialprobe.probes.results import varied

RANKED = 5  # rows of a card
SEEN = 4  # models whose maps are seen at once; the others unfold
CHARTS = 4


@dataclass(frozen=True)
class Section:
    name: str  # of its place in the page
    title: str
    content: Sequence[Html]


def summary(scores: Scores) -> str:
    probes = sum(len(run.results) for run in scores.collection.runs)
    rows, files = len(scores.rows), len(scores.collection.runs)
    return (
        f"A probe is a small model that reads features of a large, frozen one. What it scores on clips that it was not "
        f"trained on says what the features hold. Here are {counted(probes, 'probe')} on {counted(rows, 'choice')} of "
        f"features, from {counted(files, 'training run')}."
    )


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def report_sections(scores: Scores) -> Iterator[Section]:
    yield Section("glance", "At a glance", list(glance(scores)))
    yield Section("study", "The study's table", list(table_section(scores)))
    yield Section("complementarity", "Semantics against geometry", list(scatter_section(scores)))
    yield Section("layers", "Layers and noise steps", list(layer_section(scores)))
    yield Section("fusion", "What joining adds", list(fusion_section(scores)))
    yield Section("relations", "Relations by level and type", list(relation_section(scores)))
    yield Section("encoders", "Encoders and positions", list(encoder_section(scores)))
    yield Section("speed", "Throughput and disk", list(machine_section(scores)))
    yield Section("details", "Specs, settings, curves", list(detail_section(scores)))
    yield Section("missing", "What is missing", list(missing_section(scores)))


# -- at a glance ------------------------------------------------------------------------------------------------------


def glance(scores: Scores) -> Iterator[Html]:
    """A card per task, of the set of clips that most features were measured on."""
    cards = []
    for task in dict.fromkeys(bench.task for bench in scores.benches):
        benches = [bench for bench in scores.benches if bench.task == task]
        cards.append(card(scores, max(benches, key=lambda b: sum((row, b) in scores.cells for row in scores.rows))))
    if cards:
        yield element("div", cards, class_="cards")


def card(scores: Scores, bench: Bench) -> Html:
    """An axis: what it asks, and the best rows by its first number."""
    measure = bench.axis.headline
    there = [(row, p.mean(measure.metric)) for row in scores.rows if (p := scores.best(row, bench))]
    there = [(row, x) for row, x in there if x == x]
    if measure.higher is not None:
        there.sort(key=lambda one: one[1], reverse=measure.higher)
    top = max((abs(x) for _, x in there), default=0) or 1
    items = [
        element(
            "li",
            element("span", row.name, class_="who"),
            element("data", number(x), value=repr(x)),
            element("span", class_="bar", style=f"--share:{max(0.0, x) / top:.4f}", aria_hidden="true"),
        )
        for row, x in there[:RANKED]
    ]
    more = f"{len(there) - RANKED} more in the table below." if len(there) > RANKED else None
    better = {True: ", higher is better", False: ", lower is better", None: ""}[measure.higher]
    return element(
        "article",
        element("h3", scores.with_title(bench)),
        element("p", bench.axis.question or None),
        element("p", f"{measure.heading}{better}", class_="note"),
        element("ol", items) if items else element("p", "No probe has this number.", class_="note"),
        element("p", more, class_="note") if more else None,
    )


# -- the other sections -----------------------------------------------------------------------------------------------


def table_section(scores: Scores) -> Iterator[Html]:
    if not scores.benches:
        return
    yield element(
        "p",
        "Each row is what probes read, each group of columns an axis. Arrows say which way is better; ",
        element("strong", "bold"),
        f" is the best measured number of its column, {NONE} is what was not measured. “Read from” names the block and "
        "noise step, and whatever else was varied.",
    )
    yield scores_table(scores)
    yield element("ul", [element("li", note) for note in table_notes(scores)], class_="notes")
    measures = [
        m for task in dict.fromkeys(b.task for b in scores.benches) if task in BY_TASK for m in BY_TASK[task].measures
    ]
    if measures:
        terms = [(element("dt", m.heading + m.arrow), element("dd", m.meaning)) for m in measures]
        yield fold("What the numbers mean", element("dl", terms))


def table_notes(scores: Scores) -> Iterator[str]:
    titles: dict[str, list[str]] = {}
    for bench in scores.benches:
        titles.setdefault(bench_words(bench), []).append(scores.with_title(bench))
    for words, same in titles.items():
        yield f"{', '.join(same)}: {words}."
    for task in dict.fromkeys(bench.task for bench in scores.benches):
        benches = [bench for bench in scores.benches if bench.task == task]
        if len(benches) > 1:
            yield (
                f"{benches[0].axis.title} was measured on {len(benches)} sets of data or clips: each has columns of "
                "its own, and numbers of two sets are not comparable."
            )
    chosen = {task: criterion(task) for task in dict.fromkeys(bench.task for bench in scores.benches)}
    told = "; ".join(f"{task} by {'the most' if m.higher else 'the least'} {m.heading}" for task, m in chosen.items())
    yield (
        f"Where several probes read the same features, the table shows one, chosen on the validation clips: {told}. "
        "The numbers are of these same clips, so those of the best of many flatter it."
    )
    for bench in scores.benches:
        shown = [p.first for row in scores.rows if (p := scores.best(row, bench))]
        differing = [n for n in varied(shown)[0] if n not in HAS_ITS_OWN_PLACE] if shown else []
        if differing:
            yield f"{scores.with_title(bench)}: settings of the probes differ between rows in {', '.join(differing)}."
    if any(facts.spec and facts.spec.family == "points" for facts in scores.collection.stores.values()):
        yield (
            "Rows with points read point maps. Where these are the labels' own, they hold the answer to geometry and "
            "to relations of lengths: such numbers say what a probe can do, not what a model knows."
        )
    if any(len(p.results) > 1 for there in scores.cells.values() for p in there):
        yield "A number with ± is the mean over seeds, or over runs of one seed, and their standard deviation."
    if any(preset in FIGURES for row in scores.rows for preset in row.presets):
        yield (
            f"Rows in italics are figures published in {SOURCE}, as shares of 1. They are of its own clips and labels "
            "and not comparable with measured rows unless those used the same data, split and settings."
        )


def bench_words(bench: Bench) -> str:
    words = [
        f"labels {bench.labels}",
        counted(bench.train_clips, "training clip"),
        f"{counted(bench.val_clips, 'validation clip')} (set {bench.split})",
        bench.views,
    ]
    words += [f"{counted(len(bench.skipped), 'clip')} left out"] if bench.skipped else []
    return "; ".join(words)


def scatter_section(scores: Scores) -> Iterator[Html]:
    """Semantic numbers up, geometric ones to the right; of each pair of benches."""
    pairs = ((("tagging", 0), ("geometry", 0)), (("instance", 0), ("geometry", 1)))
    drawn = []
    for (semantic, i), (geometric, j) in pairs:
        benches = product(
            [b for b in scores.benches if b.task == geometric], [b for b in scores.benches if b.task == semantic]
        )
        for across, up in benches:
            drawn.append(scatter(scores, (across, across.axis.measures[j]), (up, up.axis.measures[i])))
    drawn = [chart for chart in drawn if chart is not None][:CHARTS]
    if drawn:
        yield element(
            "p",
            "Features far up know what things are, features far to the right where they are. Where the best of one are "
            "not the best of the other, models know different things, and joining them may pay.",
        )
        yield element("div", drawn, class_="pair")


def layer_section(scores: Scores) -> Iterator[Html]:
    """A row of maps for each model, the first few of which are seen at once."""
    shown = [(row, maps) for row in scores.rows if (maps := list(layer_maps(scores, row)))]
    drawn = [[element("h3", row.name), element("div", maps, class_="maps")] for row, maps in shown]
    if drawn:
        yield element(
            "p",
            "Blocks are counted from 0; noise steps index the schedule, the noisiest first. The stronger the colour, "
            "the better.",
        )
        yield from (part for one in drawn[:SEEN] for part in one)
        if drawn[SEEN:]:
            yield fold(f"{len(drawn) - SEEN} more", drawn[SEEN:])


def fusion_section(scores: Scores) -> Iterator[Html]:
    tables = list(fusion_tables(scores))
    if tables:
        yield element(
            "p",
            "Several features joined channel by channel, and each of them alone on the same labels and clips: at the "
            "same block and step where it was measured there, else at its best. The gain is over the better one.",
        )
        yield from tables


def relation_section(scores: Scores) -> Iterator[Html]:
    benches = [bench for bench in scores.benches if bench.task == "relation"]
    for bench in benches:
        yield from relation_tables(scores, bench, "" if len(benches) == 1 else f"{scores.with_title(bench)}: ")


def encoder_section(scores: Scores) -> Iterator[Html]:
    grids = list(encoder_grids(scores))
    if grids:
        yield element(
            "p",
            "Rows: an encoder with its own positions, without any, or with those of other patches. Columns: how the "
            "probe itself turns its tokens by where they are (rotary positions).",
        )
    for bench, grid in grids:
        yield element("h3", scores.with_title(bench))
        yield grid


def machine_section(scores: Scores) -> Iterator[Html]:
    yield element(
        "p",
        "Of the extraction runs, as their stores record them. Stages of loading and writing run beside the device, and "
        "add up over threads.",
    )
    yield from machine_tables(scores)


def detail_section(scores: Scores) -> Iterator[Html]:
    yield element("h3", "Stores")
    yield from spec_folds(scores)
    yield element("h3", "Probe runs")
    yield from run_folds(scores)


def missing_section(scores: Scores) -> Iterator[Html]:
    lines: list[str] = [f"{path}: not read: {why}" for path, why in scores.collection.unread.items()]
    for facts in scores.collection.stores.values():
        lines += [f"{facts.name} ({facts.spec_hash}): {why}" for why in facts.missing]
    for (row, bench), there in scores.cells.items():
        if best_of(there) is None:
            by = criterion(bench.task).heading
            lines.append(
                f"{scores.with_title(bench)} of {row.name}: none of {len(there)} probes has the {by} to choose by."
            )
    failed = sum(not result.metrics for result in scores.collection.results)
    if failed:
        lines.append(f"{counted(failed, 'probe')} ended without numbers (see the runs above).")
    if lines:
        yield element("ul", [element("li", one) for one in lines])
