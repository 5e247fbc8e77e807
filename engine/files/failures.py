"""`failed.jsonl`: one line per clip that a run could not do, added to by any number of threads and processes."""

import json
from pathlib import Path

from spatialprobe.engine.files.durable import append_line
from spatialprobe.engine.types import check_clip_id

Record = dict[str, str]  # "id", "stage", "reason"


def append_failure(path: Path, clip_id: str, stage: str, reason: str) -> None:
    append_line(path, json.dumps({"id": check_clip_id(clip_id), "stage": stage, "reason": reason}))


def read_failures(path: Path) -> tuple[dict[str, Record], list[int]]:
    """The last record of each clip id, and the numbers, from 1, of lines that are no records: a kill tore them."""
    records: dict[str, Record] = {}
    torn = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], 1):
        try:
            record = json.loads(line)
            records[check_clip_id(record["id"])] = {key: record[key] for key in ("id", "stage", "reason")}
        except (ValueError, LookupError, TypeError, AttributeError):
            if line:
                torn.append(number)
    return records, torn
