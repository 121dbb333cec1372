"""Weights from files that others made: data only, never code."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

CONVERT = (
    'to convert it where you trust it: python -c "import sys, torch; from safetensors.torch import save_file; '
    "s = torch.load(sys.argv[1], map_location='cpu', weights_only=False); "
    "s = s.state_dict() if hasattr(s, 'state_dict') else s.get('state_dict', s); "
    'save_file({k: v.clone() for k, v in s.items() if torch.is_tensor(v)}, sys.argv[2])" IN.pt OUT.safetensors'
)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file, or from a torch checkpoint that holds nothing but tensors.

    Raises ConfigError for a file that is missing, damaged, of another kind, or that would run code.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name the weights file in it")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise ConfigError(f"{path}: not a weights file; give .safetensors, or a torch .pt of plain tensors")
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TorchScript, which is refused below
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of damaged bytes the unpickler raises anything: KeyError, IndexError, AssertionError
        if "TorchScript" in str(error) or "torch.jit" in str(error):
            what = "a TorchScript archive, which is a program"
        elif isinstance(error, pickle.UnpicklingError):
            what = "holds more than tensors, which may run code"
        else:
            raise ConfigError(f"{path}: a damaged torch checkpoint ({_first(error)})") from error
        raise ConfigError(f"{path}: {what}: refused; {CONVERT}") from error
    return _tensors(path, found)


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a whole safetensors file ({_first(error)})") from error


def _tensors(path: Path, found: Any) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint, without a wrapper's prefix."""
    import torch

    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds a {type(found).__name__}, not weights by name")
    tensors = {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ConfigError(f"{path}: holds no weights")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
