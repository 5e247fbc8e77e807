"""Taps hand over each wanted block's output once: of one run, or of several put together."""

import pytest
import torch
from torch import nn

from spatialprobe.engine.device.tap import Taps


class Scaled(nn.Module):
    def forward(self, x):
        return 2 * x, "the text, say"


def run(blocks, *inputs):
    for x in inputs:
        for block in blocks:
            x, _ = block(x)


def test_the_tokens_of_several_passes_come_together_with_the_last():
    blocks, got = [Scaled(), Scaled(), Scaled()], []
    taps = Taps(blocks, (0, 2))
    first, second = torch.ones(2, 3, 4), torch.full((2, 3, 4), 5.0)
    run(blocks, first)  # outside of `into`: nobody listens
    with taps.into(lambda layer, x: got.append((layer, x)), 2):
        run(blocks, first)
        assert got == []
        run(blocks, second)
    assert [layer for layer, _ in got] == [0, 2]
    for layer, x in got:
        assert torch.equal(x, torch.cat([first, second], 1) * 2 ** (layer + 1))
    with taps.into(lambda layer, x: got.append((layer, x))):
        run(blocks, second)
    assert torch.equal(got[-1][1], 8 * second)


@pytest.mark.parametrize(("passes", "runs"), [(1, 0), (1, 2), (2, 1), (2, 3)])
def test_blocks_that_run_too_seldom_or_too_often_are_noticed(passes, runs):
    blocks = [Scaled()]
    with pytest.raises(AssertionError, match=f"run {passes} times each, ran {{0: {runs}}}"):
        with Taps(blocks, (0,)).into(lambda layer, x: None, passes):
            run(blocks, *[torch.ones(1, 2, 3)] * runs)
