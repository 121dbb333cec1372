"""Processes and runs that several files share: starting them is what takes the time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mm.data.build import openmoji
from ranks import Trained


@pytest.fixture(scope="package")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    shards = tmp_path_factory.mktemp("shards")
    openmoji(shards, size=32, per_shard=64, progress=False, limit=150)
    trained = Trained(shards, tmp_path_factory.mktemp("runs"))
    yield trained
    trained.close()
