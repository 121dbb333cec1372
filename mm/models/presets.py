"""Model sizes by name. Each is a function, so that a config starts from a fresh copy and changes what it likes.

Encoder sizes follow CLIP (arXiv 2103.00020) and open_clip's ViT-S; denoiser sizes follow DiT (arXiv 2212.09748).
"""

from __future__ import annotations

from typing import Any

from mm.config import DenoiserConfig, ImageConfig, ModelConfig, TextConfig


def tiny() -> ModelConfig:
    """32 px, for two CPU cores and a few minutes: 18 M parameters, a tokenizer of its own."""
    return ModelConfig(
        embed_dim=128,
        image=ImageConfig(size=32, patch=8, width=192, depth=6, heads=3),
        text=TextConfig(tokenizer="corpus", vocab_size=2048, context_length=17, width=192, depth=4, heads=3),
        denoiser=DenoiserConfig(patch=8, width=320, depth=6, heads=5),
    )


def vit_s16() -> ModelConfig:
    """ViT-S/16 with a 384-wide text tower, and a denoiser of DiT-S's size on 16-px patches."""
    return _clip(16, (384, 12, 6), (384, 12, 6), embed_dim=384, denoiser=(384, 12, 6))


def vit_b32() -> ModelConfig:
    """CLIP ViT-B/32, and a denoiser of DiT-B's size on 16-px patches."""
    return _clip(32, (768, 12, 12), (512, 12, 8), embed_dim=512, denoiser=(768, 12, 12))


def vit_b16() -> ModelConfig:
    """CLIP ViT-B/16, and a denoiser of DiT-B's size on 16-px patches."""
    return _clip(16, (768, 12, 12), (512, 12, 8), embed_dim=512, denoiser=(768, 12, 12))


def vit_l14() -> ModelConfig:
    """CLIP ViT-L/14, and a denoiser of DiT-L's size on 14-px patches."""
    return _clip(14, (1024, 24, 16), (768, 12, 12), embed_dim=768, denoiser=(1024, 24, 16), denoiser_patch=14)


def so400m() -> ModelConfig:
    """SoViT-400m/16 (arXiv 2305.13035) with SigLIP's text tower of the same shape, 256 px; no denoiser.

    Shapes as in open_clip's ViT-SO400M-16-SigLIP2-256; the vocabulary is as large as SigLIP's.
    """
    shape: dict[str, Any] = {"width": 1152, "depth": 27, "heads": 16, "mlp_ratio": 3.7362}  # the MLP is 4304 wide
    return ModelConfig(
        embed_dim=1152,
        image=ImageConfig(size=256, patch=16, pool="mean", **shape),
        text=TextConfig(tokenizer="corpus", vocab_size=32000, context_length=64, pool="last", **shape),
        denoiser=None,
    )


PRESETS = {
    "tiny": tiny,
    "vit_s16": vit_s16,
    "vit_b32": vit_b32,
    "vit_b16": vit_b16,
    "vit_l14": vit_l14,
    "so400m": so400m,
}


def _clip(
    patch: int,
    image: tuple[int, int, int],
    text: tuple[int, int, int],
    *,
    embed_dim: int,
    denoiser: tuple[int, int, int],
    denoiser_patch: int = 16,
) -> ModelConfig:
    """224 px, CLIP's tokenizer and normalisation; each tower and the denoiser as (width, depth, heads)."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return ModelConfig(
        embed_dim=embed_dim,
        image=ImageConfig(
            size=224, patch=patch, width=image[0], depth=image[1], heads=image[2], mean=mean, std=std, pool="cls"
        ),
        text=TextConfig(
            tokenizer="clip",
            vocab_size=49408,
            context_length=77,
            width=text[0],
            depth=text[1],
            heads=text[2],
            causal=True,
            pool="last",
        ),
        denoiser=DenoiserConfig(
            patch=denoiser_patch,
            width=denoiser[0],
            depth=denoiser[1],
            heads=denoiser[2],
            bottleneck=128,
            context_depth=denoiser[1] - 1,
        ),
    )
