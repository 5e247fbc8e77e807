"""What a clip's file must hold under a spec, asked before it is written and when it is verified; how specs differ."""

import json
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from spatialprobe.engine.files.clipfile import Entry
from spatialprobe.engine.types import STORE_DTYPES, FeatureSpec, tensor_name
from spatialprobe.kernels.pool_features import QUANTISED_MAX

PROVENANCE = {  # keys that every clip's provenance has
    "grid": "[T, H, W] of the model's tokens, before rows were chosen and tokens pooled",
    "rows_kept": "for each stored row, which of the model's T rows it is",
    "padded": "frames repeated at the end of the window, None if unknown",
}


def quantised(spec: FeatureSpec) -> bool:
    """Whether features of `spec` have a scale per token."""
    return STORE_DTYPES[spec.dtype] in QUANTISED_MAX


def mismatches(spec: FeatureSpec, entries: dict[str, Entry]) -> list[str]:
    """What is wrong with a file's tensor names, dtypes and shapes, one line each."""
    parts = (".mean", ".rstd", ".scale") if quantised(spec) else (".mean", ".rstd")
    names = [tensor_name(layer, step) for layer, step in spec.tensors()]
    dtypes = {name: STORE_DTYPES[spec.dtype] for name in names}
    dtypes |= {name + part: torch.float32 for name in names for part in parts} | {"rows": torch.int64}
    if set(dtypes) != set(entries):
        missing, surplus = sorted(set(dtypes) - set(entries)), sorted(set(entries) - set(dtypes))
        found = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(surplus)}"] * bool(surplus)
        return [f"{' and '.join(found)}, which does not fit the spec"]
    lines = [f"{n} is {entries[n].dtype}, not {dtype}" for n, dtype in dtypes.items() if entries[n].dtype != dtype]
    length, window = entries[names[0]].shape[:1], spec.frames.window
    rows = entries["rows"].shape
    if len(rows) != 1 or not rows[0] or (window is not None and rows != (window,)):
        lines.append(f"rows must be [{window or 'F'}], got {list(rows)}")
    for name in names:
        shape = entries[name].shape
        pooled = shape[1:3] if spec.pool is None else tuple(spec.pool)
        if len(shape) != 4 or 0 in shape or shape[:1] != length or shape[1:3] != pooled:
            grid = "H, W" if spec.pool is None else f"{spec.pool[0]}, {spec.pool[1]}"
            lines.append(f"{name} must be [T, {grid}, C] with one T for all tensors, got {list(shape)}")
        for part in parts:
            if entries[name + part].shape != shape[:3]:
                lines.append(f"{name}{part} must be {list(shape[:3])}, got {list(entries[name + part].shape)}")
    return lines


def row_mismatches(rows: Tensor, provenance: dict[str, Any], length: int) -> list[str]:
    """What is wrong with `rows` and provenance for features of `length` rows, one line each."""
    lines = []
    if int(rows.min()) < -1 or int(rows.max()) >= length:
        lines.append(f"rows must be -1 .. {length - 1}, got {rows.tolist()}")
    missing = [key for key in PROVENANCE if key not in provenance]
    if missing:
        lines.append(f"provenance lacks {', '.join(missing)}")
    elif len(provenance["rows_kept"]) != length:
        lines.append(f"rows_kept must name the model's row of each of {length} rows, got {provenance['rows_kept']}")
    return lines


class Spec(Protocol):
    """Of features or of labels."""

    def to_json(self) -> str: ...


def differences(there: Spec, asked: Spec) -> list[str]:
    """One line for each field in which two specs differ, with dotted names: "frames.window: 81 there, 49 asked"."""
    return [f"{name}: {a} there, {b} asked" for name, (a, b) in differing(there, asked).items()]


def differing(a: Spec, b: Spec) -> dict[str, tuple[str, str]]:
    """Fields in which two specs differ, with dotted names -> JSON of both; "nothing" for one that a spec lacks."""
    x, y = (dict(_flat(json.loads(spec.to_json()))) for spec in (a, b))
    return {k: (x.get(k, "nothing"), y.get(k, "nothing")) for k in sorted(x | y) if x.get(k) != y.get(k)}


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(value)
