"""A denoiser made ready to draw: what all evaluations of a call have in common is computed once.

The weights are cast to bf16 and packed for the CPU's matrix products; the keys and values of a context that no block
changes are kept; and modulations, which depend on noise level and condition but not on the picture, are made for many
levels in one product. Blocks can be compiled. It predicts what the denoiser predicts under autocast.

Letters: B pictures, D width, G noise levels, L text tokens, N image tokens.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mm.distributed.device import compile_blocks
from mm.models.denoiser import Denoiser
from mm.nn.block import JointBlock
from mm.types import Tokens
from mm_kernels import packed_linear

LEVELS = 16  # whose modulations are made, and kept, at once

Given = tuple[Tensor, ...]  # a block's own: modulation, and the context's, or keys and values where these are kept


def can_prepare(denoiser: nn.Module) -> bool:
    """Whether it is a whole one of mm's on a CPU with bf16 products: sharded and wrapped ones run as they are."""
    if type(denoiser) is not Denoiser or denoiser.cos.device.type != "cpu" or not packed_linear.available():
        return False
    return all(type(block) is JointBlock for block in denoiser.blocks)


class PreparedBlock(nn.Module):
    """A block that is given what it would make of noise level and condition."""

    def __init__(self, block: JointBlock):
        super().__init__()
        self.block = block

    def forward(
        self, x: Tensor, context: Tensor, given: Given, mask: Tensor, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if self.block.context is None:
            modulation, *kept = given
            ck, cv = kept or self.block.read(context, len(x))
            return self.block.attend(x, modulation, ck, cv, mask, angles), context
        modulation, context_modulation = given
        return self.block.exchange(x, context, modulation, context_modulation, mask, angles)


class Prepared(nn.Module):
    """A copy of `denoiser` with packed weights, for about `pictures` rows a call; it does not follow later changes."""

    def __init__(self, denoiser: Denoiser, pictures: int, *, compiled: bool = False):
        super().__init__()
        patch, (_, height, width) = denoiser.config.patch, denoiser.shape
        rows = pictures * (height // patch) * (width // patch)
        self.denoiser = cast("Denoiser", packed_linear.packed_copy(denoiser, rows))
        self.blocks = nn.ModuleList(PreparedBlock(block) for block in self.denoiser.blocks)  # type: ignore[arg-type]
        self.said = compile_blocks(self, torch.device("cpu")) if compiled else ""

    def tell(self, condition: Tokens, pooled: Tensor, levels: Tensor) -> Told:
        """The prediction for conditions `[B, L, D_text]` and `[B, E_all]` at any of `levels` `[G]`."""
        return Told(self, condition, pooled, levels)


class Told:
    """A prediction x `[B, C, H, W]` float32 of z and sigma `[B]`, all of one level, for conditions given before."""

    def __init__(self, prepared: Prepared, condition: Tokens, pooled: Tensor, levels: Tensor):
        self._prepared, self._condition, self._pooled, self._levels = prepared, condition, pooled, levels
        self._places = {level: place for place, level in enumerate(levels.tolist())}
        denoiser = prepared.denoiser
        self._context = denoiser.context_in(condition.x)
        blocks = _blocks(denoiser)
        still = blocks[0].context is None  # or what the later blocks read depends on the noise level, too
        self._read = [block.read(self._context, len(pooled)) if still else () for block in blocks]
        self._group, self._modulations = -1, list[list[Tensor]]()

    def __call__(self, z: Tensor, sigma: Tensor) -> Tensor:
        denoiser = self._prepared.denoiser
        place = self._places[float(sigma[0])]
        *of_blocks, final = self._modulated(place // LEVELS)
        x, context, angles = denoiser.tokens(z), self._context, denoiser.rotary(z)
        mask = denoiser.visible(self._condition, x.shape[1])
        for block, modulations, read in zip(self._prepared.blocks, of_blocks, self._read, strict=True):
            own = tuple(modulation[place % LEVELS] for modulation in modulations)
            x, context = block(x, context, (*own, *read), mask, angles)
        return denoiser.picture(x, final[0][place % LEVELS], (*z.shape[1:],)).float()

    def _modulated(self, group: int) -> list[list[Tensor]]:
        """Of each block, and last of the final norm: its modulations `[G, B, 6 D]` (2 D) at the levels of one group."""
        if group != self._group:
            denoiser, count = self._prepared.denoiser, len(self._pooled)
            levels = self._levels[group * LEVELS : (group + 1) * LEVELS]
            vector = denoiser.vector(levels.repeat_interleave(count), self._pooled.repeat(len(levels), 1))
            sides = [[block.image, block.context] for block in _blocks(denoiser)]
            makers = [[side.modulation for side in both if side is not None] for both in sides]
            makers.append([denoiser.final_modulation])
            self._modulations = [[make(vector).unflatten(0, (-1, count)) for make in both] for both in makers]
            self._group = group
        return self._modulations


def _blocks(denoiser: Denoiser) -> list[JointBlock]:
    return list(denoiser.blocks)  # type: ignore[arg-type]
