"""Every question about rendered scenes has the answer that the scene's description gives it."""

import json
import re
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from object_tables import table_of_scene
from question_truth import SceneTruth

from spatialprobe.engine.demo.scenes import make_scene
from spatialprobe.engine.questions.ask import ask
from spatialprobe.engine.questions.forms import FORMS
from spatialprobe.engine.questions.lines import record_lines
from spatialprobe.engine.questions.phrasing import PHRASES
from spatialprobe.engine.questions.phrasing_steps import STEPS
from spatialprobe.engine.questions.settings import Settings
from spatialprobe.engine.questions.types import BY_TYPE, LEVELS, NEEDS, TYPES

SCENES, VIEWS, PER_CLIP = 12, 5, 300
NUMBER = re.compile(r"(-?\d+(?:\.\d+)?) (cm|m|degrees?|times|o'clock)\b")
TRUE_ASKS = ("True or false: ", "Is this statement true or false? ", " True or false?")
YES = {"between": "is between", "equilateral": "form", "fits_between": "would fit", "taller_than_long": "taller"}


@cache
def truth_of(seed: int) -> SceneTruth:
    scene = make_scene(seed, frames=81)
    return SceneTruth(replace(scene, poses=scene.poses[:: 80 // (VIEWS - 1)]))


@cache
def table_of(seed: int):
    """As the scene is, with the share of each object that is not occluded."""
    truth = truth_of(seed)
    table = table_of_scene(truth.scene, samples=16)
    whole = [[truth.whole(frame, i) for frame in range(VIEWS)] for i in table.ids.tolist()]
    return replace(table, whole=np.array(whole))


@cache
def records(seed: int) -> list[dict]:
    """Of all types, and more of the rarest: few rooms have three objects at equal distances."""
    rare = [Settings.from_words({"types": "equilateral", "per_clip": "20", "seed": str(k)}) for k in range(4)]
    asked = [ask(table_of(seed), settings) for settings in (Settings(per_clip=PER_CLIP, seed=seed), *rare)]
    return [json.loads(line) for each in asked for line in record_lines(each)]


def test_the_table_has_all_that_a_type_needs():
    assert len(TYPES) >= 38
    assert len({kind.name for kind in TYPES}) == len(TYPES)
    assert {kind.level for kind in TYPES} == set(range(len(LEVELS)))
    assert {kind.name for kind in TYPES} == set(PHRASES) | set(STEPS)
    for kind in TYPES:
        assert set(kind.needs.split()) <= set(NEEDS), kind.name
        assert kind.margin.value > 0
        assert kind.margin.of
        for part in (PHRASES | STEPS)[kind.name]:
            assert len(set(part)) >= 3, kind.name


@pytest.mark.parametrize("seed", range(SCENES))
def test_every_answer_is_that_of_the_scene(seed):
    for q in records(seed):
        check(q, truth_of(seed))


def test_every_type_comes_in_every_form():
    seen = Counter((q["type"], q["form"]) for seed in range(SCENES) for q in records(seed))
    lacking = [(kind.name, form) for kind in TYPES for form in FORMS if not seen[kind.name, form]]
    assert not lacking
    assert sum(seen.values()) > 0.95 * SCENES * PER_CLIP  # a room with two whole objects has fewer


def check(q: dict, truth: SceneTruth) -> None:
    """A record's right answer, and that its words say so and no more than so."""
    right, unit = truth.answer(q), BY_TYPE[q["type"]].unit
    if isinstance(right, str):
        assert q["right"] == right, q
    else:
        right = int(right) if unit == "count" else right
        assert says(q["right"], right, unit), (q, right)
        if unit != "count":
            assert np.allclose(q["value"], right, rtol=1e-3, atol=2e-3) or unit == "h", (q, right)
    if q["form"] == "choice":
        check_choice(q, right, unit)
    elif q["form"] == "truth":
        check_statement(q, right, unit)
    elif isinstance(right, str):
        assert q["right"] in q["answer"].lower() or said_yes(q["answer"]) == right, q
    elif not re.fullmatch(r"None of them are.*", q["answer"]):
        assert q["right"] in q["answer"], q
    for thing in q.get("objects", ()):
        assert thing["name"] in q["question"].lower() or "\n" in q["question"], q
        check_name(thing, q, truth)
    assert q["question"][0].isupper()
    assert q["answer"][0] in "ABCD(-0123456789" or q["answer"][0].isupper()
    assert not re.search(r"\b(the the|an? the|other(furniture|prop))\b|\{|\}|  |-0 |\.\.", q["question"] + q["answer"])


def check_choice(q: dict, right, unit: str) -> None:
    assert q["answer"].lstrip("(")[0] == q["letter"]
    lines = q["question"].split("\n")[1:]
    assert [re.sub(r"^\(?[A-D][.)] ", "", line).lower() for line in lines] == [c.lower() for c in q["choices"]]
    place = "ABCD".index(q["letter"])
    assert lines[place].lstrip("(")[0] == q["letter"]
    for k, text in enumerate(q["choices"]):
        if isinstance(right, str):
            assert (text == right) == (k == place), q
        else:
            assert says(text, right, unit) == (k == place), (q, right)
    if len(lines[place]) > 4 and len(q["answer"]) > 3:
        assert q["answer"].lower().endswith(q["choices"][place].lower()), q


def check_statement(q: dict, right, unit: str) -> None:
    """The statement is found in the question, and is true or false as the answer says."""
    assert said_yes(q["answer"]) == ("yes" if q["truth"] else "no"), q
    text = q["question"].split(" Points are in pixels")[0]
    state = text
    for words in TRUE_ASKS:
        state = state.replace(words, "")
    assert len(state) < len(text), q
    if q["type"] in YES:
        denied = re.search(r"\bnot\b", state) is not None
        assert denied == (q["truth"] != (right == "yes")), q
        return
    if isinstance(right, str):
        stated = BY_TYPE[q["type"]].words and q["stated"]
        if BY_TYPE[q["type"]].kind == "words":
            assert re.search(rf"\b{stated.replace('to the ', '')}\b", state), q
        elif BY_TYPE[q["type"]].kind == "order":
            stated = q["stated"]
            assert stated in state, q
        assert q["truth"] == (stated == right), q
        return
    if unit == "count":
        found = re.search(r", (none|\d) (?:is|are) | (?:is|gives) (\d)\.", state)
        number = next(group for group in found.groups() if group)
        assert q["truth"] == ((0 if number == "none" else int(number)) == right), q
        return
    stated = spoken(state, unit)
    assert near(stated, np.array(q["stated"]), unit), q
    assert q["truth"] == near(stated, right, unit), (q, right)
    if not q["truth"]:
        assert far_off(stated, right, unit), (q, right)


def said_yes(answer: str) -> str:
    word = re.match(r"(Yes|No|True|False|That is true|That is false)\b", answer)
    return {"Y": "yes", "N": "no", "T": "yes", "F": "no"}[word[0][0]] if word and "false" not in word[0] else "no"


def says(text: str, right, unit: str) -> bool:
    return int(text) == right if unit == "count" else near(spoken(text, unit), right, unit)


def spoken(text: str, unit: str):
    """The number that a text ends with, or the numbers."""
    if unit == "xyz":
        return np.array([float(x) for x in re.search(r"\((-?[\d.]+), (-?[\d.]+), (-?[\d.]+)\) m", text).groups()])
    found = [(float(number), word) for number, word in NUMBER.findall(text)]
    if unit == "level":
        side, ahead = (number / {"cm": 100, "m": 1}[word] for number, word in found[-2:])
        return np.array([side if "to the right and" in text else -side, ahead])
    if unit == "side":
        return found[-1][0] * (1 if re.search(r"degrees? to the right", text) else -1)
    if unit == "h":  # the 12 that a question takes for granted comes before, or after
        hours = [number for number, word in found if word == "o'clock"]
        return float(hours[-1] if "you see" in text or len(hours) == 1 or hours[0] == 12 else hours[0])
    number, word = found[-1]
    return number / 100 if word == "cm" else number


def near(stated, right, unit: str) -> bool:
    """Equal at the precision of the text: a centimetre, a degree, an hour, a tenth."""
    if unit == "h":
        return abs((stated - right + 6) % 12 - 6) <= 0.5
    within = {"deg": 0.51, "side": 0.51, "times": 0.051}.get(unit, 0.0055)
    return bool(np.all(np.abs(np.asarray(stated) - right) <= within + 1e-3 * np.abs(right)))


def far_off(stated, right, unit: str) -> bool:
    if unit == "h":
        return abs((stated - right + 6) % 12 - 6) >= 1.5
    if unit in ("deg", "side"):
        return abs(stated - right) >= 9.5  # twice the least angle to a side, at least
    return float(np.linalg.norm(np.asarray(stated) - right)) >= 0.2 * float(np.linalg.norm(right))


def check_name(thing: dict, q: dict, truth: SceneTruth) -> None:
    """One object of the first image, and no other, answers to the name."""
    frame, kind = q["frames"][0], thing["tag"]
    alike = [i for i, o in truth.things.items() if o.kind == kind and truth.visible(frame, i).any()]
    if thing["name"] == f"the {kind}":
        assert alike == [thing["id"]], q
        return
    value = {
        "leftmost": lambda i: truth.middle(frame, i),
        "rightmost": lambda i: -truth.middle(frame, i),
        "nearest": lambda i: truth.nearest(frame, i),
        "farthest": lambda i: -truth.nearest(frame, i),
        "taller": lambda i: -truth.sides(i)[2],
        "tallest": lambda i: -truth.sides(i)[2],
        "shorter": lambda i: truth.sides(i)[2],
        "shortest": lambda i: truth.sides(i)[2],
    }[re.search(r"leftmost|rightmost|nearest|farthest|taller|tallest|shorter|shortest", thing["name"])[0]]
    assert len(alike) > 1
    assert min(alike, key=value) == thing["id"], q
