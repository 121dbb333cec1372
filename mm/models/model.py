"""The whole model: an adapter and an encoder a modality, one denoiser, one latent space."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from mm.adapters.image import ImageAdapter, ImageProcessor, PixelAdapter
from mm.adapters.latents import LatentsProcessor, latent_space
from mm.adapters.text import IdsAdapter, TextAdapter, TextProcessor
from mm.models.denoiser import Denoiser, gather_condition
from mm.models.encoder import Encoder, image_encoder, text_encoder
from mm.models.init import init_weights
from mm.models.modality import modality

if TYPE_CHECKING:
    from mm.adapters.base import Adapter, Processor
    from mm.adapters.text import Tokenizer
    from mm.config import ModelConfig
    from mm.models.wrapped import Wrapped
    from mm.types import Batch, Encoded, Tokens


class Model(nn.Module):
    """Both encoders and the denoiser. `config` and `tokenizer` say everything that is needed to build it again."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, init: bool = True):
        """`init` False: for weights that are loaded afterwards, all of them."""
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        image, text = config.image, config.text
        see = ImageProcessor.from_config(image)
        read = TextProcessor(tokenizer, text.context_length, text.word_dropout, text.pad_id)
        wrapped = {name for name, part in (("image", image), ("text", text)) if part.tower is not None}
        self.adapters = nn.ModuleDict(
            {
                "image": PixelAdapter(image, see) if "image" in wrapped else ImageAdapter(image, see),
                "text": IdsAdapter("text", read) if "text" in wrapped else TextAdapter(text, read),
            }
        )
        self.encoders = nn.ModuleDict(
            {
                "image": image_encoder(image, config.embed_dim),
                "text": text_encoder(text, config.embed_dim),
            }
        )
        for extra in config.modalities:
            self.adapters[extra.name], self.encoders[extra.name] = modality(extra, config.embed_dim)
        latents = latent_space(config)
        self.denoiser = None
        if config.denoiser is not None:
            self.denoiser = Denoiser(config.denoiser, latents.shape, self.width("text"), 2 * config.embed_dim)
        if init:
            init_weights(self)
        self.latents = latents  # last: its weights come from elsewhere

    def width(self, name: str) -> int:
        """Of the tokens that the encoder of a modality gives."""
        return int(cast("Encoder | Wrapped", self.encoders[name]).width)

    def processors(self, train: bool) -> dict[str, Processor]:
        """What the loader runs, by input name; in training `target` is the whole picture that diffusion draws."""
        found = {name: cast("Adapter", adapter).processor for name, adapter in self.adapters.items()}
        if train and self.denoiser is not None and self.config.image.clean_target:
            found["target"] = ImageProcessor(self.config.image.size)
            if self.config.latents is not None and self.config.latents.cached:
                found["latents"] = LatentsProcessor(self.latents.shape)
        return found

    def encode(self, batch: Batch, pooled_only: Collection[str] = ()) -> dict[str, Encoded]:
        """Every modality of the batch, once; of those in `pooled_only` mm's own encoders give no tokens.

        The image last: what it keeps for the backward, the most by far, goes first, before the others' gradients come.
        """
        found = {}
        names = [name for name in self.adapters if name in batch.inputs]
        for name in sorted(names, key=lambda name: name == "image"):
            encoder, tokens = self.encoders[name], cast("Adapter", self.adapters[name]).embed(batch)
            lean = name in pooled_only and isinstance(encoder, Encoder)
            found[name] = encoder(tokens, pooled_only=True) if lean else encoder(tokens)
        return {name: found[name] for name in names}

    def condition(self, encoded: dict[str, Encoded], keep: dict[str, Tensor]) -> tuple[Tokens, Tensor]:
        """The denoiser's conditions, with the hidden ones blanked; see `gather_condition`."""
        size, device = len(keep["text"]), keep["text"].device
        return gather_condition(encoded, keep, size, self.config.embed_dim, device)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
