"""Transformer blocks: the pre-norm block of both encoders, and the modulated joint-attention block of the denoiser."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_kernels import adaln_modulate, attention, qk_norm_rope, rms_norm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # CLIP's first weights
}


class Norm(nn.LayerNorm):
    """A layer norm that takes wider inputs than its weights, where these were gathered in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == torch.float32:
            return super().forward(x)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `qk_norm` q and k are RMS-normed (arXiv 2302.05442)."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        causal: bool = False,
        *,
        activation: str = "gelu_tanh",
        qk_norm: bool = True,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.heads, self.causal, self.activation = heads, causal, activation
        hidden = int(width * mlp_ratio)
        self.norm1 = Norm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.Parameter(torch.ones(width // heads)) if qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(width // heads)) if qk_norm else None
        self.out = nn.Linear(width, width)
        self.norm2 = Norm(width, eps=eps)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
        longest: int | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """x `[B, N, D]` with mask `[B, N]`, True where a token is real; or packed `[T, D]`.

        Packed sequences begin at `offsets` `[B + 1]`, and none has more than `longest` tokens. With `rows` int64 `[B]`
        only that token of each sequence is computed, its place in the sequence or in the packed x: `[B, 1, D]`, or
        packed `[B, D]`. Of packed causal sequences it must be the last.
        """
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # [.., H, Dh] each
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk_norm_rope(q, k, self.q_norm, self.k_norm, None, None)
        begin, many, causal = offsets, longest, self.causal
        if rows is not None:
            if offsets is not None:
                begin, many, causal = torch.arange(len(rows) + 1, dtype=torch.int32, device=x.device), 1, False
            elif causal:
                seen = torch.arange(x.shape[1], device=x.device) <= rows[:, None]
                mask, causal = seen if mask is None else mask & seen, False
            q, x = taken(q, rows, offsets is not None), taken(x, rows, offsets is not None)
        attended = attention(q, k, v, mask=mask, cu_q=begin, cu_k=offsets, max_q=many, max_k=longest, causal=causal)
        x = x + self.out(attended.flatten(-2))
        return x + self.fc2(ACTIVATIONS[self.activation](self.fc1(self.norm2(x))))


def taken(x: Tensor, rows: Tensor, packed: bool = False) -> Tensor:
    """One token of each sequence: `[B, 1, ...]` of x `[B, N, ...]` at rows `[B]`; packed, rows of x `[B, ...]`."""
    return x.index_select(0, rows) if packed else x[torch.arange(len(x), device=x.device), rows].unsqueeze(1)


class Stream(nn.Module):
    """One stream of a joint block: its own norms, projections, SwiGLU and modulation (MMDiT, arXiv 2403.03206)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        hidden = swiglu_width(width)
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.Parameter(torch.ones(width // heads))
        self.k_norm = nn.Parameter(torch.ones(width // heads))
        self.out = nn.Linear(width, width)
        self.gate_up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def project(
        self, x: Tensor, shift: Tensor, scale: Tensor, angles: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[B, N, H, Dh]` of the modulated input."""
        q, k, v = self.qkv(adaln_modulate(x, shift, scale)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        cos, sin = angles if angles is not None else (None, None)
        return *qk_norm_rope(q, k, self.q_norm, self.k_norm, cos, sin), v

    def finish(self, x: Tensor, attended: Tensor, gate1: Tensor, shift: Tensor, scale: Tensor, gate2: Tensor) -> Tensor:
        """The gated attention and the gated SwiGLU added to the residual stream."""
        normed, x = adaln_modulate(self.out(attended.flatten(2)), shift, scale, gate1, x)
        gate, up = self.gate_up(normed).chunk(2, dim=-1)
        return x + gate2[:, None] * self.down(F.silu(gate) * up)


class JointBlock(nn.Module):
    """Image tokens attend to themselves and to the context; with `update_context` the context has a stream too.

    Without it the context is only read (keys and values), as in the last block of SD3, and may hold fewer samples
    than the image: sample i of the image reads context i // (B_image / B_context).
    """

    def __init__(self, width: int, heads: int, update_context: bool):
        super().__init__()
        self.heads = heads
        self.image = Stream(width, heads)
        self.context = Stream(width, heads) if update_context else None
        if not update_context:
            self.context_norm = Norm(width)
            self.context_kv = nn.Linear(width, 2 * width)
            self.context_k_norm = nn.Parameter(torch.ones(width // heads))

    def forward(
        self, x: Tensor, context: Tensor, mask: Tensor, vector: Tensor, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """x `[B, N, D]`, context `[Bc, L, D]`, mask `[B, N + L]` of real keys, vector `[B, D]`; x and context back."""
        modulation = self.image.modulation(vector)
        if self.context is None:
            return self.attend(x, modulation, *self.read(context, len(x)), mask, angles), context
        return self.exchange(x, context, modulation, self.context.modulation(vector), mask, angles)

    def read(self, context: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[count, L, H, Dh]` of a context that is only read: the same at every noise level."""
        ck, cv = self.context_kv(self.context_norm(context)).unflatten(-1, (2, self.heads, -1)).unbind(2)
        ck = rms_norm(ck, self.context_k_norm)
        if len(context) != count:
            copies = count // len(context)
            ck, cv = ck.repeat_interleave(copies, 0), cv.repeat_interleave(copies, 0)
        return ck, cv

    def attend(
        self, x: Tensor, modulation: Tensor, ck: Tensor, cv: Tensor, mask: Tensor, angles: tuple[Tensor, Tensor]
    ) -> Tensor:
        """x after this block, its modulation `[B, 6 D]` given, which attends to itself and to what `read` gave."""
        shift, scale, *rest = modulation.chunk(6, dim=-1)
        q, k, v = self.image.project(x, shift, scale, angles)
        attended = attention(q, torch.cat([k, ck], 1), torch.cat([v, cv], 1), mask=mask)
        return self.image.finish(x, attended, *rest)

    def exchange(
        self,
        x: Tensor,
        context: Tensor,
        modulation: Tensor,
        context_modulation: Tensor,
        mask: Tensor,
        angles: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """x and context `[B, L, D]` after this block, in which each attends to both."""
        assert self.context is not None
        shift, scale, *rest = modulation.chunk(6, dim=-1)
        q, k, v = self.image.project(x, shift, scale, angles)
        shift, scale, *context_rest = context_modulation.chunk(6, dim=-1)
        cq, ck, cv = self.context.project(context, shift, scale, None)
        attended = attention(torch.cat([q, cq], 1), torch.cat([k, ck], 1), torch.cat([v, cv], 1), mask=mask)
        ours, theirs = attended.split([x.shape[1], context.shape[1]], dim=1)
        return self.image.finish(x, ours, *rest), self.context.finish(context, theirs, *context_rest)


def swiglu_width(width: int) -> int:
    """8/3 of the width, so that SwiGLU has as many weights as a 4x MLP (arXiv 2002.05202), in steps of 64."""
    return max(64, round(width * 8 / 3 / 64) * 64)
