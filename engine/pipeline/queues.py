"""Bounded work around the device: loading ahead, batches, sizes that fit, writing behind. Knows nothing of models."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from spatialprobe.engine.device.out_of_memory import is_out_of_memory
from spatialprobe.engine.files.durable import StoreFull
from spatialprobe.engine.types import first_line


def ahead(pool: Executor, work: Callable, items: Iterable, depth: int) -> Iterator:
    """map(work, items) on `pool`, in order, with at most `depth` results made or in the making."""
    items, waiting = iter(items), deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) == depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Nearby(Executor):
    """Runs what is short where it is asked for, and hands the rest to a pool of threads.

    Threads that all want the interpreter hand it over at every system call and every operation of torch: a clip of
    16x16 pixels took a third more CPU time with loaders and writers than on one thread (`benchmarks/bench_workers.py`).
    Work is done here while it takes less than `short` seconds on the average. In the pool, where waiting for the
    interpreter makes it longer, it stays while it takes more than `RETRY` times that.
    """

    RETRY, EVERY, MEMORY = 8, 64, 0.9  # EVERY: tasks of the pool between tries; MEMORY: of the running average

    def __init__(self, pool: Executor, short: float):
        self._pool, self._short = pool, short
        self.here, self._mean, self._stay = False, 0.0, 1  # seconds; tasks of the pool before the next try

    def submit(self, work: Callable, /, *args: Any) -> Future:
        if not self.here:
            return self._pool.submit(self._timed, work, args)
        done, start = Future(), time.perf_counter()
        try:
            done.set_result(work(*args))
        except Exception as error:  # raised where the result is asked for
            done.set_exception(error)
        self._add(time.perf_counter() - start)
        if self._mean > self._short:
            self.here, self._mean, self._stay = False, 0.0, self.EVERY
        return done

    def _timed(self, work: Callable, args: tuple) -> Any:
        start = time.perf_counter()
        try:
            return work(*args)
        finally:
            if not self.here:
                self._add(time.perf_counter() - start)
                self._stay -= 1
                if self._stay <= 0 and self._mean < self.RETRY * self._short:
                    self.here, self._mean = True, 0.0

    def _add(self, seconds: float) -> None:
        self._mean = self.MEMORY * self._mean + (1 - self.MEMORY) * seconds if self._mean else seconds

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait, cancel_futures=cancel_futures)


class BatchSize:
    """Clips per batch. "auto" starts at `auto` and halves, for good, when the device's memory runs out."""

    def __init__(self, asked: int | str, auto: int):
        self.now, self.may_halve = (auto, True) if asked == "auto" else (asked, False)

    def groups(self, clips: Iterable, key: Callable) -> Iterator[list]:
        """Clips of equal keys, in full batches as they fill up, then the rest. At most 4 keys wait for company."""
        waiting: dict[Any, list] = {}
        for clip in clips:
            group = waiting.setdefault(key(clip), [])
            group.append(clip)
            if len(group) >= self.now:
                yield waiting.pop(key(clip))
            elif len(waiting) > 4:
                yield waiting.pop(max(waiting, key=lambda k: len(waiting[k])))  # the fullest
        yield from waiting.values()

    def fitting(self, clips: list, run: Callable[[list], Any]) -> Iterator[tuple[list, Any]]:
        """(clips, run(clips)) for pieces of `clips` that fit in memory."""
        while clips:
            piece, full = clips[: self.now], ""
            try:
                result = run(piece)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                full = first_line(error)
            if full:  # outside the handler: the traceback would keep the failed batch in memory
                self._halve(full)
                continue
            yield piece, result
            clips = clips[len(piece) :]

    def _halve(self, full: str) -> None:
        if self.now == 1 or not self.may_halve:
            hint = "one clip alone does not fit" if self.now == 1 else "use a smaller batch size, or auto"
            raise MemoryError(f"out of device memory at batch size {self.now}: {hint} ({full})")
        self.now //= 2
        torch.cuda.empty_cache()


@dataclass
class Task:
    item: Any
    give: Callable[[], Future] | None  # to the pool; None once that has happened
    future: Future | None = None  # None too where an interrupt came while it was done on this thread


class Behind:
    """Work given to a pool and settled, in order, on the calling thread: at most `depth` are under way."""

    def __init__(self, pool: Executor, depth: int, settle: Callable[[Any, Future], None]):
        self._pool, self._depth, self._settle = pool, depth, settle
        self._under_way: deque[Task] = deque()

    def put(self, item: Any, work: Callable, *args: Any) -> None:
        """`work` may be done twice, if an interrupt comes: it must not mind."""
        task = Task(item, lambda: self._pool.submit(work, *args))
        self._under_way.append(task)
        task.future, task.give = task.give(), None

    def settle_rest(self) -> str:
        """Settles all that is left. What cannot be stored any more is left unsettled, to be done again another time;
        what is stored is settled, though there may be no room for a line that says so. Returns the first reason why
        something could not be stored, other than a full disk, or ""."""
        why = ""
        while self._under_way:
            task = self._under_way.popleft()
            future = task.future or task.give()
            if not isinstance(error := future.exception(), OSError):
                with suppress(StoreFull):
                    self._close(task.item, future)
            elif not isinstance(error, StoreFull):
                why = why or first_line(error)
        return why

    def wait(self, depth: int | None = None) -> None:
        """Settles what is done, and waits until at most `depth` are under way."""
        most = self._depth if depth is None else depth
        while len(self._under_way) > most or (self._under_way and self._under_way[0].future.done()):
            task = self._under_way.popleft()
            self._close(task.item, task.future)

    def _close(self, item: Any, future: Future) -> None:
        self._settle(item, future)
        if (error := future.exception()) is not None:
            error.__traceback__ = None  # its frames hold the future, and what the work was given, in a circle
