"""What a word of a job or a command may be: text of the command line, or TOML's own types. All raise ValueError."""

import math
from typing import Any

ALL = 0  # as window: every frame from `start` on


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {value!r}")
    return value


def number(name: str, value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not str(value).isdigit() or int(value) < least:
        raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")
    return int(value)


def share(name: str, value: Any) -> float:
    """A number from 0 on."""
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be a number from 0, got {value!r}")
    return number


def positive(name: str, value: Any) -> int:
    return number(name, value, least=1)


def numbers(name: str, value: Any) -> list[int]:
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    return [number(name, item.strip() if isinstance(item, str) else item) for item in items]


def layer_list(name: str, value: Any) -> list[int]:
    """Block indices; hsK is transformers' hidden_states[K], the output of block K - 1."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    layers = []
    for item in (str(item).strip() for item in items):
        if item.startswith("hs"):
            layers.append(number(f"{name} hsK, K", item[2:], least=1) - 1)
        else:
            layers.append(number(name, item))
    return layers


def window(name: str, value: Any) -> int:
    return ALL if value == "all" else positive(f"{name}, if not 'all',", value)


def batch(name: str, value: Any) -> int | str:
    return value if value == "auto" else positive(f"{name}, if not 'auto',", value)


def start(name: str, value: Any) -> int | str:
    return number(name, value) if str(value).isdigit() else text(name, value)


def switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def table(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a table, got {value!r}")
    return value


def parse_size(name: str, text: str) -> tuple[int, int]:
    """ "15x26" -> (15, 26), height first."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"{name} must be HEIGHTxWIDTH like 15x26, got {text!r}")
    return int(parts[0]), int(parts[1])
