"""What is asked is balanced, put into good words, and depends on the seed and the clip alone."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
from synthetic_tables import random_table, records

from spatialprobe.engine.questions.ask import ask, ask_together, choose
from spatialprobe.engine.questions.describe import noun
from spatialprobe.engine.questions.lines import record_lines
from spatialprobe.engine.questions.numbers import hour, length, to_side
from spatialprobe.engine.questions.run import alike
from spatialprobe.engine.questions.settings import Settings
from spatialprobe.engine.questions.types import BY_TYPE, TYPES


@pytest.fixture(scope="module")
def thousand() -> list[list[dict]]:
    tables = [random_table(n, objects=6 + n % 4, alike=n % 3 == 0) for n in range(1000)]
    settings = Settings(per_clip=30)
    chosen = {table.clip: choose(table, settings) for table in tables}
    groups = [ask_together([chosen[clip] for clip in clips], settings) for clips in alike(chosen)]
    return [[json.loads(line) for line in record_lines(asked)] for group in groups for asked in group]


def test_level_and_form_shares_are_those_asked_for(thousand):
    levels = Counter(q["level"] for qs in thousand for q in qs)
    forms = Counter(q["form"] for qs in thousand for q in qs)
    total = sum(levels.values())
    assert total == 30_000
    assert [levels[k] / total for k in range(4)] == pytest.approx([0.15, 0.25, 0.35, 0.25], abs=0.002)
    assert [forms[f] / total for f in ("open", "choice", "truth")] == pytest.approx([0.4, 0.3, 0.3], abs=0.01)
    types = Counter(q["type"] for qs in thousand for q in qs)
    for kind in TYPES:
        even = levels[kind.level] / sum(other.level == kind.level for other in TYPES)
        rare = kind.name in ("equilateral", "camera_turned", "taller_than_long", "fits_between", "between")
        assert types[kind.name] == pytest.approx(even, rel=0.25) or (rare and types[kind.name] > 20), kind.name


def test_true_and_false_letters_and_words_are_balanced(thousand):
    truths = [q["truth"] for qs in thousand for q in qs if q["form"] == "truth"]
    assert abs(2 * sum(truths) - len(truths)) < 100  # at most one more of either in a clip
    for qs in thousand:
        assert abs(sum(2 * q["truth"] - 1 for q in qs if q["form"] == "truth")) <= 1
    by_type: dict[str, Counter] = {}
    letters: dict[int, Counter] = {}
    for q in (q for qs in thousand for q in qs):
        kind = BY_TYPE[q["type"]]
        if kind.words and kind.name != "image_third":
            by_type.setdefault(kind.name, Counter())[q["word"]] += 1
        if q["form"] == "choice":
            letters.setdefault(len(q["choices"]), Counter())[q["letter"]] += 1
    for name, words in by_type.items():
        n = sum(words.values())
        assert len(words) == 2
        assert abs(2 * max(words.values()) - n) <= 4 * n**0.5, (name, words)
    assert sorted(letters) == [2, 3, 4]
    for count, placed in letters.items():
        n = sum(placed.values())
        assert [placed["ABCD"[k]] / n for k in range(count)] == pytest.approx([1 / count] * count, abs=4 * 0.5 / n**0.5)


def test_the_right_number_has_no_favoured_rank_and_wrong_ones_are_clear_of_it(thousand):
    ranks = Counter()
    for q in (q for qs in thousand for q in qs if q["form"] == "choice" and q["unit"] == "m"):
        if isinstance(q["value"], float):
            values = sorted(q["choice_values"])
            ranks[values.index(q["value"])] += 1
            assert all(b / a > 1.25 for a, b in pairwise(values))
            assert len(set(q["choices"])) == 4
    n = sum(ranks.values())
    assert n > 500
    assert [ranks[k] / n for k in range(4)] == pytest.approx([0.25] * 4, abs=2 / n**0.5)


def test_no_question_comes_twice_in_a_clip(thousand):
    for qs in thousand[:200]:
        said = [(q["question"], *q["frames"]) for q in qs]
        assert len(set(said)) == len(said)


# -- words


def test_numbers_as_text():
    assert [length(x) for x in (0.104, 0.9949, 0.9951, 1.0, 2.346, 12.0)] == [
        "10 cm", "99 cm", "1.00 m", "1.00 m", "2.35 m", "12.00 m",
    ]  # fmt: skip
    assert [hour(x) for x in (0.2, 11.7, 3.4, 12)] == ["12 o'clock", "12 o'clock", "3 o'clock", "12 o'clock"]
    assert [to_side(x) for x in (-12.4, 30.6)] == ["12 degrees to the left", "31 degrees to the right"]


def test_nouns():
    tags = ("otherfurniture", "kitchen cabinets", "mattress", "shower_curtain", "office chair", "blinds")
    assert [noun(tag) for tag in tags] == [
        "piece of furniture", "set of kitchen cabinets", "mattress", "shower curtain", "office chair", "set of blinds",
    ]  # fmt: skip


# -- determinism


def digest() -> str:
    """Of a few clips' lines, each asked alone."""
    lines = [line for n in range(6) for line in record_lines(ask(random_table(n, alike=n % 2 == 0), Settings(seed=3)))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_questions_depend_on_seed_and_clip_alone():
    code = "import test_questions_balance as t; print(t.digest())"
    env = {"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == digest()
    settings, numbers = Settings(seed=3), [4, 1, 3, 0, 2, 5]
    together = ask_together([choose(random_table(n, alike=n % 2 == 0), settings) for n in numbers], settings)
    for n, asked in zip(numbers, together, strict=True):
        alone = ask(random_table(n, alike=n % 2 == 0), settings)
        assert list(record_lines(asked)) == list(record_lines(alone))
    assert records(random_table(0), seed=3) != records(random_table(0), seed=4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"types": "height,nothing"}, "types must be of .*, got nothing"),
        ({"levels": "0,4"}, r"levels must be distinct numbers of 0 .. 3, got \[0, 4\]"),
        ({"levels": "0,1", "shares": "1"}, r"shares must be 2 numbers from 0, of the levels \[0, 1\], got \[1.0\]"),
        ({"types": "height", "levels": "0"}, "level 0 has a share, but none of the types height"),
        ({"forms": "open,closed"}, "forms must be of open, choice, truth, .*, got 'closed'"),
        ({"forms": "open=0"}, "shares of forms must be numbers from 0, not all 0"),
        ({"per_clip": "many"}, "per-clip must be a whole number, got 'many'"),
        ({"per_clip": "0"}, "per-clip must be at least 1, got 0"),
        ({"shares": "a,b"}, "shares must be numbers with commas between them, got 'a,b'"),
    ],
)
def test_wrong_words_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_words(words)


def test_words_choose_types_levels_and_forms():
    asked = records(random_table(1), types="height,left_right,distance", shares="0.25,0.75", forms="truth=1,open=3")
    assert Counter(q["level"] for q in asked) == {1: 25, 2: 75}
    assert {q["form"] for q in asked} == {"truth", "open"}
