"""Encoders of other libraries behind mm's types: timm backbones, and open_clip towers that mm has no classes for.

Each takes the raw input as tokens (pixels of width 3, ids of width 1) and gives tokens and a unit-norm vector, so that
objectives, classification, drawing and saving cannot tell it from mm's own. Dropout of every kind is off: it draws from
torch's own generator, and a run that is resumed could not repeat it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from mm.config import ConfigError
from mm.types import Encoded, Tokens

if TYPE_CHECKING:
    from mm.config import ImageConfig, TextConfig, TowerConfig


class Wrapped(nn.Module):
    """A third-party encoder; its own initialisation stands."""

    width: int  # of its tokens


class TimmEncoder(Wrapped):
    """A timm backbone: its features as tokens, its own pooling, and a projection to the shared space."""

    def __init__(self, tower: TowerConfig, embed_dim: int, proj: str):
        super().__init__()
        import timm

        options = _options(tower)
        try:
            self.trunk: Any = timm.create_model(tower.name, pretrained=False, **{"num_classes": 0, **options})
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f"model.image.tower: timm builds no {tower.name} with {tower.options}: {error}"
            ) from error
        self.width = int(self.trunk.num_features)  # type: ignore[arg-type]
        width = int(getattr(self.trunk, "head_hidden_size", 0) or self.width)
        self.proj = nn.Identity() if proj == "none" else nn.Linear(width, embed_dim, bias=proj == "affine")
        if isinstance(self.proj, nn.Linear):
            nn.init.trunc_normal_(self.proj.weight, std=width**-0.5)

    def forward(self, tokens: Tokens) -> Encoded:
        features = self.trunk.forward_features(pixels(tokens))
        pooled = self.proj(self.trunk.forward_head(features, pre_logits=True))
        return _encoded(self.trunk, features, pooled)


class OpenClipImage(Wrapped):
    """An image tower of open_clip: a timm model with open_clip's head, a ResNet, or a vision transformer."""

    def __init__(self, tower: TowerConfig, embed_dim: int):
        super().__init__()
        from open_clip.model import _build_vision_tower

        options = _options(tower)
        vision = {**options["vision_cfg"], "timm_model_pretrained": False, "output_tokens": False, "patch_dropout": 0.0}
        vision |= {"timm_drop": 0.0, "timm_drop_path": None}
        self.visual: Any = _build_vision_tower(embed_dim, vision, options.get("quick_gelu", False))
        self.width = _width(self.visual)

    def forward(self, tokens: Tokens) -> Encoded:
        from open_clip.modified_resnet import ModifiedResNet
        from open_clip.timm_model import TimmModel

        visual, x = self.visual, pixels(tokens)
        if isinstance(visual, TimmModel):
            features = visual.trunk.forward_features(x)
            return _encoded(visual.trunk, features, visual.head(visual.trunk.forward_head(features)))
        if isinstance(visual, ModifiedResNet):
            features = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(x)))))
            return _encoded(visual, features, visual.attnpool(features))
        visual.output_tokens = True
        pooled, features = visual(x)
        return _encoded(visual, features, pooled)


class OpenClipText(Wrapped):
    """A text tower of open_clip: CoCa's, or a Hugging Face model with open_clip's pooling and projection."""

    def __init__(self, tower: TowerConfig, embed_dim: int):
        super().__init__()
        from open_clip.model import _build_text_tower

        options = _options(tower)
        text = {**options["text_cfg"], "output_tokens": True, "hf_model_pretrained": False}
        with tempfile.TemporaryDirectory() as folder:  # where transformers reads an architecture from, no hub involved
            if "hf_config" in options:
                still = {
                    key: 0.0 if "dropout" in key and value else value for key, value in options["hf_config"].items()
                }
                Path(folder, "config.json").write_text(json.dumps(still), encoding="utf-8")
                text["hf_model_name"] = folder
                width = options["hf_config"].get("hidden_size") or options["hf_config"].get("d_model")
                if text.get("hf_proj_type") is None and width != embed_dim:
                    text["hf_proj_type"] = "linear"  # open_clip's adapter would have none, and fail
            self.text: Any = _build_text_tower(embed_dim, text, options.get("quick_gelu", False))
        inner = getattr(self.text, "config", None)  # a Hugging Face model's
        self.width = int(self.text.width if inner is None else getattr(inner, "hidden_size", 0) or inner.d_model)

    def forward(self, tokens: Tokens) -> Encoded:
        pooled, features = self.text(tokens.x[..., 0])
        mask = tokens.mask
        if mask is not None and features.shape[1] != mask.shape[1]:  # without a first token that stands for all
            mask = mask[:, -features.shape[1] :]
        return Encoded(Tokens(features, mask, max_len=features.shape[1]), F.normalize(pooled.float(), dim=-1))


def wrapped_image(config: ImageConfig, embed_dim: int) -> nn.Module:
    """The encoder that `config.tower` describes. Raises ConfigError where its library cannot build it."""
    assert config.tower is not None
    if config.tower.library == "timm":
        return TimmEncoder(config.tower, embed_dim, config.proj)
    return OpenClipImage(config.tower, embed_dim)


def wrapped_text(config: TextConfig, embed_dim: int) -> nn.Module:
    """The text encoder that `config.tower` describes. Raises ConfigError where there is none, or transformers lacks."""
    assert config.tower is not None
    if config.tower.library == "timm":
        raise ConfigError("model.text.tower.library = 'timm': has no text encoders; use open_clip")
    if "hf_config" in _options(config.tower):
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise ConfigError('model.text.tower: needs transformers; pip install "mm[interop]"') from error
    return OpenClipText(config.tower, embed_dim)


def _width(visual: Any) -> int:
    """Of the tokens that an open_clip image tower gives."""
    if hasattr(visual, "trunk"):
        return int(visual.trunk.num_features)
    if hasattr(visual, "attnpool"):
        return int(visual.attnpool.k_proj.in_features)
    return int(visual.ln_post.normalized_shape[0])


def pixels(tokens: Tokens) -> Tensor:
    """The square pictures `[B, 3, H, W]` that pixel tokens `[B, H W, 3]` are a view of."""
    side = int(tokens.x.shape[1] ** 0.5)
    return tokens.x.transpose(1, 2).unflatten(2, (side, side))


def _options(tower: TowerConfig) -> dict[str, Any]:
    try:
        found = json.loads(tower.options)
    except json.JSONDecodeError as error:
        raise ConfigError(f"tower.options = {tower.options!r}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"tower.options = {tower.options!r}: must be a JSON object")
    return found


def _encoded(trunk: Any, features: Tensor, pooled: Tensor) -> Encoded:
    """Feature maps `[B, C, H, W]` or `[B, H, W, C]`, or tokens `[B, N, D]`, as tokens."""
    if features.ndim == 4:
        last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        features = features.flatten(1, 2) if last else features.flatten(2).transpose(1, 2)
    elif features.ndim == 2:
        features = features[:, None]
    return Encoded(Tokens(features, max_len=features.shape[1]), F.normalize(pooled.float(), dim=-1))
