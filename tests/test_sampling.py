"""Frames as the published protocol samples them; order and frames depend on the names they are drawn from alone."""

from itertools import pairwise

import numpy as np
import pytest

from spatialprobe.probes.loading.sampling import STUDY, FrameSampling, generator, shuffled


def published_rule(views, gap, context, divisor, rng):
    """The study's rule, step by step: random slack between least gaps, then each lowered to 1 + a multiple."""
    slack = context - ((views - 1) * gap + 1)
    cuts = sorted(int(rng.integers(0, slack + 1)) for _ in range(views - 1))
    frames, before = [0], 0
    for cut in cuts:
        frames.append(frames[-1] + gap + cut - before)
        before = cut
    return [max(0, (f - 1) // divisor * divisor + 1) for f in frames]


@pytest.mark.parametrize("views", [1, 2, 4, 8, 15])
def test_the_rule_is_the_published_one(views):
    query = {0, *range(1, 76, 4)}
    for trial in range(50):
        frames = STUDY.sample(views, 81, np.random.default_rng(trial))
        assert len(set(frames)) == views
        assert frames == sorted(frames)
        assert frames[0] == 0
        assert set(frames) <= query
        assert all(b - a >= 4 for a, b in pairwise(frames))


class Scripted:
    """A generator that hands out the numbers it is given, and notes what it was asked for."""

    def __init__(self, numbers):
        self.numbers, self.asked = list(numbers), []

    def integers(self, low, high, size=None):
        self.asked.append((low, high))
        if size is None:
            return self.numbers.pop(0)
        return np.array([self.numbers.pop(0) for _ in range(size)], dtype=int)


@pytest.mark.parametrize(("views", "gap", "context"), [(8, 5, 76), (4, 5, 76), (4, 9, 60), (16, 5, 76), (2, 5, 6)])
def test_every_draw_becomes_the_frames_of_the_published_rule(views, gap, context):
    source = np.random.default_rng(views)
    slack = context - 1 - (views - 1) * gap
    for _ in range(30):
        numbers = source.integers(0, slack + 1, views - 1).tolist()
        ours, theirs = Scripted(numbers), Scripted(numbers)
        frames = FrameSampling(context=context, gap=gap).sample(views, 81, ours)
        assert frames == published_rule(views, gap, context, 4, theirs)
        assert set(ours.asked) | set(theirs.asked) <= {(0, slack + 1)}


def test_draws_are_spread_over_all_that_the_gaps_leave():
    seen = {f for trial in range(300) for f in STUDY.sample(8, 81, np.random.default_rng(trial))}
    assert seen == {0, *range(5, 76, 4)}  # frame 1 is nearer than the gap


def test_a_clip_shorter_than_the_context_uses_what_it_has():
    frames = [STUDY.sample(8, 36, np.random.default_rng(trial)) for trial in range(5)]
    assert frames == [[0, 5, 9, 13, 17, 25, 29, 33]] * 5  # 8 views 5 apart fill 36 frames: no slack
    with pytest.raises(ValueError, match=r"35 frames hold 1 \.\. 7 views 5 frames apart, got 8 views"):
        STUDY.sample(8, 35, np.random.default_rng(0))


def test_other_frames_may_be_asked_for():
    short = FrameSampling(context=17, gap=4, query="::4")
    assert short.candidates(81) == (0, 4, 8, 12, 16)
    assert short.sample(5, 17, np.random.default_rng(0)) == [0, 4, 8, 12, 16]
    assert {tuple(short.sample(2, 17, np.random.default_rng(i))) for i in range(100)} == {
        (0, f) for f in (4, 8, 12, 16)
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query": "4::4"}, "must begin at frame 0"),
        ({"gap": 3}, "name one of any 3 frames in a row"),
        ({"query": "0,1:60:4"}, "name one of any 5 frames in a row of the first 76"),
        ({"gap": 0}, "at least 1 frame, got 76 and 0"),
        ({"query": "a"}, "query must be frame numbers"),
    ],
)
def test_frames_that_two_views_could_share_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FrameSampling(**fields)


@pytest.mark.parametrize("views", [0, -1, 17])
def test_views_that_do_not_fit_are_refused(views):
    with pytest.raises(ValueError, match=rf"76 frames hold 1 \.\. 16 views 5 frames apart, got {views} views"):
        STUDY.sample(views, 81, np.random.default_rng(0))


def test_random_numbers_depend_on_their_names_alone():
    draws = [generator(*names).integers(0, 1 << 30) for names in [("a", 1), ("a", 1), ("a", 2), ("b", 1), ("a1",)]]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 4


def test_order_depends_on_seed_and_epoch_and_not_on_the_other_clips():
    ids = [f"clip{i}" for i in range(100)]
    order = shuffled(ids, 0, 3)
    assert sorted(order) == sorted(ids)
    assert order != ids
    assert order == shuffled(ids[::-1], 0, 3)
    assert order not in (shuffled(ids, 0, 4), shuffled(ids, 1, 3))
    assert [i for i in order if i in ids[::3]] == shuffled(ids[::3], 0, 3)
