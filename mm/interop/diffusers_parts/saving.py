"""A pipeline with code of its own as a folder that brings this code along."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import __version__ as DIFFUSERS_VERSION

from mm.interop.diffusers_parts.checks import FLOW, moves_along_velocity


def save(pipe: Any, root: Path, **kwargs: Any) -> None:
    """Every component in its folder with the file that defines it, then model_index.json; `kwargs` for the weights."""
    root.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {"_class_name": copy_code(type(pipe), root)}
    index["_diffusers_version"] = DIFFUSERS_VERSION
    numbers = ("noise_scale", "shift", "latent_scale", "latent_shift")
    index.update({name: pipe.config[name] for name in numbers})
    for name, part in pipe.components.items():
        if part is None:
            index[name] = [None, None]
            continue
        part.save_pretrained(root / name, **(kwargs if isinstance(part, torch.nn.Module) else {}))
        if name == "scheduler" and moves_along_velocity(part):
            without(root / name / "scheduler_config.json", FLOW)
        ours = not type(part).__module__.startswith("diffusers.")
        index[name] = copy_code(type(part), root / name) if ours else ["diffusers", type(part).__name__]
    write_json(root / "model_index.json", index)


def copy_code(kind: type, folder: Path) -> list[str]:
    """The file that defines a class, copied into `folder`; its name and the class's."""
    source = Path(str(sys.modules[kind.__module__].__file__))
    if source.parent.resolve() != folder.resolve():
        shutil.copyfile(source, folder / source.name)
    return [source.stem, kind.__name__]


def without(path: Path, keys: Iterable[str]) -> None:
    """Leave `keys` out of a JSON file: the scheduler itself would warn of them, and `__init__` adds them again."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {name: value for name, value in settings.items() if name not in keys})


def write_json(path: Path, content: dict[str, Any]) -> None:
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(fresh, path)
