"""Whether a model hub can be asked: its clients retry for most of a minute where there is no network."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
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
    return asked(factory.from_pretrained, name, **options)


def asked(function: Callable[..., Any], name: str, **options: Any) -> Any:
    """The same for any function of these libraries that takes a name and `local_files_only`."""
    try:
        return function(name, local_files_only=True, **options)
    except (OSError, ValueError):
        if not reachable():
            raise
    return function(name, **options)
