"""Adapters by name: which class `package.module:Class` is, without a config that is only read importing any code.

A released model's config.json may come from anywhere, and importing a module runs it. So a name is looked up among the
modules that are imported already, those of mm, and those that the environment variable MM_IMPORT lists.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mm.adapters.base import EXTENSION, Adapter
from mm.config import ConfigError

if TYPE_CHECKING:
    from mm.config import ModalityConfig

_OURS = ("mm.adapters.", "mm.interop.")


def build_adapter(config: ModalityConfig) -> Adapter:
    """The adapter that `config.adapter` names, given the config.

    Raises ConfigError where its module is not imported, or it is no `Adapter` of that name.
    """
    where = f"modality {config.name!r}: adapter = {config.adapter!r}"
    module, _, name = config.adapter.partition(":")
    if module.startswith(_OURS) or (module and module in os.environ.get("MM_IMPORT", "").split(",")):
        _import(module, where)
    if module not in sys.modules:
        raise ConfigError(
            f"{where}: module {module} is not imported, and loading a model imports no code of others; "
            f"if you trust it, import {module} first, or set MM_IMPORT={module}"
        )
    kind = getattr(sys.modules[module], name, None)
    if not (isinstance(kind, type) and issubclass(kind, Adapter)):
        raise ConfigError(f"{where}: {module} has no subclass of mm.adapters.base.Adapter with that name")
    adapter = kind(config)  # type: ignore[arg-type, call-arg]
    if adapter.name != config.name:
        raise ConfigError(f"{where}: calls itself {adapter.name!r}; give the config's name to Adapter.__init__")
    if not EXTENSION.match(adapter.processor.source):
        raise ConfigError(
            f"{where}: its processor's source = {adapter.processor.source!r}: must be 'image', 'text' or the extension "
            "of a shard's members in small letters, such as 'depth.png'"
        )
    return adapter


def import_adapters(modalities: Iterable[ModalityConfig]) -> None:
    """Import the modules of their adapters: for a config that is code itself, never for one that was only read."""
    for config in modalities:
        module = config.adapter.partition(":")[0]
        if module not in sys.modules:
            _import(module, f"modality {config.name!r}: adapter = {config.adapter!r}")


def _import(module: str, where: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{where}: cannot be imported ({error}); install it, or put its folder on PYTHONPATH"
        ) from error
