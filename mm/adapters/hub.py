"""Model hubs' clients: whether one can be asked (they retry for most of a minute without a network), and kept quiet."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from urllib.parse import urlsplit


@cache
def reachable(seconds: float = 3.0) -> bool:
    """Whether the Hugging Face hub answers at all; False where HF_HUB_OFFLINE says not to ask."""
    from huggingface_hub import constants

    proxy = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if constants.HF_HUB_OFFLINE or proxy:
        return not constants.HF_HUB_OFFLINE
    parts = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 443), timeout=seconds).close()
    except OSError:
        return False
    return True


def pretrained(factory: Any, name: str, **options: Any) -> Any:
    """`factory.from_pretrained(name)` from a folder or the local cache; from the hub only where it answers.

    Raises OSError or ValueError where it is on neither.
    """
    library = factory.__module__.partition(".")[0]

    def ask(name: str, **options: Any) -> Any:
        with quiet(library, bars="local_files_only" not in options):  # a download is worth a bar
            return factory.from_pretrained(name, **options)

    return asked(ask, name, **options)


@contextmanager
def quiet(library: str, bars: bool = False) -> Iterator[None]:
    """`transformers` or `diffusers` without its reports and, but for `bars`, progress bars; then again as it was."""
    if library not in ("transformers", "diffusers"):
        yield
        return
    logging = importlib.import_module(f"{library}.utils.logging")
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def asked(function: Callable[..., Any], name: str, **options: Any) -> Any:
    """The same for any function of these libraries that takes a name and `local_files_only`."""
    try:
        return function(name, local_files_only=True, **options)
    except (OSError, ValueError):
        if not reachable():
            raise
    return function(name, **options)
