"""Which form of an operation runs, decided in one place: torch on a CPU, Triton on a GPU or in its interpreter."""

from __future__ import annotations

import os
from collections import Counter

from torch import Tensor

launches: Counter[str] = Counter()  # kernels launched, by name: what tests ask to know that Triton ran


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors (`TRITON_INTERPRET=1` before Triton's import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(tensor: Tensor) -> bool:
    """Whether a Triton kernel takes this tensor: on CUDA and HIP always, on a CPU in the interpreter."""
    return tensor.device.type == "cuda" or (tensor.device.type == "cpu" and interpreted())
