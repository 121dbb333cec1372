"""What a report is made of: sections in one HTML file that needs no other, listed on top where they are many."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from mm.evaluation.images import png_bytes

if TYPE_CHECKING:
    from PIL import Image

LONG = 6  # sections with a title from which on a page lists them


@dataclass
class Section:
    """A part of a page: its title, a line on what it shows, and its HTML, whose words are escaped already."""

    title: str
    body: str
    note: str = ""

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")

    def html(self) -> str:
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        return f'<section id="{self.anchor}"><h2>{escape(self.title)}</h2>{note}{self.body}</section>'


def page(
    title: str,
    *,
    lead: str,
    meta: Sequence[str],
    cards: str,
    sections: Sequence[Section],
    more: str = "",
    foot: str = "",
) -> str:
    """The whole file. `lead`, `cards` and `more` (after the sections) are HTML, the rest words."""
    shown = [section for section in sections if section.body]
    contents = ""
    if len(shown) >= LONG:
        links = "".join(f'<li><a href="#{part.anchor}">{escape(part.title)}</a></li>' for part in shown)
        contents = f'<nav aria-label="Contents"><ol>{links}</ol></nav>'
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=escape(title),
        lead=lead,
        meta="".join(f"<span>{escape(fact)}</span>" for fact in meta if fact),
        cards=cards,
        contents=contents,
        sections="".join(section.html() for section in shown),
        more=more,
        footer=escape(foot),
    )


def image(picture: Image.Image, alt: str, kind: str = "") -> str:
    """An `img` that holds its picture."""
    data = base64.b64encode(png_bytes(picture)).decode()
    return f'<img class="{kind}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def card(value: str, unit: str, what: str, how: str, around: str) -> str:
    """A number that leads a report, what it is, and how sure."""
    return (
        f'<div class="card"><div class="value">{escape(value)}<small> {escape(unit)}</small></div>'
        f'<div class="what">{escape(what)}</div><div class="how">{escape(how)}<br>{escape(around)}</div></div>'
    )


def card_grid(cards: Sequence[str]) -> str:
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Words in a table that scrolls by itself; all but the first column are set to the right."""
    if not rows:
        return ""
    top = "".join(f'<th scope="col">{escape(word)}</th>' for word in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    headed = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="scroll"><table class="{kind}">{headed}<tbody>{body}</tbody></table></div>'


def legend(names: Sequence[str]) -> str:
    """Which line of a chart is which, in the order of its series."""
    spans = "".join(f'<span class="s{number % 4}">{escape(name)}</span>' for number, name in enumerate(names))
    return f'<p class="legend">{spans}</p>'
