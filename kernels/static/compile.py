"""Compile a shipped configuration ahead of time, for a GPU that is not there, and read off what came of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import sass
import triton
from shipped import configs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DOT = re.compile(r"tt\.dot .*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<(\d+)x(\d+)x(\w+)>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """One row: a configuration on an architecture."""

    architecture: str
    name: str
    head_width: int | None
    registers: int
    stack: int  # bytes a thread
    spills: int  # instructions to and from local memory; on gfx942 spilled registers
    shared_memory: int  # bytes
    tensor_memory: int  # columns of 512
    matrix_instructions: int
    traps: int
    low_precision_products: int  # tl.dot of float16 or bfloat16 operands in the source: what needs matrix instructions
    matrix_work: float | None  # of the source's products, over what the head width asks for
    hot_loop_bound: float | None


def figures(op: str, name: str, architecture: str) -> Figures:
    """Compile; raises what Triton raises, RuntimeError where the machine code cannot be read.

    The configuration comes by its name, so that the call can go to another process, where kernels cannot.
    """
    config = configs(op)[name]
    kernel = config.kernel
    constants = config.constants(architecture)
    signature = {name: "constexpr" if name in constants else config.signature[name] for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(signature.values())
        if kind.startswith("*") or kind.endswith(":16")
    }
    source = ASTSource(
        fn=kernel,
        signature={name: kind.removesuffix(":16") for name, kind in signature.items()},
        constexprs=constants,
        attrs=aligned,
    )
    compiled = triton.compile(source, target=TARGETS[architecture], options=config.options(architecture))
    products = [(int(m[1]), int(m[2]), int(m[5]), m[3]) for m in DOT.finditer(compiled.asm["ttir"])]
    return Figures(
        architecture=architecture,
        name=config.name,
        head_width=constants.get("D"),
        shared_memory=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        low_precision_products=sum(kind in ("f16", "bf16") for *_, kind in products),
        matrix_work=matrix_work(products, constants),
        **(amd(compiled.asm["amdgcn"]) if architecture == "gfx942" else nvidia(compiled.asm["cubin"], architecture)),
    )


def nvidia(cubin: bytes, architecture: str) -> dict[str, Any]:
    machine = sass.disassemble(cubin)
    bound = sass.hot_loop_bound(architecture, machine.instructions)
    return {
        "registers": machine.registers,
        "stack": machine.stack,
        "spills": machine.count("LDL", "STL"),
        "matrix_instructions": sum(instruction.is_matrix for instruction in machine.instructions),
        "traps": machine.traps,
        "hot_loop_bound": None if bound is None else round(bound, 3),
    }


def amd(assembly: str) -> dict[str, Any]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the assembly has no .{key}")
        return int(found[1])

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),
        "matrix_instructions": len(re.findall(r"^\s+v_mfma", assembly, re.MULTILINE)),
        "traps": len(re.findall(r"^\s+s_trap", assembly, re.MULTILINE)),
        "hot_loop_bound": None,
    }


def matrix_work(products: list[tuple[int, int, int, str]], constants: dict[str, Any]) -> float | None:
    """Multiplications in the products of the source over those that heads of width D need.

    A tile's products are BM × BN × D; a D that is no power of two is split into pieces that are, 72 into 64 and 16, or
    rounded up. None where the kernel has no D, BM and BN, or a product that is not over the tile.
    """
    if not products or not {"D", "BM", "BN"} <= constants.keys():
        return None
    width, tile = constants["D"], constants["BM"] * constants["BN"]
    work = [m * k * n for m, k, n, _ in products]
    if any(each % tile for each in work):
        return None
    pieces = [each // tile for each in work]
    largest = max(pieces)
    whole = pieces.count(largest) / max(1, width // largest)  # products of the full width
    return round(sum(pieces) / (whole * width), 3)
