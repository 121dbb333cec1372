"""Hugging Face tokenizers on their way into a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.adapters.hub import pretrained
from mm.adapters.hub_tokenizer import HubTokenizer
from mm.config import ConfigError

if TYPE_CHECKING:
    from mm.adapters.text import Tokenizer
    from mm.config import TextConfig

FILES = ("tokenizer.json", "tokenizer_config.json")


def hub_tokenizer(known: str, options: dict[str, Any], text: TextConfig, beside: str = "") -> Tokenizer:
    """A Hugging Face tokenizer with its serialisation inside, or only its name where it cannot be had now.

    `options` are open_clip's: clean, strip_sep_token. A folder `beside` the weights goes first where it holds one, as
    in open_clip. `text.pad_id` becomes its padding. Raises ConfigError for other options, and where a text may have
    ids that the embedding has no row for.
    """
    clean, size = options.get("clean", "whitespace"), text.vocab_size
    if other := sorted(set(options) - {"clean", "strip_sep_token"}):
        raise ConfigError(f"{known}: mm knows no tokenizer option {other[0]} = {options[other[0]]!r}; leave it out")
    own = bool(beside) and any(Path(beside, file).is_file() for file in FILES)
    try:
        from transformers import AutoTokenizer

        fast = pretrained(AutoTokenizer, beside if own else known, trust_remote_code=False)
    except (ImportError, OSError, ValueError):  # text is refused later, by name; token ids work
        text.pad_id = 1 if "SigLIP" in known and "SigLIP2" not in known else text.pad_id
        return HubTokenizer(known, size, clean=clean)
    beyond = [word for word, number in fast.get_vocab().items() if number >= size and "extra_id" not in word]
    if beyond:  # but for the placeholders at the end of T5's vocabularies, which stand in no text
        raise ConfigError(
            f"{known}: the tokenizer has {len(fast)} ids and the text embedding {size} rows; they do not fit"
        )
    text.pad_id = int(fast.pad_token_id or 0)
    blank = fast.sep_token_id if options.get("strip_sep_token") else None
    # as many ids as the embedding has rows, of which some may be spare
    return HubTokenizer(known, size, fast.backend_tokenizer.to_str(), clean, blank)
