"""Single files of open_clip, without the package: to import that takes seconds, for timm, torchvision, transformers."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_PARTS = ("embed_dim", "vision_cfg", "text_cfg")  # of a model's config, as open_clip asks


@functools.cache
def alone(name: str) -> ModuleType:
    """The module open_clip.`name`, which must import nothing of its package: the file by itself where that is cheaper.

    Raises ImportError where there is no open_clip.
    """
    whole = f"open_clip.{name}"
    path = _folder() / f"{name}.py"
    if "open_clip" in sys.modules or not path.is_file():
        return importlib.import_module(whole)
    spec = importlib.util.spec_from_file_location(f"{__name__}.{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_config(name: str) -> dict[str, Any] | None:
    """open_clip's config of an architecture, one that was registered in this process too; None where it has none."""
    path = _folder() / "model_configs" / f"{name}.json"
    if "open_clip" not in sys.modules and path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(part in found for part in _PARTS):
            return dict(found)
    from open_clip.factory import get_model_config

    config: dict[str, Any] | None = get_model_config(name)
    return config


@functools.cache
def _folder() -> Path:
    spec = importlib.util.find_spec("open_clip")  # finds it, and imports nothing
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")
    return Path(spec.origin).parent
