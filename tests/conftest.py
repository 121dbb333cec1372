"""What every test may use."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("OMP_NUM_THREADS", "2")  # many small tests: more threads only fight
_CACHE = tempfile.TemporaryDirectory(prefix="mm-cache-")
os.environ["MM_CACHE"] = _CACHE.name  # indexes and fetched shards: not among the user's


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_python("-m", "mm.cli", "--help")`: a fresh interpreter in an empty folder, with this repository's code."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])

    def run(*args: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": path}
        command = [sys.executable, *args]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run


@pytest.fixture(scope="session")
def openmoji_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train-, dev- and val- shards of 300 emoji at 32 pixels, built once."""
    from mm.data.build import openmoji

    out = tmp_path_factory.mktemp("openmoji")
    openmoji(out, size=32, per_shard=64, progress=False, limit=300)
    return out


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is none; torch is imported only where there are such tests."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
