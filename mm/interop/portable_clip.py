"""CLIP's tokenizer without open_clip: its merges as a file of the `tokenizers` package, its words as a pattern.

A cleaned text is split into words, and each is a BPE over its bytes, the last of which carries an end mark
(openai/CLIP's simple_tokenizer).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mm.adapters.cleaning import cleaned

START_OF_TEXT, END_OF_TEXT = "<start_of_text>", "<end_of_text>"


class PortableClip:
    """A `Tokenizer` as `mm.adapters.text.ClipTokenizer` is, id for id, from what `portable_clip` wrote."""

    def __init__(self, serialized: str):
        from tokenizers import Tokenizer as Rust

        self._rust = Rust.from_str(serialized)
        self.vocab_size = self._rust.get_vocab_size()
        vocabulary = self._rust.get_vocab()
        self._special: dict[str, int] = {name: vocabulary[name] for name in (START_OF_TEXT, END_OF_TEXT)}

    def encode(self, text: str) -> list[int]:
        """Ids with the start and end tokens."""
        text = cleaned(text, "lower")
        if any(name in text for name in self._special):  # a word of their own; BPE would cut them up
            pieces = [piece for piece, _ in self._rust.pre_tokenizer.pre_tokenize_str(text)]
            parts = [[self._special[piece]] if piece in self._special else self._word(piece) for piece in pieces]
            ids = [number for part in parts for number in part]
        else:
            ids = self._rust.encode(text).ids
        return [self._special[START_OF_TEXT], *ids, self._special[END_OF_TEXT]]

    def _word(self, piece: str) -> list[int]:
        return [token.id for token in self._rust.model.tokenize(piece)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text from ids, without the start and end tokens."""
        kept = [int(number) for number in ids if int(number) not in self._special.values()]
        return self._rust.decode(kept).strip()

    def to_json(self) -> str:
        return self._rust.to_str()


def portable_clip() -> str:
    """CLIP's merges, as open_clip ships them, in the JSON of the `tokenizers` package."""
    from open_clip.tokenizer import SimpleTokenizer
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Rust

    clip = SimpleTokenizer()
    merges = sorted(clip.bpe_ranks, key=clip.bpe_ranks.__getitem__)
    rust = Rust(models.BPE(vocab=clip.encoder, merges=merges, end_of_word_suffix="</w>", fuse_unk=False))
    letter, digit, rest = _characters(r"[\p{L}]", r"[\p{N}]", r"[^\s\p{L}\p{N}]")
    short = rf"(?i:{START_OF_TEXT}|{END_OF_TEXT}|'s|'t|'re|'ve|'m|'ll|'d)"
    words = rf"{short}|[{letter}]+|[{digit}]|[{rest}]+"
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rust.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    return rust.to_str()


def _characters(*patterns: str) -> list[str]:
    """For each pattern the ranges of all characters that it takes in open_clip, as a regular expression has them.

    Written out, because `tokenizers` knows an older Unicode than `regex`, and words would end elsewhere.
    """
    import regex

    everything = "".join(chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)
    runs = [regex.findall(f"{pattern}+", everything, regex.IGNORECASE) for pattern in patterns]
    return ["".join(rf"\x{{{ord(run[0]):x}}}-\x{{{ord(run[-1]):x}}}" for run in found) for found in runs]
