"""The loss' Triton kernels against float64, in the interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm_kernels import contrastive_loss
from mm_kernels.contrastive_loss import contrastive_loss_reference, triton_tiles
from mm_kernels.contrastive_loss.op import contrastive_loss_op

KINDS = ["softmax", "sigmoid"]
TYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("value", "image", "text", "scale", "bias")


def batch(n: int, width: int, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(n * width)
    image = F.normalize(torch.randn(n, width, dtype=torch.float64), dim=-1)
    text = F.normalize(image + torch.randn(n, width, dtype=torch.float64) * 2 / width**0.5, dim=-1)
    numbers = (torch.tensor([10.0]), torch.tensor([-10.0]))
    return image.to(dtype), text.to(dtype), *(numbers if kind == "sigmoid" else numbers[:1])


def value_and_gradients(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = loss(*leaves, **options)
    return value.detach(), *torch.autograd.grad(3 * value, leaves)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n", "width", "chunk"), [(1, 1, None), (33, 32, None), (70, 40, 48), (97, 72, None)])
def test_kernels_equal_float64(
    n: int,
    width: int,
    chunk: int | None,
    dtype: torch.dtype,
    kind: str,
    assert_accurate: Any,
    launched: Any,
    guard: Any,
) -> None:
    """Rows, widths and chunks that blocks divide and that they do not; NaN before, after and between the rows."""
    inputs = batch(n, width, kind, dtype)
    exact = value_and_gradients(contrastive_loss_reference, tuple(x.double() for x in inputs), kind=kind)
    torchs = value_and_gradients(contrastive_loss_reference, inputs, kind=kind)
    guarded = tuple(guard(x, strided=n > 33) if x.ndim == 2 else guard(x) for x in inputs)
    kernels = ["contrastive_statistics", "contrastive_softmax"] if kind == "softmax" else ["contrastive_sigmoid"]
    if dtype != torch.float32:
        kernels.append("contrastive_product")
    with launched(*kernels):
        ours = value_and_gradients(contrastive_loss, guarded, kind=kind, chunk=chunk)
    for name, found, wanted, theirs in zip(NAMES, ours, exact, torchs, strict=False):
        # the scale's gradient is a difference of sums as large as the logits; torch's own may happen to be exact
        size = max(1.0, wanted.abs().max().item()) if name == "scale" else None
        assert_accurate(found, wanted, None if found.dtype == torch.float32 else theirs, size=size, what=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_width_of_1000_and_the_same_bits_again(kind: str, assert_accurate: Any) -> None:
    inputs = batch(40, 1000, kind)
    exact = value_and_gradients(contrastive_loss_reference, tuple(x.double() for x in inputs), kind=kind)
    ours, again = (value_and_gradients(contrastive_loss, inputs, kind=kind) for _ in range(2))
    for name, found, wanted, repeated in zip(NAMES, ours, exact, again, strict=False):
        assert_accurate(found, wanted, size=max(1.0, wanted.abs().max().item()) if name == "scale" else None, what=name)
        assert torch.equal(found, repeated)


def test_logits_far_apart_neither_overflow_nor_vanish(assert_accurate: Any) -> None:
    image, text, scale = batch(40, 8, "softmax")
    inputs = image * torch.linspace(0.01, 9, 40)[:, None], text, scale * 10
    exact = value_and_gradients(contrastive_loss_reference, tuple(x.double() for x in inputs))
    for found, wanted in zip(value_and_gradients(contrastive_loss, inputs), exact, strict=True):
        assert_accurate(found, wanted, limit=2e-5)  # float32 holds a logit of 900 to 3e-5


def test_the_sigmoid_loss_keeps_its_digits_where_it_is_small(assert_accurate: Any) -> None:
    for bias in (0.0, -3.0, -16.0, -60.0, 60.0):  # softplus of each: 0.7, 5e-2, 1e-7, 9e-27, 60
        image, text = torch.zeros(4, 2), torch.zeros(4, 2)
        numbers = torch.tensor([1.0]), torch.tensor([bias])
        _, sums = triton_tiles.sigmoid_weights(image, text, *numbers, first=9, gradients=True)
        z = torch.full((16,), bias, dtype=torch.float64)
        exact = torch.stack([torch.where(z > 30, z, z.exp().log1p()).sum(), z.sigmoid().sum()])
        for found, wanted in zip(sums, exact, strict=False):
            assert found.item() == pytest.approx(wanted.item(), rel=2e-6)
        assert sums[2] == 0


@pytest.mark.parametrize("first", [-50, -7, 0, 31, 64, 200])
def test_pairs_lie_where_the_tile_is_told(first: int, assert_accurate: Any) -> None:
    """Rectangles whose pairs start below, above or outside them, as processes and chunks make them."""
    from mm_kernels.contrastive_loss import tiles

    torch.manual_seed(0)
    image, text, scale, bias = torch.randn(66, 20), torch.randn(41, 20), torch.tensor([0.7]), torch.tensor([-1.0])
    double = [x.double() for x in (image, text, scale, bias)]
    rows, columns = tiles.statistics(*double[:3], first)
    for found, wanted in zip(triton_tiles.statistics(image, text, scale, first), (rows, columns), strict=True):
        assert_accurate(found, wanted)
    weights, _ = triton_tiles.softmax_weights(image, text, scale, first, rows.float(), columns.float())
    exact, _ = tiles.softmax_weights(*double[:3], first, rows, columns)
    assert_accurate(weights, exact, limit=4e-6)
    weights, sums = triton_tiles.sigmoid_weights(image, text, scale, bias, first, True)
    exact, wanted = tiles.sigmoid_weights(*double, first, True)
    assert_accurate(weights, exact)
    assert_accurate(sums[:2], wanted[:2])
    assert sums[2].item() == pytest.approx((exact * (double[0] @ double[1].T)).sum().item(), rel=2e-6)


def test_operator_passes_opcheck() -> None:
    image, text, scale, bias = (x.requires_grad_() for x in batch(9, 6, "sigmoid"))
    torch.library.opcheck(contrastive_loss_op, (image, text, scale, bias, "sigmoid", 4, "", False, True))


def test_without_gradients_only_the_value_is_made(assert_accurate: Any) -> None:
    for kind in KINDS:
        inputs = batch(33, 20, kind)
        with torch.no_grad():
            value = contrastive_loss(*inputs, kind=kind)
        assert_accurate(value, contrastive_loss_reference(*(x.double() for x in inputs), kind=kind))
