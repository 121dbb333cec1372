"""mm's models as open_clip reads them: `open_clip_config.json` and `open_clip_model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.adapters.hub_tokenizer import HubTokenizer
from mm.config import ConfigError
from mm.interop import names, preprocessing
from mm.interop.describe import NoCounterpart, describe, registered, same_architecture
from mm.interop.open_clip import PREFIX, pairs
from mm.interop.origin import OBJECTIVES, Origin, refuse_difference
from mm.interop.tokenizer_out import hub_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def write(origin: Origin, folder: Path, out: Path) -> list[str]:
    """The two files, and the tokenizer's where it has some; `out` is where the folder will be. What to tell the user.

    `open_clip.create_model_and_transforms("local-dir:OUT")` reads them, strictly, and, where open_clip has a
    registered config of this architecture, its name with `pretrained=` the weights too. A denoiser is left out. Raises
    ConfigError for a model that open_clip has no classes for.
    """
    from safetensors.torch import save_file

    name, cfg = _config(origin)
    tensors = convert(origin, cfg)
    _check(origin.source, cfg, tensors)
    preprocess = preprocessing.open_clip(origin.model.image)
    whole = {"model_cfg": cfg, "preprocess_cfg": preprocess}
    (folder / CONFIG).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    told = []
    if isinstance(origin.tokenizer, HubTokenizer):
        if origin.tokenizer.serialized:
            hub_tokenizer(origin, folder)
        else:
            told.append(f"the tokenizer {origin.tokenizer.name} is not in this model: only its name is written")
    place = cfg["text_cfg"].get("hf_model_name")
    if place and Path(place).is_dir():
        told.append(f"open_clip builds this text encoder from the folder {place}: it loads only where that is")
    if origin.model.denoiser is not None:
        told.append("the denoiser is left out: open_clip has none")
    if origin.model.modalities:
        names = ", ".join(extra.name for extra in origin.model.modalities)
        told.append(f"{names} is left out: open_clip has images and text only")
    if origin.model.image.resize == "crop":
        told.append("pictures: mm's crop is open_clip's resize_mode shortest, the same part of a picture")
    return [*told, *_calls(name, preprocess, out)]


def convert(origin: Origin, cfg: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors by open_clip's names; the inverse of `mm.interop.open_clip.convert`, to the bit."""
    inside = "text." if cfg.get("custom_text") or cfg["text_cfg"].get("hf_model_name") else ""
    table = pairs(origin.model, inside) + names.scale("init_logit_bias" in cfg)
    found = {}
    for name in table:
        if name.ours not in origin.tensors:
            raise ConfigError(f"{origin.source}: has no {name.ours}; open_clip needs {name.theirs}")
        tensor = names.FORMS[name.form][1](origin.tensors[name.ours], origin.model.image.patch)
        found[name.theirs] = tensor.contiguous()
    known = {name.ours for name in table}
    for ours, tensor in origin.tensors.items():
        theirs = _wrapped(origin, ours)
        if theirs and ours not in known:
            found[theirs] = tensor.contiguous()
    return found


def _wrapped(origin: Origin, ours: str) -> str:
    """The name of a wrapped tower's tensor; "" for another's."""
    image, text = origin.model.image.tower, origin.model.text.tower
    if image is not None and ours.startswith("encoders.image."):
        inner = ours.removeprefix("encoders.image.")
        if image.library == "timm":
            return f"visual.{inner}" if inner.startswith("trunk.") else f"visual.head.{inner}"
        return inner
    return ours.removeprefix("encoders.text.") if text is not None and ours.startswith("encoders.text.") else ""


def _config(origin: Origin) -> tuple[str, dict[str, Any]]:
    """The name of a registered config of this architecture, or "", and the `model_cfg` to write."""
    note = origin.note.get("open_clip") or {}
    cfg = note.get("model_cfg") or {}
    if "multimodal_cfg" in cfg:
        raise ConfigError(
            f"{origin.source}: a CoCa model, of which mm reads the image and text towers and not the text decoder; "
            "it cannot be written back, release it with --format mm"
        )
    missing = [name for name in ("image", "text") if name not in origin.parts]
    if missing:
        raise ConfigError(f"{origin.source}: has no {missing[0]} encoder; open_clip needs one, use --format mm")
    if origin.contrastive is None or f"{OBJECTIVES}contrastive.logit_scale" not in origin.tensors:
        raise NoCounterpart("open_clip", "objectives.contrastive", None, "a logit scale")
    if "embed_cls" in cfg.get("text_cfg", {}) and origin.model.text.tower is None:
        cfg = {}
    name, found = registered(origin.model, origin.contrastive, origin.tokenizer, note.get("name", ""))
    if found:
        return name, found
    if cfg and _still(origin, note):
        return "", dict(cfg)
    return "", describe(origin.model, origin.contrastive, origin.tokenizer)


def _still(origin: Origin, note: dict[str, Any]) -> bool:
    """Whether the description that a model came with is still that of its architecture."""
    from mm.interop.architecture import model_config

    try:
        came = model_config(note["name"], note["model_cfg"], note["preprocess_cfg"])
    except (ConfigError, KeyError, TypeError):
        return False
    bias = f"{OBJECTIVES}contrastive.logit_bias" in origin.tensors
    return same_architecture(came, origin.model) and ("init_logit_bias" in note["model_cfg"]) == bias


def _check(source: str, cfg: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raises ConfigError unless open_clip's model, built on no device, has the same names and shapes."""
    import torch
    from open_clip.model import CLIP, CustomTextCLIP

    if cfg["text_cfg"].get("hf_model_name"):  # built from the hub: that it fitted is known from reading
        return
    vision = cfg["vision_cfg"]
    if "timm_model_name" in vision:
        vision = {**vision, "timm_model_pretrained": False}
    kind = CustomTextCLIP if cfg.get("custom_text") else CLIP
    rest = {key: value for key, value in cfg.items() if key != "custom_text"}
    with torch.device("meta"):
        built = kind(**{**rest, "vision_cfg": vision, "text_cfg": dict(cfg["text_cfg"])})
    expected = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    refuse_difference(source, expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, "open_clip")


def _calls(name: str, preprocess: dict[str, Any], out: Path) -> list[str]:
    """How open_clip, and mm again, load what was written."""
    from open_clip.transform import PreprocessCfg

    calls = [f'open_clip.create_model_and_transforms("local-dir:{out}")']
    if name:
        usual = PreprocessCfg()
        keys = {"mean": "image_mean", "std": "image_std", "interpolation": "image_interpolation"}
        given = ""
        for key, option in {**keys, "resize_mode": "image_resize_mode"}.items():
            value = preprocess[key]
            if (tuple(value) if isinstance(value, list) else value) != getattr(usual, key):
                given += f", {option}={tuple(value) if isinstance(value, list) else value!r}"
        calls.append(f'open_clip.create_model_and_transforms("{name}", pretrained="{out / WEIGHTS}"{given})')
    return [f"load it: {call}" for call in [*calls, f'mm.load("{PREFIX}local-dir:{out}")']]
