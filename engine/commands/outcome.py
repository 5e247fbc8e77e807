"""What people read at the end of a run over clips, and its exit code."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spatialprobe.engine.pipeline.outcomes import Report


def print_report(report: "Report", root: Path, words: list[str]) -> int:
    """What became of the clips, and the exit code."""
    from spatialprobe.engine.pipeline.progress import summary

    print(summary(report, root))
    if report.stopped:
        print(f"engine: stopped: {report.stopped}; run the same command again to go on", file=sys.stderr)
    if report.interrupted:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130
    if report.failed:
        print(f"{report.failed} clips failed:", file=sys.stderr)
        for clip_id, reason in report.failures.items():
            print(f"  {clip_id}  {reason}", file=sys.stderr)
        again = [word for word in words if word != "--retry-failed"]
        print(f"to retry them: {shlex.join([sys.argv[0], *again, '--retry-failed'])}", file=sys.stderr)
    return 1 if report.failed or report.stopped else 0
