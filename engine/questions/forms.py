"""One candidate put into words: an open question, a multiple choice, or a statement that is true or false."""

from typing import Any, NamedTuple

from spatialprobe.engine.questions.numbers import UNITS, Number, Random, length, rounded
from spatialprobe.engine.questions.phrasing import PHRASES
from spatialprobe.engine.questions.phrasing_steps import STEPS
from spatialprobe.engine.questions.types import TYPES, QuestionType

FORMS = ("open", "choice", "truth")
LETTERS = "ABCD"
ORDERS = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))  # of three things, all but the right one

CHOICE_LINES = ("({}) {}", "{}. {}", "{}) {}")
CHOICE_ENDS = ("", " Choose one.", " Answer with the letter of the right choice.")
CHOICE_ANSWERS = ("{letter}", "({letter}) {text}", "{letter}. {text}")
TRUTH_ASKS = ("True or false: {state}", "Is this statement true or false? {State}", "{State} True or false?")
TRUTH_ANSWERS = {
    True: ("True.", "That is true.", "True: {right}"),
    False: ("False.", "That is false.", "False: {right}"),
}
POINTS_IN = " Points are in pixels (x, y) from the top left corner of the {}x{} image."

ALL_PHRASES = {
    name: tuple(tuple(template.format_map for template in part) for part in phrases)
    for name, phrases in (PHRASES | STEPS).items()
}  # bound methods of the templates of asks, answers and states


class Composed(NamedTuple):
    """A question in words, and the numbers that its words add to the candidate's."""

    question: str
    answer: str
    right: str  # the answer itself, in no sentence
    choices: list[str] | None = None
    letter: str | None = None  # of the right choice
    choice_values: list[Number] | None = None
    truth: bool | None = None
    stated: Number | str | None = None  # by a statement, in place of the right answer: a number, or words


class Variant(NamedTuple):
    """An answer, right or wrong."""

    text: str  # as a choice
    fields: dict[str, str]
    value: Number | None = None


def compose(
    kind: QuestionType,
    form: str,
    names: list[str],  # of the things
    value: Any,  # rounded numbers of the candidate
    outcome: int,
    truth: bool,  # of a statement; other forms do not look at it
    size: tuple[int, int],  # (H, W) of the image
    random: Random,
) -> Composed:
    """Phrases, the order of things and wrong answers are drawn; what is right was decided before."""
    fields, right, wrong = VARIANTS[kind.kind](kind, names, value, outcome, random)
    asks, answers, states = ALL_PHRASES[kind.name]
    where = POINTS_IN.format(size[1], size[0]) if kind.points else ""
    if form == "truth":
        said = right if truth else wrong(1)[0]
        state = one(states, random)
        question = one(TRUTH_ASKS, random)
        stated = state(fields | said.fields)
        question = question.format(state=stated, State=sentence(stated)) + where
        corrected = "" if truth else state(fields | right.fields)
        answer = one(TRUTH_ANSWERS[truth], random).format(right=corrected or stated)
        return Composed(
            question, answer, right.text, truth=truth, stated=said.text if said.value is None else said.value
        )
    fields |= right.fields
    question = sentence(one(asks, random)(fields)) + where
    if form == "open":
        return Composed(question, sentence(one(answers, random)(fields)), right.text)
    options = wrong(3)
    place = int(random() * (len(options) + 1))
    options.insert(place, right)
    line = one(CHOICE_LINES, random)
    lines = [line.format(LETTERS[k], sentence(option.text, "")) for k, option in enumerate(options)]
    answer = one(CHOICE_ANSWERS, random).format(letter=LETTERS[place], text=sentence(right.text, ""))
    values = None if right.value is None else [option.value for option in options]
    texts = [option.text for option in options]
    return Composed(
        "\n".join([question + one(CHOICE_ENDS, random), *lines]), answer, right.text, texts, LETTERS[place], values
    )


def one(choices: tuple, random: Random) -> Any:
    return choices[int(random() * len(choices))]


def shuffled(items: list, random: Random) -> list:
    items = list(items)
    for i in range(len(items) - 1, 0, -1):
        j = int(random() * (i + 1))
        items[i], items[j] = items[j], items[i]
    return items


def sentence(text: str, end: str = ".") -> str:
    """With a capital letter and a full stop, unless it ends a sentence already."""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".?!" else end)


def listed(names: list[str], word: str) -> str:
    return f"{', '.join(names[:-1])} {word} {names[-1]}"


# What can be answered, by kind of type: fields of all phrases, the right answer, and wrong ones in any order


def words(kind: QuestionType, names: list[str], value: Any, outcome: int, random: Random) -> tuple:
    right, wrong = WORDS[kind.name, outcome]
    return dict(zip("ABC", names, strict=False)), right, lambda count: shuffled(wrong, random)[:count]


def pick(kind: QuestionType, names: list[str], value: Any, outcome: int, random: Random) -> tuple:
    count = len(value)
    order = shuffled(names[:count], random)
    fields = {"or": listed(order, "or"), "and": listed(order, "and"), "w": kind.words[outcome][1]}
    if len(names) > count:
        fields["R"] = names[count]

    def variant(name: str) -> Variant:
        others = [other for other in order if other != name]
        return Variant(name, {"X": name, "Y": listed(others, "and") if len(others) > 1 else others[0]})

    return fields, variant(names[0]), lambda n: [variant(name) for name in shuffled(names[1:count], random)[:n]]


def number(kind: QuestionType, names: list[str], value: Any, outcome: int, random: Random) -> tuple:
    fields, unit = dict(zip("ABCD", names, strict=False)), UNITS[kind.unit]
    if kind.unit == "count":
        fields["radius"], value = length(value[0]), float(outcome)  # the radius of types that have one

    def variant(value: Number) -> Variant:
        text = unit.text(value)
        if kind.unit != "count":
            return Variant(text, {"n": text}, value)
        inside = {"n": text, "c": "none" if value == 0 else text, "are": "is" if value == 1 else "are"}
        return Variant(text, inside, value)

    def wrong(count: int) -> list[Variant]:
        return [variant(rounded(x)) for x in shuffled(unit.wrong(value, random), random)[:count]]

    return fields, variant(value), wrong


def order(kind: QuestionType, names: list[str], value: Any, outcome: int, random: Random) -> tuple:
    def variant(places: tuple[int, ...]) -> Variant:
        text = ", then ".join(names[place] for place in places)
        return Variant(text, {"n": text})

    fields = {"and": listed(shuffled(names, random), "and")}
    return fields, variant((0, 1, 2)), lambda count: [variant(p) for p in shuffled(ORDERS, random)[:count]]


WORDS = {}  # (type, outcome) -> the right variant, and the wrong ones
for _kind in TYPES:
    _all = [Variant(short, {"s": short, "w": inside}) for short, inside in _kind.words]
    WORDS |= {(_kind.name, k): (right, _all[:k] + _all[k + 1 :]) for k, right in enumerate(_all)}

VARIANTS = {"words": words, "pick": pick, "number": number, "vector": number, "order": order}
