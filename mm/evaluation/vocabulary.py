"""The words a classifier chooses among and the sentences around them: given as lists, or by a published name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mm.adapters.open_clip_files import alone
from mm.fields import suggestion

MOST_LABELS = 1_000_000
MOST_TEMPLATES = 10_000
MOST_CHARACTERS = 10_000  # of a label or a template
HOLE = "{}"  # in a template, where the label goes
SHOWN = 60  # characters of a text that an error repeats

LABEL_SETS = {"imagenet": "IMAGENET_CLASSNAMES"}  # name -> open_clip's
TEMPLATE_SETS = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}


def read_labels(labels: str | Sequence[str], *, repeats: bool = False) -> list[str]:
    """The labels of a list, or of a published set: "imagenet" is the 1,000 class names of open_clip, in their order.

    Each label once: of two alike, neither could be told from the other. `repeats` allows it, for published lists whose
    places have a meaning (two of ImageNet's names stand in it twice). Raises ValueError naming what is wrong.
    """
    if isinstance(labels, str):
        if labels not in LABEL_SETS:
            raise ValueError(
                f"labels = {_short(labels)}: must be a list or the name of a set ({', '.join(LABEL_SETS)})"
                f"{suggestion(labels, LABEL_SETS)}; for one label write [{_short(labels)}]"
            )
        return list(_published(LABEL_SETS[labels]))
    check_labels(labels, repeats=repeats)
    return list(labels)


def read_templates(templates: str | Sequence[str]) -> list[str]:
    """The templates of a list, or of a published set: "openai" is the 80 of CLIP's paper, "simple" 7 of these.

    Raises ValueError naming what is wrong.
    """
    if isinstance(templates, str):
        if templates not in TEMPLATE_SETS:
            raise ValueError(
                f"templates = {_short(templates)}: must be a list or the name of a set ({', '.join(TEMPLATE_SETS)})"
                f"{suggestion(templates, TEMPLATE_SETS)}; for one template write [{_short(templates)}]"
            )
        made: Sequence[Callable[[str], str]] = _published(TEMPLATE_SETS[templates])
        return [template(HOLE) for template in made]
    check_templates(templates)
    return list(templates)


def check_labels(labels: Sequence[str], *, repeats: bool = False) -> None:
    """Raises ValueError unless `labels` is a list of at least one text, none of them blank, too long or given twice."""
    _check_list("labels", labels, MOST_LABELS)
    if not len(labels):
        raise ValueError("labels = []: nothing to choose from; give at least one label")
    seen: dict[str, int] = {}
    for place, label in enumerate(labels):
        _check_text(f"labels[{place}]", label)
        bare = label.strip()
        if not bare:
            raise ValueError(f"labels[{place}] = {label!r}: is blank; leave it out")
        first = seen.setdefault(bare, place)
        if first != place and not repeats:
            raise ValueError(f"labels[{place}] = {_short(label)}: is labels[{first}] again; give each label once")


def check_templates(templates: Sequence[str]) -> None:
    """Raises ValueError unless `templates` is a list of at least one text with `{}` where the label goes."""
    _check_list("templates", templates, MOST_TEMPLATES)
    if not len(templates):
        raise ValueError('templates = []: give at least one, such as "{}"')
    for place, template in enumerate(templates):
        if not isinstance(template, str) or HOLE not in template:
            shown = _short(template) if isinstance(template, str) else repr(type(template).__name__)
            raise ValueError(f"templates[{place}] = {shown}: has no {{}} where the label goes; write 'a {{}}'")
        _check_text(f"templates[{place}]", template)


def filled(label: str, templates: Sequence[str]) -> list[str]:
    """The label in each template. Only `{}` is replaced: other braces are text."""
    return [template.replace(HOLE, label) for template in templates]


def _check_list(name: str, given: Any, most: int) -> None:
    if isinstance(given, (str, bytes, dict, set, frozenset)) or not hasattr(given, "__getitem__"):
        raise ValueError(f"{name}: must be a list of texts, not {type(given).__name__}")
    if len(given) > most:
        raise ValueError(f"{name}: {len(given):,} are over the limit of {most:,}; split them")


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} = {_short(text)}: must be a str, not {type(text).__name__}")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{name}: {len(text):,} characters are over the limit of {MOST_CHARACTERS:,}; shorten it")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which no tokenizer takes
        raise ValueError(f"{name} = {_short(text)}: is not Unicode text ({error.reason})") from error


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"


def _published(name: str) -> Any:
    return getattr(alone("zero_shot_metadata"), name)
