"""Where work is done: short work on the thread that asks, long work on a pool; errors come where they are asked for."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from spatialprobe.engine.queues import Behind, Nearby, ahead


@pytest.fixture
def nearby():
    with Nearby(ThreadPoolExecutor(2, "pool"), 0.02) as executor:
        yield executor


def where(seconds: float = 0.0) -> str:
    time.sleep(seconds)
    return threading.current_thread().name.split("_")[0]


def test_short_work_comes_to_the_calling_thread_and_long_work_stays_in_the_pool(nearby):
    mine = where()
    assert nearby.submit(where).result() == "pool"  # not known yet
    assert {nearby.submit(where).result() for _ in range(50)} == {mine}
    assert nearby.submit(where, 0.5).result() == mine  # found out by doing it
    assert {nearby.submit(where, 0.2).result() for _ in range(8)} == {"pool"}
    assert {nearby.submit(where).result() for _ in range(Nearby.EVERY - 8)} == {"pool"}
    assert nearby.submit(where).result() == mine  # tried again: it has become short


def test_work_that_was_long_at_first_is_never_tried_on_the_calling_thread(nearby):
    assert {nearby.submit(where, 0.17).result() for _ in range(5)} == {"pool"}


def test_order_and_errors_are_those_of_a_pool(nearby):
    def work(n: int) -> int:
        if n == 30:
            raise ValueError("thirty")
        return n

    results = ahead(nearby, work, range(40), 4)
    assert [next(results) for _ in range(30)] == list(range(30))
    with pytest.raises(ValueError, match="thirty"):
        next(results)
    settled = []
    behind = Behind(nearby, 2, lambda item, future: settled.append((item, type(future.exception()).__name__)))
    for n in (1, 30, 2):
        behind.put(n, work, n)
        behind.wait()
    behind.wait(0)
    assert settled == [(1, "NoneType"), (30, "ValueError"), (2, "NoneType")]


def test_an_interrupt_comes_out_at_once(nearby):
    def interrupted() -> None:
        raise KeyboardInterrupt

    nearby.submit(where).result()
    with pytest.raises(KeyboardInterrupt):
        nearby.submit(interrupted)
