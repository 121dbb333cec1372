"""A modality that a config adds: anybody's adapter, before one of mm's own encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from mm.adapters.named import build_adapter
from mm.config import ConfigError
from mm.models.encoder import Encoder
from mm.types import Encoded, Tokens

if TYPE_CHECKING:
    from mm.adapters.base import Adapter
    from mm.config import ModalityConfig


class ModalityEncoder(Encoder):
    """An encoder that says which modality is given tokens of another width."""

    def __init__(self, config: ModalityConfig, embed_dim: int):
        super().__init__(
            config.width, config.depth, config.heads, embed_dim, mlp_ratio=config.mlp_ratio, pool=config.pool
        )
        self.name, self.width = config.name, config.width

    def forward(self, tokens: Tokens, pooled_only: bool = False) -> Encoded:
        """Raises ValueError for tokens that are not of the encoder's width."""
        x: Tensor = tokens.x
        if x.shape[-1] != self.width:
            raise ValueError(
                f"modality {self.name!r}: its adapter embeds tokens of shape {list(x.shape)}, and its encoder takes "
                f"width = {self.width}; make them equal"
            )
        return super().forward(tokens, pooled_only)


def modality(config: ModalityConfig, embed_dim: int) -> tuple[Adapter, Encoder]:
    """The adapter and the encoder of an added modality. Raises ConfigError where the adapter cannot be had."""
    if hasattr(nn.ModuleDict, config.name):
        raise ConfigError(f"modality name = {config.name!r}: torch's modules have an attribute of that name; rename it")
    return build_adapter(config), ModalityEncoder(config, embed_dim)
