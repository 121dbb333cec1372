"""The tokenizer of a Hugging Face text encoder, kept inside the model that uses it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mm.adapters.cleaning import cleaned
from mm.config import ConfigError


class HubTokenizer:
    """A `tokenizers` tokenizer with open_clip's cleaning in front; or only its name, where it could not be had.

    `clean`: "whitespace", "lower" or "canonicalize", as in open_clip. `blank`: an id that becomes 0, as CLIPA's
    separator does. Without `serialized` (no network when the model was read) token ids still work, text does not.
    """

    def __init__(
        self, name: str, vocab_size: int, serialized: str = "", clean: str = "whitespace", blank: int | None = None
    ):
        self.name, self.vocab_size, self.serialized = name, vocab_size, serialized
        self.clean, self.blank = clean, blank
        self._rust: Any = None
        self.tail = 1  # tokens that stand behind every text, and are kept where one is cut
        if serialized:
            from tokenizers import Tokenizer as Rust

            self._rust = Rust.from_str(serialized)
            self._rust.no_padding()
            self._rust.no_truncation()
            special = self._rust.encode("a").special_tokens_mask[::-1]
            self.tail = special.index(0) if 0 in special else len(special)

    def encode(self, text: str) -> list[int]:
        ids = self._ready().encode(cleaned(text, self.clean)).ids
        if ids and max(ids) >= self.vocab_size:
            raise ValueError(f"text: {text[:40]!r} has token {max(ids)}; the model knows {self.vocab_size}; reword it")
        return [0 if i == self.blank else i for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self._ready().decode([int(i) for i in ids]).strip()

    def to_json(self) -> str:
        fields = {"name": self.name, "vocab_size": self.vocab_size, "clean": self.clean, "blank": self.blank}
        return json.dumps({"hub": fields | {"tokenizer": self.serialized}})

    @classmethod
    def from_json(cls, text: str) -> HubTokenizer:
        """The inverse of `to_json`. Raises ConfigError where something is missing."""
        try:
            found = json.loads(text)["hub"]
            if not isinstance(found["vocab_size"], int) or found["clean"] not in (
                "whitespace",
                "lower",
                "canonicalize",
            ):
                raise ConfigError(
                    f"tokenizer.json: vocab_size = {found['vocab_size']!r}, clean = {found['clean']!r}: must be a "
                    "number, and whitespace, lower or canonicalize; release the model again"
                )
            return cls(found["name"], found["vocab_size"], found["tokenizer"], found["clean"], found["blank"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ConfigError(f"tokenizer.json: damaged ({error}); release the model again") from error

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return HubTokenizer.from_json, (self.to_json(),)

    def _ready(self) -> Any:
        if self._rust is None:
            raise ConfigError(
                f"text: the tokenizer {self.name} is not in this model (there was no network when it was read); "
                "give token ids, or load it once with a network and transformers installed, and mm release it"
            )
        return self._rust
