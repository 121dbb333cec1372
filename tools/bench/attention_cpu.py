"""Forward and backward of attention at the demo's size on a CPU: the explicit form against torch's fused one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _common import alternate, report
from torch import Tensor

from mm_kernels import attention

BATCH, HEADS, QUERIES, KEYS, WIDTH = 128, 5, 16, 33, 64


def main() -> None:
    torch.manual_seed(0)
    q = torch.randn(BATCH, QUERIES, HEADS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(BATCH, KEYS, HEADS, WIDTH, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    mask = torch.ones(BATCH, KEYS, dtype=torch.bool)
    mask[:, KEYS - 5 :] = False
    gradient = torch.randn_like(q)

    def fused() -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, attn_mask=mask[:, None, None]).transpose(1, 2)

    difference = (attention(q, k, v, mask=mask) - fused()).abs().max().item()
    assert difference < 0.05, f"the two sides differ by {difference}"

    def both_ways(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (q, k, v), gradient)

    ours, peer = alternate(lambda: both_ways(attention(q, k, v, mask=mask)), lambda: both_ways(fused()), 15)
    report(
        "attention forward and backward, 16 queries, 33 keys, bf16, CPU",
        ours,
        peer,
        unit="s",
        mark=1.0,
        better="lower",
        packages=("mm", "torch"),
        largest_difference=difference,
    )


if __name__ == "__main__":
    main()
