"""Every setting of a run, in one place.

A run is one Python file with `def config() -> TrainConfig`. How it is read, overridden and saved is in
`mm/settings.py`, what makes a setting impossible in `mm/rules.py`; their functions are reachable here too, and so is
what shapes a model, `mm/model_config.py`. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mm.model_config import (
    Activation,
    DenoiserConfig,
    ImageConfig,
    LatentsConfig,
    ModalityConfig,
    ModelConfig,
    Projection,
    TextConfig,
    TowerConfig,
)

if TYPE_CHECKING:
    from mm.rules import validate
    from mm.settings import difference, from_dict, load, override, read, save, to_dict

__all__ = ["VERSION", "ConfigError", "TrainConfig", "validate"]
__all__ += [
    "Activation",
    "DenoiserConfig",
    "ImageConfig",
    "LatentsConfig",
    "ModalityConfig",
    "ModelConfig",
    "Projection",
    "TextConfig",
    "TowerConfig",
]
__all__ += ["difference", "from_dict", "load", "override", "read", "save", "to_dict"]

VERSION = 1  # of config.json


class ConfigError(ValueError):
    """A setting that cannot work: names the field, the value, and a fix."""


@dataclass(slots=True, kw_only=True)
class RunConfig:
    dir: str = "runs/debug"  # the run folder; starting again with the same folder resumes
    seed: int = 0  # weights, sample order, augmentation, noise
    steps: int = 100  # optimizer steps in all
    log_every: int = 10  # steps between lines of metrics.jsonl
    eval_every: int = 0  # steps between evaluations on data.val; 0: only at the end
    sample_every: int = 0  # steps between sample images; 0: only at the end
    diagnose_every: int = 0  # steps between gradient norms and cosine of the objectives on the encoders; 0: never
    tensorboard: bool = False  # also write TensorBoard events to <dir>/tensorboard
    tracker: Literal["none", "wandb", "trackio"] = "none"  # also report there; its package must be installed
    project: str = "mm"  # the tracker's name for a group of runs


@dataclass(slots=True, kw_only=True)
class DataConfig:
    train: str = ""  # shards: a folder, a pattern (brace or glob), a URL, or several joined by ::
    val: str = ""  # the same, for periodic evaluation; may be empty
    batch_size: int = 64  # global: over all processes and accumulation steps
    workers: int = 0  # decoding processes; 0 decodes in the training process
    shuffle_block: int = 16384  # samples shuffled together; reads stay within this many consecutive samples
    caption: str = "txt"  # txt, caption, json.FIELD, or several: txt=0.7,json.FIELD=0.3; one for each source by ::
    weights: str = ""  # of the parts of train, by sample: 2::1; empty: they are joined
    buckets: Literal["none", "text", "aspect"] = "none"  # batches of like caption length, or aspect ratio
    shapes: int = 7  # picture shapes of aspect buckets, from 1:2 to 2:1
    max_error_rate: float = 0.05  # share of unusable samples above which the run stops
    max_consecutive_errors: int = 100  # unusable samples in a row above which it stops
    buffer_mb: int = 512  # batches made ahead, over all workers
    cache_mb: int = 256  # small pictures kept decoded, over all workers
    fetch_gb: float = 20.0  # disk that shards from a remote store may take
    stall_seconds: float = 60.0  # a remote store that brings nothing for so long is asked again, five times


@dataclass(slots=True, kw_only=True)
class StartConfig:
    """Where weights come from before the first step; the shape of each part named here is its source's.

    A source: a run folder, a released folder, open_clip:NAME/TAG, open_clip:NAME@FILE, open_clip:local-dir:DIR,
    timm:NAME or timm:NAME@FILE (vision), hf:NAME or a folder (text), hub:ORG/NAME.
    """

    model: str = ""  # both encoders, logit scale and bias, and the denoiser where the source has one
    image: str = ""  # the vision encoder
    text: str = ""  # the text encoder and its tokenizer
    denoiser: str = ""
    size: int = 0  # pixels a side, where not the source's: position embeddings are stretched


@dataclass(slots=True, kw_only=True)
class ContrastiveConfig:
    weight: float = 1.0
    kind: Literal["softmax", "sigmoid"] = "softmax"
    pairs: str = "all"  # of modalities, whose losses are averaged: all, or some, as in image-text,depth-text
    init_scale: float = 10.0  # initial logit scale (factor, not log)
    init_bias: float = -10.0  # sigmoid only
    max_scale: float = 100.0


@dataclass(slots=True, kw_only=True)
class DiffusionConfig:
    weight: float = 1.0
    share: float = 1.0  # of a batch's samples that are drawn from; the others only serve the contrastive objective
    copies: int = 1  # noise levels drawn for each of those
    sigma_mean: float = 0.8  # logit of the noise level: mean ...
    sigma_std: float = 0.8  # ... and standard deviation
    noise_scale: float = 1.0  # standard deviation of the noise; JiT: image size / 256, at least 1
    shift: float = 1.0  # resolution shift of the noise level
    drop_text: float = 0.1  # probability of hiding the text condition
    drop_image: float = 0.9  # probability of hiding the vision condition, drawn independently
    text_grad: float = 1.0  # scale of the diffusion gradient into the text encoder; 0 stops it
    image_grad: float = 1.0  # the same into the vision encoder


@dataclass(slots=True, kw_only=True)
class AlignConfig:
    weight: float = 0.5
    block: int = 2  # denoiser block whose output is aligned
    warmup: int = 200  # steps over which the weight ramps in
    stop: int = 0  # step at which it ends; 0: never
    gamma: float = 0.6  # share of the mean token taken off the teacher's tokens
    decay: float = 0.99  # of the teacher, an average of the vision encoder's weights


@dataclass(slots=True, kw_only=True)
class ObjectivesConfig:
    contrastive: ContrastiveConfig | None = field(default_factory=ContrastiveConfig)
    diffusion: DiffusionConfig | None = field(default_factory=DiffusionConfig)
    align: AlignConfig | None = None


@dataclass(slots=True, kw_only=True)
class AdaptConfig:
    """What trains of each part: all | locked | first:N | last | bias | lora.

    first:N freezes the embedding and the first N blocks, last everything before the last block; bias trains biases
    only, lora only small matrices beside those of the blocks. Locked is all of a tower, its projection too.
    """

    image: str = "all"
    text: str = "all"
    denoiser: str = "all"
    lora_rank: int = 8
    lora_alpha: float = 16.0  # the product of the small matrices is added times alpha / rank


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    name: Literal["adamw", "muon"] = "adamw"  # muon: Muon on the matrices, AdamW on the rest
    lr: float = 1e-3  # AdamW's
    muon_lr: float = 0.01
    muon_momentum: float = 0.95
    muon_steps: int = 5  # Newton-Schulz iterations
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    muon_weight_decay: float = 0.05
    warmup: int = 50
    final: float = 0.02  # learning rate at the end, as a share of the peak
    schedule: Literal["cosine", "linear"] = "cosine"
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.999  # decay of the averaged weights; ramps in as (1 + step) / (10 + step); 0: none are kept
    accumulate: int = 1  # micro-batches a step


@dataclass(slots=True, kw_only=True)
class ParallelConfig:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "bf16_params"] = "bf16"  # bf16_params: shards of blocks are gathered in bf16 too
    compile: bool = True
    threads: int = 0  # CPU threads of torch; 0: one a core
    strategy: Literal["ddp", "fsdp", "hybrid"] = "ddp"  # whole copies; sharded; sharded in groups, copied across them
    shard: int = 0  # hybrid: processes that share one copy; 0: those of one machine
    reshard: bool = True  # fsdp, hybrid: free gathered weights after the forward and gather them again
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # selective: matrix products are kept
    timeout: float = 1800.0  # seconds after which a collective that does not end is an error


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    every: int = 100  # steps; 0: only at the end
    minutes: float = 0.0  # also when the last one is so old; 0: never
    keep: int = 2  # newest checkpoints that stay
    keep_every: int = 0  # those of every so many steps stay too; 0: none
    background: bool = True  # write while training goes on


@dataclass(slots=True, kw_only=True)
class HealthConfig:
    nonfinite: Literal["stop", "skip", "rewind"] = "stop"  # a loss or gradient norm that is no number
    spike: Literal["off", "stop", "skip", "rewind"] = "off"  # a loss far above those before it
    spike_factor: float = 2.0  # that many times the median of the last `spike_window` steps
    spike_window: int = 50
    most: int = 3  # skips and rewinds in the run before it stops
    stall_seconds: float = 600.0  # without progress: stacks are written and the run ends; 0: never


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    start: StartConfig = field(default_factory=StartConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)


if not TYPE_CHECKING:  # seen by nobody's type checker, or every misspelt name would pass

    def __getattr__(name: str) -> Any:
        """The functions of `mm/settings.py` and `mm/rules.py`, which import this file."""
        if name.startswith("_") or name not in __all__:
            raise AttributeError(f"module 'mm.config' has no attribute {name!r}")
        from mm import rules, settings

        return getattr(rules if name == "validate" else settings, name)
