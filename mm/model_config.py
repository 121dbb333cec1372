"""The settings that shape a model: what a released folder needs to build it again. Names are had from `mm.config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
Projection = Literal["linear", "affine", "none"]  # to the shared space: without a bias, with one, or none at all


@dataclass(slots=True, kw_only=True)
class TowerConfig:
    """A third-party encoder, wrapped as it is: everything that is needed to build it again."""

    library: Literal["timm", "open_clip"]
    name: str = ""  # in that library; for people and messages where `options` says all
    options: str = "{}"  # JSON: what it is built with


@dataclass(slots=True, kw_only=True)
class ImageConfig:
    size: int = 32  # pixels a side
    patch: int = 8
    width: int = 192
    depth: int = 6
    heads: int = 3
    mlp_ratio: float = 4.0  # of the MLP's width to the tower's
    crop_scale: float = 0.7  # smallest area of the random-resized-crop that the vision encoder sees in training
    color_jitter: float = 0.1  # brightness and contrast, in training
    clean_target: bool = True  # diffusion draws the whole image, not the crop that the vision encoder sees
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: Literal["crop", "shortest", "squash", "longest"] = "crop"  # outside training; all but crop as in open_clip
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # of those
    fill: int = 0  # level of what "longest" pads with
    pool: Literal["mean", "cls", "patches", "map"] = "mean"  # patches: their mean beside a class token; map: attention
    patch_bias: bool = True
    pre_norm: bool = False  # a norm before the first block, as in CLIP
    norm_after_pool: bool = False  # the final norm sees the pooled vector, as in CLIPA
    activation: Activation = "gelu_tanh"
    qk_norm: bool = True
    eps: float = 1e-5  # of the norms
    proj: Projection = "linear"
    tower: TowerConfig | None = None  # a wrapped encoder, in place of all that shapes one


@dataclass(slots=True, kw_only=True)
class TextConfig:
    tokenizer: Literal["corpus", "clip", "source"] = "corpus"  # a small BPE trained on data.train, CLIP's, or start's
    vocab_size: int = 2048  # upper bound for a corpus tokenizer; 49408 for CLIP's
    context_length: int = 20
    width: int = 192
    depth: int = 4
    heads: int = 3
    mlp_ratio: float = 4.0
    causal: bool = False
    pool: Literal["mean", "last", "end"] = "mean"  # last: the end-of-text token (CLIP); end: the last place (SigLIP)
    masked: bool = True  # attention does not see the padding; SigLIP's does
    pad_id: int = 0  # what stands there
    activation: Activation = "gelu_tanh"
    qk_norm: bool = True
    eps: float = 1e-5
    proj: Projection = "linear"
    tower: TowerConfig | None = None
    word_dropout: float = 0.0  # probability of leaving a word out of a training caption


@dataclass(slots=True, kw_only=True)
class DenoiserConfig:
    patch: int = 8  # pixels a side, or latents
    width: int = 320
    depth: int = 6
    heads: int = 5
    bottleneck: int = 0  # width between patch and model (JiT); 0: none
    context_depth: int = 0  # first blocks that also update the text stream (MMDiT); later ones only read it


@dataclass(slots=True, kw_only=True)
class ModalityConfig:
    """A modality beside image and text: anybody's adapter before one of mm's own encoders. See docs/adapters.md."""

    name: str  # of the input, the metrics, and the argument of `encode`
    adapter: str  # "package.module:Class", a subclass of mm.adapters.base.Adapter that is given this
    width: int = 192
    depth: int = 4
    heads: int = 3
    mlp_ratio: float = 4.0
    pool: Literal["mean", "cls", "last"] = "mean"  # cls: the first token; last: the last that the mask shows
    options: str = "{}"  # JSON object: the adapter's own settings


@dataclass(slots=True, kw_only=True)
class LatentsConfig:
    """An autoencoder of diffusers, in whose latents the denoiser draws; read by mm.interop.latents.latents_config."""

    source: str = ""  # where training takes its weights: a folder, or a hub name; a trained model holds them
    kind: Literal["AutoencoderKL", "AutoencoderDC"] = "AutoencoderKL"
    options: str = ""  # the autoencoder's own config, as JSON
    channels: int = 4
    factor: int = 8  # pixels a side of one latent
    scale: float = 1.0  # latents are (the autoencoder's - shift) * scale ...
    shift: float = 0.0
    cached: bool = False  # read those that `mm shards latents` wrote, instead of encoding in each step


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    embed_dim: int = 128  # width of the shared embedding space
    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    denoiser: DenoiserConfig | None = field(default_factory=DenoiserConfig)
    latents: LatentsConfig | None = None  # None: the denoiser draws pixels
    modalities: tuple[ModalityConfig, ...] = ()  # more of them; set in the config file only
