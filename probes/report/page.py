"""The report's page: one self-contained HTML file, without scripts, that fetches nothing."""

from collections.abc import Sequence

from spatialprobe.probes.report.markup import Html, element
from spatialprobe.probes.report.scores import Scores
from spatialprobe.probes.report.sections import Section, report_sections, summary
from spatialprobe.probes.report.style import CSS

__all__ = ["Section", "render"]

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing from anywhere, and no script


def render(
    scores: Scores,
    title: str,
    *,
    intro: Html | None = None,  # in the place of the report's own summary
    first: Sequence[Section] = (),  # before the report's own sections
    last: Sequence[Section] = (),
) -> str:
    """The whole page; sections without content are left out."""
    sections = [section for section in [*first, *report_sections(scores), *last] if section.content]
    links = [element("li", element("a", s.title, href=f"#{s.name}")) for s in sections]
    header = element(
        "header",
        element("h1", title),
        intro or element("p", summary(scores), class_="lead"),
        element("nav", element("ul", links), aria_label="Sections"),
    )
    main = [
        element(
            "section",
            element("h2", s.title, id=f"{s.name}-title"),
            s.content,
            id=s.name,
            aria_labelledby=f"{s.name}-title",
        )
        for s in sections
    ]
    footer = element(
        "footer",
        element(
            "p",
            "Made by ",
            element("code", "engine report"),
            " of spatialprobe. This page is one file and fetches nothing.",
        ),
    )
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", title),
        element("link", rel="icon", href="data:,"),
        element("style", Html(CSS)),
    ]
    body = element("body", header, element("main", main), footer)
    return f"<!doctype html>\n{element('html', element('head', head), body, lang='en')}\n"
