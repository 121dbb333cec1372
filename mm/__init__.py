"""mm: shared vision and text encoders, trained by a contrastive and a diffusion objective at once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm.api import LoadedModel

# torch reads it at its first large allocation: huge pages where the kernel offers them, for tensors of 2 MB and more
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(source: str, **options: Any) -> LoadedModel:
    """A trained model from a run folder or a released folder; see `mm.api.load`.

    torch is imported here and not with `mm`, so that `import mm` stays instant.
    """
    from mm.api import load as load_model

    return load_model(source, **options)
