"""Where a model may come from: one reader for every source that a user can name."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from mm.config import ConfigError
from mm.fields import suggestion
from mm.interop.origin import Origin
from mm.rules_modalities import modality_names

FORMS = "a run folder, a released folder, open_clip:NAME/TAG, open_clip:NAME@FILE, timm:NAME, hf:NAME, hub:ORG/NAME"


def read(source: str | os.PathLike[str], weights: bool = True, size: int = 0) -> Origin:
    """The model that `source` names, with its tokenizer, preprocessing and (with `weights`) its weights.

    `size`: pixels a side that a timm backbone is built for, instead of its own.

    A run folder or a released folder of mm; `openmoji`, in a copy that has it; `open_clip:` as in
    `mm.interop.open_clip.read`; `timm:` as in `mm.interop.timm.read`; `hf:` as in `mm.interop.huggingface.read`;
    `hub:ORG/NAME`, a release that was pushed.
    Raises ConfigError naming what is wrong with it.
    """
    name = os.fspath(source)
    scheme, colon, _ = name.partition(":")
    if colon and scheme in READERS:
        return READERS[scheme](name, weights, size)
    if colon and not os.path.exists(name) and "/" not in scheme and len(scheme) > 1:
        raise ConfigError(f"{name}: no such source{suggestion(scheme, list(READERS))}; give {FORMS}")
    return _mm(name, weights)


def _open_clip(name: str, weights: bool, _size: int) -> Origin:
    from mm.interop.open_clip import read as run

    return run(name, weights)


def _timm(name: str, weights: bool, size: int) -> Origin:
    from mm.interop.timm import read as run

    return run(name, weights, size)


def _hugging_face(name: str, weights: bool, _size: int) -> Origin:
    from mm.interop.huggingface import read as run

    return run(name, weights)


def _hub(name: str, weights: bool, _size: int) -> Origin:
    """`hub:ORG/NAME`: what `mm release --push` uploaded. Data only: none of the repository's code is fetched."""
    from huggingface_hub import snapshot_download

    from mm.adapters.hub import reachable

    repository = name.removeprefix("hub:")
    try:
        folder = snapshot_download(
            repository, allow_patterns=["*.json", "*.safetensors"], local_files_only=not reachable()
        )
    except Exception as error:  # whatever a client of the network raises
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ConfigError(f"{name}: not on this machine, and could not be fetched from the hub ({first})") from error
    return replace(_mm(folder, weights), source=name)


READERS: dict[str, Any] = {"open_clip": _open_clip, "timm": _timm, "hf": _hugging_face, "hub": _hub}


def _mm(name: str, weights: bool) -> Origin:
    """A folder that mm wrote."""
    from mm.models.export import find_export, parts_of, read_export

    state, tokenizer, config, note = read_export(find_export(name))
    tensors = {key.removeprefix("model."): tensor for key, tensor in state.items()}
    objectives = config.objectives
    found = Origin(name, config.model, tokenizer, tensors, objectives.contrastive, objectives.diffusion, note, config)
    found.parts = parts_of(state, modality_names(config.model))
    found.tensors = tensors if weights else {}
    return found
