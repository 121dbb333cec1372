"""The static gate: what it lets pass and what not, and the committed figures of the kernels that ship."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def static(root: Path) -> Iterator[SimpleNamespace]:
    """The modules of kernels/static, which is a program and no package."""
    sys.path.insert(0, str(root / "kernels" / "static"))
    import compile
    import gate
    import sass
    import shipped

    yield SimpleNamespace(compile=compile, gate=gate, sass=sass, shipped=shipped)
    sys.path.remove(str(root / "kernels" / "static"))


@pytest.fixture
def good(static: SimpleNamespace) -> Any:
    """A row that passes every gate."""
    return static.compile.Figures(
        architecture="sm_90",
        name="forward",
        head_width=72,
        registers=128,
        stack=0,
        spills=0,
        shared_memory=60_000,
        tensor_memory=0,
        matrix_instructions=12,
        traps=0,
        low_precision_products=4,
        matrix_work=1.111,
        hot_loop_bound=0.9,
    )


def test_a_good_row_passes(static: SimpleNamespace, good: Any) -> None:
    assert static.gate.failures("attention", [good], [good]) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"matrix_instructions": 0}, "no matrix instruction"),
        ({"traps": 1}, "stub"),
        ({"spills": 2}, "spills: 2"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared_memory": 227 * 1024 + 1}, "of 232448 bytes"),
        ({"architecture": "sm_80", "shared_memory": 163 * 1024 + 1}, "of 166912 bytes"),
        ({"architecture": "gfx942", "shared_memory": 64 * 1024 + 1}, "of 65536 bytes"),
        ({"architecture": "sm_100", "tensor_memory": 640}, "640 of 512 columns"),
        ({"matrix_work": 1.778}, "1.778 times the ideal"),
        ({"hot_loop_bound": 0.84}, "0.84, at least 0.85"),
    ],
)
def test_each_gate_fails_with_one_line(static: SimpleNamespace, good: Any, change: dict[str, Any], says: str) -> None:
    row = dataclasses.replace(good, **change)
    (line,) = static.gate.failures("attention", [row], [row])
    assert says in line
    assert line.startswith(f"attention, forward, {row.architecture}: ")


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        ({"registers": 134}, False),
        ({"registers": 135}, True),
        ({"shared_memory": 63_001}, True),
        ({"matrix_instructions": 13}, True),
        ({"hot_loop_bound": 0.855}, True),
        ({"registers": 60, "shared_memory": 0, "hot_loop_bound": 1.0}, False),
    ],
)
def test_more_than_five_percent_growth_fails(
    static: SimpleNamespace, good: Any, change: dict[str, Any], fails: bool
) -> None:
    lines = static.gate.failures("attention", [dataclasses.replace(good, **change)], [good])
    assert bool(lines) is fails


def test_rows_that_come_or_go_fail(static: SimpleNamespace, good: Any) -> None:
    other = dataclasses.replace(good, name="backward")
    assert static.gate.failures("attention", [other], [good]) == [
        "attention, backward, sm_90: not in the committed file",
        "attention, forward, sm_90: committed, but no longer shipped",
    ]
    assert static.gate.failures("attention", [good], [good, other], partial=True) == []


def test_narrow_heads_and_exact_products_are_spared_what_they_cannot_do(static: SimpleNamespace, good: Any) -> None:
    narrow = dataclasses.replace(good, head_width=32, hot_loop_bound=0.4)
    exact = dataclasses.replace(good, low_precision_products=0, matrix_instructions=0, hot_loop_bound=None)
    for row in (narrow, exact):
        assert static.gate.failures("attention", [row], [row]) == []


@pytest.mark.parametrize(
    ("width", "pieces", "ratio"),
    [(72, [64, 16], 1.111), (72, [128], 1.778), (96, [64, 32], 1.0), (128, [64, 64], 1.0), (80, [32, 32, 16], 1.0)],
)
def test_matrix_work_counts_what_a_split_width_costs(
    static: SimpleNamespace, width: int, pieces: list[int], ratio: float
) -> None:
    scores = [(128, piece, 64, "bf16") for piece in pieces]
    sums = [(128, 64, piece, "bf16") for piece in pieces]
    assert static.compile.matrix_work(scores + sums, {"D": width, "BM": 128, "BN": 64}) == ratio


def test_the_hot_loop_is_the_innermost_one_with_matrix_work(static: SimpleNamespace) -> None:
    names = ["MOV", "HMMA.16816.F32", "FADD", "BRA", "HMMA.16816.F32", "HMMA.16816.F32", "MUFU.EX2", "BRA", "BRA"]
    jumps = {3: 1, 7: 4, 8: 0}  # two loops one after the other in a third
    instructions = [
        static.sass.Instruction(16 * place, name, f" 0x{16 * jumps[place]:x}" if place in jumps else "")
        for place, name in enumerate(names)
    ]
    assert static.sass.hot_loop(instructions) == instructions[4:8]
    assert static.sass.hot_loop_bound("sm_80", instructions) == 2 * 4096 / 512 / 16
    assert static.sass.hot_loop_bound("sm_90", instructions) == 8 / 8
    assert static.sass.hot_loop_bound("sm_100", instructions) is None


def test_traps_in_the_kernel_count_and_those_of_its_subroutines_do_not(static: SimpleNamespace) -> None:
    lines = [(0, "CALL.REL.NOINC", " 0x30"), (16, "EXIT", ""), (48, "BPT.TRAP", " 0x1")]
    sound = static.sass.Machine(32, 0, [static.sass.Instruction(*line) for line in lines])
    stub = static.sass.Machine(32, 0, [static.sass.Instruction(16, "BPT.TRAP", " 0x1")])
    assert (sound.traps, stub.traps) == (0, 1)


def test_committed_figures_cover_what_ships_and_pass_every_gate(static: SimpleNamespace, root: Path) -> None:
    names = {op: list(static.shipped.configs(op)) for op in static.shipped.ops()}
    assert sum(map(len, names.values())) <= 75
    assert {path.stem for path in (root / "kernels" / "static").glob("*.csv")} == {op for op in names if names[op]}
    for op, shipping in names.items():
        rows = static.gate.read(op)
        expected = [(architecture, name) for name in shipping for architecture in ARCHITECTURES]
        assert [(row.architecture, row.name) for row in rows] == expected
        assert static.gate.failures(op, rows, rows) == [] or not shipping


@pytest.mark.timeout(600)
def test_every_shipped_kernel_compiles_for_four_architectures_and_passes_its_gates(root: Path) -> None:
    run = subprocess.run(
        [sys.executable, "kernels/static"], cwd=root, capture_output=True, text=True, timeout=580, check=False
    )
    assert run.returncode == 0 and run.stdout.endswith("all pass\n"), (run.stdout + run.stderr)[-4000:]
