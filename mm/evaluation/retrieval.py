"""Retrieval between two sets of embeddings: pairs, row i of one belonging to row i of the other, or several to one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST_NUMBERS = 1 << 25  # similarities held at once


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


def found_within(
    queries: Tensor, bank: Tensor, own: Tensor, ks: Sequence[int], most: int = MOST_NUMBERS
) -> dict[int, Tensor]:
    """By k, bool `[Q]`: whether one of a query's own rows of `bank` is among the k nearest to it.

    `queries` `[Q, E]`, `bank` `[N, E]`, `own` int64 `[Q, P]`: places in the bank, filled up with -1. `most` numbers of
    the similarities are held at once. Of rows that are equally near, those count as nearer that `torch.topk` names
    first: what CLIP_benchmark does, where one caption of two pictures makes such ties.
    """
    parts: dict[int, list[Tensor]] = {k: [] for k in ks}
    rows = max(1, most // max(1, len(bank)))
    for start in range(0, len(queries), rows):
        similarity = queries[start : start + rows] @ bank.T  # [b, N]
        mine = own[start : start + rows]
        values = similarity.gather(1, mine.clamp_min(0)).masked_fill(mine < 0, -torch.inf)
        best = values.amax(1, keepdim=True)
        ahead = (similarity > best).sum(1)
        level = (similarity == best).sum(1) > (values == best).sum(1)
        tied = level.nonzero()[:, 0]
        for k in ks:
            hit = ahead < k
            if len(tied):
                places = similarity[tied].topk(min(k, len(bank)), dim=1).indices  # [t, k or N]
                hit[tied] = (places[:, :, None] == mine[tied][:, None, :]).flatten(1).any(1)
            parts[k].append(hit)
    return {k: torch.cat(found) for k, found in parts.items()}


def own_rows(counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of images with so many captions each, in order: own captions of each image `[I, P]`, own image of each caption
    `[T, 1]`, as `found_within` takes them."""
    own, start = torch.full((len(counts), max(counts)), -1), 0
    for row, count in enumerate(counts):
        own[row, :count] = torch.arange(start, start + count)
        start += count
    return own, torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[:, None]
