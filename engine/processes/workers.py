"""`--devices`: one process per named device on one store. They share the clips by `sharing`; this end starts them,
shows one bar, passes an interrupt on, and adds up what became of the clips. A worker that dies is not started again.
"""

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spatialprobe.engine.job import Job
from spatialprobe.engine.pipeline.outcomes import Outcomes, Report
from spatialprobe.engine.pipeline.progress import bar
from spatialprobe.engine.processes.sharing import Sharing, positions
from spatialprobe.engine.processes.worker import KNOWN
from spatialprobe.engine.resolve import device_of
from spatialprobe.engine.run import open_run, survey, write_report
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import ClipRef


def devices_of(text: str, offload: str = "none") -> list[str]:
    """ "all" or a list of devices, one per worker; "cpu,cpu" is two. Raises ValueError for what is not there."""
    import torch

    if offload == "spread":
        raise ValueError("offload spread uses every GPU for one model: it does not go with devices")
    names = [name.strip() for name in text.split(",")]
    if names == ["all"]:
        names = [f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
        if not names:
            raise ValueError("devices all: this machine has no CUDA device; cpu,cpu starts two workers on the CPU")
    kinds = {device_of(name or "nothing").type for name in names}
    if len(kinds) > 1:
        raise ValueError(f"devices must be of one kind, whose features are the same bits, got {text!r}")
    return names


# -- the parent -----------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    number: int
    device: str
    process: subprocess.Popen
    answers: Any  # the pipe's file, whose last line may be cut short
    loaded: bool = False
    report: dict | None = None
    error: dict | None = None  # "type" and "text"
    ended: str = ""  # how, in words
    lines: bytes = field(default=b"", repr=False)

    def read(self) -> list[dict] | None:
        """What it has said since; None at the end."""
        data = os.read(self.answers.fileno(), 1 << 16)
        if not data:
            return None
        *whole, self.lines = (self.lines + data).split(b"\n")
        return [json.loads(line) for line in whole]


def run_workers(job: Job, *, retry_failed: bool = False, **of_leases: Any) -> tuple[Report, Path]:
    """Extracts what the store lacks of a job's clips, by a process on each of `job.devices`.

    Raises ValueError for a job that cannot be done, and what kept every worker from beginning.
    """
    devices, out, started = devices_of(job.devices, job.offload), Path(job.out), datetime.now(UTC)
    job = replace(job, device=devices[0], devices=None)
    resolved, refs, todo = survey(job, retry_failed=retry_failed)
    if not todo:
        run = open_run(job, retry_failed=retry_failed)
        return run.extract(), run.store.root
    if job.loaders is None and resolved.device.type == "cuda":
        job = replace(job, loaders=max(2, min(16, (os.cpu_count() or 2) // len(devices))))
    pool = Pool(len(refs), todo)
    task = {"retry_failed": retry_failed, "since": positions(out), "session": secrets.token_hex(8)} | of_leases
    try:
        for number, device in enumerate(devices):
            of_worker = {"job": asdict(replace(job, device=device)), "number": number, "of": len(devices)}
            pool.start(task | of_worker)
        pool.listen()
    finally:
        pool.end()
    if not any(worker.loaded for worker in pool.workers):
        return pool.nothing_began(), out
    store = FeatureStore.create(out, FeatureStore.open(out).spec)  # a worker may have tiled the VAE, which is in it
    with Sharing(store, since=task["since"], session=task["session"], **of_leases) as sharing:
        report = pool.add_up(store, sharing)
    parts = [{"device": w.device, "ended": w.ended} | (w.report or {}) for w in pool.workers]
    write_report(store, replace(job, device=None, devices=",".join(devices)), started, {"workers": parts}, report)
    return report, out


class Pool:
    """The workers of a run, and what they have said."""

    def __init__(self, asked: int, todo: list[ClipRef]):
        self.asked, self.todo = asked, todo
        self.workers: list[Worker] = []
        self.outcomes: dict[str, tuple[str, str]] = {}  # clip id -> (outcome, reason)
        self.interrupted = False
        self._bar = bar(len(todo), "clip")
        self._failed: set[str] = set()

    def start(self, task: dict) -> None:
        mine, theirs = os.pipe()
        os.set_inheritable(theirs, True)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "spatialprobe.engine.processes.worker", str(theirs)],
            stdin=subprocess.PIPE,
            stdout=2,  # libraries may print
            pass_fds=[theirs],
            start_new_session=True,  # the terminal's Ctrl-C reaches this end alone, which passes it on once
        )
        os.close(theirs)
        self.workers.append(Worker(task["number"], task["job"]["device"], process, os.fdopen(mine, "rb", buffering=0)))
        try:
            process.stdin.write(json.dumps(task).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:  # it died at once; `listen` says so
            pass

    def listen(self) -> None:
        """Until every worker has ended. An interrupt is passed on; a second one kills."""
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                selector.register(worker.answers, selectors.EVENT_READ, worker)
            while selector.get_map():
                try:
                    for key, _ in selector.select():
                        self._hear(key.data) or selector.unregister(key.data.answers)
                except KeyboardInterrupt:
                    if self.interrupted:
                        raise
                    self.interrupted = True
                    for worker in self.workers:
                        close_quietly(worker.process.stdin)

    def _hear(self, worker: Worker) -> bool:
        """Takes in what a worker says; False if it has ended."""
        messages = worker.read()
        for message in messages or []:
            kind = message.pop("kind")
            if kind == "clip":
                self._settle(**message)
            elif kind == "loaded":
                worker.loaded = True
            elif kind == "report":
                worker.report = message
            else:
                worker.error = message
        if messages is None:
            worker.ended = how_it_ended(worker)
            if worker.ended != "done" and not self.interrupted:
                left = sum(not other.ended for other in self.workers)
                rest = "the others are done" if any(o.ended == "done" for o in self.workers) else "no worker is left"
                then = f"{left} of {len(self.workers)} workers go on" if left else rest
                tqdm.write(f"engine: worker {worker.number} ({worker.device}) {worker.ended}; {then}", sys.stderr)
        return messages is not None

    def _settle(self, id: str, outcome: str, reason: str) -> None:
        if id not in self.outcomes:
            self._bar.update()
        if outcome.startswith("failed"):
            self._failed.add(id)
            self._bar.set_postfix(failed=len(self._failed), refresh=False)
        if id not in self.outcomes or not outcome.endswith(" elsewhere"):  # the one that did it knows best
            self.outcomes[id] = (outcome, reason)

    def end(self) -> None:
        """No worker is left behind, whatever happened here."""
        self._bar.close()
        for worker in self.workers:
            if worker.process.poll() is None and not worker.ended:
                worker.process.kill()
            close_quietly(worker.process.stdin)
            worker.process.wait()
            worker.answers.close()

    def nothing_began(self) -> Report:
        """Of workers that could not load: raises as one process would have."""
        if self.interrupted:
            raise KeyboardInterrupt
        error = next((worker.error for worker in self.workers if worker.error), None)
        if error is None:
            raise MemoryError(f"every worker ended while it loaded the model: the first {self.workers[0].ended}")
        raise KNOWN.get(error["type"], RuntimeError)(error["text"])

    def add_up(self, store: FeatureStore, sharing: Sharing) -> Report:
        """One report of all workers. What a worker took with it, and nobody took over, is looked at here."""
        report = Report(self.asked, self.asked - len(self.todo), interrupted=self.interrupted)
        why = {clip_id: f"{record['stage']}: {record['reason']}" for clip_id, record in store.failures().items()}
        for clip_id, (outcome, reason) in self.outcomes.items():
            name = "elsewhere" if outcome == "written elsewhere" else outcome.removesuffix(" elsewhere")
            setattr(report, name, getattr(report, name) + 1)
            if name == "failed":
                report.failures[clip_id] = why.get(clip_id, reason)
        rest = [ref for ref in self.todo if ref.id not in self.outcomes]
        left = sharing.settle_rest(rest, Outcomes(report, store, lambda *outcome: None, sharing.release))
        reports = [worker.report for worker in self.workers if worker.report]
        stopped = [r["stopped"] for r in reports if r["stopped"]]
        if left and (stopped or not report.interrupted):
            report.stopped = stopped[0] if stopped else f"{left} clips are left, and no worker is"
        report.batch_size = min((r["batch_size"] for r in reports), default=0)
        report.timing = merged_timing([r["timing"] for r in reports if r["timing"]])
        return report


def how_it_ended(worker: Worker) -> str:
    code = worker.process.wait()
    if worker.error:
        return worker.error["text"]
    if worker.report and code == 0:
        stopped = worker.report["stopped"]
        return f"stopped: {stopped}" if stopped else "was interrupted" if worker.report["interrupted"] else "done"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def merged_timing(timings: list[dict]) -> dict:
    """Seconds of the longest and what held it back, stages and counts summed, busy as the mean, peak memory of the one
    that needed most."""
    if not timings:
        return {}
    stages: dict[str, dict] = {}
    for timing in timings:
        for name, stage in timing["stages"].items():
            into = stages.setdefault(name, {"seconds": 0.0})
            gb = into.pop("gb_per_s", 0.0) * into["seconds"] + stage.get("gb_per_s", 0.0) * stage["seconds"]
            into["seconds"] = round(into["seconds"] + stage["seconds"], 4)
            if gb and into["seconds"]:
                into["gb_per_s"] = round(gb / into["seconds"], 4)
    longest = max(timings, key=lambda timing: timing["seconds"])
    told: dict[str, Any] = {name: longest[name] for name in ("held_back", "launches") if name in longest}
    for name in ("compile", "latents"):
        if counts := [timing[name] for timing in timings if name in timing]:
            told[name] = {key: round(sum(count[key] for count in counts), 4) for key in counts[0]}
    return told | {
        "seconds": longest["seconds"],
        "busy": round(sum(timing["busy"] for timing in timings) / len(timings), 4),
        "peak_memory_bytes": max(timing["peak_memory_bytes"] for timing in timings),
        "stages": stages,
    }


def close_quietly(file: Any) -> None:
    try:
        file.close()
    except BrokenPipeError:  # its process has died with something unread
        pass
