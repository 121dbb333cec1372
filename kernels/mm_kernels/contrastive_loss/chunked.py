"""Value and gradients of the loss in one pass over tiles of the logits, in one process or over the rows of one of many.

With logits s_ij = t⟨I_i, T_j⟩, N pairs, and r_i, c_j the log-sum-exp of a row and a column:
softmax: L = mean_i (r_i + c_i) / 2 - s_ii, G_ij = (e^(s_ij - r_i) + e^(s_ij - c_j) - 2 δ_ij) / 2N;
sigmoid: L = Σ_ij softplus(∓(s_ij + b)) / N, G_ij = (σ(s_ij + b) - δ_ij) / N, no statistics;
dI = t G T, dT = t Gᵀ I, dt = Σ_i ⟨I_i, dI_i⟩ / t, db = Σ G. Tiles are made again instead of kept: Inf-CL
(arXiv 2410.17243), here with both directions on one tile. Tiles leave pairs out, which are added row by row in float32:
with o_i the log-sum-exp of the other logits of a row, r_i - s_ii = softplus(o_i - s_ii) and e^(s_ii - r_i) - 1 =
-σ(o_i - s_ii), which keep their digits when the loss is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_kernels.contrastive_loss import tiles as torch_tiles
from mm_kernels.contrastive_loss.exchange import Ranks, Ring
from mm_kernels.runtime import use_triton

Both = tuple[Tensor, Tensor]  # gradients of images and texts
Weights = Callable[[slice, slice, int], tuple[Tensor, Tensor]]  # a tile and its sums, by rows, columns, `first`
Others = Callable[[Tensor, Tensor, "Work", Ranks, "Both | None"], Tensor]


class Result(NamedTuple):
    """`value` [], and its derivatives with respect to `image`, `text` `[n, E]`, `scale` and `bias` `[1]`, or None."""

    value: Tensor
    image: Tensor | None
    text: Tensor | None
    scale: Tensor | None
    bias: Tensor | None


class Work(NamedTuple):
    """What every step needs: the module that computes a tile, a tile's edge, the factor and the bias `[1]`."""

    tiles: ModuleType
    edge: int
    scale: Tensor
    bias: Tensor


def tile_module(image: Tensor) -> ModuleType:
    """Who computes a tile: Triton where it runs, but never for float64."""
    if image.dtype == torch.float64 or not use_triton(image):
        return torch_tiles
    from mm_kernels.contrastive_loss import triton_tiles

    return triton_tiles


def loss_and_gradients(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kind: str,
    chunk: int,
    ranks: Ranks | None,
    ring: bool,
    gradients: bool,
) -> Result:
    """The loss of image, text `[n, E]`, one type, contiguous; `chunk`: a tile's edge, 0 for the default.

    With `ranks`, value and gradients are this process' share times the number of processes.
    """
    wide = torch.promote_types(image.dtype, torch.float32)
    tiles = tile_module(image)
    if tiles is torch_tiles:
        image, text = image.to(wide), text.to(wide)
    offset = torch.zeros(1, dtype=wide, device=image.device) if bias is None else bias.to(wide).reshape(1)
    work = Work(tiles, chunk or tiles.EDGE, scale.to(wide).reshape(1), offset)
    total, share = (sum(ranks.counts), len(ranks.counts)) if ranks else (len(image), 1)
    if not total:
        raise ValueError("no pairs: the mean over them is not defined")
    both = None
    if gradients:
        both = (torch.zeros_like(image, dtype=wide), torch.zeros_like(text, dtype=wide))
    partners = row_products(image, text, work.edge)
    if kind == "softmax":
        pairs = softmax(image, text, partners, work, ranks, both)
    else:
        pairs = sigmoid(image, text, partners, work, sigmoid_ring if ring else sigmoid_gathered, ranks, both)
    value = (pairs.loss * (share / total)).to(wide)
    if both is None:
        return Result(value, None, None, None, None)
    for gradient, partner in zip(both, (text, image), strict=True):
        for i in spans(len(gradient), work.edge):
            gradient[i].addcmul_(pairs.weights[i, None], partner[i].to(wide))
    if tiles.SLOPES:
        slope = pairs.others[2] + (pairs.weights * partners).double().sum()
    else:
        slope = row_products(image, both[0], work.edge).double().sum()
    weight = share / (2 * total if kind == "softmax" else total)
    for gradient in both:
        gradient.mul_(work.scale * weight)
    bias_sum = pairs.others[1] + pairs.weights.double().sum() if kind == "sigmoid" else torch.zeros_like(slope)
    return Result(value, *both, (slope * weight).to(wide).reshape(1), (bias_sum * weight).to(wide).reshape(1))


class Pairs(NamedTuple):
    """Of this process' rows: N times the loss [], the pairs' weights `[n]`, and the tiles' sums `[3]`."""

    loss: Tensor
    weights: Tensor
    others: Tensor


def softmax(image: Tensor, text: Tensor, partners: Tensor, work: Work, ranks: Ranks | None, both: Both | None) -> Pairs:
    """Adds 2N G T and 2N Gᵀ I, but for pairs, to `both`: weights are 2N G here. `partners` `[n]`: ⟨I_i, T_i⟩."""
    images, texts = (ranks.gather(image), ranks.gather(text)) if ranks else (image, text)
    first = ranks.first if ranks else 0
    own, whole = slice(first, first + len(image)), slice(0, len(images))
    rows, columns = statistics(image, texts, first, work)
    positive = work.scale * partners
    if ranks:
        rows, positive = ranks.gather(torch.stack([rows, positive], 1)).unbind(1)
        columns = ranks.logsumexp(columns)
    over = torch.stack([rows - positive, columns - positive])[:, own]
    rows, columns = torch.logaddexp(rows, positive), torch.logaddexp(columns, positive)

    def weights(a: slice, b: slice) -> Weights:
        """Tiles of a rectangle of the logits: the rows and the columns that it spans in the whole batch."""
        left, right, over_left, over_right = images[a], texts[b], rows[a], columns[b]

        def tile(i: slice, j: slice, place: int) -> tuple[Tensor, Tensor]:
            return work.tiles.softmax_weights(left[i], right[j], work.scale, place, over_left[i], over_right[j])

        return tile

    others = partners.new_zeros(3, dtype=torch.float64)
    if both is not None and ranks is None:
        others = add_products(image, text, 0, work, weights(whole, whole), *both)
    elif both is not None:
        others = add_products(image, texts, first, work, weights(own, whole), both[0], None)
        add_products(images, text, -first, work, weights(whole, own), None, both[1])
    return Pairs(F.softplus(over).double().sum() / 2, -over.sigmoid().sum(0), others)


def sigmoid(
    image: Tensor, text: Tensor, partners: Tensor, work: Work, run: Others, ranks: Ranks | None, both: Both | None
) -> Pairs:
    """Adds N G T and N Gᵀ I, but for pairs, to `both`: weights are N G here. `partners` `[n]`: ⟨I_i, T_i⟩."""
    if ranks:
        others = run(image, text, work, ranks, both)
    else:
        others = sigmoid_block(image, text, 0, work, *(both or (None, None)))
    negative = -(work.scale * partners + work.bias)
    return Pairs(others[0] + F.softplus(negative).double().sum(), -negative.sigmoid(), others)


def sigmoid_gathered(image: Tensor, text: Tensor, work: Work, ranks: Ranks, both: Both | None) -> Tensor:
    by_image, by_text = both or (None, None)
    others = sigmoid_block(image, ranks.gather(text), ranks.first, work, by_image, None)
    if both is not None:
        sigmoid_block(ranks.gather(image), text, -ranks.first, work, None, by_text)
    return others


def sigmoid_ring(image: Tensor, text: Tensor, work: Work, ranks: Ranks, both: Both | None) -> Tensor:
    """In memory that does not grow with the processes: texts go round, their gradients go with them."""
    by_image, travelling = both or (None, None)
    ring, block, others = Ring(ranks), text, torch.zeros(3, dtype=torch.float64, device=image.device)
    for step in range(len(ranks.counts)):
        coming = ring.start(block, step) if step + 1 < len(ranks.counts) else None
        others += sigmoid_block(image, block, ranks.first - ring.first(step), work, by_image, travelling)
        if travelling is not None:
            travelling = ring.start(travelling, step).wait()
        if coming is not None:
            block = coming.wait()
    if both is not None and travelling is not None:
        both[1].copy_(travelling)  # home again
    return others


def sigmoid_block(
    image: Tensor, text: Tensor, first: int, work: Work, by_image: Tensor | None, by_text: Tensor | None
) -> Tensor:
    """The sums over a rectangle of the logits `[3]`; adds to the gradients that are there."""
    wanted = by_image is not None or by_text is not None

    def tile(i: slice, j: slice, place: int) -> tuple[Tensor, Tensor]:
        return work.tiles.sigmoid_weights(image[i], text[j], work.scale, work.bias, place, wanted)

    return add_products(image, text, first, work, tile, by_image, by_text)


def statistics(image: Tensor, text: Tensor, first: int, work: Work) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of each row `[M]` and each column `[N]` of the logits, pairs left out."""
    rows, columns = (work.scale.new_full((len(x),), -torch.inf) for x in (image, text))
    for i in spans(len(image), work.edge):
        for j in spans(len(text), work.edge):
            place = first + i.start - j.start
            tile_rows, tile_columns = work.tiles.statistics(image[i], text[j], work.scale, place)
            rows[i], columns[j] = torch.logaddexp(rows[i], tile_rows), torch.logaddexp(columns[j], tile_columns)
    return rows, columns


def add_products(
    image: Tensor,
    text: Tensor,
    first: int,
    work: Work,
    weights: Weights,
    by_image: Tensor | None,
    by_text: Tensor | None,
) -> Tensor:
    """Add G T to the one and Gᵀ I to the other, a tile of G (`weights`) at a time; returns the tiles' sums `[3]`."""
    sums = torch.zeros(3, dtype=torch.float64, device=image.device)
    for i in spans(len(image), work.edge):
        for j in spans(len(text), work.edge):
            tile, tile_sums = weights(i, j, first + i.start - j.start)
            sums += tile_sums
            if by_image is not None:
                work.tiles.add_product(by_image[i], tile, text[j])
            if by_text is not None:
                work.tiles.add_product(by_text[j], tile.T, image[i])
    return sums


def row_products(a: Tensor, b: Tensor, edge: int) -> Tensor:
    """⟨a_i, b_i⟩ of each row `[N]`, in the wider type and at least float32."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    out = torch.empty(len(a), dtype=wide, device=a.device)
    for i in spans(len(a), edge):
        torch.sum(a[i].to(wide) * b[i].to(wide), 1, out=out[i])
    return out


def spans(length: int, edge: int) -> Iterator[slice]:
    """`[0, length)` in pieces of `edge`, the last one shorter."""
    return (slice(start, min(start + edge, length)) for start in range(0, length, edge))
