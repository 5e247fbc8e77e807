"""What questions are wanted: how many, of which levels, types and forms, checked where it is said."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spatialprobe.engine.questions.forms import FORMS
from spatialprobe.engine.questions.types import BY_TYPE, LEVELS, QuestionType

LEVEL_SHARES = (0.15, 0.25, 0.35, 0.25)  # of LEVELS, where nothing else is asked for
FORM_SHARES = (0.4, 0.3, 0.3)  # of FORMS


@dataclass(frozen=True)
class Settings:
    """What changes a question."""

    per_clip: int = 100
    seed: int = 0
    types: tuple[str, ...] = tuple(BY_TYPE)
    levels: tuple[float, ...] = LEVEL_SHARES  # shares of LEVELS
    forms: tuple[float, ...] = FORM_SHARES  # shares of FORMS

    def __post_init__(self):
        if self.per_clip < 1:
            raise ValueError(f"per-clip must be at least 1, got {self.per_clip}")
        if unknown := sorted(set(self.types) - set(BY_TYPE)):
            raise ValueError(f"types must be of {', '.join(BY_TYPE)}, got {', '.join(unknown)}")
        for name, shares, of in (("levels", self.levels, LEVELS), ("forms", self.forms, FORMS)):
            if len(shares) != len(of) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
                raise ValueError(f"shares of {name} must be {len(of)} numbers that add up to 1, got {list(shares)}")
        lacking = [str(k) for k, share in enumerate(self.levels) if share and not self.types_of(k)]
        if lacking:
            raise ValueError(f"level {', '.join(lacking)} has a share, but none of the types {', '.join(self.types)}")

    def types_of(self, level: int) -> list[QuestionType]:
        return [BY_TYPE[name] for name in self.types if BY_TYPE[name].level == level]

    @classmethod
    def from_words(cls, words: Mapping[str, str]) -> "Settings":
        """Of the command's words; one that is not there is as by default. Raises ValueError for wrong ones.

        `shares` are of the levels, in their order; levels that have none keep LEVEL_SHARES' proportions. `forms` are
        like "open,truth", with FORM_SHARES' proportions, or like "open=0.5,truth=0.5".
        """
        types = words["types"].split(",") if "types" in words else list(BY_TYPE)
        if unknown := sorted(set(types) - set(BY_TYPE)):
            raise ValueError(f"types must be of {', '.join(BY_TYPE)}, got {', '.join(unknown)}")
        there = sorted({BY_TYPE[name].level for name in types})
        levels = numbers("levels", words["levels"], int) if "levels" in words else there
        if set(levels) - set(range(len(LEVELS))) or len(set(levels)) < len(levels):
            raise ValueError(f"levels must be distinct numbers of 0 .. {len(LEVELS) - 1}, got {levels}")
        shares = numbers("shares", words["shares"], float) if "shares" in words else [LEVEL_SHARES[k] for k in levels]
        if len(shares) != len(levels) or min(shares) < 0 or not sum(shares) > 0:
            raise ValueError(f"shares must be {len(levels)} numbers from 0, of the levels {levels}, got {shares}")
        of_level = dict(zip(levels, shares, strict=True))
        if lacking := [str(k) for k, share in of_level.items() if share and k not in there]:
            raise ValueError(f"level {', '.join(lacking)} has a share, but none of the types {', '.join(types)}")
        of_form = parse_forms(words.get("forms", ",".join(FORMS)).split(","))
        return cls(
            per_clip=number("per-clip", words.get("per_clip", str(cls.per_clip))),
            seed=number("seed", words.get("seed", str(cls.seed))),
            types=tuple(name for name in BY_TYPE if name in types and of_level.get(BY_TYPE[name].level)),
            levels=tuple(of_level.get(k, 0.0) / sum(shares) for k in range(len(LEVELS))),
            forms=tuple(of_form.get(form, 0.0) / sum(of_form.values()) for form in FORMS),
        )


def numbers(word: str, text: str, of: type) -> list:
    try:
        return [of(item) for item in text.split(",")]
    except ValueError:
        raise ValueError(f"{word} must be numbers with commas between them, got {text!r}") from None


def number(word: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{word} must be a whole number, got {text!r}")
    return int(text)


def parse_forms(words: Sequence[str]) -> dict[str, float]:
    shares = {}
    for word in words:
        form, equals, share = word.partition("=")
        if form not in FORMS:
            raise ValueError(f"forms must be of {', '.join(FORMS)}, each alone or with a share, got {word!r}")
        shares[form] = numbers(f"the share of {form}", share, float)[0] if equals else FORM_SHARES[FORMS.index(form)]
    if min(shares.values()) < 0 or not sum(shares.values()) > 0:
        raise ValueError(f"shares of forms must be numbers from 0, not all 0, got {', '.join(words)}")
    return shares
