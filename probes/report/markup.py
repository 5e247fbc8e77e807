"""HTML and SVG as text. Whatever this module did not make is escaped, so that no name in a file can be markup."""

import re
from collections.abc import Iterable
from html import escape
from typing import Any

VOID = {"br", "col", "img", "link", "meta"}
NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # HTML allows none of these


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def text(content: Any) -> Html:
    """Markup as it is, None as nothing, lists one after the other, and everything else escaped."""
    if isinstance(content, Html):
        return content
    if content is None:
        return Html("")
    if isinstance(content, str):
        return Html(escape(NOT_TEXT.sub("\ufffd", content)))
    if isinstance(content, Iterable):
        return Html("".join(text(part) for part in content))
    return Html(escape(str(content)))


def element(tag: str, *content: Any, **attributes: Any) -> Html:
    """`element("td", 3, class_="best", data_x=1)`; an underscore is a dash, at the end nothing. None: no attribute."""
    words = [tag]
    for name, value in attributes.items():
        if value is not None and value is not False:
            name = name.rstrip("_").replace("_", "-")
            words.append(name if value is True else f'{name}="{text(str(value))}"')
    start = f"<{' '.join(words)}>"
    return Html(start if tag in VOID else f"{start}{text(content)}</{tag}>")


def fold(summary: Any, *content: Any, open_: bool = False, **attributes: Any) -> Html:
    """What is seen once its summary is clicked, or chosen with the keyboard."""
    return element("details", element("summary", summary), content, open=open_, **attributes)


def scroll(label: str, *content: Any) -> Html:
    """A box that scrolls sideways on its own where what it holds is wider than the page, with the keyboard too."""
    return element("div", content, class_="scroll", role="group", aria_label=label, tabindex=0)
