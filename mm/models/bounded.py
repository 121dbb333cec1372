"""A model built from a config that may come from anywhere: no larger than the weights that came with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from mm.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from mm.models.model import Model

TIMES, SPARE = 8, 1 << 25  # elements: some libraries build more than is kept, and tables that are not saved
FACTORIES = ("empty", "zeros", "ones", "full", "rand", "randn")
INITIALISATIONS = {  # how torch.nn, timm and open_clip give a parameter its first values
    *("uniform_", "normal_", "constant_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_"),
    *("xavier_normal_", "fill_", "zero_", "mul_", "add_", "clamp_", "erfinv_"),
}


class _Bounded(TorchFunctionMode):
    """Refuses a tensor before it is allocated, once all made so far have more than `limit` elements.

    Parameters keep whatever their memory holds: no random number is drawn for what is loaded afterwards. A function
    mode, because torch's other kind imports its compiler, which takes longer than all else.
    """

    def __init__(self, limit: int):
        super().__init__()
        self.limit = self.left = limit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func.__name__ in INITIALISATIONS:
            target = args[0] if args else given.get("tensor")
            if isinstance(target, Parameter):
                return target
        if func.__name__ in FACTORIES:
            shape = args[0] if args and isinstance(args[0], Sequence) else given.get("size", args)
            self.left -= math.prod(side for side in shape if isinstance(side, int))
            if self.left < 0:
                raise ConfigError(f"its config asks for more than {self.limit} numbers, many more than its weights are")
        return func(*args, **given)


def build(make: Callable[[], Model], tensors: Iterable[Tensor], source: str) -> Model:
    """What `make` builds for these weights, its parameters still to be set, every one of them.

    Raises ConfigError where it is far larger, or cannot be built.
    """
    limit = TIMES * sum(tensor.numel() for tensor in tensors) + SPARE
    try:
        with _Bounded(limit):
            return make()
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ConfigError(f"{source}: its config describes no model that can be built ({told})") from error
