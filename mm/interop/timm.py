"""timm backbones as the vision encoder: any model that gives features, with the preprocessing of its weights."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from mm.adapters.hub import reachable
from mm.adapters.text import ClipTokenizer
from mm.config import ConfigError, ContrastiveConfig, ImageConfig, ModelConfig, TextConfig, TowerConfig
from mm.fields import suggestion
from mm.interop.files import read_weights
from mm.interop.origin import Origin, refuse_difference

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "timm:"
SIDE = "encoders.image.trunk."


def read(source: str, weights: bool = True, size: int = 0) -> Origin:
    """`timm:NAME[.TAG]` with timm's weights, or `timm:NAME@FILE`; `size` pixels a side instead of the model's own.

    The pooled features themselves are the embedding; there is no text encoder. Position embeddings are stretched to
    other sizes as timm does it. Raises ConfigError for a name that timm does not know (with the nearest), and weights
    that do not fit.
    """
    import timm

    name, _, file = source.removeprefix(PREFIX).partition("@")
    bare = name.split(".")[0]
    if not timm.is_model(bare):
        raise ConfigError(f"{source}: timm has no model {bare}{suggestion(bare, timm.list_models())}")
    options: dict[str, Any] = {"num_classes": 0}
    trunk, options = _built(source, name, options, size)
    data = timm.data.resolve_model_data_config(trunk)
    side = size or _square(source, data["input_size"])
    image = ImageConfig(
        size=side,
        mean=_three(data["mean"]),
        std=_three(data["std"]),
        resize="squash" if data["crop_mode"] == "squash" else "shortest",
        interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
        crop_scale=0.9,
        color_jitter=0.0,
        proj="none",
        tower=TowerConfig(library="timm", name=bare, options=json.dumps(options, sort_keys=True)),
    )
    width = int(getattr(trunk, "head_hidden_size", 0) or trunk.num_features)
    text = TextConfig(tokenizer="clip", vocab_size=49408, width=64, depth=1, heads=1)  # of shape only
    model = ModelConfig(embed_dim=width, image=image, text=text, denoiser=None)
    note = {"timm": {"name": name, "data": {key: str(value) for key, value in data.items()}}}
    origin = Origin(source, model, ClipTokenizer(), contrastive=ContrastiveConfig(), note=note, parts=("image",))
    origin.fresh = ("encoders.image.proj.",)
    if weights:
        origin.tensors = _weights(source, name, file, trunk, options)
    return origin


def _built(source: str, name: str, options: dict[str, Any], size: int) -> tuple[Any, dict[str, Any]]:
    """The backbone without its classifier, for pictures of `size` where that is not its own."""
    import timm

    options = {**options, "img_size": size} if size else options
    try:
        return timm.create_model(name, pretrained=False, **options), options
    except TypeError:  # a convolutional network takes any size
        options.pop("img_size", None)
        return timm.create_model(name, pretrained=False, **options), options
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(f"{source}: timm cannot build it for {size or 'its own'} pixels a side: {error}") from error


def _weights(source: str, name: str, file: str, trunk: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    """The backbone's tensors by mm's names."""
    import timm

    expected = {key: tuple(tensor.shape) for key, tensor in trunk.state_dict().items()}
    if file:
        found = read_weights(file)
        found = {key: tensor for key, tensor in found.items() if key in expected or not _classifier(key)}
        found = _resized(found, trunk, expected)
    else:
        if not reachable():
            raise ConfigError(
                f"{source}: its weights could not be fetched, the hub does not answer; give a file: @FILE"
            )
        try:
            found = timm.create_model(name, pretrained=True, **options).state_dict()
        except Exception as error:  # whatever a client of the network raises
            raise ConfigError(f"{source}: its weights could not be fetched ({error}); give a file: @FILE") from error
    refuse_difference(source, expected, {key: tuple(tensor.shape) for key, tensor in found.items()}, name)
    return {SIDE + key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in found.items()}


def _resized(found: dict[str, Tensor], trunk: Any, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Position embeddings and tables of another picture size, stretched as timm stretches them for its own weights."""
    same = all(tuple(tensor.shape) == expected.get(key, tuple(tensor.shape)) for key, tensor in found.items())
    stretch = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    if same or stretch is None:
        return found
    try:
        return dict(stretch(dict(found), trunk))
    except (RuntimeError, ValueError, KeyError, AssertionError):
        return found  # not a matter of size: what differs is told from the file as it is


def _classifier(key: str) -> bool:
    """Whether a tensor belongs to the classifier, which is left behind."""
    return key.startswith(("head.", "fc.", "classifier.", "head_dist.")) or ".fc." in key.removeprefix("head")


def _square(source: str, shape: tuple[int, ...]) -> int:
    if shape[1] != shape[2]:
        raise ConfigError(f"{source}: takes pictures of {shape[1]}x{shape[2]} pixels; mm takes square ones")
    return int(shape[1])


def _three(values: Any) -> tuple[float, float, float]:
    a, b, c = values
    return float(a), float(b), float(c)
