"""mm's models in the layout of `transformers`: CLIPModel and SiglipModel, with tokenizer and preprocessing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.adapters.hub_tokenizer import HubTokenizer
from mm.adapters.text import ClipTokenizer
from mm.config import ConfigError, ImageConfig, TextConfig
from mm.interop import preprocessing
from mm.interop.describe import NoCounterpart
from mm.interop.origin import OBJECTIVES, Origin, refuse_difference
from mm.interop.tokenizer_out import clip_tokenizer, hub_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
END = 49407  # of CLIP's text; its table ends with it
SCALE, BIAS = f"{OBJECTIVES}contrastive.logit_scale", f"{OBJECTIVES}contrastive.logit_bias"
# what a field must be for a model to be a CLIPModel or a SiglipModel
CLIP: dict[str, dict[str, tuple[Any, ...]]] = {
    "image": {
        "pool": ("cls",),
        "pre_norm": (True,),
        "patch_bias": (False,),
        "qk_norm": (False,),
        "proj": ("linear",),
        "resize": ("shortest", "squash", "crop"),
    },
    "text": {"causal": (True,), "pool": ("last",), "qk_norm": (False,), "proj": ("linear",), "tokenizer": ("clip",)},
}
SIGLIP: dict[str, dict[str, tuple[Any, ...]]] = {
    "image": {
        "pool": ("map",),
        "pre_norm": (False,),
        "patch_bias": (True,),
        "qk_norm": (False,),
        "proj": ("none",),
        "resize": ("shortest", "squash", "crop"),
    },
    "text": {
        "causal": (False,),
        "masked": (False,),
        "pool": ("end",),
        "qk_norm": (False,),
        "proj": ("affine",),
        "tokenizer": ("source",),
    },
}


def write(origin: Origin, folder: Path, out: Path) -> list[str]:
    """model.safetensors, config.json, the tokenizer's files and preprocessor_config.json. What to tell the user.

    `out` is where the folder will be. A denoiser is left out. Raises ConfigError naming the first field that neither
    class has.
    """
    from safetensors.torch import save_file

    kind = "siglip" if origin.model.image.pool == "map" else "clip"
    _check(origin, kind)
    tensors = convert(origin, kind)
    _compare(origin.source, kind, config(origin, kind), tensors)
    (folder / "config.json").write_text(json.dumps(config(origin, kind), indent=2) + "\n", encoding="utf-8")
    reader = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}[kind]
    seen = preprocessing.hugging_face(origin.model.image, reader)
    (folder / "preprocessor_config.json").write_text(json.dumps(seen, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    told = []
    if isinstance(origin.tokenizer, ClipTokenizer):
        clip_tokenizer(origin, folder)
    elif isinstance(origin.tokenizer, HubTokenizer) and origin.tokenizer.serialized:
        hub_tokenizer(origin, folder, clean=True)
    else:
        told.append("the tokenizer is not in this model (there was no network when it was read): none is written")
    if origin.model.denoiser is not None:
        told.append("the denoiser is left out: transformers' model has none")
    if origin.model.modalities:
        names = ", ".join(extra.name for extra in origin.model.modalities)
        told.append(f"{names} is left out: transformers' model has images and text only")
    if kind == "siglip":
        told.append(f'texts: give the tokenizer padding="max_length", max_length={origin.model.text.context_length}')
    name = {"clip": "CLIPModel", "siglip": "SiglipModel"}[kind]
    return [*told, f'load it: transformers.{name}.from_pretrained("{out}")']


def config(origin: Origin, kind: str) -> dict[str, Any]:
    """config.json."""
    image, text, width = origin.model.image, origin.model.text, origin.model.embed_dim
    vision = {**_tower(image), "image_size": image.size, "patch_size": image.patch, "num_channels": 3}
    words = {**_tower(text), "vocab_size": text.vocab_size, "max_position_embeddings": text.context_length}
    if kind == "clip":
        words |= {"bos_token_id": END - 1, "eos_token_id": END, "pad_token_id": END, "projection_dim": width}
        vision["projection_dim"] = width
        head: dict[str, Any] = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": width}
        head["logit_scale_init_value"] = float(origin.tensors[SCALE])
    else:
        words |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": text.pad_id, "projection_size": width}
        head = {"architectures": ["SiglipModel"], "model_type": "siglip"}
    vision["model_type"], words["model_type"] = f"{kind}_vision_model", f"{kind}_text_model"
    return {**head, "text_config": words, "vision_config": vision, "dtype": "float32"}


def convert(origin: Origin, kind: str) -> dict[str, Tensor]:
    """The tensors by the names of `transformers`; only names and shapes change."""
    image, text = origin.model.image, origin.model.text
    take, found = _taker(origin), {}
    found["logit_scale"] = take(SCALE).reshape(() if kind == "clip" else (1,))
    found["text_model.embeddings.token_embedding.weight"] = take("adapters.text.embedding.weight")
    found["text_model.embeddings.position_embedding.weight"] = take("adapters.text.position")
    found |= _blocks(take, "encoders.text", "text_model", text.depth)
    found |= _pair(take, "encoders.text.norm", "text_model.final_layer_norm")
    patches = take("adapters.image.proj.weight").unflatten(1, (3, image.patch, image.patch))
    found["vision_model.embeddings.patch_embedding.weight"] = patches
    found["vision_model.embeddings.position_embedding.weight"] = take("adapters.image.position")
    found |= _blocks(take, "encoders.image", "vision_model", image.depth)
    found |= _pair(take, "encoders.image.norm", "vision_model.post_layernorm")
    if kind == "clip":
        found["vision_model.embeddings.class_embedding"] = take("adapters.image.cls")[0]
        found |= _pair(take, "adapters.image.norm", "vision_model.pre_layrnorm")  # sic
        found["visual_projection.weight"] = take("encoders.image.proj.weight")
        found["text_projection.weight"] = take("encoders.text.proj.weight")
    else:
        import torch

        found["logit_bias"] = take(BIAS)
        found["vision_model.embeddings.patch_embedding.bias"] = take("adapters.image.proj.bias")
        found |= _pair(take, "encoders.text.proj", "text_model.head")
        here, there = "encoders.image.attention_pool", "vision_model.head"
        found[f"{there}.probe"] = take(f"{here}.latent")[None, None]
        for part in ("weight", "bias"):
            both = torch.cat([take(f"{here}.q.{part}"), take(f"{here}.kv.{part}")])
            found[f"{there}.attention.in_proj_{part}"] = both
        names = {"out": "attention.out_proj", "norm": "layernorm", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
        for ours, theirs in names.items():
            found |= _pair(take, f"{here}.{ours}", f"{there}.{theirs}")
    return {name: tensor.clone(memory_format=_plain()) for name, tensor in found.items()}


def _plain() -> Any:
    import torch

    return torch.contiguous_format


def _taker(origin: Origin) -> Callable[[str], Tensor]:
    def take(name: str) -> Tensor:
        if name not in origin.tensors:
            raise ConfigError(f"{origin.source}: has no {name}; transformers' model needs it")
        return origin.tensors[name]

    return take


def _blocks(take: Callable[[str], Tensor], ours: str, theirs: str, depth: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    inside = {"norm1": "layer_norm1", "out": "self_attn.out_proj", "norm2": "layer_norm2"}
    for block in range(depth):
        here, there = f"{ours}.blocks.{block}", f"{theirs}.encoder.layers.{block}"
        for part in ("weight", "bias"):
            for name, tensor in zip("qkv", take(f"{here}.qkv.{part}").chunk(3), strict=True):
                found[f"{there}.self_attn.{name}_proj.{part}"] = tensor
        for one, other in {**inside, "fc1": "mlp.fc1", "fc2": "mlp.fc2"}.items():
            found |= _pair(take, f"{here}.{one}", f"{there}.{other}")
    return found


def _pair(take: Callable[[str], Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    return {f"{theirs}.{part}": take(f"{ours}.{part}") for part in ("weight", "bias")}


def _tower(part: ImageConfig | TextConfig) -> dict[str, Any]:
    return {
        "hidden_size": part.width,
        "intermediate_size": int(part.width * part.mlp_ratio),
        "num_hidden_layers": part.depth,
        "num_attention_heads": part.heads,
        "hidden_act": ACTIVATIONS[part.activation],
        "layer_norm_eps": part.eps,
    }


def _check(origin: Origin, kind: str) -> None:
    """Raises ConfigError for the first field that the class does not have."""
    name = {"clip": "CLIPModel", "siglip": "SiglipModel"}[kind]
    for side, fields in {"clip": CLIP, "siglip": SIGLIP}[kind].items():
        part = getattr(origin.model, side)
        if part.tower is not None or side not in origin.parts:
            field, value = f"model.{side}.tower", part.tower.name if part.tower else None
            raise NoCounterpart(f"transformers' {name}", field, value, "vision and text transformers only")
        for field, values in fields.items():
            if getattr(part, field) not in values:
                has = f"it has {' or '.join(map(repr, values))}"
                raise NoCounterpart(f"transformers' {name}", f"model.{side}.{field}", getattr(part, field), has)
    contrastive = origin.contrastive
    wanted = {"clip": "softmax", "siglip": "sigmoid"}[kind]
    if contrastive is None or contrastive.kind != wanted:
        value = None if contrastive is None else contrastive.kind
        raise NoCounterpart(f"transformers' {name}", "objectives.contrastive.kind", value, f"it has {wanted!r}")


def _compare(source: str, kind: str, described: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raises ConfigError unless `transformers`' model, built on no device, has the same names and shapes."""
    import torch

    try:
        from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel
    except ImportError as error:
        raise ConfigError('--format transformers: needs transformers; pip install "mm[interop]"') from error
    with torch.device("meta"):
        built: Any
        if kind == "clip":
            built = CLIPModel(CLIPConfig.from_dict(described))
        else:
            built = SiglipModel(SiglipConfig.from_dict(described))
    expected = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    refuse_difference(source, expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, "transformers")
