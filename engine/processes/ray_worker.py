"""One worker of `--ray`: an actor that loads the job's model once and extracts lists of clips. `ray_run.py` is its
other end. Clip ids come in and what became of them goes out; pixels and features never pass through Ray.

Ray starts an actor that died again, and gives it its task again: so a task can be begun by an actor that has nothing.
What it had done is in the store by then, and the clips that it held have a lease of a dead process.
"""

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spatialprobe.engine.job import Job
from spatialprobe.engine.pipeline.progress import RunLog
from spatialprobe.engine.processes.sharing import look_again
from spatialprobe.engine.processes.worker import fail
from spatialprobe.engine.run import Run, open_store, set_up, survey
from spatialprobe.engine.store import FeatureStore

LOOKS = 30  # one a second, for a folder that another machine has just made


@dataclass
class Ticket:
    """What a run tells its workers of its store."""

    sign: str  # folder below the store that lives as long as the run: who sees it sees the same store
    spec_hash: str
    of_sharing: dict[str, Any]  # since, session, ...


class RayWorker:
    """Methods answer with a dict: what was asked for, or "error" and "type" for what is wrong with job or machine."""

    def __init__(self, words: dict[str, Any], threads: int):
        self.job, self.threads = Job(**words), threads
        self.store: FeatureStore | None = None
        self.resolved, self.refs, self.blocks = None, {}, {}
        self.stopping = False

    def load(self) -> dict[str, Any]:
        return self._answer(self._load)

    def work(self, ids: list[str], ticket: dict[str, Any]) -> dict[str, Any]:
        return self._answer(self._work, ids, Ticket(**ticket))

    def stop(self) -> None:
        """Ends the task at work, from another thread, once the clip on the device is settled."""
        self.stopping = True

    def close(self) -> None:
        if self.store is not None:
            self.store.run.close()

    def _answer(self, what, *args: Any) -> dict[str, Any]:
        said: dict[str, Any] = {"node": os.uname().nodename, "pid": os.getpid()}
        try:
            return said | what(*args)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            fail(error, lambda kind, type, text: said.update(type=type, error=text))  # a lost GPU ends the process
            return said

    def _load(self) -> dict[str, Any]:
        """Loads the model, if this process has not yet. The store may not be there before."""
        if self.resolved is None:
            torch.set_num_threads(self.threads)  # of the run's own machine: a CPU's sums depend on it
            resolved, refs, _ = survey(self.job)
            self.blocks = set_up(resolved, Path(self.job.out))
            self.resolved, self.refs = resolved, {ref.id: ref for ref in refs}
        said = {"spec": self.resolved.spec.to_json(), "about": self.resolved.about, "blocks": self.blocks}
        return said | {"may_tile": self.resolved.may_tile}

    def _work(self, ids: list[str], ticket: Ticket) -> dict[str, Any]:
        self._load()
        if self.store is None:
            self.store = self._open(ticket)
        if unseen := [clip_id for clip_id in ids if clip_id not in self.refs]:
            raise ValueError(
                f"{self.job.clips} holds no clip {unseen[0]} here; clips must be where all machines see them"
            )
        refs, settled, last = [self.refs[clip_id] for clip_id in ids], {}, time.monotonic()
        missing = sum(ref.id not in self.store for ref in refs)

        def tell(clip_id: str, outcome: str, reason: str) -> None:
            nonlocal last
            now, before = time.monotonic(), last
            settled[clip_id], last = (outcome, reason, round(now - before, 4)), now
            if self.stopping:
                self.stopping = False  # once: what is under way is settled too
                raise KeyboardInterrupt

        run = Run(self.job, self.resolved, refs, self.store, missing, self.blocks)
        with RunLog(self.store.root / "log.jsonl", total=missing, shown=False, tell=tell) as log:
            report = run.share(log, **ticket.of_sharing)
        for clip_id in ids:  # there before: by a run beside this one, or by an actor that died after it
            if clip_id not in settled and clip_id in self.store:
                settled[clip_id] = ("written elsewhere", "", 0.0)
        of_run = {name: asdict(report)[name] for name in ("stopped", "interrupted", "batch_size", "timing")}
        return {"clips": [(clip_id, *what) for clip_id, what in settled.items()]} | of_run

    def _open(self, ticket: Ticket) -> FeatureStore:
        """The run's store. Raises ValueError if this machine does not see it, or sees another."""
        root = Path(self.job.out)
        for look in range(LOOKS):
            for folder in (root, (root / ticket.sign).parent):
                look_again(folder)
            if (root / "spec.json").is_file() and (root / ticket.sign).is_dir():
                break
            time.sleep(look < LOOKS - 1)
        else:
            raise ValueError(
                f"does not see the run's store at {root.absolute()}: --out must be a path that all machines share"
            )
        if (found := FeatureStore.open(root).spec_hash) != ticket.spec_hash:
            raise ValueError(f"sees a store of spec {found} at {root.absolute()}, the run's is of {ticket.spec_hash}")
        return open_store(self.resolved, root)
