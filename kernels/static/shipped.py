"""The configurations in which kernels ship, gathered from the modules that hold the kernels.

A module of `mm_kernels` that launches Triton kernels has a function `shipped()`, which needs no GPU and returns a list
of `(name, kernel, signature, constexprs, num_warps, num_stages, overrides)`:

name        what the configuration is called, once an op: "forward bf16 72 causal"
kernel      the `@triton.jit` function
signature   the type of each argument as Triton writes it: "*bf16", "*fp32", "i32", "fp32"; "i32:16" for a whole
            number that is a multiple of 16 in practice, as strides are. Pointers are taken to be aligned to 16 bytes
constexprs  the value of each `tl.constexpr` argument. Attention's tiles are BM × BN and its head width D: what the
            gate on wasted matrix work goes by
overrides   what differs by architecture: {"gfx942": {"num_warps": 4, "BN": 32}}; keys are options of the compiler or
            names of constexprs
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from typing import Any

import mm_kernels

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "waves_per_eu", "matrix_instr_nonkdim", "kpack")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A kernel as it ships."""

    op: str
    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    warps: int
    stages: int
    overrides: dict[str, dict[str, Any]]

    def __post_init__(self) -> None:
        unknown = set(self.overrides) - set(ARCHITECTURES)
        if unknown:
            raise ValueError(
                f"{self.op}, {self.name}: overrides for {', '.join(sorted(unknown))}: no such architecture"
            )
        named = set(self.signature) | set(self.constexprs)
        if named != set(self.kernel.arg_names):
            wrong = ", ".join(sorted(named ^ set(self.kernel.arg_names)))
            raise ValueError(
                f"{self.op}, {self.name}: signature and constexprs are not the kernel's arguments: {wrong}"
            )

    def options(self, architecture: str) -> dict[str, int]:
        """What the compiler is told."""
        own = {name: value for name, value in self.overrides.get(architecture, {}).items() if name in OPTIONS}
        return {"num_warps": self.warps, "num_stages": self.stages, **own}

    def constants(self, architecture: str) -> dict[str, Any]:
        """The constexprs, in the order of the kernel's arguments."""
        own = {name: value for name, value in self.overrides.get(architecture, {}).items() if name not in OPTIONS}
        if not own.keys() <= self.constexprs.keys():
            raise ValueError(
                f"{self.op}, {self.name}: {architecture} overrides {', '.join(own)}: not all are constexprs"
            )
        values = {**self.constexprs, **own}
        return {name: values[name] for name in self.kernel.arg_names if name in values}


def ops() -> list[str]:
    """The folders of `mm_kernels`."""
    return sorted(found.name for found in pkgutil.iter_modules(mm_kernels.__path__) if found.ispkg)


@cache
def configs(op: str) -> dict[str, Config]:
    """What an op ships, by name, in the order of its modules; raises ValueError where a name comes twice."""
    gathered: dict[str, Config] = {}
    package = importlib.import_module(f"mm_kernels.{op}")
    for found in sorted(pkgutil.iter_modules(package.__path__), key=lambda found: found.name):
        module = importlib.import_module(f"mm_kernels.{op}.{found.name}")
        function = getattr(module, "shipped", None)
        if not callable(function) or function.__module__ != module.__name__:  # none, or one imported from elsewhere
            continue
        for name, kernel, signature, constexprs, warps, stages, overrides in function():
            if name in gathered:
                raise ValueError(f"{op} ships two configurations called {name!r}")
            gathered[name] = Config(
                op=op,
                name=name,
                kernel=kernel,
                signature=signature,
                constexprs=constexprs,
                warps=warps,
                stages=stages,
                overrides=overrides or {},
            )
    return gathered
