"""Stage times add up, nested stages are not counted twice."""

import time
import weakref

import pytest
import torch

from spatialprobe.engine.pipeline.timing import Clock


def test_nested_stages_are_taken_out_of_the_outer_one():
    clock = Clock(torch.device("cpu"))
    with clock.on_device("blocks"):
        time.sleep(0.02)
        with clock.on_device("finish", out_of="blocks"):
            time.sleep(0.05)
    with clock.host("decode"):
        time.sleep(0.01)
    clock.add("decode", nbytes=10_000_000)
    summary = clock.summary()
    stages = {name: stage["seconds"] for name, stage in summary["stages"].items()}
    assert stages["finish"] >= 0.05
    assert 0.02 <= stages["blocks"] < 0.05
    assert stages["blocks"] + stages["finish"] + stages["decode"] <= summary["seconds"] + 2e-4  # rounded
    assert summary["busy"] == pytest.approx((stages["blocks"] + stages["finish"]) / summary["seconds"], rel=0.01)
    assert summary["stages"]["decode"]["gb_per_s"] == pytest.approx(0.01 / stages["decode"], rel=0.05)
    assert summary["peak_memory_bytes"] > 1e6


def test_waiting_times_the_wait_and_passes_everything_on():
    clock = Clock(torch.device("cpu"))

    def slow():
        for i in range(3):
            time.sleep(0.01)
            yield i

    got = []
    for item in clock.waiting("wait", slow()):
        got.append(item)
        time.sleep(0.02)
    assert got == [0, 1, 2]
    assert 0.03 <= clock.summary()["stages"]["wait"]["seconds"] < 0.06 + 0.03


def test_what_was_waited_for_is_let_go_before_the_next_is():
    alive = []

    def made():
        for _ in range(3):
            alive.append([ref() is not None for ref in there])
            item = torch.zeros(1)
            there.append(weakref.ref(item))
            yield item
            del item

    there = []
    for item in Clock(torch.device("cpu")).waiting("wait", made()):
        del item
    assert alive == [[], [False], [False, False]]
