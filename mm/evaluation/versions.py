"""What a result depends on beside the model and the data: versions and the commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    try:
        ours = importlib.metadata.version("mm")
    except importlib.metadata.PackageNotFoundError:
        ours = "not installed"
    return {"mm": ours, "python": platform.python_version(), "torch": torch.__version__}


def commit() -> str | None:
    """The commit of this code where it runs from a git checkout, "-dirty" if files differ from it; else None."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
