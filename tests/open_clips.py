"""Small open_clip models of every kind, no parameter at its initial value, in folders as open_clip writes them."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from tiny_clips import randomised

import mm

VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 16, "width": 64, "heads": 4, "layers": 2}
SIGLIP_TEXT = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
TANH = {"act_kwargs": {"approximate": "tanh"}}
CLIPA = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
MAP = {"timm_model_name": "tiny_siglip_for_mm", "timm_pool": "map", "timm_proj": "none", "image_size": 36}
COCA = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 4, "output_tokens": True}
DECODER = {"width": 64, "context_length": 16, "vocab_size": 49408, "layers": 1, "heads": 4}
# vision, text and what lies outside both; the first ones are of mm's own classes
OWN: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "clip": (VISION, TEXT, {}),
    "quick_gelu": (VISION, TEXT, {"quick_gelu": True}),
    "clipa": (VISION | CLIPA | TANH, TEXT | TANH | {"pool_type": "last", "no_causal_mask": True}, {}),
    "causal, pooled in the last place": (VISION | {"pool_type": "avg"}, TEXT | {"pool_type": "last"}, {}),
    "siglip": (MAP, TEXT | SIGLIP_TEXT, {"custom_text": True, "init_logit_bias": -10}),
    "mobile text": (VISION, TEXT | {"no_causal_mask": True, "mlp_ratio": 2.5}, {"custom_text": True}),
    "no text projection": (VISION, TEXT | {"width": 32, "proj_type": "none"}, {}),
}
WRAPPED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "resnet": ({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}, TEXT, {}),
    "timm convnet": ({"timm_model_name": "test_convnext", "timm_proj": "mlp", "image_size": 64}, TEXT, {}),
    "timm head": ({"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "", "image_size": 160}, TEXT, {}),
    "map pool with a head": (MAP | {"timm_proj": ""}, TEXT, {"custom_text": True}),
    "layer scale": (VISION | {"ls_init_value": 0.1}, TEXT | {"ls_init_value": 0.1}, {}),
    "coca": (VISION | COCA, TEXT | {"embed_cls": True, "output_tokens": True},
             {"custom_text": True, "multimodal_cfg": DECODER}),
}  # fmt: skip


@timm.models.register_model
def tiny_siglip_for_mm(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """36 pixels are two patches of 16 and 4 pixels more, as with SigLIP's 384."""
    shape: dict[str, Any] = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False}
    options = {key: value for key, value in options.items() if not key.startswith(("pretrained", "cache"))}
    return VisionTransformer(**{"img_size": 36} | shape | options)


KEPT = tempfile.TemporaryDirectory(prefix="mm-open-clip-")  # until the process ends


class Made(NamedTuple):
    """open_clip's own model and transform, and mm's from the same folder."""

    folder: Path
    theirs: Any
    preprocess: Any
    loaded: mm.api.LoadedModel


def write(folder: Path, parts: tuple[dict[str, Any], dict[str, Any], dict[str, Any]], **preprocess: Any) -> Any:
    """open_clip's own model and transform; its folder as open_clip writes it."""
    vision, text, rest = parts
    cfg = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, **rest}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    theirs, _, transform = open_clip.create_model_and_transforms(
        f"local-dir:{folder}", load_weights=False, pretrained_hf=False
    )
    randomised(theirs, amount=0.1)  # enough that features of two pictures are far apart
    theirs.logit_scale.data.fill_(np.log(112.33))
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return theirs, transform


@functools.cache
def made(name: str) -> Made:
    folder = Path(KEPT.name, name)
    theirs, transform = write(
        folder, (OWN | WRAPPED)[name], mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25], resize_mode="squash"
    )
    return Made(folder, theirs, transform, mm.load(f"open_clip:local-dir:{folder}"))


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)
