"""Retrieval shown: captions with the pictures nearest to them, pictures with the captions nearest to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from mm.evaluation.report_page import Section, image
from mm.evaluation.retrieval import nearest
from mm.evaluation.samples import evenly
from mm.evaluation.stream import Stream

if TYPE_CHECKING:
    from PIL import Image

    from mm.evaluation.inference import Inference

SHOWN = 5  # answers a query
QUERIES = 8  # of each kind


@dataclass
class Pictures:
    """Pictures of some shards with their captions, at the model's size."""

    images: list[Image.Image]
    captions: list[list[str]]
    keys: list[str]

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class Answer:
    """One of the nearest: a picture (with its first caption) or a caption, its cosine, and whether it is right."""

    text: str
    score: float
    right: bool
    picture: Image.Image | None = None


@dataclass
class Query:
    """A caption or a picture, what is nearest to it, and at which place, from 1, the first right answer is."""

    text: str
    picture: Image.Image | None
    answers: list[Answer]
    place: int


def read_pictures(
    inference: Inference, files: Sequence[str], *, captions: str, limit: int, progress: bool = False
) -> Pictures:
    """The first `limit` samples of shards that can be used."""
    found = Pictures([], [], [])
    processor = inference.processor("image")
    label = "reading pictures" if progress else ""
    for chunk in Stream(list(files), processor, captions=captions, limit=limit, progress=label):
        found.images += processor.render(chunk.images)
        found.captions += chunk.captions
        found.keys += chunk.keys
    return found


def retrieved(inference: Inference, found: Pictures, *, progress: bool = False) -> tuple[list[Query], list[Query]]:
    """Evenly chosen captions with the nearest pictures among all, and pictures with the nearest captions."""
    texts = list(dict.fromkeys(text for captions in found.captions for text in captions))
    images = inference.encode("image", found.images, progress=progress)
    words = inference.encode("text", texts, progress=progress)
    chosen = evenly(list(range(len(found))), QUERIES)
    by_text, by_image = [], []
    places, scores = nearest(words[[texts.index(found.captions[row][0]) for row in chosen]], images, len(images))
    for row, order, cosines in zip(chosen, places.tolist(), scores.tolist(), strict=True):
        query = found.captions[row][0]
        right = [query in found.captions[place] for place in order]
        answers = [
            Answer(found.captions[place][0], cosine, good, found.images[place])
            for place, cosine, good in zip(order[:SHOWN], cosines, right, strict=False)
        ]
        by_text.append(Query(query, None, answers, right.index(True) + 1))
    places, scores = nearest(images[chosen], words, len(words))
    for row, order, cosines in zip(chosen, places.tolist(), scores.tolist(), strict=True):
        right = [texts[place] in found.captions[row] for place in order]
        answers = [
            Answer(texts[place], cosine, good)
            for place, cosine, good in zip(order[:SHOWN], cosines, right, strict=False)
        ]
        by_image.append(Query(found.captions[row][0], found.images[row], answers, right.index(True) + 1))
    return by_text, by_image


def retrieval_sections(by_text: Sequence[Query], by_image: Sequence[Query], pictures: int) -> list[Section]:
    """Both ways as parts of a page; what is right is marked, and where it came if not among those shown."""
    note = f"of {pictures:,} pictures. Evenly chosen, not picked; ✓ marks what belongs to the query."
    rows = []
    for query in by_text:
        figures = "".join(
            f'<figure class="{"right" if answer.right else ""}">{_picture(answer)}'
            f'<figcaption title="{escape(answer.text)}">{"✓ " if answer.right else ""}{answer.score:.2f} '
            f"{escape(answer.text)}</figcaption></figure>"
            for answer in query.answers
        )
        head = f'<div class="query">{escape(query.text)}</div><div class="where">{_where(query)}</div>'
        rows.append(f'<div class="row">{head}<div class="found">{figures}</div></div>')
    body = f'<div class="rows">{"".join(rows)}</div>' if rows else ""
    found = [Section("Pictures found by captions", body, f"The {SHOWN} nearest {note}")]
    rows = []
    for query in by_image:
        assert query.picture is not None
        names = "".join(
            f'<li class="right">✓ {answer.score:.2f} {escape(answer.text)}</li>'
            if answer.right
            else f"<li>· {answer.score:.2f} {escape(answer.text)}</li>"
            for answer in query.answers
        )
        truth = f'<div class="truth">{escape(query.text)}</div><div class="where">{_where(query)}</div>'
        shown = image(query.picture, query.text, _kind(query.picture))
        rows.append(f'<div class="example">{shown}<div>{truth}<ol>{names}</ol></div></div>')
    body = f'<div class="examples">{"".join(rows)}</div>' if rows else ""
    return [*found, Section("Captions found by pictures", body, f"The {SHOWN} nearest captions {note}")]


def _where(query: Query) -> str:
    return f"right one at place {query.place:,}" if query.place > 1 else "right one first"


def _picture(answer: Answer) -> str:
    assert answer.picture is not None
    return image(answer.picture, answer.text, _kind(answer.picture))


def _kind(picture: Image.Image) -> str:
    """Large pictures are smoothed where they are shown smaller; of small ones the pixels stay square."""
    return "smooth" if max(picture.size) > 96 else ""
