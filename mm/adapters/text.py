"""Text: a byte-level BPE trained on the corpus, or CLIP's, and words as tokens."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mm.adapters.base import Adapter, Processor, length_mask
from mm.adapters.hub_tokenizer import HubTokenizer
from mm.adapters.open_clip_files import alone
from mm.config import ConfigError
from mm.types import Batch, Tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mm.config import TextConfig

PAD, START, END = "<pad>", "<start>", "<end>"


class Tokenizer(Protocol):
    """Text to ids and back; picklable. Ids carry no padding and end with the end-of-text token."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def to_json(self) -> str: ...


class CorpusTokenizer:
    """Byte-level BPE (arXiv 1508.07909) through `tokenizers`; any text can be encoded."""

    def __init__(self, serialized: str):
        from tokenizers import Tokenizer as Rust

        self._rust = Rust.from_str(serialized)
        self.vocab_size = self._rust.get_vocab_size()
        self._end: int = self._rust.encode(END).ids[0]  # a special token is never split

    def encode(self, text: str) -> list[int]:
        return [*self._rust.encode(text).ids, self._end]

    def decode(self, ids: Sequence[int]) -> str:
        return self._rust.decode([int(i) for i in ids]).strip()

    def to_json(self) -> str:
        return self._rust.to_str()

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return CorpusTokenizer, (self.to_json(),)


@functools.cache
def clip_table() -> Any:
    """open_clip's; a tenth of a second to read, which its module does once for itself."""
    module = alone("tokenizer")
    return getattr(module, "_tokenizer", None) or module.SimpleTokenizer()


class ClipTokenizer:
    """CLIP's BPE from open_clip, with its start and end tokens."""

    vocab_size = 49408

    def __init__(self) -> None:
        self._clip = clip_table()

    def encode(self, text: str) -> list[int]:
        ids, end = self._clip.encode(text), self._clip.eot_token_id
        if end in ids:  # a text may spell it; CLIP pools at the first, and what follows is not seen
            ids = ids[: ids.index(end)]
        return [self._clip.sot_token_id, *ids, end]

    def decode(self, ids: Sequence[int]) -> str:
        special = (self._clip.sot_token_id, self._clip.eot_token_id)
        return self._clip.decode([int(i) for i in ids if int(i) not in special]).strip()

    def to_json(self) -> str:
        return '{"clip": 49408}'

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return ClipTokenizer, ()


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> CorpusTokenizer:
    """A byte-level BPE of at most `vocab_size` entries, fitted to `captions`."""
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, pre_tokenizers, trainers

    rust = Rust(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(captions, trainer)
    return CorpusTokenizer(rust.to_str())


def tokenizer_from_json(serialized: str) -> Tokenizer:
    """The tokenizer that `to_json` described. Raises ConfigError where that is damaged."""
    if serialized.startswith('{"clip"'):
        return ClipTokenizer()
    try:
        return HubTokenizer.from_json(serialized) if serialized.startswith('{"hub"') else CorpusTokenizer(serialized)
    except ConfigError:
        raise
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise ConfigError(
            f"tokenizer.json: damaged ({' '.join(str(error).split())[:160]}); release it again"
        ) from error


class TextProcessor(Processor):
    """Strings to token ids, cut at `context_length` with the end token kept, padded with `pad_id` to that length."""

    source = "text"

    def __init__(self, tokenizer: Tokenizer, context_length: int, word_dropout: float = 0.0, pad_id: int = 0):
        self.tokenizer, self.context_length, self.word_dropout = tokenizer, context_length, word_dropout
        self.pad_id = pad_id
        self._cache: dict[str, np.ndarray] = {}

    def prepare(self, raw: Any, *, train: bool, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        if not isinstance(raw, str):
            raise ValueError(f"a text must be a str, not {type(raw).__name__}")
        if train and rng is not None and self.word_dropout > 0:
            words = raw.split()
            kept = [word for word, draw in zip(words, rng.random(len(words)), strict=True) if draw >= self.word_dropout]
            raw = " ".join(kept or words)
        return {"ids": self._encode(raw)}

    def _encode(self, text: str) -> np.ndarray:
        found = self._cache.get(text)  # looked up once: another thread may clear it meanwhile
        if found is None:
            ids = self.tokenizer.encode(text)
            if len(ids) > self.context_length:
                kept = getattr(self.tokenizer, "tail", 1)  # the end token; a hub's may have none, or two
                ids = [*ids[: self.context_length - kept], *ids[len(ids) - kept :]]
            if len(self._cache) > 65536:  # bounded: captions of a large corpus hardly repeat
                self._cache.clear()
            found = self._cache[text] = np.asarray(ids, dtype=np.int64)
        return found

    def collate(self, items: Sequence[dict[str, np.ndarray]]) -> tuple[Tensor, Tensor]:
        """ids int64 `[B, context_length]` and lengths `[B]`."""
        ids = np.full((len(items), self.context_length), self.pad_id, dtype=np.int64)
        lengths = np.empty(len(items), dtype=np.int64)
        for row, item in enumerate(items):
            lengths[row] = len(item["ids"])
            ids[row, : lengths[row]] = item["ids"]
        return torch.from_numpy(ids), torch.from_numpy(lengths)

    def render(self, tensor: Tensor) -> list[str]:
        """Strings from ids `[B, L]`."""
        return [self.tokenizer.decode([i for i in row.tolist() if i != self.pad_id]) for row in tensor]


class TextAdapter(Adapter):
    """Token embeddings with a learned position."""

    def __init__(self, config: TextConfig, processor: TextProcessor, name: str = "text"):
        super().__init__(name, processor)
        self.embedding = nn.Embedding(processor.tokenizer.vocab_size, config.width)
        self.position = nn.Parameter(torch.zeros(config.context_length, config.width))

    def embed(self, batch: Batch) -> Tokens:
        """Tokens `[B, L, D]` with a mask over the padding, from ids `[B, L]`."""
        ids = batch.inputs[self.name]
        x = self.embedding(ids) + self.position[: ids.shape[1]]
        return Tokens(x, mask=length_mask(batch.lengths[self.name], ids.shape[1]), max_len=ids.shape[1])


class IdsAdapter(Adapter):
    """Each token id a token of width 1: what a wrapped encoder, which has embeddings of its own, is given."""

    def embed(self, batch: Batch) -> Tokens:
        """Tokens int64 `[B, L, 1]` with a mask over the padding, from ids `[B, L]`."""
        ids = batch.inputs[self.name]
        mask = length_mask(batch.lengths[self.name], ids.shape[1])
        return Tokens(ids[..., None], mask=mask, max_len=ids.shape[1])
