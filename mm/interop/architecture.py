"""open_clip's description of a model as mm's config: own classes where the architecture is ours, wrapped otherwise."""

from __future__ import annotations

import json
from typing import Any

from mm.adapters.hub import pretrained
from mm.config import Activation, ConfigError, ContrastiveConfig, ImageConfig, ModelConfig, TextConfig, TowerConfig

CUSTOM = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc", "block_type")
BIAS = -10.0  # of a sigmoid loss at its start


def model_config(name: str, cfg: dict[str, Any], preprocess: dict[str, Any]) -> ModelConfig:
    """mm's config of an open_clip model from its `model_cfg` and `preprocess_cfg`; no denoiser.

    Raises ConfigError for what cannot be had, such as pictures that are not square.
    """
    image, text = _image(name, cfg, preprocess), _text(name, cfg)
    return ModelConfig(embed_dim=cfg["embed_dim"], image=image, text=text, denoiser=None)


def contrastive_config(cfg: dict[str, Any]) -> ContrastiveConfig:
    """The loss that an open_clip model was made for."""
    bias = cfg.get("init_logit_bias")
    kind = ContrastiveConfig(kind="softmax" if bias is None else "sigmoid")
    kind.init_bias = BIAS if bias is None else float(bias)
    return kind


def _image(name: str, cfg: dict[str, Any], preprocess: dict[str, Any]) -> ImageConfig:
    vision = cfg["vision_cfg"]
    size = _square(name, vision.get("image_size", 224))  # which open_clip puts in place of what preprocess says
    common: dict[str, Any] = {
        "size": size,
        "mean": _three(preprocess["mean"]),
        "std": _three(preprocess["std"]),
        "resize": preprocess.get("resize_mode") or "shortest",
        "interpolation": "bilinear" if preprocess.get("interpolation") == "bilinear" else "bicubic",
        "fill": int(preprocess.get("fill_color") or 0),
        "crop_scale": 0.9,  # open_clip's
        "color_jitter": 0.0,
    }
    own = _siglip(vision, size) if vision.get("timm_pool") == "map" else _clip(vision, cfg)
    if own is None or own.pop("size", size) != size:
        wanted = {**vision, "image_size": size}
        options = {"vision_cfg": wanted, "quick_gelu": bool(cfg.get("quick_gelu"))}
        tower = TowerConfig(library="open_clip", name=name, options=json.dumps(options, sort_keys=True))
        return ImageConfig(**common, tower=tower)
    return ImageConfig(**common, **own)


def _clip(vision: dict[str, Any], cfg: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of a CLIP vision transformer; None for anything else."""
    depth = vision.get("layers", 12)
    other = vision.get("timm_model_name") or isinstance(depth, (list, tuple)) or vision.get("attentional_pool")
    other = other or vision.get("ls_init_value") is not None or any(vision.get(key) for key in CUSTOM)
    other = other or vision.get("pos_embed_type", "learnable") != "learnable"
    pool = {"tok": "cls", "avg": "patches"}.get(vision.get("pool_type", "tok"))
    if other or pool is None:
        return None
    width = vision.get("width", 768)
    return {
        "patch": vision.get("patch_size", 16),
        "width": width,
        "depth": depth,
        "heads": width // vision.get("head_width", 64),
        "mlp_ratio": vision.get("mlp_ratio", 4.0),
        "pool": pool,
        "patch_bias": False,
        "pre_norm": not vision.get("no_ln_pre", False),
        "norm_after_pool": bool(vision.get("final_ln_after_pool", False)),
        "activation": _activation(vision, cfg),
        "qk_norm": False,
        "eps": float((vision.get("norm_kwargs") or {}).get("eps", 1e-5)),
        "proj": "linear",
    }


def _siglip(vision: dict[str, Any], size: int) -> dict[str, Any] | None:
    """The fields of timm's vision transformer with attention pooling, read off one built on no device; else None."""
    import timm
    import torch
    from torch import nn

    with torch.device("meta"):
        trunk: Any = timm.create_model(vision["timm_model_name"], num_classes=0, global_pool="map", img_size=size)
    if type(trunk) is not timm.models.vision_transformer.VisionTransformer:
        return None
    block: Any = trunk.blocks[0]
    pool: Any = trunk.attn_pool
    absent = (trunk.norm_pre, trunk.fc_norm, trunk.head, block.ls1, block.attn.q_norm, block.attn.norm, pool.q_norm)
    activation = _named_activation(block.mlp.act)
    plain = (
        all(isinstance(part, nn.Identity) for part in absent)
        and type(block) is timm.models.vision_transformer.Block
        and trunk.num_prefix_tokens == 0
        and trunk.pos_embed is not None
        and pool.pos_embed is None
        and pool.latent_len == 1
        and isinstance(trunk.norm, nn.LayerNorm)
        and isinstance(block.mlp.norm, nn.Identity)
        and block.attn.qkv.bias is not None  # type: ignore[union-attr]
        and pool.num_heads == block.attn.num_heads
        and _named_activation(pool.mlp.act) == activation
        and vision.get("timm_proj", "linear") == "none"  # with "" there is a projection in timm's head
    )
    if not plain or activation is None:
        return None
    return {
        "size": trunk.patch_embed.img_size[0],
        "patch": trunk.patch_embed.patch_size[0],
        "width": trunk.embed_dim,
        "depth": len(trunk.blocks),
        "heads": block.attn.num_heads,
        "mlp_ratio": (block.mlp.fc1.out_features + 0.5) / trunk.embed_dim,  # rounded down it is that width again
        "pool": "map",
        "activation": activation,
        "qk_norm": False,
        "eps": trunk.norm.eps,
        "proj": "none",
    }


def _named_activation(module: Any) -> Activation | None:
    from torch import nn

    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return "gelu_tanh" if type(module).__name__ == "GELUTanh" else None


def _text(name: str, cfg: dict[str, Any]) -> TextConfig:
    text = cfg["text_cfg"]
    shape: dict[str, Any] = {
        "tokenizer": "source" if text.get("hf_tokenizer_name") else "clip",
        "vocab_size": text.get("vocab_size", 49408),
        "context_length": text.get("context_length", 77),
        "causal": not text.get("no_causal_mask", False),
        "pad_id": text.get("pad_id", 0),
    }
    pool = {"argmax": "last", "eos": "last", "last": "end"}.get(text.get("pool_type", "argmax"))
    other = text.get("hf_model_name") or text.get("embed_cls") or text.get("ls_init_value") is not None
    if other or pool is None or any(text.get(key) for key in CUSTOM):
        options: dict[str, Any] = {"text_cfg": text, "quick_gelu": bool(cfg.get("quick_gelu"))}
        if text.get("hf_model_name"):
            options["hf_config"], shape["vocab_size"] = hugging_face(text["hf_model_name"])
        tower = TowerConfig(library="open_clip", name=name, options=json.dumps(options, sort_keys=True))
        return TextConfig(**shape, masked=False, pool="last", tower=tower)
    kind = text.get("proj_type", "linear")
    return TextConfig(
        **shape,
        width=text.get("width", 512),
        depth=text.get("layers", 12),
        heads=text.get("heads", 8),
        mlp_ratio=text.get("mlp_ratio", 4.0),
        pool=pool,  # type: ignore[arg-type]
        masked=shape["causal"] and pool == "last",  # what is causal and pooled at the end token never sees the padding
        activation=_activation(text, cfg),
        qk_norm=False,
        eps=float((text.get("norm_kwargs") or {}).get("eps", 1e-5)),
        proj="none" if kind == "none" else "affine" if text.get("proj_bias") else "linear",
    )


def hugging_face(name: str) -> tuple[dict[str, Any], int]:
    """A Hugging Face model's config and vocabulary size, from a folder, the local cache or the hub."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ConfigError(
            f'{name}: a Hugging Face text encoder needs transformers; pip install "mm[interop]"'
        ) from error
    try:
        config = pretrained(AutoConfig, name, trust_remote_code=False)  # else it asks whether to run code
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: its config is not on this machine and could not be fetched from the hub") from error
    described = config.to_dict()
    described.pop("_name_or_path", None)  # a folder of whoever read it is nothing to pass on
    return described, int(config.vocab_size)


def _activation(part: dict[str, Any], cfg: dict[str, Any]) -> Activation:
    if cfg.get("quick_gelu"):
        return "quick_gelu"
    return "gelu_tanh" if (part.get("act_kwargs") or {}).get("approximate") == "tanh" else "gelu"


def _square(name: str, size: Any) -> int:
    sides = list(size) if isinstance(size, (list, tuple)) else [size]
    if len(set(sides)) != 1:
        raise ConfigError(f"{name}: takes pictures of {'x'.join(map(str, sides))} pixels; mm takes square ones")
    return int(sides[0])


def _three(value: Any) -> tuple[float, float, float]:
    a, b, c = value if isinstance(value, (list, tuple)) else (value,) * 3
    return float(a), float(b), float(c)
