"""Shards that many unit tests read: some real emoji, built once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm.data.build import openmoji


@pytest.fixture(scope="session")
def openmoji_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train-, dev- and val- shards of 300 emoji at 32 pixels."""
    out = tmp_path_factory.mktemp("openmoji")
    openmoji(out, size=32, per_shard=64, progress=False, limit=300)
    return out
