"""Makers of shards: `openmoji(OUT)` from installed packages, `folder(DIR, OUT)` from a user's own files."""

from __future__ import annotations

from mm.data.folder import folder
from mm.data.openmoji import openmoji

__all__ = ["folder", "openmoji"]
