"""What a classifier compares images with: each label's embedding, encoded once and then kept.

Letters: L labels, T templates, E embedding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.evaluation.inference import TEXT_STEP
from mm.evaluation.label_cache import LabelCache, folder_of
from mm.evaluation.vocabulary import filled

if TYPE_CHECKING:
    from mm.evaluation.inference import Inference

TEXTS = 8192  # encoded at a time: 80,000 would be held as ids and as embeddings at once
KEPT_BYTES = 256 << 20  # in memory, of one model
_FORMAT = "2"  # of what is hashed and kept; another one where the same labels would get other weights


def encode_labels(
    inference: Inference, labels: Sequence[str], templates: Sequence[str], *, progress: bool = False
) -> Tensor:
    """`[L, E]` unit norm: the mean over the templates of unit-norm embeddings, normalised again (arXiv 2103.00020).

    Some labels at a time, so that memory holds L embeddings and not L T. A label's bits do not depend on the others.
    """
    from tqdm import tqdm

    weights = torch.empty(len(labels), inference.config.model.embed_dim)
    at_once = max(1, TEXTS // len(templates))
    quiet = None if progress else True  # None: shown on a terminal only
    with tqdm(total=len(labels), desc="encoding labels", unit="label", disable=quiet, leave=False) as bar:
        for start in range(0, len(labels), at_once):
            part = labels[start : start + at_once]
            texts = [text for label in part for text in filled(label, templates)]
            unique = {text: row for row, text in enumerate(dict.fromkeys(texts))}
            found = inference.encode("text", list(unique))  # [U, E], unit norm
            rows = torch.tensor([unique[text] for text in texts]).unflatten(0, (len(part), len(templates)))
            if len(templates) == 1:
                weights[start : start + len(part)] = found[rows[:, 0]]
            else:  # label by label: how many there are must not choose the order of a sum
                for row, places in enumerate(rows, start):
                    weights[row] = F.normalize(found[places].mean(0), dim=-1)  # [T, E] -> [E]
            bar.update(len(part))
    return weights


class LabelWeights:
    """The label weights of one model, in memory and, where asked for, on disk. Its weights must not change."""

    def __init__(self, inference: Inference) -> None:
        self.inference = inference
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(
        self,
        labels: Sequence[str],
        templates: Sequence[str],
        *,
        cache: bool | str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """`[L, E]` as `encode_labels`, shared: not to be written to. What was encoded before is not encoded again.

        `cache`: True keeps them in `$MM_CACHE`/labels too, a path in that folder. Raises ValueError where it is neither
        or cannot be written.
        """
        folder = folder_of(cache)
        wanted = self._wanted(labels, templates)
        with self._lock:
            weights = self._kept.get(wanted)
        if folder is None:
            if weights is None:
                weights = encode_labels(self.inference, labels, templates, progress=progress)
        else:
            store, key = LabelCache(folder), self._hash(self.fingerprint, wanted)
            shape = (len(labels), self.inference.config.model.embed_dim)
            known = store.has(key) if weights is not None else (weights := store.read(key, shape)) is not None
            if not known:
                store.check()
                if weights is None:
                    weights = encode_labels(self.inference, labels, templates, progress=progress)
                store.write(key, weights)
        assert weights is not None
        self._keep(wanted, weights)
        return weights

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that a text's embedding follows from: the text tower's weights, its config, the tokenizer.

        The same for a run and for what was released from it.
        """
        model, config = self.inference.model, self.inference.config.model
        found = hashlib.blake2b(digest_size=20)
        said = [_FORMAT, model.tokenizer.to_json(), config.embed_dim, dataclasses.asdict(config.text)]
        found.update(json.dumps(said, sort_keys=True).encode())
        for part in (model.adapters["text"], model.encoders["text"]):
            for name, tensor in sorted(part.state_dict().items()):
                found.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def _wanted(self, labels: Sequence[str], templates: Sequence[str]) -> str:
        """A hash of the words, and of what else changes an embedding's last bits."""
        how = [self.inference.model.device.type, "bf16" if self.inference.bf16 else "fp32"]
        how += [torch.__version__, str(self.inference.size("text", TEXT_STEP))]  # which depends on the threads
        return self._hash(json.dumps([how, list(templates), list(labels)], ensure_ascii=False))

    @staticmethod
    def _hash(*words: str) -> str:
        return hashlib.blake2b("\n".join(words).encode(), digest_size=20).hexdigest()

    def _keep(self, wanted: str, weights: Tensor) -> None:
        with self._lock:
            self._kept[wanted] = weights
            self._kept.move_to_end(wanted)
            while self._kept and sum(4 * one.numel() for one in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
