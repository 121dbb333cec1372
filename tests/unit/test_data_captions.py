from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from mm.config import ConfigError
from mm.data.captions import Captions, draw, per_source, read_weights, text


def sample(**parts: bytes) -> Callable[[str], bytes | None]:
    return parts.get


def test_captions_are_utf8_and_not_empty() -> None:
    assert text("\ufeff  größe\n".encode()) == "größe"
    for data in (b"", b" \n", b"\xff\xfe"):
        with pytest.raises(ValueError, match=r"caption"):
            text(data)


def test_the_first_place_that_a_sample_has_is_taken() -> None:
    places = Captions("caption, json.meta.long, txt")
    assert places.parts == ("caption", "json", "txt")
    assert places.texts(sample(txt=b"short"), every=False) == [(["short"], 1.0)]
    data = b'{"meta": {"long": " a long one "}}'
    assert places.texts(sample(txt=b"short", json=data), every=False) == [(["a long one"], 1.0)]
    assert places.texts(sample(txt=b"short", json=data), every=True)[1] == (["short"], 1.0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[]", "no text in 'a'"),
        (b'{"a": 3}', "no text in 'a'"),
        (b'{"a": ["", 4]}', "no text in 'a'"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_a_field_that_holds_no_text_says_so(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Captions("json.a").texts(sample(json=data), every=True)
    assert Captions("json.a,txt").texts(sample(json=data, txt=b"t"), every=True) == [(["t"], 1.0)]


def test_captions_are_drawn_by_weight_and_lists_evenly() -> None:
    texts = Captions("txt=3,json.names").texts(sample(txt=b"one", json=b'{"names": ["two", "three"]}'), every=True)
    rng = np.random.default_rng(0)
    found = Counter(draw(texts, rng) for _ in range(4000))
    assert abs(found["one"] / 4000 - 0.75) < 0.03  # four standard deviations
    assert abs(found["two"] / 4000 - 0.125) < 0.02 and abs(found["three"] / 4000 - 0.125) < 0.02


@pytest.mark.parametrize("spec", "|xml|json|json.|json..a|txt.a|txt=0|txt=-1|txt=x|txt,,txt".split("|"))
def test_places_that_cannot_be_meant_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.caption"):
        Captions(spec)


def test_sources_have_their_own_places_and_weights() -> None:
    assert [place.spec for place in per_source("txt", 3)] == ["txt"] * 3
    assert [place.spec for place in per_source("txt :: json.a", 2)] == ["txt", "json.a"]
    assert read_weights("", 2) is None and read_weights("2:: 0.5", 2) == [2.0, 0.5]
    with pytest.raises(ConfigError, match=r"is for 2 sources, data.train names 3"):
        per_source("txt::txt", 3)
    for spec in ("1", "1::0", "1::x", "1::nan", "1::2::3"):
        with pytest.raises(ConfigError, match=r"data\.weights"):
            read_weights(spec, 2)
