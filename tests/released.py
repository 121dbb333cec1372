"""Models of open_clip of every family, tiny and random, and what the tests of `mm release` ask of them."""

from __future__ import annotations

import functools
import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_clips import randomised

VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
WORDS = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
HUB_WORDS = {**WORDS, "width": 64, "vocab_size": 500, "no_causal_mask": True, "pool_type": "last"}
CLIPA_WORDS = {**HUB_WORDS, "hf_tokenizer_name": "bert-none", "tokenizer_kwargs": {"strip_sep_token": True}}
SIGLIP_WORDS = {**HUB_WORDS, "hf_tokenizer_name": "none/SigLIP", "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
SIGLIP_WORDS |= {"act_kwargs": {"approximate": "tanh"}, "tokenizer_kwargs": {"clean": "canonicalize"}}
TIMM = {"image_size": 32, "timm_pool": "", "timm_proj": "linear", "timm_model_pretrained": False}
SIGLIP = {"timm_model_name": "vit_mini_patch8_siglip_32", "timm_pool": "map", "timm_proj": "none"}
TINY: dict[str, dict[str, Any]] = {
    "clip": {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": WORDS},
    "quick": {"embed_dim": 32, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": WORDS},
    "custom": {"embed_dim": 32, "custom_text": True, "vision_cfg": VISION, "text_cfg": CLIPA_WORDS},
    "clipa": {
        "embed_dim": 32,
        "vision_cfg": {**VISION, "no_ln_pre": True, "final_ln_after_pool": True, "pool_type": "avg"},
        "text_cfg": CLIPA_WORDS,
    },
    "siglip": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {**TIMM, **SIGLIP},
        "text_cfg": SIGLIP_WORDS,
    },
    "resnet": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
        "text_cfg": CLIPA_WORDS,
    },
    "convnext": {"embed_dim": 32, "vision_cfg": {**TIMM, "timm_model_name": "test_convnext"}, "text_cfg": CLIPA_WORDS},
}
PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear", "resize_mode": "squash"}
Theirs = Callable[[str], Path]
CAPTIONS = ["a photo of a cat", "Don't PANIC!! it's 42 -- déjà vu"]


@functools.cache
def mini_siglip() -> None:
    """A timm model small enough for a test, under a name as SigLIP's are."""
    from timm.models import vision_transformer

    def vit_mini_patch8_siglip_32(pretrained: bool = False, **options: Any) -> Any:
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "class_token": False}
        shape |= {"global_pool": "map", "act_layer": "gelu_tanh"}
        return vision_transformer._create_vision_transformer(
            "vit_mini_patch8_siglip_32", pretrained=False, **{**shape, **options}
        )

    vit_mini_patch8_siglip_32.__module__ = vision_transformer.__name__
    cfg = vision_transformer._cfg(input_size=(3, 32, 32), num_classes=0)
    vision_transformer.default_cfgs["vit_mini_patch8_siglip_32"] = _known(cfg)
    vision_transformer.register_model(vit_mini_patch8_siglip_32)


def _known(cfg: dict[str, Any]) -> Any:
    from timm.models._pretrained import DefaultCfg, PretrainedCfg

    return DefaultCfg(tags=deque([""]), cfgs={"": PretrainedCfg(**cfg)}, is_pretrained=False)


def models_in(base: Path) -> Theirs:
    """A function from a kind of TINY to the folder of such a model in open_clip's own format, made in `base` once."""
    mini_siglip()

    @functools.cache
    def made(kind: str) -> Path:
        original(kind, base / kind)
        return base / kind

    return made


def original(kind: str, folder: Path) -> None:
    cfg = json.loads(json.dumps(TINY[kind]))
    folder.mkdir()
    whole = {"model_cfg": cfg, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    model = open_clip.create_model(f"local-dir:{folder}", pretrained_image=False)
    randomised(model, len(kind))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def source_of(folder: Path) -> str:
    return f"open_clip:local-dir:{folder}"


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in noise]


def ids(origin_kind: str) -> torch.Tensor:
    size = TINY[origin_kind]["text_cfg"]["vocab_size"]
    found = torch.randint(2, min(size, 400), (2, 16), generator=torch.Generator().manual_seed(1))
    if size == 49408:
        found[0, 5], found[1, -1] = 49407, 49407
        found[0, 6:] = 0
    return found


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
