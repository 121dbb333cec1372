"""mm's config of a model as open_clip's description of it: the way back from `mm.interop.architecture`."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

from mm.adapters.hub_tokenizer import HubTokenizer
from mm.adapters.text import ClipTokenizer, Tokenizer
from mm.config import Activation, ConfigError, ContrastiveConfig, ImageConfig, ModelConfig, TextConfig, TowerConfig
from mm.interop.architecture import model_config

PREPROCESS = {"size": 224, "mean": (0.0,) * 3, "std": (1.0,) * 3}  # any: only architectures are compared
# what a config says beside the architecture: how pictures are read, and what only training looks at
BESIDE = {
    "image": "mean std resize interpolation fill crop_scale color_jitter clean_target".split(),
    "text": "tokenizer pad_id word_dropout".split(),
}
PROJECTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "affine": {"proj_bias": True},
    "none": {"proj_type": "none"},
}


class NoCounterpart(ConfigError):
    """A model that another library has no class for."""

    def __init__(self, library: str, field: str, value: Any, has: str):
        super().__init__(f"{field} = {value!r}: {library} has no counterpart ({has}); release it with --format mm")


def describe(model: ModelConfig, contrastive: ContrastiveConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """open_clip's `model_cfg` of an architecture: the inverse of `mm.interop.architecture.model_config`.

    The denoiser and added modalities, which open_clip does not have, are left out. Raises ConfigError naming the first
    field that has no counterpart.
    """
    image, text = model.image, model.text
    cfg: dict[str, Any] = {"embed_dim": model.embed_dim}
    if contrastive.kind == "sigmoid":
        cfg["init_logit_bias"] = contrastive.init_bias
    cfg["vision_cfg"], quick_image = _vision(model)
    cfg["text_cfg"], quick_text = _text(text, model.embed_dim, tokenizer)
    if quick_image is not None and quick_text is not None and quick_image != quick_text:
        both = (image.activation, text.activation)
        raise NoCounterpart("open_clip", "model.image.activation, model.text.activation", both, "QuickGELU in both")
    if quick_image or quick_text:
        cfg["quick_gelu"] = True
    if text.tower is not None or text.proj != "linear" or "eos_id" in cfg["text_cfg"]:
        cfg["custom_text"] = True
    return cfg


def same_architecture(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two configs have the same towers, however their pictures are read and trained on."""
    return _bare(one) == _bare(other)


def registered(
    model: ModelConfig, contrastive: ContrastiveConfig, tokenizer: Tokenizer, first: str = ""
) -> tuple[str, dict[str, Any]]:
    """The name and `model_cfg` of open_clip's registered config of this architecture; ("", {}) where there is none.

    `first` is tried before the others, of which the shortest name is taken.
    """
    from open_clip.factory import _MODEL_CONFIGS, get_model_config

    for name in sorted(_MODEL_CONFIGS, key=lambda name: (name != first, len(name), name)):
        cfg = get_model_config(name)
        text = cfg["text_cfg"]
        possible = (
            cfg["embed_dim"] == model.embed_dim
            and "multimodal_cfg" not in cfg
            and ("init_logit_bias" in cfg) == (contrastive.kind == "sigmoid")
            and text.get("context_length", 77) == model.text.context_length
            and (text.get("hf_tokenizer_name") or "") == getattr(tokenizer, "name", "")
            and bool(text.get("hf_model_name")) == ("hf_config" in _options(model.text.tower))
        )
        if possible and _matches(model, name, cfg):
            return name, cfg
    return "", {}


def _matches(model: ModelConfig, name: str, cfg: dict[str, Any]) -> bool:
    size = cfg["vision_cfg"].get("image_size", 224)
    if size != model.image.size and list(size if isinstance(size, list) else [size]) != [model.image.size] * 2:
        return False
    if cfg["vision_cfg"].get("timm_pool") == "map":  # building one to look at takes a while
        patch = f"_patch{model.image.patch}_"
        if model.image.tower is None and patch not in cfg["vision_cfg"]["timm_model_name"]:
            return False
    elif model.image.tower is None and "timm_model_name" in cfg["vision_cfg"]:
        return False
    try:
        return same_architecture(model, model_config(name, cfg, {**PREPROCESS, "size": None}))
    except ConfigError:  # not one that mm has
        return False


def _bare(model: ModelConfig) -> dict[str, Any]:
    """The architecture alone, as plain values; of a wrapped tower what it is built from."""
    found = dataclasses.asdict(model)
    for name in ("denoiser", "latents", "modalities"):
        found.pop(name)
    for name, beside in BESIDE.items():
        part = found[name]
        for field in beside:
            part.pop(field, None)
        if part.get("tower"):
            wanted = {"tower": _plain(json.loads(part["tower"]["options"])), "library": part["tower"]["library"]}
            found[name] = wanted | {key: part[key] for key in ("size", "context_length", "vocab_size") if key in part}
        else:  # a ratio that gives the same width is the same
            part["mlp_ratio"] = int(part["width"] * part["mlp_ratio"])
    return found


def _plain(value: Any) -> Any:
    """JSON without what is a library's default, or says only where weights come from."""
    if not isinstance(value, dict):
        return value
    known = ("timm_model_pretrained", "hf_model_pretrained", "timm_drop", "timm_drop_path", "output_tokens")
    return {key: _plain(inner) for key, inner in value.items() if key not in known and inner not in (None, False)}


def _vision(model: ModelConfig) -> tuple[dict[str, Any], bool | None]:
    """`vision_cfg`, and whether its activation is QuickGELU (None: it does not say)."""
    image = model.image
    if image.tower is not None:
        options = _options(image.tower)
        if image.tower.library == "open_clip":
            return dict(options["vision_cfg"]), bool(options.get("quick_gelu")) or None
        odd = [name for name in options if name not in ("num_classes",)]
        if odd or image.proj == "none":
            field, value = ("tower.options", image.tower.options) if odd else ("proj", image.proj)
            raise NoCounterpart("open_clip", f"model.image.{field}", value, "timm's models at their own size, linear")
        cfg = {"timm_model_name": image.tower.name, "timm_pool": "", "timm_proj": "linear", "image_size": image.size}
        return cfg | ({"timm_proj_bias": True} if image.proj == "affine" else {}), None
    if image.pool == "map":
        return _siglip(image, model.embed_dim), None
    wanted = {"qk_norm": (False,), "pool": ("cls", "patches"), "patch_bias": (False,), "proj": ("linear",)}
    _refuse("image", image, wanted)
    cfg = {
        "image_size": image.size,
        "layers": image.depth,
        "width": image.width,
        "head_width": image.width // image.heads,
        "patch_size": image.patch,
        "mlp_ratio": image.mlp_ratio,
        **({"pool_type": "avg"} if image.pool == "patches" else {}),
        **({} if image.pre_norm else {"no_ln_pre": True}),
        **({"final_ln_after_pool": True} if image.norm_after_pool else {}),
        **_act_and_norm(image.activation, image.eps),
    }
    return cfg, image.activation == "quick_gelu"


def _siglip(image: ImageConfig, embed_dim: int) -> dict[str, Any]:
    wanted: dict[str, Any] = {"qk_norm": (False,), "patch_bias": (True,), "pre_norm": (False,), "proj": ("none",)}
    _refuse("image", image, wanted | {"norm_after_pool": (False,)})
    shape = (image.size, image.patch, image.width, image.depth, image.heads, int(image.mlp_ratio * image.width))
    for name in _map_pooled(image.size, image.patch):
        cfg = {"image_size": image.size, "timm_model_name": name, "timm_model_pretrained": False}
        cfg |= {"timm_pool": "map", "timm_proj": "none"}
        found = model_config(
            name, {"embed_dim": embed_dim, "vision_cfg": cfg, "text_cfg": {}}, PREPROCESS | {"size": 0}
        )
        one = ModelConfig(embed_dim=embed_dim, image=found.image)
        if same_architecture(one, ModelConfig(embed_dim=embed_dim, image=image)):
            return cfg
    raise NoCounterpart("open_clip", "model.image.size, patch, width, depth, heads, mlp", shape, "timm's SigLIP shapes")


@cache
def _map_pooled(size: int, patch: int) -> tuple[str, ...]:
    """timm's vision transformers with attention pooling, for pictures of that size: their names."""
    import timm

    found = []
    for name in timm.list_models(f"vit_*_patch{patch}_*"):
        known = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
        if "siglip" in name and "gap" not in name and known is not None and known.input_size[-1] == size:
            found.append(name)
    return tuple(sorted(found, key=lambda name: (len(name), name)))


def _text(text: TextConfig, embed_dim: int, tokenizer: Tokenizer) -> tuple[dict[str, Any], bool | None]:
    """`text_cfg`, and whether its activation is QuickGELU (None: it does not say)."""
    if text.tower is not None:
        options = _options(text.tower)
        cfg: dict[str, Any] = {"context_length": text.context_length, **options["text_cfg"]}
        if "hf_config" in options:
            width = options["hf_config"].get("hidden_size") or options["hf_config"].get("d_model")
            if cfg.get("hf_proj_type", "mlp") is None and width != embed_dim:
                cfg["hf_proj_type"] = "linear"  # as mm.models.wrapped builds it
            if isinstance(tokenizer, HubTokenizer):
                cfg.setdefault("hf_tokenizer_name", tokenizer.name)
        return cfg, bool(options.get("quick_gelu")) or None
    wanted: dict[str, Any] = {"qk_norm": (False,), "pool": ("last", "end"), "masked": (text.causal,)}
    if text.pool == "last" and text.causal:
        wanted["masked"] = (True, False)  # the end token never sees the padding
    _refuse("text", text, wanted)
    cfg = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.depth,
        "mlp_ratio": text.mlp_ratio,
        **({} if text.causal else {"no_causal_mask": True}),
        **PROJECTIONS[text.proj],
        **_act_and_norm(text.activation, text.eps),
    }
    if isinstance(tokenizer, HubTokenizer):
        cfg["hf_tokenizer_name"] = tokenizer.name
        options = {} if tokenizer.clean == "whitespace" else {"clean": tokenizer.clean}
        options |= {"strip_sep_token": True} if tokenizer.blank is not None else {}
        if options:
            cfg["tokenizer_kwargs"] = options
    elif not isinstance(tokenizer, ClipTokenizer):
        raise NoCounterpart("open_clip", "model.text.tokenizer", text.tokenizer, "CLIP's and Hugging Face's")
    if text.pool == "end":
        cfg["pool_type"] = "last"
    elif isinstance(tokenizer, HubTokenizer):
        cfg |= {"pool_type": "eos", "eos_id": tokenizer.encode("a")[-1]}
    return cfg, text.activation == "quick_gelu"


def _act_and_norm(activation: Activation, eps: float) -> dict[str, Any]:
    found: dict[str, Any] = {"act_kwargs": {"approximate": "tanh"}} if activation == "gelu_tanh" else {}
    return found | ({} if eps == 1e-5 else {"norm_kwargs": {"eps": eps}})


def _refuse(part: str, config: ImageConfig | TextConfig, wanted: dict[str, tuple[Any, ...]]) -> None:
    """Raises NoCounterpart for the first field whose value is not among those that open_clip can have."""
    for field, values in wanted.items():
        if getattr(config, field) not in values:
            has = " or ".join(map(repr, values))
            raise NoCounterpart("open_clip", f"model.{part}.{field}", getattr(config, field), f"it has {has}")


def _options(tower: TowerConfig | None) -> dict[str, Any]:
    return json.loads(tower.options) if tower is not None else {}
