"""Every initialisation of the model, in one function."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from mm.adapters.image import ImageAdapter
from mm.adapters.text import TextAdapter
from mm.models.denoiser import Denoiser
from mm.models.wrapped import Wrapped
from mm.nn.block import Block, Stream
from mm.nn.pool import AttentionPool

if TYPE_CHECKING:
    from mm.models.model import Model


def init_weights(model: Model) -> None:
    """Truncated normal of std width ** -0.5 for every matrix, zero for biases; then the exceptions below.

    What another library built keeps its own initialisation.
    """
    theirs = {inner for module in model.modules() if isinstance(module, Wrapped) for inner in module.modules()}
    modules = [module for module in model.modules() if module not in theirs]
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in modules:
        if isinstance(module, ImageAdapter):
            nn.init.normal_(module.position, std=0.02)
            if module.cls is not None:
                nn.init.normal_(module.cls, std=0.02)
        elif isinstance(module, TextAdapter):
            nn.init.normal_(module.embedding.weight, std=0.02)
            nn.init.normal_(module.position, std=0.01)
        elif isinstance(module, Block):  # a residual branch starts small
            nn.init.trunc_normal_(module.out.weight, std=0.1 * module.out.in_features**-0.5)
            nn.init.trunc_normal_(module.fc2.weight, std=0.1 * module.fc2.in_features**-0.5)
        elif isinstance(module, AttentionPool):
            nn.init.trunc_normal_(module.latent, std=len(module.latent) ** -0.5)
        elif isinstance(module, Stream):  # adaLN-zero: every block starts as the identity (arXiv 2212.09748)
            nn.init.zeros_(module.modulation.weight)
        elif isinstance(module, Denoiser):
            nn.init.zeros_(module.final_modulation.weight)
            nn.init.zeros_(module.patch_out.weight)
