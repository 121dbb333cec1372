"""A ViT-B/32 text tower on captions of real lengths, forward and backward on a CPU: packed against padded to 77.

Both sides are the same module with the same weights; open_clip's own text tower, which pads, runs beside them.
"""

from __future__ import annotations

from statistics import median

import torch
from _common import alternate, arguments, report
from torch import Tensor

from mm.models.encoder import Encoder
from mm.models.presets import vit_b32
from mm.nn.packing import layout
from mm.types import Tokens

WORDS, DEVIATION = 10.3, 4.5  # of a caption in Conceptual Captions (Sharma et al., ACL 2018, table 2: median 9)
ENDS = 2  # the tokens before and after the words
MARK = 3.0


def caption_lengths(count: int, longest: int) -> Tensor:
    """Tokens of each caption, int64 `[count]`: words from the log-normal of that mean and deviation, and two ends."""
    spread = torch.log(torch.tensor(1 + (DEVIATION / WORDS) ** 2))
    words = torch.exp(torch.randn(count) * spread.sqrt() + torch.log(torch.tensor(WORDS)) - spread / 2)
    return (words.round().clamp_min(1).long() + ENDS).clamp_max(longest)


def open_clip_tower(ids: Tensor, depth: int, width: int, heads: int) -> tuple[torch.nn.Module, Tensor]:
    """open_clip's text tower of the same size, and token ids that end where the captions do."""
    from open_clip.transformer import TextTransformer

    vocabulary = 49408
    tower = TextTransformer(ids.shape[1], vocabulary, width, heads, depth, output_dim=width)
    return tower, ids


def main() -> None:
    args = arguments("packed text on a CPU", batch=64, rounds=7)
    torch.manual_seed(0)
    config = vit_b32()
    text, longest = config.text, config.text.context_length
    lengths = caption_lengths(args.batch, longest)
    mask = torch.arange(longest) < lengths[:, None]
    encoder = Encoder(text.width, text.depth, text.heads, config.embed_dim, pool=text.pool, causal=text.causal)
    x = torch.randn(args.batch, longest, text.width)
    x[~mask] = 0  # what there is in padding changes nothing, but for the last bit of a blocked sum
    weights = torch.randn(args.batch, config.embed_dim)
    ids = torch.randint(1, 49407, (args.batch, longest)).masked_fill(~mask, 0)
    ids[torch.arange(args.batch), lengths - 1] = 49407
    peer, ids = open_clip_tower(ids, text.depth, text.width, text.heads)

    def outputs(packed: bool, leaf: Tensor) -> Tensor:
        encoder.train(packed)
        return encoder(Tokens(leaf, mask=mask, max_len=longest)).pooled

    def step(packed: bool) -> list[Tensor]:
        encoder.zero_grad()
        leaf = x.clone().requires_grad_()
        pooled = outputs(packed, leaf)
        (pooled * weights).sum().backward()
        assert leaf.grad is not None
        return [pooled.detach(), leaf.grad[mask], *(p.grad.clone() for p in encoder.parameters() if p.grad is not None)]

    def padded_by_open_clip() -> None:
        peer.zero_grad()
        (peer(ids) * weights).sum().backward()

    pairs = list(zip(step(True), step(False), strict=True))
    difference = (pairs[0][0] - pairs[0][1]).abs().max().item()
    gradients = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs[1:])
    assert difference < 1e-5 and gradients < 1e-4, f"outputs differ by {difference}, gradients by {gradients}"

    ours, padded = alternate(lambda: step(True), lambda: step(False), args.rounds)
    _, other = alternate(lambda: None, padded_by_open_clip, args.rounds)
    with torch.no_grad():
        forward = alternate(lambda: outputs(True, x), lambda: outputs(False, x), args.rounds)
    tokens, rows = int(lengths.sum()), len(layout(mask).place)
    print(
        f"{args.batch} captions, {tokens / args.batch:.1f} tokens each (longest {int(lengths.max())}), {rows} rows of "
        f"{args.batch * longest}; outputs differ by {difference:.1e}\n"
        f"forward alone: {median(forward[1]) / median(forward[0]):.2f} times faster; "
        f"open_clip's tower, padded: {median(other):.3f} s"
    )
    report(
        f"ViT-B/32 text tower, {args.batch} captions, float32, forward and backward, CPU: packed against padded",
        ours,
        padded,
        unit="s",
        mark=MARK,
        better="lower",
        packages=("mm", "torch", "open_clip_torch"),
        args=args,
        tokens_per_caption=tokens / args.batch,
        longest_caption=int(lengths.max()),
        packed_rows=rows,
        forward_ratio=median(forward[1]) / median(forward[0]),
        open_clip_seconds=median(other),
        largest_output_difference=difference,
        largest_gradient_difference=gradients,
    )


if __name__ == "__main__":
    main()
