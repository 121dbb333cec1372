"""open_clip's models: read by name and tag, from the hub, a folder or a file; and written as open_clip reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.adapters import open_clip_files
from mm.adapters.hub import reachable
from mm.adapters.text import ClipTokenizer
from mm.config import ConfigError
from mm.fields import suggestion
from mm.interop import names
from mm.interop.architecture import contrastive_config, model_config
from mm.interop.files import read_weights
from mm.interop.origin import Origin, check_tokenizer, refuse_difference
from mm.interop.tokenizer_in import hub_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from mm.adapters.text import Tokenizer
    from mm.config import ModelConfig, TextConfig

PREFIX = "open_clip:"
PREPROCESS = {"interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}  # open_clip's PreprocessCfg
IGNORED = ("attn_mask", "position_ids", "text_decoder.")
TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")  # of CLIP's own


def read(source: str, weights: bool = True) -> Origin:
    """`open_clip:NAME/TAG`, `NAME@FILE`, `NAME/TAG@FILE` (the tag's preprocessing), `hf-hub:ORG/REPO`, `local-dir:DIR`.

    Without `weights` only the architecture is read, and `open_clip:NAME` is enough. Raises ConfigError for a name or a
    tag that open_clip does not know (with the nearest), weights of another architecture, or a file that may run code.
    """
    where, _, file = source.removeprefix(PREFIX).partition("@")
    if where.startswith("local-dir:") and Path(source.removeprefix(PREFIX + "local-dir:")).is_dir():
        where, file = source.removeprefix(PREFIX), ""  # an @ in the folder's name
    name, tag = (where, "") if where.startswith(("hf-hub:", "local-dir:")) else _split(where)
    cfg, preprocess, found = _described(source, name, tag, weights and not file)
    model = model_config(name, cfg, preprocess)
    tokenizer = _tokenizer(cfg, model.text, name)
    note = {"open_clip": {"name": name, "tag": tag, "model_cfg": cfg, "preprocess_cfg": preprocess}}
    check_tokenizer(source, model, tokenizer)
    origin = Origin(source, model, tokenizer, contrastive=contrastive_config(cfg), note=note)
    if weights:
        origin.tensors = convert(source, read_weights(file or found), origin)
    return origin


def convert(source: str, theirs: dict[str, Tensor], origin: Origin) -> dict[str, Tensor]:
    """open_clip's state dict by mm's names. Raises ConfigError naming what differs from the architecture."""
    given = {name: tensor for name, tensor in theirs.items() if not any(part in name for part in IGNORED)}
    if origin.model.text.tower is not None and not any(name.startswith("text.") for name in given):
        given = {_apart(name): tensor for name, tensor in given.items()}
    table = pairs(origin.model, "text." if any(name.startswith("text.") for name in given) else "")
    assert origin.contrastive is not None
    table += names.scale("logit_bias" in given)
    ours = {}
    own = {name.theirs for name in table}
    for name in table:
        if name.theirs in given:
            try:
                ours[name.ours] = names.FORMS[name.form][0](given[name.theirs]).float().contiguous()
            except (RuntimeError, IndexError) as error:
                shape = "x".join(map(str, given[name.theirs].shape))
                raise ConfigError(f"{source}: weights of another architecture: {name.theirs} is {shape}") from error
    whole = _wrapped(origin.model)
    for key, tensor in given.items():
        for theirs_prefix, ours_prefix in whole.items():
            if key.startswith(theirs_prefix) and key not in own:
                ours[ours_prefix + key] = tensor.float() if tensor.is_floating_point() else tensor
                own.add(key)
    lacks: dict[str, tuple[int, ...]] = {name.theirs: () for name in table if name.theirs not in given}
    extra: dict[str, tuple[int, ...]] = {key: () for key in given if key not in own}
    refuse_difference(source, lacks, extra, origin.note["open_clip"]["name"])
    _refuse_size(source, origin.model, ours)
    if "objectives.contrastive.logit_scale" in ours:
        factor = float(ours["objectives.contrastive.logit_scale"].exp())
        origin.contrastive.init_scale, origin.contrastive.max_scale = factor, max(100.0, factor)
    if "objectives.contrastive.logit_bias" in ours:
        origin.contrastive.init_bias = float(ours["objectives.contrastive.logit_bias"])
    return ours


def pairs(model: ModelConfig, inside: str) -> list[names.Name]:
    """The names of both towers' tensors, of those that mm has classes for."""
    image, text = model.image, model.text
    found = []
    if image.tower is None:
        found += names.siglip_image(image) if image.pool == "map" else names.clip_image(image)
    return found if text.tower is not None else found + names.text(text, inside)


def _apart(name: str) -> str:
    """A text tower's tensor as it is named in models that keep the tower in a module of its own."""
    return f"text.{name}" if name.startswith(TEXT) else name


def _refuse_size(source: str, model: ModelConfig, ours: dict[str, Tensor]) -> None:
    """Raises ConfigError where the weights are for pictures of another size than the model's."""
    image, position = model.image, ours.get("adapters.image.position")
    if position is None:
        return
    patches = len(position) - (image.pool in ("cls", "patches"))
    side = math.isqrt(patches)
    if side * side == patches and side != image.size // image.patch:
        raise ConfigError(
            f"{source}: its weights are for pictures of {side * image.patch} pixels a side and "
            f"model.image.size = {image.size}; name the open_clip model of that size"
        )


def _wrapped(model: ModelConfig) -> dict[str, str]:
    """Prefixes of the tensors of wrapped towers, theirs to ours."""
    found = {"visual.": "encoders.image."} if model.image.tower is not None else {}
    return found | ({"text.": "encoders.text."} if model.text.tower is not None else {})


def _split(where: str) -> tuple[str, str]:
    name, _, tag = where.partition("/")
    return name, tag


def _described(source: str, name: str, tag: str, weights: bool) -> tuple[dict[str, Any], dict[str, Any], str]:
    """model_cfg, preprocess_cfg and, with `weights`, the path of the weights."""
    constants = open_clip_files.alone("constants")
    default = {"mean": constants.OPENAI_DATASET_MEAN, "std": constants.OPENAI_DATASET_STD, **PREPROCESS}
    if name.startswith("local-dir:"):
        return _folder(source, Path(name.removeprefix("local-dir:")), default, weights)
    if name.startswith("hf-hub:"):
        return _repository(source, name.removeprefix("hf-hub:"), default, weights)
    cfg = open_clip_files.model_config(name)
    if cfg is not None and not tag and not weights:
        return cfg, default, ""
    from open_clip.factory import _MODEL_CONFIGS
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    if cfg is None:
        raise ConfigError(f"{source}: open_clip has no model {name}{suggestion(name, list(_MODEL_CONFIGS))}")
    if not tag:
        tags = ", ".join(list_pretrained_tags_by_model(name)[:8]) or "none"
        raise ConfigError(f"{source}: no weights named; add /TAG (of {tags}) or @FILE.safetensors")
    known = get_pretrained_cfg(name, tag)
    if not known:
        tags = list_pretrained_tags_by_model(name)
        hint = suggestion(tag, tags) or f"; it has {', '.join(tags[:8]) or 'none'}"
        raise ConfigError(f"{source}: open_clip has no weights {tag} of {name}{hint}")
    if known.get("quick_gelu") and not cfg.get("quick_gelu"):
        cfg["quick_gelu"] = True  # open_clip warns and goes on with wrong activations
    return cfg, _over(default, known), _fetched(source, known) if weights else ""


def _over(default: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The preprocessing with what a model says of it; null says nothing, as in open_clip."""
    return {key: value if given.get(key) is None else given[key] for key, value in default.items()}


def _fetched(source: str, known: dict[str, Any]) -> str:
    from open_clip.pretrained import download_pretrained

    if known.get("hf_hub") and not reachable():
        return _cached(source, known["hf_hub"])
    try:
        return str(download_pretrained(known))
    except Exception as error:  # whatever a client of the network raises
        raise ConfigError(
            f"{source}: its weights could not be fetched ({_first(error)}); give a file with @FILE"
        ) from error


def _cached(source: str, repository: str) -> str:
    """The weights that an earlier download left in the hub client's cache."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, name = repository.rpartition("/") if repository.count("/") == 2 else (repository, "", "")
    for file in [name] if name else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]:
        found = try_to_load_from_cache(repository.rstrip("/"), file)
        if isinstance(found, str):
            return found
    raise ConfigError(f"{source}: its weights are not on this machine and the hub does not answer; give a file: @FILE")


def _folder(
    source: str, folder: Path, default: dict[str, Any], weights: bool
) -> tuple[dict[str, Any], dict[str, Any], str]:
    path = folder / "open_clip_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        cfg, preprocess = found["model_cfg"], _over(default, found.get("preprocess_cfg") or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{source}: {path} is not there or is no open_clip config ({_first(error)})") from error
    if not weights:
        return cfg, preprocess, ""
    files = [
        folder / name for name in ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin")
    ]
    there = [str(file) for file in [*files, *sorted(folder.glob("*.safetensors"))] if file.is_file()]
    if not there:
        raise ConfigError(f"{source}: no weights in {folder}; they are in open_clip_model.safetensors")
    return cfg, preprocess, there[0]


def _repository(
    source: str, repository: str, default: dict[str, Any], weights: bool
) -> tuple[dict[str, Any], dict[str, Any], str]:
    from huggingface_hub import try_to_load_from_cache
    from open_clip.pretrained import download_pretrained_from_hf

    if reachable():
        try:
            path = download_pretrained_from_hf(repository, filename="open_clip_config.json")
            file = download_pretrained_from_hf(repository) if weights else ""
        except Exception as error:  # whatever a client of the network raises
            raise ConfigError(f"{source}: could not be fetched from the hub ({_first(error)})") from error
    else:  # the client would try for most of a minute
        path = try_to_load_from_cache(repository, "open_clip_config.json")
        if not isinstance(path, str):
            raise ConfigError(f"{source}: is not on this machine and the hub does not answer; give local-dir:FOLDER")
        file = _cached(source, repository) if weights else ""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    return found["model_cfg"], _over(default, found.get("preprocess_cfg") or {}), file


def _tokenizer(cfg: dict[str, Any], text: TextConfig, name: str = "open_clip") -> Tokenizer:
    theirs = cfg["text_cfg"]
    known, options = theirs.get("hf_tokenizer_name"), dict(theirs.get("tokenizer_kwargs") or {})
    if theirs.get("tokenizer_mode"):
        options["tokenizer_mode"] = theirs["tokenizer_mode"]
    if known:
        if theirs.get("pool_type") == "eos":  # where the tokenizer cannot be asked: RoBERTa pads with 1 and ends with 2
            text.pad_id = 1 if theirs.get("eos_id", 2) == 2 else text.pad_id
        return hub_tokenizer(known, options, text, name.removeprefix("local-dir:") if "local-dir:" in name else "")
    if options not in ({}, {"clean": "lower"}):
        raise ConfigError(f"{name}: mm's CLIP tokenizer has no {options}; give an hf_tokenizer_name, or leave them out")
    return ClipTokenizer()


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
