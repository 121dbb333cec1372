"""Encoders of other libraries behind mm's types: timm backbones, and open_clip towers that mm has no classes for.

Each takes the raw input as tokens (pixels of width 3, ids of width 1) and gives tokens and a unit-norm vector, so that
objectives, classification, drawing and saving cannot tell it from mm's own. Dropout of every kind is off: it draws from
torch's own generator, and a run that is resumed could not repeat it.

What describes a tower may come with a model from anywhere. It names architectures only: nothing that it says fetches or
opens a file, or runs code that is not installed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from mm.config import ConfigError
from mm.fields import suggestion
from mm.types import Encoded, Tokens

FILES = frozenset({"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"})
CODE = ("auto_map", "_implementation", "quantization_config", "custom_pipelines")  # parts of keys

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

        options = {"num_classes": 0, **_options(tower)}
        if read := sorted(FILES & set(options)):
            raise ConfigError(f"model.image.tower.options: {read[0]}: a tower is built without files; leave it out")
        _known("model.image.tower.name", tower.name)
        self.trunk: Any = _built("model.image.tower", tower, lambda: timm.create_model(tower.name, **options))
        self.width = int(self.trunk.num_features)
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
        vision = _part(options, "vision_cfg", "model.image.tower")
        if vision.get("timm_model_name"):
            _known("model.image.tower: timm_model_name", vision["timm_model_name"])
        vision |= {"timm_model_pretrained": False, "output_tokens": False, "patch_dropout": 0.0}
        vision |= {"timm_drop": 0.0, "timm_drop_path": None}
        quick = options.get("quick_gelu", False)
        self.visual: Any = _built("model.image.tower", tower, lambda: _build_vision_tower(embed_dim, vision, quick))
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
        text = _part(options, "text_cfg", "model.text.tower")
        text |= {"output_tokens": True, "hf_model_pretrained": False}
        if text.get("hf_model_name") and "hf_config" not in options:
            raise ConfigError(
                "model.text.tower.options: hf_model_name without hf_config, which says what it is; add it"
            )
        with tempfile.TemporaryDirectory() as folder:  # where transformers reads an architecture from, no hub involved
            if "hf_config" in options:
                described = _plain(_part(options, "hf_config", "model.text.tower"))
                Path(folder, "config.json").write_text(json.dumps(described), encoding="utf-8")
                text["hf_model_name"] = folder
                width = described.get("hidden_size") or described.get("d_model")
                if text.get("hf_proj_type") is None and width != embed_dim:
                    text["hf_proj_type"] = "linear"  # open_clip's adapter would have none, and fail
            quick = options.get("quick_gelu", False)
            self.text: Any = _built("model.text.tower", tower, lambda: _build_text_tower(embed_dim, text, quick))
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


def _built(where: str, tower: TowerConfig, build: Callable[[], nn.Module]) -> Any:
    """What `build` returns, without dropout. Raises ConfigError for whatever another library finds wrong."""
    try:
        module = build()
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"{where}: {tower.library} builds no {tower.name} with {tower.options[:300]}: {told}"
        ) from error
    for part in module.modules():  # also what is on by default, as in swin, and what is called by function
        for name, value in vars(part).items():
            if isinstance(value, float) and (
                "drop" in name or (name in ("p", "prob") and "Drop" in type(part).__name__)
            ):
                setattr(part, name, 0.0)
    return module


def _known(where: str, name: Any) -> None:
    """Raises ConfigError unless timm itself has a model of that name, rather than a hub or a folder."""
    import timm

    if not (isinstance(name, str) and ":" not in name and timm.is_model(name)):
        near = suggestion(str(name), timm.list_models())
        raise ConfigError(f"{where} = {name!r}: timm has no such model{near or '; timm.list_models() has them'}")


def _part(options: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    found = options.get(name)
    if not isinstance(found, dict):
        raise ConfigError(f"{where}.options: {name} = {found!r}: must be a JSON object")
    return dict(found)


def _plain(described: dict[str, Any]) -> dict[str, Any]:
    """A Hugging Face config without what makes transformers fetch code: classes of a repository, and kernels.

    Raises ConfigError for a kind of model that transformers does not have itself: of that it asks whether to run code.
    """
    from transformers import CONFIG_MAPPING

    kind = described.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"model.text.tower: transformers has no model_type = {kind!r} of its own; update it")
    return _without_code(described)


def _without_code(described: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_code(value) if isinstance(value, dict) else value
        for key, value in described.items()
        if not any(word in key for word in CODE)
    }


def _options(tower: TowerConfig) -> dict[str, Any]:
    try:
        found = json.loads(tower.options)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"tower.options = {tower.options[:80]!r}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"tower.options = {tower.options[:80]!r}: must be a JSON object")
    return found


def _encoded(trunk: Any, features: Tensor, pooled: Tensor) -> Encoded:
    """Feature maps `[B, C, H, W]` or `[B, H, W, C]`, or tokens `[B, N, D]`, as tokens."""
    if features.ndim == 4:
        last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        features = features.flatten(1, 2) if last else features.flatten(2).transpose(1, 2)
    elif features.ndim == 2:
        features = features[:, None]
    return Encoded(Tokens(features, max_len=features.shape[1]), F.normalize(pooled.float(), dim=-1))
