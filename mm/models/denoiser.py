"""The denoiser: patches of a noisy image, joint attention with the text, and everything else through adaLN-zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.adapters.image import patchify, unpatchify
from mm.nn.block import JointBlock
from mm.nn.position import grid_positions, rotary_angles, timestep_embedding
from mm.types import Encoded, Tokens
from mm_kernels import adaln_modulate

if TYPE_CHECKING:
    from mm.config import DenoiserConfig


class Denoiser(nn.Module):
    """A raw prediction `[B, C, H, W]` from noisy x_t, noise level t and conditions; the schedule says what it means."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: DenoiserConfig, shape: tuple[int, int, int], context_width: int, pooled_width: int):
        super().__init__()
        self.config, self.shape, self.width = config, shape, config.width
        width = config.width
        patch_width = shape[0] * config.patch**2
        narrow = config.bottleneck  # a low-rank patch embedding (JiT)
        self.patch_down = nn.Linear(patch_width, narrow, bias=False) if narrow else nn.Identity()
        self.patch_in = nn.Linear(narrow or patch_width, width)
        self.context_in = nn.Linear(context_width, width)
        self.pooled_in = nn.Linear(pooled_width, width)
        self.time_in = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            JointBlock(width, config.heads, update_context=index < config.context_depth)
            for index in range(config.depth)
        )
        self.final_modulation = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, patch_width)
        cos, sin = self._angles(shape[1], shape[2])
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _angles(self, height: int, width: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        grid = grid_positions(height // self.config.patch, width // self.config.patch).to(device)
        return rotary_angles(grid, self.width // self.config.heads)

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Tokens, pooled: Tensor, tap: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x_t `[B, C, H, W]`, t `[B]` in [0, 1], condition tokens `[Bc, L, D_text]`, pooled `[Bc, E_all]`.

        B may be a multiple of Bc: sample i then reads condition i // (B / Bc). H and W may be any multiples of the
        patch. With `tap`, the image tokens
        `[B, N, D]` after that many blocks are returned too.
        """
        copies = len(x_t) // len(pooled)
        vector = self.vector(t, pooled.repeat_interleave(copies, 0))
        x = self.tokens(x_t)
        context = self.context_in(condition.x)  # [Bc, L, D]
        if self.config.context_depth and copies > 1:  # a context with a stream of its own sees the noise level
            context = context.repeat_interleave(copies, 0)
        mask = self.visible(condition, x.shape[1]).repeat_interleave(copies, 0)
        rotary = self.rotary(x_t)
        tapped = x
        for index, block in enumerate(self.blocks):
            x, context = block(x, context, mask, vector, rotary)
            if index + 1 == tap:
                tapped = x
        out = self.picture(x, self.final_modulation(vector), (*x_t.shape[1:],))
        return out if tap is None else (out, tapped)

    def vector(self, t: Tensor, pooled: Tensor) -> Tensor:
        """`[B, D]`, of which every modulation is made, from noise levels `[B]` and pooled conditions `[B, E_all]`."""
        return F.silu(self.time_in(timestep_embedding(t, 256)) + self.pooled_in(pooled))

    def tokens(self, x_t: Tensor) -> Tensor:
        """`[B, N, D]` of `[B, C, H, W]`."""
        return self.patch_in(self.patch_down(patchify(x_t, self.config.patch)))

    def visible(self, condition: Tokens, count: int) -> Tensor:
        """Which keys are real, bool `[Bc, count + L]`: all of `count` image tokens, and of the condition's its own."""
        mask = condition.mask
        if mask is None:
            mask = torch.ones(condition.x.shape[:2], dtype=torch.bool, device=condition.x.device)
        return F.pad(mask, (count, 0), value=True)

    def rotary(self, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin `[N, Dh / 2]` of the places of its patches."""
        if x_t.shape[2:] == self.shape[1:]:
            return self.cos, self.sin
        return self._angles(x_t.shape[2], x_t.shape[3], x_t.device)

    def picture(self, x: Tensor, modulation: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """`[B, *shape]` from the last block's tokens `[B, N, D]` and the final modulation `[B, 2 D]`."""
        shift, scale = modulation.chunk(2, dim=-1)
        return unpatchify(self.patch_out(adaln_modulate(x, shift, scale)), self.config.patch, shape)


def gather_condition(
    encoded: dict[str, Encoded], keep: dict[str, Tensor], batch: int, embed_dim: int, device: torch.device
) -> tuple[Tokens, Tensor]:
    """What the denoiser is told: the text's tokens, and the pooled text and image vectors `[B, 2 E]` side by side.

    `keep[modality]` `[B]` is 1 where a condition is shown and 0 where it is hidden: a hidden one becomes zeros, which
    no real condition is (both are normalised), and keeps its length.
    """
    tokens = encoded["text"].tokens
    tokens = tokens._replace(x=tokens.x * keep["text"].to(tokens.x.dtype)[:, None, None])
    pooled = [
        encoded[name].pooled * keep[name][:, None] if name in encoded else torch.zeros(batch, embed_dim, device=device)
        for name in ("text", "image")
    ]
    return tokens, torch.cat(pooled, dim=-1)
