"""What NVIDIA machine code tells: counts of instructions, and how well its hot loop can feed the matrix units."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton.backends.nvidia

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")

# dense bf16 FLOP a clock of one of an SM's four parts: A100 312 TFLOP/s, H100 SXM 989 TFLOP/s
MATRIX_RATE = {"sm_80": 512, "sm_90": 1024}
EXPONENTIAL_CLOCKS = 8  # one MUFU instruction of a warp: 32 lanes, 4 a clock and part


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str

    @property
    def is_matrix(self) -> bool:
        """HMMA (sm_80), HGMMA (sm_90), UTCHMMA and its like (sm_100)."""
        return "MMA" in self.name.split(".")[0]


class Machine(NamedTuple):
    """Registers of a thread, bytes of its stack, and the instructions."""

    registers: int
    stack: int
    instructions: list[Instruction]

    def count(self, *names: str) -> int:
        """How many instructions are called one of `names`, whatever their suffix."""
        return sum(self.by_name[name] for name in names)

    @property
    def by_name(self) -> Counter[str]:
        """How often each instruction occurs, suffixes left out."""
        return Counter(instruction.name.split(".")[0] for instruction in self.instructions)

    @property
    def traps(self) -> int:
        """Traps in the kernel's way, as where it needs more tensor memory than there is: the compiler leaves a stub.

        Not counted are those that are called: ptxas adds such subroutines to every sm_100 kernel with tensor memory,
        for columns that are freed but were never taken.
        """
        called = {address(each) for each in self.instructions if each.name.startswith("CALL")}
        return sum(each.name.startswith("BPT.TRAP") and each.address not in called for each in self.instructions)


def address(jump: Instruction) -> int | None:
    """Where a branch or a call goes; None where that is not in the instruction."""
    found = re.search(r"0x([0-9a-f]+)", jump.operands)
    return int(found[1], 16) if found else None


def disassemble(cubin: bytes) -> Machine:
    """Read a compiled kernel; raises RuntimeError where cuobjdump does not say what it should."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = USAGE.search(text)
    if usage is None:
        raise RuntimeError(f"cuobjdump names no registers: {text[:200]!r}")
    instructions = [Instruction(int(found[1], 16), found[2], found[3]) for found in INSTRUCTION.finditer(text)]
    return Machine(int(usage[1]), int(usage[2]), instructions)


def hot_loop(instructions: list[Instruction]) -> list[Instruction]:
    """The innermost loop with the most matrix instructions, the shortest of several such; empty where there is none."""
    loops = []
    for branch in instructions:
        start = address(branch) if branch.name.startswith("BRA") else None
        if start is not None and start < branch.address:
            body = [instruction for instruction in instructions if start <= instruction.address <= branch.address]
            if any(instruction.is_matrix for instruction in body):
                loops.append(body)
    innermost = [
        body
        for body in loops
        if not any(
            other is not body
            and len(other) < len(body)
            and body[0].address <= other[0].address
            and other[-1].address <= body[-1].address
            for other in loops
        )
    ]
    return min(innermost, key=lambda body: (-sum(each.is_matrix for each in body), len(body)), default=[])


def matrix_flop(name: str) -> float:
    """Floating-point operations of a matrix instruction, of one warp."""
    if name.startswith("HMMA.16816"):
        return 2 * 16 * 8 * 16
    if name.startswith("HMMA.1688"):
        return 2 * 16 * 8 * 8
    shape = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name)
    return 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) / 4 if shape else 0  # four warps share one HGMMA


def hot_loop_bound(architecture: str, instructions: list[Instruction]) -> float | None:
    """The largest share of the matrix units' rate that the hot loop leaves possible, 0 to 1.

    An SM's part issues one instruction a clock and has one exponential unit, so a turn of the loop takes at least as
    many clocks as the loop has instructions, as its exponentials take, and as its matrix work takes. None where there
    is no such loop, or where the architecture starts its matrix work from one thread (sm_100).
    """
    rate, body = MATRIX_RATE.get(architecture), hot_loop(instructions)
    if rate is None or not body:
        return None
    matrix = sum(matrix_flop(instruction.name) for instruction in body) / rate
    exponentials = EXPONENTIAL_CLOCKS * sum(instruction.name.startswith("MUFU") for instruction in body)
    return matrix / max(matrix, exponentials, len(body))
