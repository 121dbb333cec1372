"""What a run begins with: either tower, the denoiser, or all of it, from any source that `mm.load` takes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mm import settings
from mm.adapters.autoencoder import AutoencoderSpace
from mm.config import ConfigError, ImageConfig, LatentsConfig, ModelConfig, TrainConfig
from mm.interop.origin import OBJECTIVES, Origin, check_tokenizer, fill
from mm.interop.sources import read
from mm.training.manifest import last_step

if TYPE_CHECKING:
    from torch import Tensor

    from mm.adapters.text import Tokenizer
    from mm.objectives.step import TrainStep

OF_THE_RUN = {  # how a run feeds an encoder is its own affair
    "image": ("crop_scale", "color_jitter", "clean_target"),
    "text": ("word_dropout",),
}
PREFIXES = {
    "image": ("adapters.image.", "encoders.image."),
    "text": ("adapters.text.", "encoders.text."),
    "denoiser": ("denoiser.", "latents."),  # with the autoencoder in whose latents it draws
}


@dataclass
class Start:
    """The sources of a run's first weights, by part."""

    config: TrainConfig
    parts: dict[str, str] = field(default_factory=dict)  # image | text | denoiser | an added modality -> source
    tokenizer: Tokenizer | None = None
    known: dict[str, Origin] = field(default_factory=dict)
    gone: str = ""  # why the sources cannot be read any more; a checkpoint must have the weights then

    def fill(self, step: TrainStep) -> list[str]:
        """Put the weights in place; what was done, a line each. Raises ConfigError where they do not fit."""
        lines = self._fill(step)
        self.known.clear()  # as large as the model
        return lines

    def _fill(self, step: TrainStep) -> list[str]:
        lines = []
        for source in dict.fromkeys(self.parts.values()):
            origin = self.known[source]
            names = [part for part, where in self.parts.items() if where == source]
            count = 0
            for prefix in [prefix for part in names for prefix in _prefixes(part)]:
                tensors = self._fitting(origin, prefix)
                own = step.model.state_dict()
                kept = {name: own[name] for name in own if name.startswith(origin.fresh)} if origin.fresh else {}
                fill(step.model, {**{n: t for n, t in kept.items() if n.startswith(prefix)}, **tensors}, source, prefix)
                count += sum(tensor.numel() for tensor in tensors.values())
            lines.append(f"{' and '.join(names)} from {source}: {count / 1e6:.1f} M weights")
            if "denoiser" in names and isinstance(step.model.latents, AutoencoderSpace):
                step.model.latents.loaded = True
            if source == self.config.start.model:
                _scales(step, origin)
        return lines

    def _fitting(self, origin: Origin, prefix: str) -> dict[str, Tensor]:
        """A source's tensors under a prefix, its position embeddings stretched to the run's picture size."""
        from mm.adapters.image import stretch

        found = {name: tensor for name, tensor in origin.tensors.items() if name.startswith(prefix)}
        theirs, ours = origin.model.image, self.config.model.image
        name = "adapters.image.position"
        if name in found and theirs.size != ours.size and ours.tower is None:
            side = ours.size // ours.patch
            found[name] = stretch(found[name], theirs.size // theirs.patch, side, side)
        return found


def resolve(config: TrainConfig, weights: bool = True) -> Start:
    """The start that `config.start` describes; `config.model` takes the shapes of its sources, in place.

    A run that has a checkpoint has all of it from there, and its sources may be gone. Raises ConfigError for a source
    that cannot be read, lacks what is asked of it, or does not fit another.
    """
    try:
        return _resolved(config, weights)
    except ConfigError as error:
        folder = Path(config.run.dir)
        if not weights or not last_step(folder):
            raise
        saved = settings.read(folder / "config.json")
        if saved.start != config.start:
            raise
        # whose adapters are imported is said by the run's Python file, never by what is read
        config.model = replace(saved.model, modalities=config.model.modalities)
        config.objectives.contrastive = saved.objectives.contrastive
        return Start(config, gone=str(error))


def _resolved(config: TrainConfig, weights: bool) -> Start:
    start, model = config.start, config.model
    found = Start(config)
    for part in ("image", "text", "denoiser"):
        source = getattr(start, part) or start.model
        if not source:
            continue
        if source not in found.known:
            found.known[source] = read(source, weights, size=start.size)
        origin = found.known[source]
        has = part in origin.parts if part != "denoiser" else origin.model.denoiser is not None
        if not has and getattr(start, part):
            raise ConfigError(f"start.{part} = {source}: has no {part}; name a source that has one")
        if not has or (part == "denoiser" and model.denoiser is None and not start.denoiser):
            continue
        found.parts[part] = source
        theirs = getattr(origin.model, part)
        if part in OF_THE_RUN:
            theirs = replace(theirs, **{name: getattr(getattr(model, part), name) for name in OF_THE_RUN[part]})
        setattr(model, part, theirs)
        if part == "denoiser":
            model.latents = _latents(origin.model, model)
    brought = found.known[start.model].parts if start.model in found.known else ()
    found.parts |= {modality.name: start.model for modality in model.modalities if modality.name in brought}
    if "text" in found.parts:
        found.tokenizer = found.known[found.parts["text"]].tokenizer
        check_tokenizer(found.parts["text"], model, found.tokenizer)
    _width(found, model)
    if start.size:
        model.image = _resized(model.image, start.size)
    theirs, mine = found.known[start.model].contrastive if start.model else None, config.objectives.contrastive
    if theirs is not None and mine is not None:
        mine.kind, mine.init_scale, mine.init_bias = theirs.kind, theirs.init_scale, theirs.init_bias
        trained = found.known[start.model].tensors.get(f"{OBJECTIVES}contrastive.logit_scale")
        mine.max_scale = max(mine.max_scale, theirs.init_scale, 0.0 if trained is None else float(trained.exp()))
    return found


def _prefixes(part: str) -> tuple[str, ...]:
    """How the names of a part's tensors begin; of an added modality's as of image and text."""
    return PREFIXES.get(part, (f"adapters.{part}.", f"encoders.{part}."))


def _latents(theirs: ModelConfig, ours: ModelConfig) -> LatentsConfig | None:
    """What a source's denoiser draws in; the autoencoder's weights are in the source too."""
    cached = ours.latents is not None and ours.latents.cached
    return None if theirs.latents is None else replace(theirs.latents, source="", cached=cached)


def _width(found: Start, model: ModelConfig) -> None:
    """The shared space: that of the sources, which must agree; a backbone without one is projected into it."""
    widths = {}
    for part, source in found.parts.items():
        origin = found.known[source]
        if part == "denoiser" or not origin.fresh:
            widths[part] = origin.model.embed_dim
        elif part == "image":
            model.image.proj = "linear"
    if len(set(widths.values())) > 1:
        told = ", ".join(f"start.{part} = {found.parts[part]} has {width}" for part, width in widths.items())
        raise ConfigError(f"embeddings of different width: {told}; choose sources of one width")
    if widths:
        model.embed_dim = next(iter(widths.values()))


def _scales(step: TrainStep, origin: Origin) -> None:
    """Logit scale and bias, where both losses have them."""
    own = step.state_dict()
    found = {name: tensor for name, tensor in origin.extras().items() if name in own and name.startswith(OBJECTIVES)}
    step.load_state_dict(found, strict=False)


def _resized(image: ImageConfig, size: int) -> ImageConfig:
    """The same encoder for pictures of another size."""
    if image.tower is None or image.tower.library == "timm":  # which was read for that size
        return replace(image, size=size)
    options = json.loads(image.tower.options)
    options["vision_cfg"]["image_size"] = size
    return replace(image, size=size, tower=replace(image.tower, options=json.dumps(options, sort_keys=True)))
