"""The sides that kernels/bench/attention.py times: ours, and what torch and flash-attn offer for the same problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mm_kernels import attention

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(slots=True)
class Problem:
    """Self-attention over samples of `lengths` tokens, H heads of width D; q, k, v are packed `[T, H, D]`."""

    name: str
    lengths: list[int]
    heads: int
    width: int
    causal: bool = False
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    offsets: Tensor = field(init=False)  # [B + 1]

    def __post_init__(self) -> None:
        self.offsets = torch.tensor([0, *self.lengths]).cumsum(0).to(self.device, torch.int32)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(self.lengths)

    @property
    def dense(self) -> bool:
        """Whether all samples are of one length."""
        return min(self.lengths) == self.longest

    @property
    def flop(self) -> int:
        """Floating-point operations of the forward pass: two products a visible pair of tokens. Backward: 2.5 times."""
        pairs = sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)
        return 4 * pairs * self.heads * self.width

    def inputs(self) -> list[Tensor]:
        """q, k, v, the same for each side."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (sum(self.lengths), self.heads, self.width)
        make = {"generator": generator, "device": self.device, "dtype": self.dtype, "requires_grad": True}
        return [torch.randn(shape, **make) for _ in range(3)]

    def samples(self, packed: Tensor) -> Tensor:
        """`[B, N, H, D]` of a dense problem's tokens; a view."""
        return packed.view(len(self.lengths), self.longest, self.heads, self.width)


@dataclass(frozen=True, slots=True)
class Side:
    """`prepare` makes of a problem what is timed: inputs, a call, and how its result becomes tokens `[T, H, D]`."""

    name: str
    suits: Callable[[Problem], bool]
    prepare: Callable[[Problem], tuple[list[Tensor], Call, Callable[[Tensor], Tensor]]]


def packed_side(name: str, suits: Callable[[Problem], bool], make: Callable[[Problem], Call]) -> Side:
    """A side whose call takes packed tokens, or views of them, as they are."""
    return Side(
        name, suits, lambda problem: (problem.inputs(), make(problem), lambda out: out.reshape(-1, *out.shape[-2:]))
    )


def ours(problem: Problem) -> Call:
    if problem.dense:
        return lambda *qkv: attention(*map(problem.samples, qkv), causal=problem.causal)
    return ours_packed(problem)


def ours_packed(problem: Problem) -> Call:
    at, longest = problem.offsets, problem.longest
    return lambda q, k, v: attention(q, k, v, cu_q=at, cu_k=at, max_q=longest, max_k=longest, causal=problem.causal)


def fused(backend: SDPBackend) -> Callable[[Problem], Call]:
    """torch's scaled_dot_product_attention by one backend, which raises where it cannot."""

    def make(problem: Problem) -> Call:
        def call(*qkv: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                heads_first = (problem.samples(x).transpose(1, 2) for x in qkv)
                return F.scaled_dot_product_attention(*heads_first, is_causal=problem.causal).transpose(1, 2)

        return call

    return make


def padded(problem: Problem) -> tuple[list[Tensor], Call, Callable[[Tensor], Tensor]]:
    """scaled_dot_product_attention, the backend left to torch, on samples padded to the longest beforehand."""
    steps = torch.arange(problem.longest, device=problem.device)
    real = steps < problem.offsets.diff()[:, None]  # [B, N]
    shape = (*real.shape, problem.heads, problem.width)
    inputs = []
    for tensor in problem.inputs():
        sample = tensor.new_zeros(shape)
        sample[real] = tensor.detach()
        inputs.append(sample.transpose(1, 2).requires_grad_())
    visible = real[:, None, None, :]
    if problem.causal:
        visible = visible & (steps <= steps[:, None])
    return (
        inputs,
        lambda *qkv: F.scaled_dot_product_attention(*qkv, attn_mask=visible),
        lambda out: out.transpose(1, 2)[real],
    )


def varlen(problem: Problem) -> Call:
    from torch.nn.attention.varlen import varlen_attn

    at, longest = problem.offsets, problem.longest
    window = (-1, 0) if problem.causal else (-1, -1)
    return lambda q, k, v: varlen_attn(q, k, v, at, at, longest, longest, window_size=window)


@cache
def compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def flex(problem: Problem) -> Call:
    """FlexAttention over all tokens as one sequence in which a sample sees only itself; its mask is not timed."""
    total = sum(problem.lengths)
    sample = torch.repeat_interleave(torch.tensor(problem.lengths)).to(problem.device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = sample[query] == sample[key]
        return same & (key <= query) if problem.causal else same

    blocks = create_block_mask(visible, None, None, total, total, device=problem.device)
    run = compiled_flex() if problem.device == "cuda" else flex_attention
    return lambda *qkv: run(*(x.transpose(0, 1)[None] for x in qkv), block_mask=blocks)[0].transpose(0, 1)


def flash(problem: Problem) -> Call:
    from flash_attn import flash_attn_varlen_func

    at, longest = problem.offsets, problem.longest
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, at, at, longest, longest, causal=problem.causal)


def flash_dense(problem: Problem) -> Call:
    from flash_attn import flash_attn_func

    return lambda *qkv: flash_attn_func(*map(problem.samples, qkv), causal=problem.causal)


def sides() -> list[Side]:
    """Ours first; flash-attn only where it is installed."""
    dense, ragged, always = (lambda p: p.dense), (lambda p: not p.dense), (lambda p: True)
    found = [
        packed_side("mm", always, ours),
        packed_side("mm packed", dense, ours_packed),
        packed_side("SDPA flash", dense, fused(SDPBackend.FLASH_ATTENTION)),
        packed_side("SDPA efficient", dense, fused(SDPBackend.EFFICIENT_ATTENTION)),
        packed_side("SDPA cuDNN", dense, fused(SDPBackend.CUDNN_ATTENTION)),
        packed_side("SDPA math", dense, fused(SDPBackend.MATH)),
        Side("SDPA padded", ragged, padded),
        packed_side("torch varlen", always, varlen),
        packed_side("FlexAttention", always, flex),
    ]
    if find_spec("flash_attn"):
        found += [packed_side("flash-attn", dense, flash_dense), packed_side("flash-attn varlen", always, flash)]
    return found
