"""What kernel tests share: memory that is poisoned with NaN, and one way to say how far a result may be off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from mm_kernels import runtime

FLOAT32_LIMIT = 2e-6  # largest error over the largest value; a float32 sum of a few hundred terms stays well below
BAND = 3  # rows and columns of NaN round a guarded tensor


def useless(tensor: Tensor) -> float:
    """A value of the tensor's type that spoils every result it gets into."""
    return math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from torch.empty and its kin is NaN (integers: the smallest there is): what a kernel leaves out shows."""

    def poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            tensor = function(*args, **kwargs)
            return tensor if tensor.dtype == torch.bool else tensor.fill_(useless(tensor))

        return allocate

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def guard() -> Callable[..., Tensor]:
    """`guard(tensor, strided=False)`: the same values as a leaf inside a larger buffer that is NaN all round.

    Contiguous, with whole rows of NaN before and after it; `strided`: NaN between all rows as well, so every stride but
    the last (1) is larger than the shape asks for, and the column after the last one of a row is NaN.
    """

    def guarded(tensor: Tensor, strided: bool = False) -> Tensor:
        value = useless(tensor)
        if strided:
            buffer = tensor.new_full([n + 2 * BAND for n in tensor.shape], value)
            view = buffer[tuple(slice(BAND, BAND + n) for n in tensor.shape)]
        else:
            width = max(1, math.prod(tensor.shape[1:])) * BAND
            view = tensor.new_full([tensor.numel() + 2 * width], value)[width : width + tensor.numel()]
            view = view.view(tensor.shape)
        with torch.no_grad():
            view.copy_(tensor)
        return view.detach().requires_grad_(tensor.requires_grad)

    return guarded


def relative_error(actual: Tensor, exact: Tensor, size: float | None = None) -> float:
    """The largest |actual - exact| over `size`, by default the largest |exact|; 0 where there is nothing to compare.

    Infinities must sit in the same places; where they do not, and where `actual` has a NaN, the error is infinite.
    """
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return 0.0
    found, wanted = actual.detach().double(), exact.detach().double()
    finite = wanted.isfinite()
    if not torch.equal(found[~finite], wanted[~finite]):
        return math.inf
    found, wanted = found[finite], wanted[finite]
    if not found.isfinite().all():
        return math.inf
    if not found.numel():
        return 0.0
    off = (found - wanted).abs().max().item()
    largest = wanted.abs().max().item() if size is None else size
    return off / largest if largest else (math.inf if off else 0.0)


@pytest.fixture(name="relative_error")
def relative_error_function() -> Callable[..., float]:
    """`relative_error(actual, exact, size=None)`: the function above."""
    return relative_error


@pytest.fixture
def assert_accurate() -> Callable[..., None]:
    """`assert_accurate(actual, exact, torchs=None, *, size=None, limit=2e-6, what="")` against a float64 result.

    `torchs`: what torch makes of the same inputs in the type of `actual`; then the limit is twice torch's own error,
    and never under `limit`. float16 and bfloat16 need it. `size`: what errors are measured against where `exact`
    vanishes by cancellation, and so says nothing of the terms that were summed.
    """

    def check(
        actual: Tensor,
        exact: Tensor,
        torchs: Tensor | None = None,
        *,
        size: float | None = None,
        limit: float = FLOAT32_LIMIT,
        what: str = "",
    ) -> None:
        assert exact.dtype == torch.float64, "the exact result is a float64 one"
        if actual.dtype in (torch.float16, torch.bfloat16):
            assert torchs is not None and torchs.dtype == actual.dtype, f"what does torch make of it in {actual.dtype}?"
        allowed = limit if torchs is None else max(limit, 2 * relative_error(torchs, exact, size))
        found = relative_error(actual, exact, size)
        assert found <= allowed, f"{what or 'result'}: relative error {found:.2e}, allowed {allowed:.2e}"

    return check


@pytest.fixture
def launched() -> Callable[..., AbstractContextManager[None]]:
    """`with launched("name", ...):` fails unless each of these Triton kernels was launched inside, not torch for it."""

    @contextmanager
    def counting(*names: str) -> Iterator[None]:
        before = runtime.launches.copy()
        yield
        idle = [name for name in names if runtime.launches[name] <= before[name]]
        assert not idle, f"not launched: {', '.join(idle)}"

    return counting
