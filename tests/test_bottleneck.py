"""The stage that holds a run back, of clocks that were made up."""

import pytest
import torch

from spatialprobe.engine.pipeline.bottleneck import held_back, held_back_line
from spatialprobe.engine.pipeline.timing import Clock


def timing(busy: float, **stages: float) -> dict:
    named = {name.replace("_", " "): {"seconds": seconds} for name, seconds in stages.items()}
    return {"seconds": 100.0, "busy": busy, "stages": named}


@pytest.mark.parametrize(
    ("clock", "line"),
    [
        (
            timing(0.4, wait_for_loaders=55, decode=180, prepare=40, blocks=30, encode=10),
            "held back by decode (55% of the time): more --loaders (4 on 16 cores) or smaller sources",
        ),
        (
            timing(0.2, wait_for_loaders=75, decode=100, prepare=200, blocks=20),
            "held back by prepare (75% of the time): more --loaders (4 on 16 cores) or --resize device",
        ),
        (
            timing(0.3, wait_for_writers=60, wait_for_loaders=5, write=120, decode=30),
            "held back by write (60% of the time): more --writers (2 on 16 cores) or "
            "--pool, a smaller --store-dtype or a faster disk",
        ),
        (
            timing(0.97, wait_for_loaders=2, blocks=90, encode=7, decode=300),
            "held back by blocks (97% of the time): "
            "fewer --steps, or a larger --batch or --compile where it is not full yet",
        ),
        (
            timing(0.9, blocks=20, encode=70),
            "held back by encode (90% of the time): --latents, where clips come back for other layers, steps or models",
        ),
        (
            timing(0.3, stage=50, noise=3, blocks=30),
            "held back by stage (53% of the time): --resize host where sources are larger than the model's input",
        ),
        (timing(0.05, blocks=5, wait_for_loaders=3), "held back by no stage in particular"),
    ],
)
def test_the_line_names_the_stage_and_what_would_widen_it(clock, line):
    assert held_back_line(clock, loaders=4, writers=2, cores=16) == line


@pytest.mark.parametrize(
    ("launch", "advice"),
    [
        (0.8, "a larger --batch, or --compile graphs (launching is 80% of a block's time)"),
        (0.79, "fewer --steps, or --compile where it is off (launching is 79% of a block's time)"),
    ],
)
def test_blocks_that_wait_for_launches_want_graphs(launch, advice):
    measured = {"launches": {"launch_ms": 5 * launch, "block_ms": 5.0}}
    assert held_back(timing(0.9, blocks=90) | measured, loaders=1, writers=1).advice == advice
    assert held_back(timing(0.9, encode=90) | measured, loaders=1, writers=1).stage == "encode"


def test_more_threads_than_cores_are_not_advised():
    found = held_back(timing(0.1, wait_for_loaders=80, decode=300), loaders=16, writers=2, cores=16)
    assert (found.stage, found.share) == ("decode", 0.8)
    assert found.advice == "more cores (16 --loaders) or smaller sources"


def test_what_a_run_cannot_do_is_not_advised():
    about = {"loaders": 1, "writers": 1, "cores": 4, "cannot": ["prepare", "encode"]}
    assert "--resize" not in held_back(timing(0.1, wait_for_loaders=80, prepare=70), **about).advice
    assert held_back(timing(0.9, encode=70, blocks=20), **about).advice == "more GPUs"


def test_threads_are_not_advised_for_what_they_were_not_given():
    clock = timing(0.1, wait_for_writers=60, write=60)
    found = held_back(clock, loaders=2, writers=4, cores=16, here=["writers"])
    assert (found.stage, found.advice.split(" or ")[0]) == ("write", "more processes (--devices)")
    assert "more --writers" in held_back(clock, loaders=2, writers=4, cores=16, here=["loaders"]).advice


def test_a_run_without_time_is_held_back_by_nothing():
    assert held_back({"seconds": 0.0, "busy": 0.0, "stages": {}}, loaders=1, writers=1, cores=2) is None


def test_it_reads_what_a_clock_writes():
    clock = Clock(torch.device("cpu"))
    clock.started -= 10
    clock.add("wait for loaders", seconds=9)
    clock.add("decode", seconds=8)
    assert clock.share("wait for loaders") == pytest.approx(0.9, abs=0.05)
    assert held_back(clock.summary(), loaders=1, writers=1, cores=2).stage == "decode"
