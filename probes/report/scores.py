"""Results as the study's table: features in rows, benches (a task on one set of clips) in columns, probes in cells.

Results of other clips, labels or views are another bench, so that no column holds two. Nothing is chosen but the best
probe of a cell, by its task's own criterion.
"""

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from spatialprobe.engine.presets import ENCODERS, GENERATORS, PRESETS, VISION_LANGUAGE
from spatialprobe.probes.report.axes import AXES, Axis, axis_of, criterion
from spatialprobe.probes.report.collect import Collection, StoreFacts
from spatialprobe.probes.results import Result

KINDS = {"video generators": GENERATORS, "vision-language models": VISION_LANGUAGE, "encoders": ENCODERS}
OTHER, JOINED, UNKNOWN = "other inputs", "several joined", "of unknown family"
ORDER = (*KINDS, UNKNOWN, OTHER, JOINED)


@dataclass(frozen=True)
class Features:
    """A row: what probes read. One model's features whichever the layer and step, or several joined."""

    key: tuple[str, ...]  # identity of each part
    parts: tuple[str, ...]  # name of each part, which no other features have
    models: tuple[str, ...]  # of each part; several features may be of one
    kind: str
    presets: tuple[str | None, ...]  # of each part

    @property
    def name(self) -> str:
        return " + ".join(self.parts)


@dataclass(frozen=True)
class Bench:
    """A column: a task on one set of labels and clips, seen in the same way."""

    axis: Axis
    labels: str
    train_clips: int
    val_clips: int
    split: str  # hash of the validation clips; without one, the seed that drew them
    views: str  # settings that say which frames a clip shows
    skipped: tuple[str, ...]

    @property
    def task(self) -> str:
        return self.axis.task


@dataclass(frozen=True)
class Probes:
    """Probes of one configuration, which differ in their seed alone."""

    results: tuple[Result, ...]

    @property
    def first(self) -> Result:
        return self.results[0]

    @property
    def places(self) -> tuple[tuple[int, int | None], ...]:
        """(layer, step) of each part."""
        return tuple((layer, step) for _, layer, step in self.first.keys)

    def values(self, metric: str) -> list[float]:
        """Of the seeds that have it as a number."""
        there = [result.metrics.get(metric, math.nan) for result in self.results]
        return [x for x in there if math.isfinite(x)]

    def mean(self, metric: str) -> float:
        """Over seeds; NaN where one has no such number, so that no mean is of some of them."""
        there = self.values(metric)
        return statistics.fmean(there) if len(there) == len(self.results) else math.nan

    def spread(self, metric: str) -> float | None:
        """Standard deviation over seeds; None of one, or where `mean` is none."""
        there = self.values(metric)
        return statistics.stdev(there) if len(there) == len(self.results) > 1 else None


@dataclass(frozen=True)
class Scores:
    """The table that all of the report reads: of rows and columns not every cell is there."""

    collection: Collection
    rows: list[Features]
    benches: list[Bench]
    cells: dict[tuple[Features, Bench], list[Probes]]  # all that were trained, but for those without numbers
    names: dict[tuple[str, str], str]  # of stores, by name and hash of the spec; no two are the same

    def best(self, row: Features, bench: Bench) -> Probes | None:
        return best_of(self.cells.get((row, bench), ()))

    @cached_property
    def by_kind(self) -> dict[str, list[Features]]:
        return {kind: rows for kind in ORDER if (rows := [row for row in self.rows if row.kind == kind])}

    def with_title(self, bench: Bench) -> str:
        """The axis, numbered where it has several benches."""
        same = [b for b in self.benches if b.task == bench.task]
        return bench.axis.title if len(same) == 1 else f"{bench.axis.title}, data {same.index(bench) + 1}"


def best_of(probes: Iterable[Probes]) -> Probes | None:
    """By the task's own criterion on the validation clips: the first of equals, None of several without it."""
    there = list(probes)
    if len(there) < 2:
        return there[0] if there else None
    by = criterion(there[0].first.task)
    scored = [(p.mean(by.metric), p) for p in there]
    best = by.best(x for x, _ in scored)
    return next((p for x, p in scored if x == best), None)


def make_scores(collection: Collection) -> Scores:
    """Rows, columns and cells of all results; a result that was found twice counts once."""
    found = {facts.spec_hash: facts for facts in collection.stores.values() if facts.spec}
    stores = {key: found.get(facts.spec_hash, facts) for key, facts in collection.stores.items()}  # moved, or copied
    identities = {key: identity(facts) for key, facts in stores.items()}
    names = part_names(stores, identities)
    rows: dict[tuple[str, ...], Features] = {}
    grouped: dict[tuple, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    seen = set()
    for result in collection.results:
        keys = [(source["store"], source["spec"]) for source in result.sources]
        parts = tuple(identities[key] for key in keys)
        if parts not in rows:
            facts = [stores[key] for key in keys]
            rows[parts] = Features(
                parts,
                tuple(names[part] for part in parts),
                tuple(map(model_name, facts)),
                JOINED if len(parts) > 1 else kind_of(facts[0], result),
                tuple(preset_of(fact, source["weights"]) for fact, source in zip(facts, result.sources, strict=True)),
            )
        if not result.metrics:  # it diverged
            continue
        one = json.dumps([result.config, result.metrics, result.keys, parts, result.labels], sort_keys=True)
        if one in seen:  # a copy of a file, or the same run again
            continue
        seen.add(one)
        grouped[rows[parts], bench_of(result)][_config_text(result)].append(result)
    axes = [axis.task for axis in AXES]
    benches = sorted(
        {bench for _, bench in grouped},
        key=lambda b: (axes.index(b.task) if b.task in axes else len(axes), b.task, str(asdict(b))),
    )
    cells = {place: [Probes(tuple(same)) for same in by_config.values()] for place, by_config in grouped.items()}
    ordered = sorted(rows.values(), key=lambda row: (ORDER.index(row.kind), len(row.key), row.name))
    return Scores(collection, ordered, benches, cells, store_names(names, identities))


def bench_of(result: Result) -> Bench:
    config = result.config
    views, context, gap, query = (config.get(name) for name in ("views", "context", "gap", "query"))
    return Bench(
        axis_of(result.task, result.metrics),
        result.labels,
        result.train_clips,
        result.val_clips,
        result.split or f"drawn by seed {config.get('data_seed')}, its clips not recorded",
        f"{views} views of a clip's first {context} frames, {gap} or more apart, among frames {query}",
        tuple(sorted(result.skipped)),
    )


def _config_text(result: Result) -> str:
    """Equal for probes that differ in their seed alone."""
    config = {name: value for name, value in result.config.items() if name != "seed"}
    return json.dumps([config, result.keys], sort_keys=True)


# -- names ------------------------------------------------------------------------------------------------------------


def identity(facts: StoreFacts) -> str:
    """Equal for stores of the same features, whichever layers and steps of them they hold."""
    if facts.spec is None:
        return f"spec {facts.spec_hash}"
    fields = asdict(facts.spec)
    del fields["layers"], fields["steps"]
    return json.dumps(fields, sort_keys=True)


def model_name(facts: StoreFacts) -> str:
    """The model as people call it: as it was typed to `engine extract`, without folders; else the store's folder."""
    said = facts.about.get("model")
    return Path(said if isinstance(said, str) and said else facts.name).name or facts.name


def part_names(stores: dict[tuple[str, str], StoreFacts], identities: dict[tuple[str, str], str]) -> dict[str, str]:
    """identity -> a name that no other has: the model's, with what tells apart those of one name."""
    by_name: dict[str, dict[str, StoreFacts]] = defaultdict(dict)
    for key, facts in stores.items():
        by_name[model_name(facts)].setdefault(identities[key], facts)
    names = {}
    for name, same in by_name.items():
        fields = {i: flat(asdict(facts.spec)) if facts.spec else {"spec": facts.spec_hash} for i, facts in same.items()}
        differing = _differing(list(fields.values()), without=("layers", "steps"))
        for i, of_one in fields.items():
            told = ", ".join(f"{f.rpartition('.')[2]} {of_one.get(f, 'not set')}" for f in differing)
            names[i] = f"{name} ({told})" if told else name
    return names


def store_names(names: dict[str, str], identities: dict[tuple[str, str], str]) -> dict[tuple[str, str], str]:
    """As `part_names`; stores of the same features, with other layers or in another place, say which they are."""
    same = Counter(identities.values())
    return {
        key: names[identity] if same[identity] == 1 else f"{names[identity]}, {key[0]} ({key[1][:6]})"
        for key, identity in identities.items()
    }


def _differing(settings: Sequence[dict[str, Any]], without: Iterable[str] = ()) -> list[str]:
    names = dict.fromkeys(name for one in settings for name in one if name not in without)
    return [name for name in names if len({json.dumps(one.get(name), default=str) for one in settings}) > 1]


def flat(fields: dict[str, Any], above: str = "") -> dict[str, Any]:
    """{"options.size": ...}: nested dicts as one."""
    out = {}
    for name, value in fields.items():
        out |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return out


def preset_of(facts: StoreFacts, weights: str) -> str | None:
    """The preset that features were extracted with, if any: by its name, or by the repository of the weights."""
    said, repo = facts.about.get("model"), facts.about.get("repo")
    if said in PRESETS:
        return said
    from_hub = weights.removeprefix("hub:").partition("@")[0] if weights.startswith("hub:") else None
    return next((name for name, preset in PRESETS.items() if preset.repo in (repo, from_hub)), None)


def kind_of(facts: StoreFacts, result: Result) -> str:
    preset = preset_of(facts, result.sources[0]["weights"])
    family = facts.spec.family if facts.spec else PRESETS[preset].family if preset else None
    return next((kind for kind, families in KINDS.items() if family in families), OTHER if family else UNKNOWN)
