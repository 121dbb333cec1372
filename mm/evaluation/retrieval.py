"""Retrieval between two sets of embeddings, row i of one belonging to row i of the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ranks(queries: Tensor, bank: Tensor, block: int = 1024) -> Tensor:
    """float32 `[N]`: how many rows of `bank` `[N, E]` are nearer to query i `[N, E]` than row i; a tie counts half.

    With the half, a model that maps everything to one point ranks in the middle and not first.
    """
    found = []
    for start in range(0, len(queries), block):
        similarity = queries[start : start + block] @ bank.T  # [b, N]
        own = similarity.diagonal(offset=start)[:, None]
        found.append((similarity > own).sum(1) + ((similarity == own).sum(1) - 1) / 2)
    return torch.cat(found).float()


def recall(
    images: Tensor, texts: Tensor, ks: Sequence[int] = (1, 5, 10), names: tuple[str, str] = ("image", "text")
) -> dict[str, float]:
    """`image_to_text@k` and `text_to_image@k`: the share of unit-norm `[N, E]` rows whose partner is among k nearest.

    `names` of two other modalities are used in their place. Raises ValueError where the two differ in shape or hold
    nothing.
    """
    if images.shape != texts.shape or not len(images):
        raise ValueError(
            f"recall: {names[0]}s {list(images.shape)} and {names[1]}s {list(texts.shape)} must be pairs, at least one"
        )
    one, other = names
    directions = {f"{one}_to_{other}": ranks(images, texts), f"{other}_to_{one}": ranks(texts, images)}
    return {f"{name}@{k}": float((rank < k).float().mean()) for name, rank in directions.items() for k in ks}


def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Places `[B, k]` in `bank` and cosines `[B, k]` of the nearest to each query, nearest first; unit-norm rows."""
    cosines, places = (queries @ bank.T).topk(min(k, len(bank)), dim=1)
    return places, cosines
