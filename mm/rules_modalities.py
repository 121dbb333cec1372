"""What makes an added modality impossible, and which pairs of modalities the contrastive objective compares."""

from __future__ import annotations

import itertools
import json
import re

from mm.config import ConfigError, ModalityConfig, ModelConfig, TrainConfig
from mm.fields import describe, fits, leaves, suggestion

_TAKEN = ("image", "text", "target", "denoiser", "draw", "progress")  # what inputs and arguments are called already
_ADAPTER = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def validate_modalities(config: TrainConfig) -> None:
    """Refuses modalities that cannot be built or that nothing trains, and pairs of what is no modality."""
    names = modality_names(config.model)
    contrastive = config.objectives.contrastive
    paired = {name for pair in pairs_of(contrastive.pairs, names) for name in pair} if contrastive else set()
    for place, modality in enumerate(config.model.modalities):
        where = f"model.modalities[{place}]"
        _validate_modality(modality, where)
        if names.count(modality.name) > 1:
            raise ConfigError(f"{where}.name = {modality.name!r}: there are two of that name; rename one")
        if modality.name not in paired:
            raise ConfigError(
                f"{where}.name = {modality.name!r}: no objective trains it; add it to objectives.contrastive.pairs"
            )


def _validate_modality(modality: ModalityConfig, where: str) -> None:
    for name, value, hint in leaves(modality, f"{where}."):
        if not fits(value, hint):
            raise ConfigError(f"{name} = {value!r}: must be {describe(hint)}")
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", modality.name) or modality.name in _TAKEN:
        raise ConfigError(
            f"{where}.name = {modality.name!r}: must be small letters, digits and _, at most 32, "
            f"and none of {', '.join(_TAKEN)}"
        )
    if not _ADAPTER.fullmatch(modality.adapter):
        raise ConfigError(f"{where}.adapter = {modality.adapter!r}: must be 'package.module:Class'")
    for name in ("width", "depth", "heads"):
        if getattr(modality, name) < 1:
            raise ConfigError(f"{where}.{name} = {getattr(modality, name)}: must be at least 1")
    if modality.mlp_ratio <= 0:
        raise ConfigError(f"{where}.mlp_ratio = {modality.mlp_ratio}: must be above 0")
    if modality.width % modality.heads:
        raise ConfigError(
            f"{where}.width = {modality.width}: must be a multiple of {where}.heads = {modality.heads}; "
            f"try {-(-modality.width // modality.heads) * modality.heads}"
        )
    try:
        options = json.loads(modality.options)
    except ValueError as error:
        raise ConfigError(f"{where}.options = {modality.options!r}: not JSON ({error})") from None
    if not isinstance(options, dict):
        raise ConfigError(f"{where}.options = {modality.options!r}: must be a JSON object, such as '{{}}'")


def modality_names(model: ModelConfig) -> list[str]:
    """Of all that a model encodes, in order."""
    return ["image", "text", *(modality.name for modality in model.modalities)]


def pairs_of(pairs: str, names: list[str]) -> list[tuple[str, str]]:
    """The pairs of modalities that `objectives.contrastive.pairs` names. Raises ConfigError for one that is none."""
    if pairs == "all":
        return list(itertools.combinations(names, 2))
    found = []
    for text in pairs.split(","):
        sides = text.strip().split("-")
        wrong = next((side for side in sides if side not in names), "")
        if len(set(sides)) != 2 or len(sides) != 2 or wrong:
            why = f"no modality {wrong!r}{suggestion(wrong, names)}" if wrong else "a pair is two names, as image-text"
            raise ConfigError(f"objectives.contrastive.pairs = {pairs!r}: {why}; there are {', '.join(names)}")
        first, second = sorted(sides, key=names.index)
        if (first, second) in found:
            raise ConfigError(f"objectives.contrastive.pairs = {pairs!r}: {text.strip()} is there twice; take one away")
        found.append((first, second))
    return found
