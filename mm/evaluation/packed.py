"""Encoders whose matrices are bf16 and laid out as the CPU's library reads them, once and not at every micro-batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from mm.adapters.image import ImageAdapter
from mm.models.encoder import Encoder
from mm_kernels import packed_linear

if TYPE_CHECKING:
    from mm.adapters.base import Adapter
    from mm.models.model import Model
    from mm.types import Batch, Encoded

_ROWS = 512  # of an input, about: what the layout is chosen for
Stamp = tuple[object, ...]  # another one after a weight has changed


class Packed:
    """A model's encoders for inference in bf16, made when first asked for and again after a weight has changed."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._made: dict[str, tuple[Stamp, Adapter, Encoder]] = {}

    def encode(self, name: str, batch: Batch, pooled_only: bool = False) -> Encoded | None:
        """What the model's encoder of a modality gives under bf16 autocast; None where it has no packed form.

        That is on a GPU, on a CPU without bf16, in training, sharded, and of what another library built.
        """
        adapter, encoder = self.model.adapters[name], self.model.encoders[name]
        if not isinstance(encoder, Encoder) or encoder.training or not _can(encoder):
            return None
        stamp = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in _parameters(adapter, encoder))
        known = self._made.get(name)
        if known is None or known[0] != stamp:
            door = packed_linear.packed_copy(adapter, _ROWS) if isinstance(adapter, ImageAdapter) else adapter
            known = self._made[name] = (
                stamp,
                cast("Adapter", door),
                cast("Encoder", packed_linear.packed_copy(encoder, _ROWS)),
            )
        _, door, inside = known
        return inside(door.embed(batch), pooled_only)


def _parameters(*modules: nn.Module) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters()]


def _can(encoder: Encoder) -> bool:
    first = encoder.norm.weight
    plain = type(first.data) is Tensor and first.device.type == "cpu"
    return plain and packed_linear.available()
