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


def refuse_stray_accesses() -> None:
    """Make every load and store that a kernel does not mask out lie within one of the tensors that it was given.

    And no two stores of a launch meet at one place. The interpreter reads whatever is there, and a value that is
    dropped or written over afterwards shows in no result; on a GPU the read may end the process, and the last of two
    stores is anyone's guess.
    """
    import numpy
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, take = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    extents: list[tuple[int, int]] = []
    written: dict[int, numpy.ndarray] = {}  # by where a tensor begins: which of its bytes a store has begun at

    def taken(self, positional, named):
        found = take(self, positional, named)
        extents.clear()
        written.clear()
        for tensor in [*found[0], *found[1].values()]:
            if hasattr(tensor, "data_ptr"):
                steps = zip(tensor.shape, tensor.stride(), strict=True)
                length = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
                extents.append((tensor.data_ptr(), tensor.data_ptr() + length * tensor.element_size()))
        return found

    def check(pointers, mask, what):
        active = pointers.data[numpy.broadcast_to(mask.data, pointers.data.shape)]
        if active.size:
            low = int(active.min())
            high = int(active.max()) + max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            around = [extent for extent in extents if extent[0] <= low and high <= extent[1]]
            assert around, f"a {what} outside of all tensors"
            if what == "store":
                start, end = around[0]
                places = (active - numpy.uint64(start)).astype(numpy.int64)
                stored = written.setdefault(start, numpy.zeros(end - start, dtype=bool))
                assert not stored[places].any(), "two stores at one place"
                stored[places] = True
                assert stored[places].sum() == len(numpy.unique(places)) == len(places), "a place stored twice at once"

    def checked_load(self, pointers, mask, *rest):
        check(pointers, mask, "load")
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        check(pointers, mask, "store")
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    executor._init_args_hst = taken


if INTERPRETED:
    repair_bfloat16_products()
    repair_bfloat16_rounding()
    refuse_stray_accesses()
