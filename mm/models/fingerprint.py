"""Which model it is: one hash of everything that decides what it says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any


def model_hash(loaded: Any) -> str:
    """SHA-256 in hex of a loaded model: names, types, shapes and bytes of its tensors, its tokenizer and its config.

    `loaded` is what `mm.load` returns, or its `inference`. Two folders with the same model have the same hash, wherever
    they lie; one weight that differs in one bit has another.
    """
    import torch

    inference = getattr(loaded, "inference", loaded)
    if inference.fingerprint:  # weights at inference do not change
        return inference.fingerprint
    tensors = {**{f"model.{n}": t for n, t in inference.model.state_dict().items()}, **inference.extras}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    digest.update(inference.model.tokenizer.to_json().encode())
    for part in (inference.config.model, inference.config.objectives):  # the latter: noise path, kind of probabilities
        digest.update(json.dumps(dataclasses.asdict(part), sort_keys=True).encode())
    inference.fingerprint = digest.hexdigest()
    return inference.fingerprint
