"""Linear layers whose weights lie as the CPU's matrix products want them, once instead of at every call.

torch's own layer hands oneDNN the weight as it is, which lays it out anew each time: at a few hundred rows that is a
tenth of the time.
"""

from __future__ import annotations

import copy
import itertools
import weakref

import torch
from torch import Tensor, nn

_weights: dict[int, Tensor] = {}  # by number, because a compiled graph takes no packed tensor
_numbers = itertools.count()
_library = torch.library.Library("mm", "FRAGMENT")
_library.define("packed_linear(Tensor x, Tensor number, Tensor? bias, int features) -> Tensor")


def available() -> bool:
    """Whether this CPU has bf16 products, and torch the library that packs for them."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedLinear(nn.Module):
    """A linear layer in bf16 with a copy of its weight, for inference on a CPU; `rows` that it will mostly be given."""

    number: Tensor

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        self.features, number = linear.out_features, next(_numbers)
        weight = linear.weight.detach().to(torch.bfloat16)
        _weights[number] = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        weakref.finalize(self, _weights.pop, number)
        self.register_buffer("number", torch.tensor(number), persistent=False)
        bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """bf16 `[..., out]` of x `[..., in]`, whatever its type."""
        out: Tensor = torch.ops.mm.packed_linear(x.to(torch.bfloat16), self.number, self.bias, self.features)
        return out


def packed_copy(module: nn.Module, rows: int) -> nn.Module:
    """The same module with its plain linear layers packed for about `rows` rows, sharing all other tensors."""
    made = copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
    for parent in list(made.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:  # none that was adapted or wrapped
                setattr(parent, name, PackedLinear(child, rows))
    return made


def _forward(x: Tensor, number: Tensor, bias: Tensor | None, features: int) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, _weights[int(number)], bias, "none", [], "")
    return out


def _fake(x: Tensor, number: Tensor, bias: Tensor | None, features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], features))


_library.impl("packed_linear", _forward, "CPU")
torch.library.register_fake("mm::packed_linear", _fake, lib=_library)
