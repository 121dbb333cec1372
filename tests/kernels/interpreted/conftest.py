"""Tests of the Triton kernels themselves: in Triton's interpreter, or on a GPU with MM_KERNEL_TESTS_ON=cuda.

Both are settled before Triton is imported, so these tests run in a process of their own, which test_interpreted.py
starts; in any other they are not collected. On a GPU tensors that a test makes without naming a device are made there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = os.environ.get("MM_KERNEL_TESTS_ON", "cpu")

if INTERPRETED:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: more threads make small products 15 times slower

collect_ignore_glob = [] if INTERPRETED or DEVICE != "cpu" else ["test_*.py"]


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    """Tensors are made where the kernels run."""
    if DEVICE == "cpu":
        yield
        return
    import torch

    with torch.device(DEVICE):
        yield


def repair_bfloat16_products() -> None:
    """Make the interpreter's tl.dot right for bfloat16.

    It holds bfloat16 as the raw bits in uint16 and, up to Triton 3.8 at least, multiplies those as integers
    (triton-lang/triton#11584). Widened to float32 first, products are exact and the sum is the float32 one of a GPU.
    """
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    unrepaired = interpreter.InterpreterBuilder.create_dot

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand.data
        return (operand.data.astype(numpy.uint32) << 16).view(numpy.float32)

    def create_dot(self, a, b, accumulator, *rest):
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return unrepaired(self, a, b, accumulator, *rest)
        product = numpy.matmul(widened(a), widened(b), dtype=numpy.float32)
        return interpreter.TensorHandle(product + widened(accumulator), accumulator.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def repair_bfloat16_rounding() -> None:
    """Make the interpreter round where it makes bfloat16 of float32, as GPUs do; up to Triton 3.8 it drops the bits."""
    import numpy
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    unrepaired = interpreter.InterpreterBuilder.cast_impl

    def cast(self, source, target):
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return unrepaired(self, source, target)
        values = torch.from_numpy(numpy.ascontiguousarray(source.data)).bfloat16()
        return interpreter.TensorHandle(values.view(torch.uint16).numpy(), tl.bfloat16)

    interpreter.InterpreterBuilder.cast_impl = cast


if INTERPRETED:
    repair_bfloat16_products()
    repair_bfloat16_rounding()
