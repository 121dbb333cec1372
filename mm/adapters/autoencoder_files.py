"""Autoencoders in diffusers' format: a folder with config.json and safetensors, or the name of one on the hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.adapters.hub import asked, pretrained
from mm.config import ConfigError, LatentsConfig

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("AutoencoderKL", "AutoencoderDC")
VAE = "vae"  # the subfolder of a whole pipeline
_LARGEST = 1 << 20  # bytes of a config.json
# what diffusers takes where an older config.json does not say
_DEFAULTS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {"latent_channels": 4, "scaling_factor": 0.18215, "block_out_channels": [64]},
    "AutoencoderDC": {"latent_channels": 32, "scaling_factor": 1.0, "encoder_block_out_channels": 6 * [0]},
}
_CODE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # weights that are pickled: reading them runs what they say


def latents_config(source: str | os.PathLike[str], *, cached: bool = False) -> LatentsConfig:
    """`model.latents` for the autoencoder in `source`: a folder, one with a subfolder `vae`, or a hub name.

    Reads its config.json only. Raises ConfigError where there is none, or it is of no autoencoder that mm knows.
    """
    source = os.fspath(source)
    options = _options(source)
    kind = options.get("_class_name")
    if kind not in KINDS:
        raise ConfigError(f"{source}: config.json is of {kind!r}; model.latents takes {' or '.join(KINDS)}")
    if options.get("latents_mean") or options.get("latents_std"):
        raise ConfigError(f"{source}: config.json has latents_mean and latents_std, which mm does not know yet")
    whole = {**_DEFAULTS[kind], **options}
    levels = whole["block_out_channels" if kind == "AutoencoderKL" else "encoder_block_out_channels"]
    own = {name: value for name, value in sorted(options.items()) if not name.startswith("_")}
    try:
        return LatentsConfig(
            source=source,
            kind=kind,
            options=json.dumps(own),
            channels=int(whole["latent_channels"]),
            factor=2 ** (len(levels) - 1),
            scale=float(whole["scaling_factor"]),
            shift=float(whole.get("shift_factor") or 0.0),
            cached=cached,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: config.json is no autoencoder's: {error}") from error


def latents_weights(source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The autoencoder's weights, float32, by diffusers' names. safetensors only: a pickle is refused.

    Raises ConfigError where there are none, or some that the autoencoder has are missing.
    """
    source = os.fspath(source)
    if not source:
        raise ConfigError("'': names no weights; set a folder of diffusers, or a hub name")
    kind = latents_config(source).kind
    folder = _folder(source)
    if folder is not None and not list(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _CODE)
        if pickled:
            raise ConfigError(
                f"{folder}: {pickled[0]} is a pickle, which may run code; where you trust it, convert it: diffusers."
                f"{kind}.from_pretrained({str(folder)!r}, use_safetensors=False).save_pretrained(OUT)"
            )
        raise ConfigError(f"{folder}: holds no *.safetensors; write it with diffusers' save_pretrained")
    import diffusers
    import torch
    from safetensors import SafetensorError

    place = {"subfolder": _subfolder(source)} if folder is None else {}
    try:
        model, about = pretrained(
            getattr(diffusers, kind),
            source if folder is None else str(folder),
            use_safetensors=True,
            torch_dtype=torch.float32,
            output_loading_info=True,
            **place,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = " ".join(str(error).split())[:200]
        raise ConfigError(f"{source}: its weights cannot be read: {first}") from error
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):  # of which diffusers only warns
        if about[what]:
            name = about[what][0]
            raise ConfigError(f"{source}: {len(about[what])} {what.replace('_', ' ')} in its weights, first {name}")
    return model.state_dict()


def _folder(source: str) -> Path | None:
    """The local folder with the autoencoder's config.json; None where `source` is a hub name."""
    path = Path(source).expanduser()
    for folder in (path, path / VAE):
        if (folder / "config.json").is_file():
            return folder
    if path.exists():
        what = "holds no config.json, and no vae/config.json" if path.is_dir() else "is a file; name its folder"
        raise ConfigError(f"{source}: {what}; mm reads autoencoders as diffusers' save_pretrained writes them")
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or not all(source.split("/")):
        raise ConfigError(f"{source}: no such folder, and no hub name such as stabilityai/sd-vae-ft-mse")
    return None


def _options(source: str) -> dict[str, Any]:
    """config.json of an autoencoder."""
    folder = _folder(source)
    if folder is None:
        return _from_hub(source, _subfolder(source))
    path = folder / "config.json"
    if path.stat().st_size > _LARGEST:
        raise ConfigError(f"{path}: {path.stat().st_size} bytes are over the limit of {_LARGEST}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must be a JSON object, not {type(found).__name__}")
    return found


def _subfolder(source: str) -> str | None:
    """Where on the hub the autoencoder lies: at the top, or in the `vae` of a pipeline."""
    try:
        _from_hub(source, None)
    except ConfigError:
        _from_hub(source, VAE)
        return VAE
    return None


def _from_hub(source: str, subfolder: str | None) -> dict[str, Any]:
    from diffusers import AutoencoderKL

    try:  # only the name of the file is the class's own: what it is a config of stands in it
        found: dict[str, Any] = asked(AutoencoderKL.load_config, source, subfolder=subfolder)
    except (OSError, ValueError) as error:
        first = " ".join(str(error).split())[:200]
        raise ConfigError(f"{source}: no such folder, and not to be had from the hub: {first}") from error
    return found
