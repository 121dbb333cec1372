"""What a compiled kernel must keep to, and the committed figures that it must not outgrow."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

from compile import Figures

SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # bytes a block
TENSOR_MEMORY = 512  # columns
MATRIX_WORK = 1.12  # over the ideal: 72 in 64 + 16 does 1.11, padded to 128 1.78
HOT_LOOP_BOUND = 0.85  # of the matrix units' rate on sm_90
WIDE = 64  # below this head width a tile's time goes to exponentials, not to products: no bound to ask for
GROWTH = 1.05  # what a figure may grow by against the committed one

GROWING = ("registers", "shared_memory", "tensor_memory", "matrix_instructions", "matrix_work")
KINDS = {"architecture": str, "name": str, "matrix_work": float, "hot_loop_bound": float}  # the other columns: int
FOLDER = Path(__file__).parent


def broken(row: Figures) -> list[str]:
    """The rules that a row breaks, in words."""
    faults = []
    if row.low_precision_products and not row.matrix_instructions:
        faults.append("no matrix instruction, though it multiplies half-precision tiles")
    if row.traps:
        faults.append(f"{row.traps} trap instructions: the compiler gave up and left a stub")
    if row.spills or row.stack:
        faults.append(f"spills: {row.spills} instructions or registers, {row.stack} bytes of stack")
    if row.shared_memory > SHARED_MEMORY[row.architecture]:
        faults.append(f"shared memory {row.shared_memory} of {SHARED_MEMORY[row.architecture]} bytes")
    if row.tensor_memory > TENSOR_MEMORY:
        faults.append(f"tensor memory {row.tensor_memory} of {TENSOR_MEMORY} columns")
    wide = row.head_width is None or row.head_width >= WIDE
    if wide and row.matrix_work is not None and row.matrix_work > MATRIX_WORK:
        faults.append(f"matrix work {row.matrix_work} times the ideal, at most {MATRIX_WORK}")
    if wide and row.architecture == "sm_90" and row.hot_loop_bound is not None and row.hot_loop_bound < HOT_LOOP_BOUND:
        faults.append(f"hot loop bound {row.hot_loop_bound}, at least {HOT_LOOP_BOUND}")
    return faults


def grown(row: Figures, committed: Figures) -> list[str]:
    """The figures that are more than 5 % worse than the committed ones, in words."""
    faults = []
    for name in GROWING:
        now, before = getattr(row, name), getattr(committed, name)
        if now is not None and before is not None and now > before * GROWTH:
            faults.append(f"{name} {now}, committed {before}")
    now, before = row.hot_loop_bound, committed.hot_loop_bound
    if now is not None and before is not None and now * GROWTH < before:
        faults.append(f"hot_loop_bound {now}, committed {before}")
    return faults


def failures(op: str, rows: Iterable[Figures], committed: Iterable[Figures], partial: bool = False) -> list[str]:
    """One line for each configuration and architecture that fails; `partial`: some committed rows were not compiled."""
    before = {(row.architecture, row.name): row for row in committed}
    new = ["not in the committed file"] if before else []
    lines = [] if before else [f"{op}: no figures are committed; python kernels/static {op} --update writes them"]
    for row in rows:
        known = before.pop((row.architecture, row.name), None)
        faults = broken(row) + (grown(row, known) if known else new)
        if faults:
            lines.append(f"{op}, {row.name}, {row.architecture}: {'; '.join(faults)}")
    if not partial:
        lines += [f"{op}, {name}, {architecture}: committed, but no longer shipped" for architecture, name in before]
    return lines


def read(op: str) -> list[Figures]:
    """The committed rows of an op; none where it has no file."""
    path = FOLDER / f"{op}.csv"
    if not path.exists():
        return []

    def value(column: str, text: str) -> object:
        return KINDS.get(column, int)(text) if text else None

    with path.open(newline="") as file:
        return [
            Figures(**{column: value(column, text) for column, text in row.items()}) for row in csv.DictReader(file)
        ]


def write(op: str, rows: Iterable[Figures]) -> None:
    """Make these the committed rows of an op."""
    with (FOLDER / f"{op}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Figures)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
