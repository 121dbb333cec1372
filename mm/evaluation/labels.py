"""What class a sample of a shard is of: from its `cls` member, its json, or its caption."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm.config import ConfigError
from mm.data.captions import Captions, text
from mm.data.index import LARGEST_TEXT, ShardIndex
from mm.data.reader import Reader
from mm.data.remote import is_remote

BESIDE = "shards"  # where words are: in files beside these
PUBLISHED = ("imagenet", "openai", "simple")  # class names and templates that have a name
NONE = "(none)"  # the class of captions that a pattern is not found in
MOST = 200  # characters of a class's name or of a pattern
MOST_BYTES = 64 << 20  # of a list of words
SEARCHED = 1000  # characters of a caption that a pattern is looked for in


class Label:
    """Reads a sample's class, as a text.

    `spec`: "cls", a member that holds it, as in CLIP_benchmark's shards; "json.FIELD" (or "json.FIELD.FIELD"), a text,
    number or truth value there; "caption", the whole of it; "caption:PATTERN", the pattern's first group or else what
    it matches, and "(none)" where it matches nothing. `captions` and `members`: what a `Stream` must bring along.
    `captions` says where captions are. Raises ValueError for another spec.
    """

    def __init__(self, spec: str, captions: str = "txt") -> None:
        kind, colon, pattern = spec.partition(":") if isinstance(spec, str) else ("", "", "")
        part, *self.fields = kind.split(".")
        known = kind in ("cls", "caption") or (part == "json" and bool(self.fields) and all(self.fields))
        if not known or (colon and (kind != "caption" or not 0 < len(pattern) <= MOST)):
            raise ValueError(
                f"label = {spec!r}: must be cls, json.FIELD, caption, or caption:PATTERN of up to {MOST} characters"
            )
        try:
            self.pattern = re.compile(pattern) if colon else None
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"label = {spec!r}: not a regular expression ({error})") from error
        self.spec, self.members = spec, () if kind == "caption" else (part,)
        self.captions = captions if kind == "caption" else ""
        self._places = Captions(self.captions) if self.captions else None

    def __call__(self, captions: Sequence[str], members: Mapping[str, bytes]) -> str:
        """The class of a sample with these captions and members. Raises ValueError where it has none."""
        if self.members:
            (data,) = (members[name] for name in self.members)
            if len(data) > LARGEST_TEXT:
                raise ValueError(f"{self.members[0]} of {len(data)} bytes is over the limit of {LARGEST_TEXT}")
            said = _short(_field(data, self.fields) if self.fields else text(data))
            return str(int(said)) if said.isdecimal() else said  # "07" is 7, as webdataset reads it
        if self.pattern is None:
            return captions[0]
        found = self.pattern.search(captions[0][:SEARCHED])
        return _short(((found[1] if self.pattern.groups else found[0]) or NONE) if found else NONE)

    def survey(self, files: Sequence[str]) -> list[str | None]:
        """The class of each sample, in the order in which a `Stream` of the same files numbers them, None where it has
        none. No picture is read."""
        parts = self._places.parts if self._places else ()
        reader = Reader(ShardIndex(list(files), parts=parts), self._places or Captions("txt"), images=False)
        return [self._of(reader, number, parts) for number in range(len(reader.index))]

    def _of(self, reader: Reader, number: int, parts: tuple[str, ...]) -> str | None:
        try:
            data = reader.parts(number, parts, self.members)
            found = self._places.texts(data.get, every=False)[0][0] if self._places else []
            return self(found, data)
        except ValueError:  # the stream says why, in its `lost`
            return None


def read_label(spec: str, files: Sequence[str], captions: str = "txt") -> Label:
    """The `Label` of a spec; of "", `cls` where the first sample of the files has it, and its caption otherwise."""
    if spec:
        return Label(spec, captions)
    label = Label("cls")
    reader = Reader(ShardIndex(list(files), parts=()), images=False)
    return label if label._of(reader, 0, ()) is not None else Label("caption", captions)


def ordered(labels: Sequence[str]) -> list[str]:
    """Each label once: numbers by value, then texts."""
    return sorted(set(labels), key=lambda label: (not label.isdecimal(), int(label) if label.isdecimal() else 0, label))


def words(given: str | Sequence[str], name: str, files: Sequence[str]) -> list[str]:
    """A list as it is, the lines of a file, or of "shards" those of the file `name` beside local shards, else [].

    CLIP_benchmark has such files in the folder around that of the shards.
    """
    if not isinstance(given, str):
        return list(given)
    if given in PUBLISHED:
        from mm.evaluation.vocabulary import read_labels, read_templates

        return read_labels(given, repeats=True) if given == "imagenet" else read_templates(given)
    if given != BESIDE:
        return _lines(Path(given))
    for folder in dict.fromkeys(Path(file).resolve().parent for file in files if not is_remote(file)):
        for path in (folder / name, folder.parent / name):
            if path.is_file():
                return _lines(path)
    return []


def _lines(path: Path) -> list[str]:
    """The stripped lines of a file, none of them blank: the place of each means something. Raises ValueError."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path}: over {MOST_BYTES >> 20} MB; is it a list of words?")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if "" in lines or not lines:
        raise ValueError(
            f"{path}: line {lines.index('') + 1 if lines else 1} is blank; give one name or template a line"
        )
    return lines


def check_words(name: str, given: Any) -> None:
    """Raises ValueError unless `words` can take it."""
    known = (BESIDE, *(one for one in PUBLISHED if (one == "imagenet") == (name == "classes")))
    if isinstance(given, str) and (given in known or Path(given).is_file()):
        return
    if isinstance(given, str):
        raise ValueError(f"{name} = {given!r}: no such file; give {', '.join(known)}, a file of lines, or a list")
    if not isinstance(given, (list, tuple)) or not given or not all(isinstance(one, str) and one for one in given):
        raise ValueError(f"{name} = {given!r}: must be a list of texts, at least one")


def class_names(label: Label, found: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """The name of each class, in the order of the classes. Numbers count `names`; of other classes, `names` are all
    there are, and where there are none they name themselves. `found`: the classes of all samples.

    Raises ConfigError for a class without a name.
    """
    if not label.members:
        return {one: one for one in (dict.fromkeys(found) if label.spec == "caption" else ordered(found))}
    if not names and not any(one.isdecimal() for one in found):
        return {one: one for one in ordered(found)}
    if not names:
        raise ConfigError("classes: no classnames.txt beside the shards; put it there, or give a file or a list")
    known = {str(number): name for number, name in enumerate(names)}
    if not all(one in known for one in found):
        known = {name: name for name in names}
    strange = [one for one in ordered(found) if one not in known]
    if strange:
        raise ConfigError(f"classes: {strange[0]!r} is none of the {len(names)} there are; check their list")
    return known


def _field(data: bytes, fields: Sequence[str]) -> str:
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"metadata is not JSON: {' '.join(str(error).split())[:100]}") from error
    for field in fields:
        value = value.get(field) if isinstance(value, dict) else None
    if not isinstance(value, (str, int, float)) or not str(value).strip():
        raise ValueError(f"metadata has no text or number in {'.'.join(fields)!r}")
    return str(value).strip()


def _short(label: str) -> str:
    if len(label) > MOST:
        raise ValueError(f"a class of {len(label)} characters; must be at most {MOST}")
    return label
