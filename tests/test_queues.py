"""Where work is done: short work on the thread that asks, long work on a pool; errors come where they are asked for."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from spatialprobe.engine.files.durable import StoreFull
from spatialprobe.engine.pipeline.queues import BatchSize, Behind, Nearby, ahead


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


def test_the_rest_is_settled_in_order_but_for_what_cannot_be_stored(nearby):
    def work(n: int) -> int:
        if n in (0, 3):
            raise StoreFull(28, "No space left on device", f"clip{n}")
        if n == 4:
            raise ValueError("not finite")
        if n >= 7:
            raise PermissionError(13, "Permission denied", f"clip{n}")
        return n

    def settle(item: int, future) -> None:
        settled.append((item, str(future.exception() or "")))
        if item == 2:
            raise StoreFull(28, "No space left on device", "log.jsonl")

    settled, behind = [], Behind(nearby, 2, settle)
    for n in range(7):
        behind.put(n, work, n)
    assert behind.settle_rest() == ""
    assert settled == [(1, ""), (2, ""), (4, "not finite"), (5, ""), (6, "")]
    for n in (0, 8, 1, 7, 2):
        behind.put(n, work, n)
    assert behind.settle_rest() == "[Errno 13] Permission denied: 'clip8'"
    assert settled[5:] == [(1, ""), (2, "")]
    behind = Behind(nearby, 2, lambda item, future: future.result())
    behind.put(4, work, 4)
    with pytest.raises(ValueError, match="not finite"):
        behind.settle_rest()


@pytest.mark.parametrize("here", [False, True])
def test_what_failed_is_let_go_without_waiting_for_the_garbage_collector(nearby, here):
    def fail(clip: set) -> None:
        raise ValueError("not finite")

    def settle(item: int, future) -> None:
        with pytest.raises(ValueError, match="not finite"):
            future.result()

    nearby.here = here
    behind, clips = Behind(nearby, 2, settle), []
    gc.disable()
    try:
        for n in range(20):
            clip = {n}
            clips.append(weakref.ref(clip))
            behind.put(n, fail, clip)
            behind.wait()
        del clip
        behind.wait(0)
        assert [clip() for clip in clips] == [None] * 20
    finally:
        gc.enable()


def test_what_is_done_holds_no_clip_and_is_settled_at_the_next_look(nearby):
    settled, kept = [], []
    behind = Behind(nearby, 8, lambda item, future: settled.append(item))
    for n in range(3):
        clip = {n}
        kept.append(weakref.ref(clip))
        behind.put(n, len, clip)
    del clip
    end = time.monotonic() + 20
    while any(clip() is not None for clip in kept) and time.monotonic() < end:
        time.sleep(0.01)
    assert [clip() for clip in kept] == [None] * 3
    assert settled == []
    behind.wait()
    assert settled == [0, 1, 2]


def test_of_clips_of_many_kinds_the_fullest_group_goes_first_and_at_most_four_wait():
    """A clip is a letter, its kind, and a number."""
    taken, size = [], BatchSize(3, 1)
    clips = "a0 a1 b0 a2 b1 c0 d0 e0 f0 b2".split()
    groups = size.groups((taken.append(clip) or clip for clip in clips), key=lambda clip: clip[0])
    asked = [(group, len(taken)) for group in groups]
    assert asked == [
        (["a0", "a1", "a2"], 4),
        (["b0", "b1"], 9),  # b, c, d, e and now f: of five the fullest
        (["c0"], 10),  # the same, all of one clip: the first
        (["d0"], 10),
        (["e0"], 10),
        (["f0"], 10),
        (["b2"], 10),
    ]


def test_an_interrupt_comes_out_at_once(nearby):
    def interrupted() -> None:
        raise KeyboardInterrupt

    nearby.submit(where).result()
    with pytest.raises(KeyboardInterrupt):
        nearby.submit(interrupted)
