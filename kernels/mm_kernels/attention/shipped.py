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


Sizes = tuple[int, int, int, int]  # of a Tile
Row = tuple[Sizes, Sizes, Sizes, Sizes, Sizes]

# Name, kernel, types of arguments, constexprs, warps, stages, and what differs by architecture.
Shipped = tuple[str, Any, dict[str, str], dict[str, Any], int, int, dict[str, dict[str, int]]]

INTERPRETED = Tile(32, 16, 4, 1)  # small and unequal, so that small tensors have every kind of block

DELTA_ROWS = 64  # of the backward's first kernel, which waits for memory alone

# By architecture and kernel: half-precision tiles for heads up to 64, 96 and 128 wide, and float32 ones for heads up to
# 64 and 128. Chosen by `make static`: no spills, and on sm_90 the best bound of the hot loop; not yet timed on a GPU.
# The sm_80 tiles also fit the 99 KB of shared memory of its smaller kin (sm_86, sm_89). Keys of several query heads
# need one more loop, and more registers. One tile spills: float32 tangents of heads wider than 96, on NVIDIA.
TILES: dict[str, dict[str, Row]] = {
    "sm_80": {
        "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2), (32, 32, 8, 1)),
        "dq": ((64, 64, 8, 2), (64, 32, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1), (16, 16, 8, 2)),
        "dkdv": ((32, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1), (16, 16, 8, 2)),
        "tangent": ((64, 32, 8, 2), (64, 16, 8, 2), (64, 32, 8, 2), (16, 32, 8, 1), (16, 16, 8, 1)),
    },
    "sm_90": {
        "forward": ((128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 3), (64, 32, 8, 2), (32, 32, 8, 1)),
        "dq": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (32, 32, 8, 1), (32, 16, 8, 2)),
        "dkdv": ((64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1), (32, 16, 8, 2)),
        "dkdv grouped": ((64, 64, 8, 2), (64, 64, 8, 1), (32, 64, 8, 2), (32, 32, 8, 1), (32, 16, 8, 2)),
        "tangent": ((128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (16, 32, 8, 1), (16, 16, 8, 1)),
    },
    "sm_100": {
        "forward": ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2), (32, 32, 8, 1)),
        "dq": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (32, 32, 8, 1), (32, 16, 8, 2)),
        "dkdv": ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1), (32, 16, 8, 2)),
        "dkdv grouped": ((64, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 1), (32, 32, 8, 1), (32, 16, 8, 2)),
        "tangent": ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (16, 32, 8, 1), (16, 16, 8, 1)),
    },
    "gfx942": {
        "forward": ((128, 64, 4, 1), (128, 64, 4, 1), (128, 32, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1)),
        "dq": ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        "dkdv": ((32, 64, 4, 1), (64, 16, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1)),
        "tangent": ((64, 32, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1), (32, 32, 4, 1), (16, 16, 8, 1)),
    },
}  # fmt: skip


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


def tile(kernel: str, dtype: torch.dtype, width: int, group: int, device: torch.device) -> Tile:
    """The tile in which a kernel runs on a device, `group` query heads to one of keys."""
    if interpreted() and device.type == "cpu":
        return INTERPRETED
    return choose(TILES[architecture(device)], kernel, dtype == torch.float32, width, group)


def choose(rows: dict[str, Row], kernel: str, single: bool, width: int, group: int) -> Tile:
    """The tile of a kernel from an architecture's rows; `single`: for float32."""
    row = rows.get(f"{kernel} grouped", rows[kernel]) if group > 1 else rows[kernel]
    if single:
        return Tile(*(row[3] if width <= 64 else row[4]))
    return Tile(*(row[0] if width <= 64 else row[1] if width <= 96 else row[2]))


def shipped() -> list[Shipped]:
    """What launches, by its widths, types and kinds of call: see `kernels/static/shipped.py`."""
    from mm_kernels.attention.backward import delta_kernel

    passes = KERNELS[:3]
    found = [describe(kernel, "", "bf16", width) for kernel in KERNELS for width in (64, 72, 128)]
    found += [describe(kernel, "", "bf16", 96) for kernel in passes]
    found += [describe(kernel, "", "fp16", 64) for kernel in passes]
    found += [describe(kernel, "", "fp32", 64) for kernel in KERNELS]
    found += [describe(kernel, " masked", "bf16", 64, MASKED=True) for kernel in passes]
    found += [describe(kernel, " packed causal", "bf16", 64, PACKED=True, CAUSAL=True) for kernel in passes]
    found += [describe(kernel, " causal grouped", "bf16", 128, CAUSAL=True, GROUP=4) for kernel in passes]
    found += [describe(kernel, "", "fp32", 128) for kernel in passes]
    found += [describe("tangent", " causal", "bf16", 64, CAUSAL=True)]
    constants = {"D": 64, "D1": 64, "D2": 0, "BM": DELTA_ROWS, "PACKED": False, "WITH_LSE": True}
    types = {name: argument_type(name, "bf16") for name in delta_kernel.arg_names if name not in constants}
    return [*found, ("delta bf16 64", delta_kernel, types, constants, 4, 1, {})]


def describe(kernel: str, name: str, dtype: str, width: int, **flags: Any) -> Shipped:
    """One configuration; that of sm_90 with the others' tiles as overrides."""
    from mm_kernels.attention.backward import dkdv_kernel, dq_kernel
    from mm_kernels.attention.forward import forward_kernel
    from mm_kernels.attention.tangent import tangent_kernel

    function = {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel, "tangent": tangent_kernel}[kernel]
    first, second = pieces(width)
    tiles = {
        architecture: choose(rows, kernel, dtype == "fp32", width, flags.get("GROUP", 1))
        for architecture, rows in TILES.items()
    }
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
