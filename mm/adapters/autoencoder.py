"""The latents of a diffusers autoencoder: a frozen part of the model, built from its JSON config alone."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mm.adapters.latents import LatentSpace, PixelSpace
from mm.config import ConfigError

if TYPE_CHECKING:
    from mm.config import LatentsConfig

LARGEST_OPTIONS = 1 << 16  # characters of an autoencoder's config


class AutoencoderSpace(LatentSpace):
    """`AutoencoderKL` or `AutoencoderDC` (DC-AE), always float32, in evaluation mode and without gradients.

    Its weights are buffers, not parameters: they are saved, exported and moved with the model, while optimizers,
    averages, sharding and the initialisation of the model know nothing of them. Float32 under autocast too: a picture
    has the same latents whatever the precision of a run, and some of these autoencoders overflow in half precision.

    Raises ConfigError where `config` does not describe one, or its numbers are not those of its `options`.
    """

    def __init__(self, config: LatentsConfig, size: int):
        super().__init__()
        self.config, self.loaded = config, False  # whether its weights are a trained autoencoder's
        if size % config.factor:
            raise ConfigError(f"size = {size}: the autoencoder takes multiples of {config.factor} pixels")
        self.shape = (config.channels, size // config.factor, size // config.factor)
        self.pixels = PixelSpace(size)
        self.autoencoder: Any = _build(config)
        for module in self.autoencoder.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
        self.eval()

    def train(self, mode: bool = True) -> AutoencoderSpace:
        """Stays in evaluation mode."""
        super().train(False)
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """The mode of the posterior, shifted and scaled: `[B, C, H / f, W / f]` float32 from uint8 `[B, 3, H, W]`."""
        with torch.autocast(pixels.device.type, enabled=False):
            found = self.autoencoder.encode(self.pixels.encode(pixels))
            latents = found.latent_dist.mode() if self.config.kind == "AutoencoderKL" else found.latent
            return (latents - self.config.shift) * self.config.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """uint8 `[B, 3, H, W]`. On a CPU one by one, so that a picture has the same bits in whatever company."""
        latents = latents.float() / self.config.scale + self.config.shift
        parts = latents.split(1) if latents.device.type == "cpu" else (latents,)
        with torch.autocast(latents.device.type, enabled=False):
            return torch.cat([self.pixels.decode(self.autoencoder.decode(part).sample) for part in parts])

    def load(self, weights: dict[str, Tensor], source: str) -> None:
        """Takes an autoencoder's own weights, by its own names. Raises ConfigError where they are of another one."""
        own = self.autoencoder.state_dict()
        odd = [f"{name} is missing" for name in own if name not in weights]
        odd += [f"{name} is not known" for name in weights if name not in own]
        odd += [
            f"{name} is {list(weights[name].shape)}, not {list(tensor.shape)}"
            for name, tensor in own.items()
            if name in weights and weights[name].shape != tensor.shape
        ]
        if odd:
            raise ConfigError(
                f"model.latents.source = {source}: its weights are not those of model.latents.options: {odd[0]} "
                f"({len(odd)} differ); make model.latents with mm.interop.latents.latents_config({source!r})"
            )
        self.autoencoder.load_state_dict(weights)
        self.loaded = True

    def about(self) -> dict[str, Any]:
        """What makes these latents differ from others: the weights' SHA-256, what is done to them, their shape."""
        sha256 = hashlib.sha256()
        for name, tensor in sorted(self.autoencoder.state_dict().items()):
            sha256.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        config = self.config
        made = {"autoencoder": config.kind, "sha256": sha256.hexdigest()}
        return {**made, "scale": config.scale, "shift": config.shift, "shape": list(self.shape)}


def _build(config: LatentsConfig) -> nn.Module:
    """The autoencoder of a config, its weights random."""
    if len(config.options) > LARGEST_OPTIONS:
        raise ConfigError(f"model.latents.options: {len(config.options)} characters are over {LARGEST_OPTIONS}")
    try:
        options = json.loads(config.options)
    except ValueError as error:
        raise ConfigError(f"model.latents.options: no JSON ({error}); take them from latents_config(FOLDER)") from error
    if not isinstance(options, dict):
        raise ConfigError(f"model.latents.options: must be a JSON object, not {type(options).__name__}")
    import diffusers

    try:
        found = getattr(diffusers, config.kind).from_config(options)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        first = str(error).strip().split("\n")[0]
        raise ConfigError(f"model.latents.options: diffusers builds no {config.kind} from them: {first}") from error
    real = {"channels": found.config.latent_channels, "factor": factor_of(found.config)}
    for name, value in real.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"model.latents.{name} = {getattr(config, name)}: the autoencoder in model.latents.options has {value}"
            )
    if (found.config.in_channels, found.config.get("out_channels", 3)) != (3, 3):
        raise ConfigError(f"model.latents.options: in_channels = {found.config.in_channels}: pictures have 3 channels")
    return found


def factor_of(options: Any) -> int:
    """Pixels a side of one latent, from an autoencoder's config: each of its levels but one halves the picture."""
    kinds = ("block_out_channels", "encoder_block_out_channels")  # AutoencoderKL's name for it, and DC-AE's
    return 2 ** (len(next(options[name] for name in kinds if name in options)) - 1)
