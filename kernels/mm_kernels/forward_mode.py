"""Forward-mode derivatives and custom ops: which of the two a call may take.

torch gives a custom op no forward-mode rule: under `torch.func.jvp` its tangents would be zeros, and nothing would say
so. Where a forward-mode level is open, public functions therefore take an autograd.Function that has a `jvp`, and the
op refuses to run. The level is all that an op can go by: functorch takes the tangents off before it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_OUTSIDE: dict[type[torch.autograd.Function], Callable[..., Any]] = {}


def active() -> bool:
    """Whether a forward-mode level is open: `torch.func.jvp`, or `torch.autograd.forward_ad.dual_level`."""
    return forward_ad._current_level >= 0


def apply(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """`function.apply`, outside of compiled graphs: torch.compile takes no function with a forward-mode rule.

    Marked as such when it is first needed: torch's compiler takes a second to import.
    """
    if function not in _OUTSIDE:
        _OUTSIDE[function] = torch.compiler.disable(function.apply)
    return _OUTSIDE[function](*inputs)


def refuse(name: str) -> None:
    """Raises NotImplementedError where a forward-mode level is open."""
    if active():
        raise NotImplementedError(
            f"mm::{name} has no forward-mode rule: call the function of mm_kernels, not the op; "
            "gradients by backward are to be had after the forward-mode level is closed"
        )


def refuse_functorch(name: str, instead: str = "it, or tensors of a CPU") -> None:
    """Raises NotImplementedError inside `torch.func.grad`, `vjp` and `vmap`, for which kernels have no rules."""
    if torch.compiler.is_compiling():
        return
    stack = torch._C._functorch.peek_interpreter_stack()
    if stack is not None and stack.key() != torch._C._functorch.TransformType.Jvp:
        raise NotImplementedError(
            f"{name}: gradients are to be had by torch.autograd, not by torch.func.grad, vjp or vmap: use {instead}"
        )


def moved(tangent: Tensor | None, like: Tensor) -> Tensor:
    """The tangent or gradient; zeros where there is none."""
    return torch.zeros_like(like) if tangent is None else tangent
