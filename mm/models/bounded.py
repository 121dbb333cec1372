"""A model built from a config that may come from anywhere: no larger than the weights that came with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch.utils._python_dispatch import TorchDispatchMode

from mm.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from mm.models.model import Model

TIMES, SPARE = 8, 1 << 25  # elements: some libraries build more than is kept, and tables that are not saved


class _Counted(TorchDispatchMode):
    """Refuses a tensor before it is allocated, once all made so far have more than `limit` elements."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit = self.left = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], list) and all(isinstance(side, int) for side in args[0]):  # empty, zeros, full
            self.left -= math.prod(args[0])
            if self.left < 0:
                raise ConfigError(f"its config asks for more than {self.limit} numbers, many more than its weights are")
        return func(*args, **(kwargs or {}))


def build(make: Callable[[], Model], tensors: Iterable[Tensor], source: str) -> Model:
    """What `make` builds for these weights. Raises ConfigError where it is far larger, or cannot be built."""
    limit = TIMES * sum(tensor.numel() for tensor in tensors) + SPARE
    try:
        with _Counted(limit):
            return make()
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ConfigError(f"{source}: its config describes no model that can be built ({told})") from error
