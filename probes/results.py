"""What training a probe ends in, as numbers, JSON and a table."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from spatialprobe.engine.files.durable import write_whole


@dataclass
class Result:
    """One trained probe, with all that made it."""

    task: str
    config: dict[str, Any]  # ProbeConfig's fields
    metrics: dict[str, float]  # of the validation clips, with the best weights; "loss" among them
    best_epoch: int | None  # from 0; None if no epoch ended
    curve: list[dict[str, float]]  # per epoch
    stopped: str  # why it ended before its last epoch, or ""
    sources: list[dict[str, str]]  # store, spec hash and weights of each
    keys: list[list[Any]]  # (source, layer, step) that it reads
    labels: str
    train_clips: int
    val_clips: int
    seconds: float  # of the whole run: all probes of a grid share it
    skipped: dict[str, str] = field(default_factory=dict)  # clips left out, where that was asked for: id -> why
    split: str = ""  # `split_hash` of the validation clips; "" in files of before it was recorded


def split_hash(val_ids: Sequence[str]) -> str:
    """Equal for results that were measured on the same clips of the same labels."""
    return sha256("\n".join(sorted(val_ids)).encode()).hexdigest()[:16]


def write_results(path: Path, results: Sequence[Result]) -> None:
    """JSON, whole or not at all; what is not a number is null there."""
    write_whole(path, json.dumps([_plain(asdict(result)) for result in results], indent=1))


def read_results(path: Path) -> list[Result]:
    return [Result(**fields) for fields in json.loads(path.read_text())]


def table(results: Sequence[Result]) -> str:
    """A line per probe: the settings in which they differ, then their metrics, of "a/b" (of a part) only "a"."""
    configs = varied(results)
    metrics = list(dict.fromkeys(name for result in results for name in result.metrics if "/" not in name))
    rows = [[*configs[0], *metrics, ""]]
    for config, result in zip(configs, results, strict=True):
        numbers = [_short(result.metrics.get(name)) for name in metrics]
        rows.append([str(value) for value in config.values()] + numbers + [result.stopped])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def varied(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Of each result's settings, those in which the results differ."""
    configs = [{k: v for k, v in r.config.items() if k != "options"} | dict(r.config["options"]) for r in results]
    names = [name for name in configs[0] if len({json.dumps(config.get(name)) for config in configs}) > 1]
    return [{name: config.get(name) for name in names} for config in configs]


def _short(x: float | None) -> str:
    return "-" if x is None else str(x) if isinstance(x, int) else f"{x:.4g}"


def _plain(x: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
