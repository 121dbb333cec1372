"""Tokenizers as `transformers` reads them: tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.adapters.hub_tokenizer import HubTokenizer
from mm.adapters.text import clip_table

if TYPE_CHECKING:
    from mm.interop.origin import Origin


def clip_tokenizer(origin: Origin, folder: Path) -> None:
    """CLIP's byte pairs, from open_clip's own table, as a `CLIPTokenizer`.

    The same ids as open_clip's, of text that needs none of open_clip's mending (ftfy, HTML entities).
    """
    from transformers import CLIPTokenizer

    table = clip_table()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(word, word): number for word, number in table.encoder.items()}
    merges = [tuple(pair) for pair, _ in sorted(table.bpe_ranks.items(), key=lambda item: item[1])]
    made = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=origin.model.text.context_length)  # type: ignore[arg-type]
    made.save_pretrained(folder)


def hub_tokenizer(origin: Origin, folder: Path, clean: bool = False) -> None:
    """A `HubTokenizer` that has its serialisation; with `clean` what open_clip does to a text before goes inside."""
    from tokenizers import Regex, normalizers
    from tokenizers import Tokenizer as Rust

    tokenizer, text = origin.tokenizer, origin.model.text
    assert isinstance(tokenizer, HubTokenizer) and tokenizer.serialized
    rust = Rust.from_str(tokenizer.serialized)
    rust.no_padding()
    rust.no_truncation()
    if clean:
        before: list[Any] = []
        if tokenizer.clean == "canonicalize":  # open_clip's: no punctuation, lower case
            before = [normalizers.Replace("_", " "), normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), "")]
        if tokenizer.clean in ("canonicalize", "lower"):
            before.append(normalizers.Lowercase())
        before += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
        rust.normalizer = normalizers.Sequence([*before, *([rust.normalizer] if rust.normalizer else [])])
    rust.save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": text.context_length,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "pad_token": rust.id_to_token(text.pad_id),
    }
    if tokenizer.blank is not None:
        fields["sep_token"] = rust.id_to_token(tokenizer.blank)
    fields = {key: value for key, value in fields.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
