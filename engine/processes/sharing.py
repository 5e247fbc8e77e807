"""How processes share the clips of one store or folder: each takes what nobody has, then what the others leave. No clip
is done twice, whoever comes when, and none waits for a process that is gone."""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spatialprobe.engine.files.spec_folder import ClipFolder
from spatialprobe.engine.pipeline.outcomes import Outcomes
from spatialprobe.engine.processes.leases import Leases
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import ClipRef

MOST_DEATHS = 2  # a clip at which so many processes died is recorded as failed
POLL = 0.2  # seconds between looks at clips that others hold


class Alone:
    """Nobody else writes here: one turn, all clips."""

    def turns(self, todo: Sequence[ClipRef], outcomes: Outcomes) -> Iterator[Iterator[ClipRef]]:
        yield iter(todo)

    def holds(self, clip_id: str) -> bool:
        return True

    def again(self, ref: ClipRef) -> None:
        raise AssertionError(f"{ref.id} cannot be taken over: nobody else writes here")

    def release(self, clip_id: str) -> None: ...


class Tail:
    """Lines that are added to a file, from `start` on."""

    def __init__(self, path: Path, start: int):
        self.path, self.at = path, start

    def lines(self) -> list[bytes]:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)  # anew: so a shared file system asks its server
        except FileNotFoundError:
            return []
        try:
            grown = os.fstat(fd).st_size - self.at
            data = os.pread(fd, grown, self.at) if grown > 0 else b""
        finally:
            os.close(fd)
        whole = data[: data.rfind(b"\n") + 1]  # the rest is being written
        self.at += len(whole)
        return whole.splitlines()


def positions(root: Path) -> dict[str, int]:
    """How long a store's records are now: what is in them later was settled later."""
    files = {name: root / name for name in ("failed.jsonl", "log.jsonl")}
    return {name: path.stat().st_size if path.exists() else 0 for name, path in files.items()}


def look_again(folder: Path) -> None:
    """A network file system may remember for a while that a file was not there; opening its folder asks the server."""
    try:
        os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except FileNotFoundError:
        pass


class Sharing:
    """One process's part of the work on a store.

    `since` is what `positions` said when the run began, and `first` the share of the clips to begin after: the workers
    of one run begin at different places.
    """

    def __init__(
        self,
        store: FeatureStore | ClipFolder,
        *,
        since: dict[str, int] | None = None,
        first: float = 0.0,
        **of_leases: Any,  # session, beat, patience
    ):
        since = positions(store.root) if since is None else since
        self.store, self.first = store, first
        self._failed, self._log = (Tail(store.root / name, since[name]) for name in ("failed.jsonl", "log.jsonl"))
        self._settled: dict[str, tuple[str, str]] = {}  # by anybody, without a file: id -> (outcome, reason)
        self._later: list[ClipRef] = []
        self.leases = Leases(store.root / "leases", **of_leases)
        self.holds, self.release = self.leases.holds, self.leases.release

    def __enter__(self) -> "Sharing":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc) -> None:
        self.leases.close(abandon=kind is not None)

    def turns(self, todo: Sequence[ClipRef], outcomes: Outcomes) -> Iterator[Iterator[ClipRef]]:
        """The clips to do, each held by this process. All of a turn must be settled before the next is asked for: so
        nobody waits for a clip while holding others. A clip at which a process died has a turn of its own."""
        start = int(self.first * len(todo))
        yield self._free([*todo[start:], *todo[:start]], outcomes)
        while self._later:
            later, self._later = self._later, []
            yield self._free(later, outcomes)
            suspects, self._later = self._later, []
            for ref in suspects:
                yield self._free([ref], outcomes, sys.maxsize)
            if len(self._later) == len(later):
                time.sleep(POLL)

    def settle_rest(self, todo: Sequence[ClipRef], outcomes: Outcomes) -> int:
        """Counts what others have settled, and fails what killed too many; returns how many clips are still to do."""
        return sum(1 for ref in self._free(todo, outcomes, sys.maxsize) if self.release(ref.id) is None) + len(
            self._later
        )

    def again(self, ref: ClipRef) -> None:
        """A clip that was taken over from this process: it is looked at again."""
        self.release(ref.id)
        self._later.append(ref)

    def _free(self, refs: Sequence[ClipRef], outcomes: Outcomes, most_deaths: int = 0) -> Iterator[ClipRef]:
        for ref in refs:
            deaths = None
            if ref.id not in self.store:
                deaths = self.leases.claim(ref.id, most_deaths)
                if deaths is None:
                    self._later.append(ref)
                    continue
            if self._is_settled(ref, outcomes):
                self.release(ref.id)
            elif deaths is not None and deaths >= MOST_DEATHS:
                outcomes.failed(ref, "worker", f"{deaths} processes died while they worked on it")
            elif deaths is not None:
                yield ref
            else:
                self._later.append(ref)  # its file was there and is not

    def _is_settled(self, ref: ClipRef, outcomes: Outcomes) -> bool:
        """Whether another process is done with a clip; counts it then."""
        for line in self._failed.lines():
            self._note(line, "failed")
        if self.store.spec.frames.short == "skip":
            for line in self._log.lines():
                if b'"skipped"' in line:
                    self._note(line, "skipped")
        look_again(self.store.path(ref.id).parent)
        if ref.id in self.store:
            outcomes.elsewhere(ref, "written", "")
        elif ref.id in self._settled:
            outcomes.elsewhere(ref, *self._settled[ref.id])
        else:
            return False
        return True

    def _note(self, line: bytes, outcome: str) -> None:
        try:
            record = json.loads(line)
            reason = f"{record['stage']}: {record['reason']}" if outcome == "failed" else record["reason"]
            if outcome == record.get("outcome", "failed"):
                self._settled[record["id"]] = (outcome, reason)
        except (ValueError, LookupError, TypeError, AttributeError):  # torn by a kill
            pass
