"""A model from elsewhere in mm's terms: what `mm.load` serves, a run starts from, and `mm release` writes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mm.config import ConfigError, ContrastiveConfig, DiffusionConfig, ModelConfig, ObjectivesConfig, TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from mm.adapters.text import Tokenizer
    from mm.models.model import Model

OBJECTIVES = "objectives."  # begins the names of what an objective owns


@dataclass
class Origin:
    """An architecture, its tokenizer and preprocessing, and its weights by mm's names (none: architecture only)."""

    source: str  # as the user wrote it
    model: ModelConfig
    tokenizer: Tokenizer
    tensors: dict[str, Tensor] = field(default_factory=dict)  # of Model, and objectives.*
    contrastive: ContrastiveConfig | None = None
    diffusion: DiffusionConfig | None = None
    note: dict[str, Any] = field(default_factory=dict)
    train: TrainConfig | None = None  # of the run that made it, where mm did
    parts: tuple[str, ...] = ("image", "text")  # the modalities that it brings
    fresh: tuple[str, ...] = ()  # begins the names of what it does not bring, and a run initialises

    def config(self) -> TrainConfig:
        """The config that a model loaded from here carries."""
        if self.train is not None:
            return self.train
        objectives = ObjectivesConfig(contrastive=self.contrastive, diffusion=self.diffusion)
        return TrainConfig(model=self.model, objectives=objectives)

    def build(self) -> Model:
        """The model with these weights, in evaluation mode. Raises ConfigError where they do not fit."""
        from mm.models.bounded import build
        from mm.models.model import Model

        check_tokenizer(self.source, self.model, self.tokenizer)
        model = build(lambda: Model(self.model, self.tokenizer, init=False), self.tensors.values(), self.source)
        for name in set(model.adapters) - set(self.parts):
            del model.adapters[name], model.encoders[name]
        fill(model, {n: t for n, t in self.tensors.items() if not n.startswith(OBJECTIVES)}, self.source)
        return model.eval().requires_grad_(False)

    def extras(self) -> dict[str, Tensor]:
        """The objectives' own tensors: logit scale and bias."""
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith(OBJECTIVES)}


def fill(model: Any, tensors: dict[str, Tensor], source: str, prefix: str = "") -> None:
    """Load `tensors` into all of `model`, or all of it whose names begin with `prefix`, in their types.

    Raises ConfigError naming what differs.
    """
    expected = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefix)}
    given = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    refuse_difference(
        source, {n: tuple(t.shape) for n, t in expected.items()}, {n: tuple(t.shape) for n, t in given.items()}
    )
    model.load_state_dict(given, strict=False)


def refuse_difference(
    source: str, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], what: str = "this model"
) -> None:
    """Raises ConfigError unless both have the same names and shapes."""
    lacks = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    shapes = [
        f"{name} is {_size(found[name])}, not {_size(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    parts = []
    if lacks:
        parts.append(f"lacks {_some(lacks)}")
    if extra:
        parts.append(f"has {_some(extra)} that {what} has not")
    if shapes:
        parts.append(_some(shapes))
    if parts:
        raise ConfigError(f"{source}: weights of another architecture: {'; '.join(parts)}")


def check_tokenizer(source: str, model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises ConfigError where the tokenizer has ids that the embedding has no row for."""
    text = model.text
    if tokenizer.vocab_size > text.vocab_size:
        raise ConfigError(
            f"{source}: its tokenizer has {tokenizer.vocab_size} ids and its text embedding {text.vocab_size} rows; "
            "they do not belong together"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"
