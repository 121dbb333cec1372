"""Captions as ids: the tokenizer of the exported model, from its tokenizer.json."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from mm.adapters.base import length_mask
from mm.adapters.hub_tokenizer import HubTokenizer
from mm.adapters.text import CorpusTokenizer, TextProcessor
from mm.interop.portable_clip import PortableClip


class MMTokenizer:
    """A list of texts as `input_ids` and `attention_mask`, `[B, context_length]`.

    `kind`: which of `kinds` reads tokenizer.json; `settings`: what mm's `TextProcessor` is built with.
    """

    kinds: ClassVar[dict[str, Any]] = {"corpus": CorpusTokenizer, "clip": PortableClip, "hub": HubTokenizer.from_json}

    def __init__(self, serialized: str, kind: str, settings: dict[str, Any]):
        self.serialized, self.kind, self.settings = serialized, kind, settings
        self.processor = TextProcessor(self.kinds[kind](serialized), **settings)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **_: Any) -> MMTokenizer:
        """From the two files of `save_pretrained`."""
        settings = json.loads(Path(folder, "tokenizer_config.json").read_text(encoding="utf-8"))
        serialized = Path(folder, "tokenizer.json").read_text(encoding="utf-8")
        return cls(serialized, settings["kind"], settings["settings"])

    def save_pretrained(self, folder: str | os.PathLike[str], **_: Any) -> None:
        """tokenizer.json and tokenizer_config.json."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        settings = {"tokenizer_class": "MMTokenizer", "kind": self.kind, "settings": self.settings}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        Path(folder, "tokenizer.json").write_text(self.serialized, encoding="utf-8")

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        ids, lengths = self.processor.collate([self.processor.prepare(text, train=False) for text in texts])
        return {"input_ids": ids, "attention_mask": length_mask(lengths, ids.shape[1]).long()}

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.tokenizer.decode(ids)
