"""Finds what a report is made of: results, the stores that they name, and the pictures drawn beside them.

What is missing is said, never guessed. What the numbers mean is not known here.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spatialprobe.engine.presets import FAMILIES
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import FeatureSpec
from spatialprobe.probes.results import Result, read_results

RESULTS = "results.json"
DRAWN_HERE = {"curve.png", "layers.png", "relations.png"}  # the page draws these itself, from the numbers


@dataclass(frozen=True)
class StoreFacts:
    """What is known of a store that results name."""

    name: str  # as they name it
    spec_hash: str
    spec: FeatureSpec | None = None
    about: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)  # file name -> record of an extraction run
    clips: int | None = None
    bytes: int | None = None
    missing: tuple[str, ...] = ()  # what could not be read, and why


@dataclass(frozen=True)
class ProbeRun:
    """One `results.json`."""

    path: Path
    results: list[Result]
    pictures: list[Path]


@dataclass(frozen=True)
class Collection:
    runs: list[ProbeRun]
    stores: dict[tuple[str, str], StoreFacts]  # by name and hash of the spec
    unread: dict[str, str] = field(default_factory=dict)  # file -> why it is not on the page

    @property
    def results(self) -> list[Result]:
        return [result for run in self.runs for result in run.results]

    def parts(self, result: Result) -> list[StoreFacts]:
        """The stores of a result's features, in its order."""
        return [self.stores[source["store"], source["spec"]] for source in result.sources]


def collect(places: Sequence[str | Path]) -> Collection:
    """All results of `places`: files, or folders with `results.json` files anywhere below them, each taken once.

    Raises ValueError for a place that is not there, a folder without results, and a named file that holds none; a file
    found in a folder that cannot be read is listed in `unread`.
    """
    runs, unread, seen = [], {}, set()
    for place in map(Path, places):
        if not place.exists():
            raise ValueError(f"{place} does not exist; wanted a {RESULTS}, or a folder above some")
        found = [place] if place.is_file() else list(_below(place))
        if not found:
            raise ValueError(f"no {RESULTS} in {place} or below it")
        for path in found:
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            try:
                runs.append(ProbeRun(path, checked_results(path), _pictures(path.parent)))
            except (ValueError, OSError) as error:
                if path == place:
                    raise ValueError(f"{path}: {error}") from None
                unread[str(path)] = str(error)
    stores: dict[tuple[str, str], StoreFacts] = {}
    for run in runs:
        for result in run.results:
            for source in result.sources:
                key = source["store"], source["spec"]
                if key not in stores or stores[key].spec is None:  # it may lie beside another file that names it
                    stores[key] = store_facts(*key, near=run.path)
    return Collection(runs, stores, unread)


def _below(folder: Path) -> Iterator[Path]:
    """Files of results in a folder, in order of their names; a store holds none, and may hold 100,000 other files."""
    for root, folders, files in os.walk(folder):
        folders[:] = [] if "spec.json" in files else sorted(name for name in folders if not name.startswith("."))
        if RESULTS in files:
            yield Path(root) / RESULTS


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.png") if path.name not in DRAWN_HERE)


def checked_results(path: Path) -> list[Result]:
    """The results of a file, with NaN for null. Raises ValueError for anything that `train` does not write."""
    try:
        results = read_results(path)
    except (ValueError, TypeError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"it does not hold the results of probes: {error}") from None
    if not isinstance(results, list) or not results:
        raise ValueError("it holds no results")
    for number, result in enumerate(results):
        if wrong := _wrong(result):
            raise ValueError(f"result {number} has {wrong}")
        result.metrics = {name: math.nan if x is None else x for name, x in result.metrics.items()}
    return results


def _wrong(result: Result) -> str:
    """What of a result is not as `train` writes it; "" if nothing."""
    number = (int, float, type(None))
    shaped = {
        "a task that is no text": isinstance(result.task, str),
        "a config without options": isinstance(result.config, dict) and isinstance(result.config.get("options"), dict),
        "metrics that are no numbers": isinstance(result.metrics, dict)
        and all(isinstance(x, number) and not isinstance(x, bool) for x in result.metrics.values()),
        "a curve that is no list of rows": isinstance(result.curve, list)
        and all(isinstance(row, dict) and all(isinstance(x, number) for x in row.values()) for row in result.curve),
        "labels that are no text": isinstance(result.labels, str) and isinstance(result.split, str),
        "clips that are no number": isinstance(result.train_clips, int) and isinstance(result.val_clips, int),
        "seconds that are no number": isinstance(result.seconds, int | float),
        "skipped clips without reasons": isinstance(result.skipped, dict),
        "sources without store, spec and weights": isinstance(result.sources, list)
        and bool(result.sources)
        and all(
            isinstance(source, dict) and all(isinstance(source.get(k), str) for k in ("store", "spec", "weights"))
            for source in result.sources
        ),
        "keys that are not source, layer and step": isinstance(result.keys, list)
        and bool(result.keys)
        and all(isinstance(key, list) and len(key) == 3 for key in result.keys),
    }
    return ", ".join(what for what, right in shaped.items() if not right)


def store_facts(name: str, spec_hash: str, *, near: Path) -> StoreFacts:
    """What a store says, where it still is: as named, or as named from a folder above the file `near`.

    A store of another spec in its place counts as missing.
    """
    if "://" in name:
        return StoreFacts(name, spec_hash, missing=("the store is elsewhere and was not looked at",))
    others = []
    for root in dict.fromkeys([Path(name), *(folder / name for folder in near.absolute().parents)]):
        try:
            store = FeatureStore.open(root)
        except (ValueError, OSError):  # not there, or not a store
            continue
        if store.spec_hash == spec_hash:
            return _facts(name, store)
        others.append(store.spec_hash)
    if others:
        why = f"the store that is there now has another spec, {others[0]}"
    else:
        why = "the store was not found"
    return StoreFacts(name, spec_hash, missing=(why,))


def _facts(name: str, store: FeatureStore) -> StoreFacts:
    missing, runs = [], {}
    for path in sorted([store.root / "about.json", *store.root.glob("run*.json")]):
        try:
            record = json.loads(path.read_text())
            if not isinstance(record, dict):
                raise ValueError(f"wanted an object, got {type(record).__name__}")
        except (ValueError, OSError) as error:
            missing.append(f"{path.name}: {error}")
        else:
            runs[path.name] = record
    about = runs.pop("about.json", {})
    if not runs and store.spec.family in FAMILIES:  # others, as noise, were not extracted
        missing.append("no run.json: how it was extracted is not recorded")
    return StoreFacts(name, store.spec_hash, store.spec, about, runs, len(store), store.nbytes, tuple(missing))
