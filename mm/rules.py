"""What makes a setting impossible: the range of every number, and what must fit together."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from mm.config import ConfigError, ModelConfig, TrainConfig
from mm.fields import describe, fits, leaves
from mm.rules_modalities import validate_modalities

# What a number must be, the test for it, and the fields it holds for (every element of a tuple).
RULES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "at least 1",
        lambda number: number >= 1,
        "run.steps run.log_every data.batch_size data.shuffle_block data.shapes data.max_consecutive_errors "
        "data.buffer_mb model.embed_dim model.image.size model.image.patch "
        "model.image.width model.image.depth model.image.heads model.text.vocab_size model.text.context_length "
        "model.text.width model.text.depth model.text.heads model.denoiser.patch model.denoiser.width "
        "model.latents.channels model.latents.factor "
        "model.denoiser.depth model.denoiser.heads objectives.diffusion.copies objectives.align.block "
        "adapt.lora_rank optim.muon_steps optim.accumulate checkpoint.keep health.spike_window health.most",
    ),
    (
        "0 or more",
        lambda number: number >= 0,
        "model.image.fill model.text.pad_id start.size run.seed run.eval_every run.sample_every run.diagnose_every "
        "data.workers data.cache_mb "
        "model.denoiser.bottleneck "
        "model.denoiser.context_depth objectives.contrastive.weight objectives.diffusion.weight "
        "objectives.align.weight objectives.diffusion.text_grad objectives.diffusion.image_grad "
        "objectives.align.warmup objectives.align.stop optim.weight_decay optim.muon_weight_decay optim.warmup "
        "parallel.threads parallel.shard checkpoint.every checkpoint.minutes checkpoint.keep_every "
        "health.stall_seconds",
    ),
    (
        "above 0",
        lambda number: number > 0,
        "data.fetch_gb data.stall_seconds model.latents.scale model.image.eps model.text.eps "
        "model.image.mlp_ratio model.image.std model.text.mlp_ratio "
        "objectives.contrastive.init_scale objectives.contrastive.max_scale "
        "objectives.diffusion.sigma_std objectives.diffusion.noise_scale objectives.diffusion.shift optim.lr "
        "adapt.lora_alpha optim.muon_lr optim.clip parallel.timeout",
    ),
    (
        "between 0 and 1",
        lambda number: 0 <= number <= 1,
        "data.max_error_rate model.image.color_jitter model.text.word_dropout objectives.diffusion.drop_text "
        "objectives.diffusion.drop_image objectives.align.gamma objectives.align.decay optim.final",
    ),
    ("above 1", lambda number: number > 1, "health.spike_factor"),
    ("above 0 and at most 1", lambda number: 0 < number <= 1, "model.image.crop_scale objectives.diffusion.share"),
    ("at least 0 and below 1", lambda number: 0 <= number < 1, "optim.betas optim.muon_momentum optim.ema"),
)


def validate(config: TrainConfig) -> None:
    """Refuses a config that cannot run, with a ConfigError that names the field, the value and a fix."""
    values = {}
    for name, value, hint in leaves(config):
        if not fits(value, hint):
            raise ConfigError(f"{name} = {value!r}: must be {describe(hint)}")
        values[name] = value
    for text, holds, names in RULES:
        for name in names.split():
            value = values.get(name, ())
            if not all(map(holds, value if isinstance(value, tuple) else (value,))):
                raise ConfigError(f"{name} = {value}: must be {text}")
    _validate_latents(config)
    _validate_model(config.model)
    _validate_data(config)
    validate_modalities(config)
    _validate_objectives(config)
    _validate_adapt(config)
    divides(config, 1)


def _validate_model(model: ModelConfig) -> None:
    image, text, denoiser = model.image, model.text, model.denoiser
    for name, part in (("image", image), ("text", text)):
        if part.tower is None:  # a vision encoder's head splits in four, for rotary positions of rows and columns
            of = 4 if name == "image" else 1
            _multiple(
                f"model.{name}.width", part.width, of * part.heads, ("4 x " if of == 4 else "") + f"model.{name}.heads"
            )
            if part.proj == "none" and part.width != model.embed_dim:
                raise ConfigError(
                    f"model.{name}.proj = 'none': model.{name}.width = {part.width} must be model.embed_dim = "
                    f"{model.embed_dim}; set that, or proj = linear"
                )
    if image.tower is None and (image.resize == "crop" or image.size < image.patch):  # SigLIP's 384 are 27 x 14 and 6
        _multiple("model.image.size", image.size, image.patch, "model.image.patch")
    if text.tokenizer == "clip" and text.vocab_size != 49408 and text.tower is None:
        raise ConfigError(
            f"model.text.vocab_size = {text.vocab_size}: CLIP's tokenizer has 49408 entries; "
            "set 49408, or model.text.tokenizer = corpus"
        )
    if denoiser:
        _multiple("model.denoiser.width", denoiser.width, 4 * denoiser.heads, "4 x model.denoiser.heads")
        what = "model.latents.factor x model.denoiser.patch" if model.latents else "model.denoiser.patch"
        _multiple("model.image.size", image.size, drawn_patch(model), what)
        if denoiser.context_depth > denoiser.depth:
            raise ConfigError(
                f"model.denoiser.context_depth = {denoiser.context_depth}: there are only "
                f"model.denoiser.depth = {denoiser.depth} blocks; set {denoiser.depth} or less"
            )


def _validate_data(config: TrainConfig) -> None:
    image, text = config.model.image, config.model.text
    if text.tokenizer == "source" and not (config.start.text or config.start.model):
        raise ConfigError("model.text.tokenizer = 'source': is start.text's or start.model's; set one, or use corpus")
    if config.start.size and not (config.start.image or config.start.model):
        raise ConfigError(f"start.size = {config.start.size}: of start.image's or start.model's pictures; set one")
    if config.data.buckets == "text" and (not text.masked or text.pool == "end"):
        raise ConfigError("data.buckets = 'text': this text encoder sees its padding, which must not vary; use 'none'")
    if config.data.buckets == "aspect" and (image.tower is not None or image.pool == "map" or image.resize == "squash"):
        raise ConfigError("data.buckets = 'aspect': this vision encoder takes square pictures only; use 'none'")


def drawn_patch(model: ModelConfig) -> int:
    """Pixels a side of what the denoiser takes as one token; 1 without a denoiser."""
    return model.denoiser.patch * (model.latents.factor if model.latents else 1) if model.denoiser else 1


def _validate_latents(config: TrainConfig) -> None:
    latents = config.model.latents
    if latents is None:
        return
    if not latents.options:
        raise ConfigError(
            "model.latents.options = '': says of no autoencoder how it is built; in the config file, set "
            "model.latents = mm.interop.latents.latents_config('FOLDER')"
        )
    if config.model.denoiser is None:
        raise ConfigError("model.latents is set: only model.denoiser draws in it; set that, or model.latents = None")
    if latents.cached and not config.model.image.clean_target:
        raise ConfigError(
            "model.latents.cached = True: cached latents are of the whole picture; set model.image.clean_target = True"
        )
    if latents.cached and config.data.buckets == "aspect":
        raise ConfigError("model.latents.cached = True: cached latents are square; set data.buckets = none or text")


def _validate_objectives(config: TrainConfig) -> None:
    contrastive, diffusion, align = (getattr(config.objectives, name) for name in ("contrastive", "diffusion", "align"))
    if not (contrastive or diffusion):
        raise ConfigError(
            "objectives.contrastive = None and objectives.diffusion = None: nothing to train; switch one on"
        )
    if contrastive and contrastive.init_scale > contrastive.max_scale:
        raise ConfigError(
            f"objectives.contrastive.init_scale = {contrastive.init_scale}: must be at most "
            f"objectives.contrastive.max_scale = {contrastive.max_scale}; lower the one or raise the other"
        )
    if diffusion and not config.model.denoiser:
        raise ConfigError(
            "model.denoiser = None: objectives.diffusion needs it; set model.denoiser, or objectives.diffusion = None"
        )
    if align and not diffusion:
        raise ConfigError(
            "objectives.align is set: it needs objectives.diffusion; set that, or objectives.align = None"
        )
    if align and config.model.denoiser and align.block > config.model.denoiser.depth:
        depth = config.model.denoiser.depth
        raise ConfigError(
            f"objectives.align.block = {align.block}: there are only model.denoiser.depth = {depth} blocks; "
            f"set {depth} or less"
        )


def _validate_adapt(config: TrainConfig) -> None:
    adapt, model = config.adapt, config.model
    parts: tuple[tuple[str, str, Any], ...] = (
        ("image", adapt.image, model.image),
        ("text", adapt.text, model.text),
        ("denoiser", adapt.denoiser, model.denoiser),
    )
    for name, mode, part in parts:
        if not re.fullmatch(r"all|locked|first:\d{1,6}|last|bias|lora", mode):
            raise ConfigError(f"adapt.{name} = {mode}: must be all, locked, first:N, last, bias or lora")
        if part is None and mode not in ("all", "locked"):
            raise ConfigError(f"adapt.{name} = {mode}: model.{name} = None; set adapt.{name} = all, or model.{name}")
        own = part is not None and getattr(part, "tower", None) is None  # else its depth is seen when it is built
        if own and mode.startswith("first:") and int(mode[6:]) > part.depth:
            raise ConfigError(
                f"adapt.{name} = {mode}: there are only model.{name}.depth = {part.depth} blocks; "
                f"set first:{part.depth} or less"
            )
    drawn = config.objectives.diffusion and adapt.denoiser != "locked"
    if adapt.image == adapt.text == "locked" and not drawn and not model.modalities:
        raise ConfigError(
            "adapt.image = adapt.text = locked: nothing is left to train; set one of adapt to all or lora"
        )


def divides(config: TrainConfig, processes: int) -> None:
    """Refuses a batch that this many processes and `optim.accumulate` micro-batches cannot share out equally."""
    parts, what = config.optim.accumulate * processes, "optim.accumulate"
    if processes > 1:
        what = f"{processes} processes" + (f" x {what}" if config.optim.accumulate > 1 else "")
    _multiple("data.batch_size", config.data.batch_size, parts, what)
    diffusion = config.objectives.diffusion
    drawn = diffusion.share * config.data.batch_size / parts if diffusion else 0.0
    if parts > 1 and abs(drawn - round(drawn)) > 1e-6:
        raise ConfigError(
            f"objectives.diffusion.share = {diffusion.share if diffusion else 0}: of data.batch_size = "
            f"{config.data.batch_size} in {parts} parts ({what}) it is {drawn:g} samples each; make that whole"
        )


def _multiple(name: str, value: int, of: int, what: str) -> None:
    """Refuses `value` unless `of` divides it, naming the nearest values that work."""
    if value % of:
        below = value // of * of
        choices = f"{below} or {below + of}" if below else f"{of}"
        raise ConfigError(f"{name} = {value}: must be a multiple of {what} = {of}; try {choices}")
