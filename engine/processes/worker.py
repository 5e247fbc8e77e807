"""One worker of `--devices`: a process that does a task's part and answers on a pipe. `workers.py` is its other end.

The task is a line of JSON on standard input, which stays open: when it is closed, so also when the parent dies, the
worker stops as at an interrupt. Answers are lines of JSON: "loaded", "clip" as each is settled, "report" or "error".
"""

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from spatialprobe.engine.job import Job
from spatialprobe.engine.pipeline.outcomes import Report
from spatialprobe.engine.pipeline.progress import RunLog
from spatialprobe.engine.run import open_run
from spatialprobe.engine.types import Refused

# What is wrong with the job or the machine; anything else is a bug of ours. By name: what to raise again.
KNOWN = {"ValueError": ValueError, "OSError": OSError, "MemoryError": MemoryError, "Refused": Refused}
Say = Callable[..., None]


def main() -> int:
    """Does the task that comes on standard input; answers on the file descriptor it is given."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it
    with os.fdopen(int(sys.argv[1]), "w", buffering=1) as answers:

        def say(kind: str, **what: Any) -> None:
            try:
                answers.write(json.dumps({"kind": kind} | what) + "\n")
            except BrokenPipeError:  # the parent is gone, and this process will be told to stop
                pass

        line = b""
        while not line.endswith(b"\n"):
            line += (got := os.read(0, 1 << 16))
            if not got:
                return 1
        threading.Thread(target=stop_with_the_parent, daemon=True).start()
        try:
            work(json.loads(line), say)
        except KeyboardInterrupt:
            say("error", type="KeyboardInterrupt", text="was interrupted")
            return 130
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            return fail(error, say)
    return 0


def stop_with_the_parent() -> None:
    while os.read(0, 1 << 16):
        pass
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # wakes it, also where it waits


def work(task: dict, say: Say) -> None:
    run = open_run(Job(**task["job"]), retry_failed=task["retry_failed"])
    say("loaded")
    of_sharing = {name: task[name] for name in ("since", "session", "beat", "patience") if name in task}
    tell = lambda clip_id, outcome, reason: say("clip", id=clip_id, outcome=outcome, reason=reason)  # noqa: E731
    report = Report(asked=len(run.refs), present=len(run.refs))
    if run.missing:
        with RunLog(run.store.root / "log.jsonl", total=run.missing, shown=False, tell=tell) as log:
            report = run.share(log, first=task["number"] / task["of"], **of_sharing)
    say("report", **asdict(report), blocks=run.blocks)


def fail(error: Exception, say: Say) -> int:
    """Says what ended this worker. Its leases stay, as a killed process's: others take its clips over."""
    text = (str(error).splitlines() or [""])[0]
    if type(error).__name__ == "AcceleratorError" or "CUDA error" in text:
        say("error", type="RuntimeError", text=f"lost its GPU: {text}")
        os._exit(1)  # a poisoned CUDA context may hang while Python cleans up
    kind = next((kind for kind in KNOWN if type(error).__name__ == kind or isinstance(error, KNOWN[kind])), "bug")
    if kind == "bug":
        traceback.print_exc()
    say("error", type=kind, text=text)
    return 1


if __name__ == "__main__":
    sys.exit(main())
