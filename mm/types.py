"""The few types that pass between rooms. Shapes: B batch, N tokens, T packed tokens, D width, E embedding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass
class Batch:
    """What the loader yields: padded inputs by modality, and what makes every random draw repeatable."""

    inputs: dict[str, Tensor]  # image [B, C, H, W] uint8, text [B, L] int64, or cached latents
    lengths: dict[str, Tensor] = field(default_factory=dict)  # modality -> [B] valid length, where ragged
    seeds: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # [B] from (run seed, epoch, key)
    keys: list[str] = field(default_factory=list)  # sample keys in global order

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on `device`."""
        return Batch(
            {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.inputs.items()},
            {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.lengths.items()},
            self.seeds.to(device, non_blocking=non_blocking),
            self.keys,
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, for copies that overlap with compute."""
        return Batch(
            {name: tensor.pin_memory() for name, tensor in self.inputs.items()},
            {name: tensor.pin_memory() for name, tensor in self.lengths.items()},
            self.seeds.pin_memory(),
            self.keys,
        )

    def __len__(self) -> int:
        return len(self.keys) if self.keys else next(iter(self.inputs.values())).shape[0]

    def split(self, size: int) -> list[Batch]:
        """Consecutive micro-batches of at most `size` samples."""
        cuts = [slice(start, start + size) for start in range(0, len(self), size)]
        return [
            Batch(
                {name: tensor[cut] for name, tensor in self.inputs.items()},
                {name: tensor[cut] for name, tensor in self.lengths.items()},
                self.seeds[cut],
                self.keys[cut],
            )
            for cut in cuts
        ]


class Tokens(NamedTuple):
    """A set of token sequences, dense `[B, N, D]` with an optional mask, or packed `[T, D]` with `cu_seqlens`."""

    x: Tensor
    mask: Tensor | None = None  # [B, N] bool, True where a token is real; dense only
    cu_seqlens: Tensor | None = None  # [B + 1] int32 offsets; packed only
    max_len: int = 0  # of the longest sequence; 0: not known
    positions: Tensor | None = None  # [N] or [N, 2] (row, column): where rotary embedding places a token


class Encoded(NamedTuple):
    """An encoder's result: its tokens after the final norm, and one unit-norm vector a sample."""

    tokens: Tokens
    pooled: Tensor  # [B, E]


class Loss(NamedTuple):
    """A scalar to minimise and the scalars worth logging with it (detached)."""

    value: Tensor
    metrics: dict[str, Tensor]
