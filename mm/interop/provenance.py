"""What a release says of where a model comes from: its shards, their licence, and no folder of anybody's machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm.config import ConfigError, TrainConfig

LICENCES = {"CC BY-SA 4.0": "cc-by-sa-4.0"}  # as shards name it, as the hub does


def manifests(train: str, run: Path) -> list[dict[str, Any]]:
    """The shards.json beside each local part of `data.train`; none where it cannot be read.

    A run folder that was moved is asked for shards of that name in it or beside it, as mm demo puts them.
    """
    found = []
    for part in filter(None, train.split("::")):
        folder = Path(part) if Path(part).is_dir() else Path(part).parent
        for place in (folder, run / folder.name, run.parent / folder.name):
            try:
                content = json.loads((place / "shards.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(content, dict) and content not in found:
                found.append(content)
            break
    return found


def licence_of(shards: Sequence[dict[str, Any]]) -> str:
    """What the training shards ask for, as the hub names it; "unknown" where nothing does."""
    asked = {LICENCES.get(str(one["license"]), "other") for one in shards if one.get("license")}
    return asked.pop() if len(asked) == 1 else "other" if asked else "unknown"


def check_licence(licence: str) -> None:
    """Raises ConfigError unless it is one word, as the hub's names of licences are."""
    if not licence or any(not (c.isalnum() or c in "-._") for c in licence):
        raise ConfigError(f"--licence {licence!r}: must be one word, such as mit, apache-2.0 or cc-by-sa-4.0")


def shareable(config: TrainConfig) -> TrainConfig:
    """A copy of the config that names no folders of the machine that it ran on."""
    from mm.settings import from_dict, to_dict

    copy = from_dict(to_dict(config))
    copy.data.train, copy.data.val = (short(value) if value else "" for value in (copy.data.train, copy.data.val))
    copy.run.dir = Path(copy.run.dir).name or "run"
    if copy.model.latents is not None and Path(copy.model.latents.source).is_absolute():
        copy.model.latents.source = Path(copy.model.latents.source).name
    for part in ("model", "image", "text", "denoiser"):
        setattr(copy.start, part, short_source(getattr(copy.start, part)))
    return copy


def short(train: str) -> str:
    """Shards without the folders of the machine that they lay on, or what a URL says beside its path."""

    def one(part: str) -> str:
        scheme, url, rest = part.partition("://")
        if url:
            return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"
        return "/".join(Path(part).parts[-2:]).replace("//", "/")

    return "::".join(map(one, train.split("::")))


def short_source(source: str) -> str:
    """A source without folders of the machine."""
    name, at, file = source.partition("@")
    scheme, local, folder = name.partition("local-dir:")
    if local:
        name = f"{scheme}{local}{Path(folder).name}"
    elif ":" not in name:
        name = Path(name).name
    return name + at + Path(file).name
