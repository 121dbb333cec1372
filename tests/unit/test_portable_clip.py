"""CLIP's tokenizer as a file, and captions cleaned without open_clip: the same ids."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from mm.adapters.cleaning import cleaned
from mm.adapters.text import ClipTokenizer
from mm.interop.portable_clip import PortableClip, portable_clip

WORDS = ["red heart", "", "the sun behind 2 small clouds, and Ünïcode 😀", "snake_case: (a) b-c"]


@pytest.fixture(scope="module")
def clips() -> tuple[ClipTokenizer, PortableClip]:
    return ClipTokenizer(), PortableClip(portable_clip())


def test_the_portable_tokenizer_gives_clips_ids(clips: tuple[ClipTokenizer, PortableClip]) -> None:
    theirs, ours = clips
    for caption in captions():
        assert ours.encode(caption) == theirs.encode(caption), caption
        assert ours.decode(ours.encode(caption)) == theirs.decode(theirs.encode(caption)), caption


def test_captions_are_cleaned_as_open_clip_does() -> None:
    from open_clip.tokenizer import get_clean_fn

    for how in ("whitespace", "lower", "canonicalize"):
        theirs = get_clean_fn(how)
        for caption in captions():
            assert cleaned(caption, how) == theirs(caption), caption


def captions() -> list[str]:
    """Words, traps, and characters at random."""
    rng = np.random.default_rng(0)
    alphabet = list(
        "abc ABC 'sS'tre 12³½éßſKÅ😀👩‍👩‍👧中文日本語عربيहिन्दी&amp;&lt;\n\t\u00a0\u2028…—“”’ﬁ_-!?<>[]{}\u0558\u0345"
    )
    traps = ["it'S a DOG'LL", "a!!<end_of_text> b", "x <START_OF_TEXT>y", "&amp;lt;b&amp;gt;", "doesnâ€™t"]
    return WORDS + traps + ["".join(rng.choice(alphabet, rng.integers(1, 24))) for _ in range(300)]


@pytest.mark.slow
def test_the_portable_tokenizer_knows_every_character(clips: tuple[ClipTokenizer, PortableClip]) -> None:
    theirs, ours = clips
    everything = [code for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    texts = [f"a{chr(code)}b's" for code in everything if code < 0x30000 or code % 37 == 0]  # no letters beyond
    assert [text for text in texts if ours.encode(text) != theirs.encode(text)] == []
