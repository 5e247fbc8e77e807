"""What people see of a run: a progress bar, a log of JSON lines, a table of stage times."""

import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

from spatialprobe.engine.files.durable import room_for
from spatialprobe.engine.pipeline.outcomes import Progress, Report


def bar(total: int | None, unit: str, *, shown: bool = True) -> tqdm:
    """A progress bar on a terminal, nothing elsewhere."""
    return tqdm(total=total, unit=unit, disable=not (shown and sys.stderr.isatty()), dynamic_ncols=True)


class RunLog:
    """One JSON line per clip as it is settled, and the bar beside it with clips/s, time left and failures.

    `unit` is for the bar where something else is settled: parts of many clips.
    """

    def __init__(
        self, path: Path, total: int, *, unit: str = "clip", shown: bool = True, tell: Progress = lambda *outcome: None
    ):
        self._path, self._file = path, path.open("ab", buffering=0)
        self._bar = bar(total, unit, shown=shown)
        self._tell = tell
        self._failed = 0

    def clip(self, clip_id: str, outcome: str, reason: str) -> None:
        if not outcome.endswith("elsewhere"):  # the process that did it writes it down
            line = {"time": round(time.time(), 3), "id": clip_id, "outcome": outcome, "reason": reason}
            data = json.dumps(line).encode() + b"\n"
            with room_for(self._path, len(data)):
                self._file.write(data)
        self._tell(clip_id, outcome, reason)
        self._failed += outcome.startswith("failed")
        if not self._bar.disable:
            self._bar.set_postfix(failed=self._failed, refresh=False)
            self._bar.update()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exc) -> None:
        self._bar.close()
        self._file.close()


def summary(report: Report, root: Path) -> str:
    """What a run did, in a few lines."""
    lines = [
        f"{root}: {report.written} written, {report.present} there before, {report.failed} failed, "
        f"{report.skipped} skipped of {report.asked} clips"
        + (f", {report.elsewhere} written by other processes meanwhile" if report.elsewhere else "")
    ]
    timing = report.timing
    if timing:
        rate = report.written / timing["seconds"] if timing["seconds"] else 0.0
        peak, plan = timing["peak_memory_bytes"] / 1e9, timing.get("planned_memory_bytes")
        planned = f" (planned {plan / 1e9:.2f} GB)" if plan else ""
        busy, batch = f"device busy {timing['busy']:.0%}, ", f", batch {report.batch_size}"
        if not timing["busy"]:  # as of `engine lift`, which has no device
            busy = batch = ""
        lines.append(f"{timing['seconds']:.1f} s, {rate:.2f} clips/s, {busy}peak memory {peak:.2f} GB{planned}{batch}")
        if "compile" in timing:
            lines.append(
                "compiled {programs} programs in {seconds:.1f} s, {recompiled} of them again for other shapes or "
                "blocks, {from_cache} from disk".format(**timing["compile"])
            )
        if "latents" in timing:
            lines.append("latents of {read} clips read, of {made} made".format(**timing["latents"]))
        if "held_back" in timing:
            lines.append(timing["held_back"])
        for name, stage in timing["stages"].items():
            gb = f"{stage['gb_per_s']:8.2f} GB/s" if "gb_per_s" in stage else ""
            lines.append(f"  {name:<17}{stage['seconds']:9.2f} s{gb}")
    return "\n".join(lines)
