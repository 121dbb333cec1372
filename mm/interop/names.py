"""One tensor under two names: the tables between mm's encoders and open_clip's, read in both directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from mm.config import ImageConfig, TextConfig

# how a tensor of theirs becomes ours; and back, given the patch's side. Only the shape changes: there and back is exact
FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, int], Tensor]]] = {
    "same": (lambda t: t, lambda t, patch: t),
    "transposed": (lambda t: t.T.contiguous(), lambda t, patch: t.T.contiguous()),
    "patches": (lambda t: t.flatten(1), lambda t, patch: t.unflatten(1, (3, patch, patch))),
    "rows": (lambda t: t[0], lambda t, patch: t[None]),  # [1, N, D]
    "row": (lambda t: t[None], lambda t, patch: t[0]),  # [D] to [1, D]
    "vector": (lambda t: t.flatten(), lambda t, patch: t[None, None]),  # [1, 1, D]
    "number": (lambda t: t.reshape(1), lambda t, patch: t.reshape(())),
}


class Name(NamedTuple):
    """One tensor: its name here and there, and how the shapes differ."""

    ours: str
    theirs: str
    form: str = "same"


def clip_image(config: ImageConfig) -> list[Name]:
    """open_clip's VisionTransformer."""
    names = [
        Name("adapters.image.proj.weight", "visual.conv1.weight", "patches"),
        Name("adapters.image.cls", "visual.class_embedding", "row"),
        Name("adapters.image.position", "visual.positional_embedding"),
        *_pair("adapters.image.norm", "visual.ln_pre", config.pre_norm),
        *_open_clip_blocks("encoders.image", "visual.transformer", config.depth),
        *_pair("encoders.image.norm", "visual.ln_post"),
    ]
    return [*names, Name("encoders.image.proj.weight", "visual.proj", "transposed")]


def siglip_image(config: ImageConfig) -> list[Name]:
    """timm's VisionTransformer with attention pooling, as open_clip wraps it."""
    names = [
        Name("adapters.image.proj.weight", "visual.trunk.patch_embed.proj.weight", "patches"),
        Name("adapters.image.proj.bias", "visual.trunk.patch_embed.proj.bias"),
        Name("adapters.image.position", "visual.trunk.pos_embed", "rows"),
        *_pair("encoders.image.norm", "visual.trunk.norm"),
        Name("encoders.image.attention_pool.latent", "visual.trunk.attn_pool.latent", "vector"),
    ]
    parts = {"q": "q", "kv": "kv", "out": "proj", "norm": "norm", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    for ours, theirs in parts.items():
        names += _pair(f"encoders.image.attention_pool.{ours}", f"visual.trunk.attn_pool.{theirs}")
    inside = {"norm1": "norm1", "qkv": "attn.qkv", "out": "attn.proj", "norm2": "norm2", "fc1": "mlp.fc1"}
    for block in range(config.depth):
        for ours, theirs in {**inside, "fc2": "mlp.fc2"}.items():
            names += _pair(f"encoders.image.blocks.{block}.{ours}", f"visual.trunk.blocks.{block}.{theirs}")
    return names


def text(config: TextConfig, inside: str) -> list[Name]:
    """open_clip's TextTransformer; `inside` "text." where the model keeps it apart, "" where it is spread out."""
    names = [
        Name("adapters.text.embedding.weight", f"{inside}token_embedding.weight"),
        Name("adapters.text.position", f"{inside}positional_embedding"),
        *_open_clip_blocks("encoders.text", f"{inside}transformer", config.depth),
        *_pair("encoders.text.norm", f"{inside}ln_final"),
    ]
    if config.proj == "affine":
        names += _pair("encoders.text.proj", f"{inside}text_projection")
    elif config.proj == "linear":
        names.append(Name("encoders.text.proj.weight", f"{inside}text_projection", "transposed"))
    return names


def scale(bias: bool) -> list[Name]:
    """Logit scale (its log) and bias."""
    names = [Name("objectives.contrastive.logit_scale", "logit_scale", "number")]
    return [*names, Name("objectives.contrastive.logit_bias", "logit_bias", "number")] if bias else names


def _pair(ours: str, theirs: str, there: bool = True) -> list[Name]:
    return [Name(f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias")] if there else []


def _open_clip_blocks(ours: str, theirs: str, depth: int) -> list[Name]:
    names = []
    inside = {"norm1": "ln_1", "out": "attn.out_proj", "norm2": "ln_2", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
    for block in range(depth):
        here, there = f"{ours}.blocks.{block}", f"{theirs}.resblocks.{block}"
        for part in ("weight", "bias"):
            names.append(Name(f"{here}.qkv.{part}", f"{there}.attn.in_proj_{part}"))
        for one, other in inside.items():
            names += _pair(f"{here}.{one}", f"{there}.{other}")
    return names
