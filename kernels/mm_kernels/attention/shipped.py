"""In which tiles the attention kernels run, by architecture, kernel, type and head width, and the list that ships."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from mm_kernels.runtime import interpreted

KERNELS = ("forward", "dq", "dkdv", "tangent")


class Tile(NamedTuple):
    """Rows of queries and of keys in a block, warps a program, and how many blocks are in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


# Name, kernel, types of arguments, constexprs, warps, stages, and what differs by architecture.
Shipped = tuple[str, Any, dict[str, str], dict[str, Any], int, int, dict[str, dict[str, int]]]

INTERPRETED = Tile(32, 16, 4, 1)  # small and unequal, so that small tensors have every kind of block

# By architecture and kernel: half-precision tiles for heads up to 64, 96 and 128 wide, and the float32 tile. Chosen by
# `make static`: no spills, and on sm_90 the best bound of the hot loop; not yet timed on a GPU. The sm_80 tiles also
# fit the 99 KB of shared memory of its smaller kin (sm_86, sm_89).
TILES: dict[str, dict[str, tuple[Tile, Tile, Tile, Tile]]] = {
    "sm_80": {
        "forward": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 32, 8, 2)),
        "dq": (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 64, 8, 2), Tile(32, 32, 8, 1)),
        "dkdv": (Tile(32, 64, 8, 2), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
        "tangent": (Tile(64, 32, 4, 2), Tile(64, 16, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
    },
    "sm_90": {
        "forward": (Tile(128, 128, 8, 2), Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(64, 32, 8, 2)),
        "dq": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(32, 32, 8, 1)),
        "dkdv": (Tile(64, 128, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 32, 8, 1)),
        "tangent": (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(32, 32, 8, 1)),
    },
    "sm_100": {
        "forward": (Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 32, 8, 2)),
        "dq": (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 32, 8, 1)),
        "dkdv": (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 32, 8, 1)),
        "tangent": (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
    },
    "gfx942": {
        "forward": (Tile(128, 64, 4, 1), Tile(128, 64, 4, 1), Tile(128, 32, 4, 2), Tile(64, 32, 4, 1)),
        "dq": (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
        "dkdv": (Tile(32, 64, 4, 1), Tile(64, 16, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        "tangent": (Tile(64, 32, 4, 1), Tile(64, 16, 4, 1), Tile(64, 16, 4, 1), Tile(32, 32, 4, 1)),
    },
}


def pieces(width: int) -> tuple[int, int]:
    """Powers of two, at least 16, that a head is split into; the second is 0 where one does: 72 gives 64 and 16."""
    first = max(16, 1 << (width.bit_length() - 1))
    if width <= first:
        return first, 0
    second = max(16, 1 << (width - first - 1).bit_length())
    return (first, second) if second < first else (2 * first, 0)


@cache
def architecture(device: torch.device) -> str:
    """The row of TILES for a device; compute capabilities between two take the smaller one's."""
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_80" if major < 9 else "sm_90" if major < 10 else "sm_100"


def tile(kernel: str, dtype: torch.dtype, width: int, device: torch.device) -> Tile:
    """The tile in which a kernel runs on a device."""
    if interpreted() and device.type == "cpu":
        return INTERPRETED
    return TILES[architecture(device)][kernel][row(dtype, width)]


def row(dtype: torch.dtype, width: int) -> int:
    """The place in a row of TILES."""
    return 3 if dtype == torch.float32 else 0 if width <= 64 else 1 if width <= 96 else 2


def shipped() -> list[Shipped]:
    """What launches, by its widths, types and kinds of call: see `kernels/static/shipped.py`."""
    passes = KERNELS[:3]
    found = [describe(kernel, "", "bf16", width) for kernel in KERNELS for width in (64, 72, 128)]
    found += [describe(kernel, "", "bf16", 96) for kernel in passes]
    found += [describe(kernel, "", "fp16", 64) for kernel in passes]
    found += [describe(kernel, "", "fp32", 64) for kernel in KERNELS]
    for width in (64, 128):
        found += [describe(kernel, " masked", "bf16", width, MASKED=True) for kernel in passes]
    found += [describe(kernel, " packed causal", "bf16", 64, PACKED=True, CAUSAL=True) for kernel in passes]
    found += [describe(kernel, " causal grouped", "bf16", 128, CAUSAL=True, GROUP=4) for kernel in passes]
    found += [describe("forward", "", "bf16", 80), describe("tangent", " causal", "bf16", 64, CAUSAL=True)]
    return found


def describe(kernel: str, name: str, dtype: str, width: int, **flags: Any) -> Shipped:
    """One configuration; that of sm_90 with the others' tiles as overrides."""
    from mm_kernels.attention.backward import dkdv_kernel, dq_kernel
    from mm_kernels.attention.forward import forward_kernel
    from mm_kernels.attention.tangent import tangent_kernel

    function = {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel, "tangent": tangent_kernel}[kernel]
    first, second = pieces(width)
    place = row(torch.float32 if dtype == "fp32" else torch.bfloat16, width)
    tiles = {architecture: rows[kernel][place] for architecture, rows in TILES.items()}
    of = tiles["sm_90"]
    constants = {"D": width, "D1": first, "D2": second, "BM": of.queries, "BN": of.keys, "GROUP": 1, "PACKED": False,
                 "MASKED": False, "CAUSAL": False, **flags}  # fmt: skip
    return (
        f"{kernel} {dtype} {width}{name}",
        function,
        {name: argument_type(name, dtype) for name in function.arg_names if name not in constants},
        constants,
        of.warps,
        of.stages,
        {
            architecture: {"BM": t.queries, "BN": t.keys, "num_warps": t.warps, "num_stages": t.stages}
            for architecture, t in tiles.items()
            if t != of
        },
    )


def argument_type(name: str, dtype: str) -> str:
    """An argument's type as Triton writes it; token strides are multiples of 16 in every model that has such widths."""
    if name in ("LSE", "TLSE", "DELTA", "DLSE"):
        return "*fp32"
    if name in ("CU_Q", "CU_K", "BOUNDS"):
        return "*i32"
    if name == "MASK":
        return "*u8"
    if name.isupper():
        return f"*{dtype}"
    return "fp32" if name == "scale" else "i32:16" if name in ("q_row", "k_row", "v_row") else "i32"
