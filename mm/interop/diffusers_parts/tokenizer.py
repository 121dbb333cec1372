"""Captions as ids: the tokenizer of the exported model, from its tokenizer.json."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from mm.adapters.base import length_mask
from mm.adapters.text import CorpusTokenizer, TextProcessor
from mm.interop.portable_clip import PortableClip


class MMTokenizer:
    """A list of texts as `input_ids` `[B, L]` and `attention_mask` `[B, L]`, of the model's context length."""

    kinds: ClassVar[dict[str, Any]] = {"corpus": CorpusTokenizer, "clip": PortableClip}

    def __init__(self, serialized: str, kind: str, context_length: int):
        self.serialized, self.kind, self.model_max_length = serialized, kind, context_length
        self.processor = TextProcessor(self.kinds[kind](serialized), context_length)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **_: Any) -> MMTokenizer:
        """From the two files of `save_pretrained`."""
        settings = json.loads(Path(folder, "tokenizer_config.json").read_text(encoding="utf-8"))
        serialized = Path(folder, "tokenizer.json").read_text(encoding="utf-8")
        return cls(serialized, settings["kind"], settings["model_max_length"])

    def save_pretrained(self, folder: str | os.PathLike[str], **_: Any) -> None:
        """tokenizer.json and tokenizer_config.json."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        settings = {"tokenizer_class": "MMTokenizer", "kind": self.kind, "model_max_length": self.model_max_length}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        Path(folder, "tokenizer.json").write_text(self.serialized, encoding="utf-8")

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        ids, lengths = self.processor.collate([self.processor.prepare(text, train=False) for text in texts])
        return {"input_ids": ids, "attention_mask": length_mask(lengths, ids.shape[1]).long()}

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.tokenizer.decode(ids)
