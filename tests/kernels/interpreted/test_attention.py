"""The Triton kernels of attention against float64: results, every gradient, log-sum-exp, tangents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact_attention import exact_attention, inputs, offsets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm_kernels.attention import attention, attention_jvp

KERNELS = "attention_forward", "attention_delta", "attention_dq", "attention_dkdv"
HALF = torch.float16, torch.bfloat16


def both_passes(
    function: Callable[..., Any], tensors: list[Tensor], weights: list[Tensor], **options: Any
) -> list[Tensor]:
    """Result, log-sum-exp and the gradients of q, k, v for fixed gradients of the first two (zero where -inf)."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out, lse = function(*tensors, **options)
    finite = torch.where(lse.isfinite(), lse, 0.0)
    loss = (out * weights[0].to(out)).sum() + (finite * weights[1].to(finite)).sum()
    return [out, lse, *torch.autograd.grad(loss, tensors)]


def compare(check: Callable[..., None], tensors: list[Tensor], **options: Any) -> None:
    """All that both passes return against float64, and in half precision against torch's own error."""
    heads, rows = tensors[0].shape[-2], tensors[0].shape[-3]
    lead = tensors[0].shape[:-3]
    weights = [torch.randn(tensors[0].shape), torch.randn(*lead, heads, rows)]
    ours = both_passes(lambda *args, **kw: attention(*args, **kw, return_lse=True), tensors, weights, **options)
    kept = {name: value for name, value in options.items() if name not in ("max_q", "max_k")}
    exact = both_passes(exact_attention, [tensor.double() for tensor in tensors], weights, **kept)
    theirs = [None] * 5
    if tensors[0].dtype in HALF:
        theirs = both_passes(exact_attention, tensors, weights, **kept)
        theirs[1] = None  # the kernels keep the sums of exponentials in float32
    # Gradients of q and k vanish by cancellation where a row sees one key: their size is then that of the terms.
    for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), ours, exact, theirs, strict=True):
        size = b.abs().max().clamp_min(0.5).item() if name in ("dq", "dk") and b.numel() else None
        check(a, b, c, size=size, what=name)


SHAPES = {  # queries, keys, heads of each, width
    "one token": (1, 1, 1, 1, 16),
    "one query": (1, 37, 2, 2, 32),
    "odd": (37, 41, 2, 2, 24),
    "whole blocks": (64, 32, 1, 1, 32),
    "one query head for all": (35, 50, 3, 1, 16),
    "grouped": (20, 33, 4, 2, 40),
    "no keys": (5, 0, 2, 2, 16),
    "no queries": (0, 5, 2, 2, 16),
}


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_dense_attention_equals_float64(
    shape: tuple[int, ...], causal: bool, poison: None, assert_accurate: Any
) -> None:
    compare(assert_accurate, inputs(*shape), causal=causal)


@pytest.mark.parametrize("width", [1, 5, 64, 72, 80, 88, 96, 104, 128])
def test_any_head_width(width: int, poison: None, assert_accurate: Any, launched: Any) -> None:
    with launched(*KERNELS):
        compare(assert_accurate, inputs(33, 17, 1, 1, width, 1))


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", HALF, ids=["fp16", "bf16"])
def test_half_precision_errs_no_more_than_twice_as_torch(
    dtype: torch.dtype, causal: bool, assert_accurate: Any
) -> None:
    compare(assert_accurate, [tensor.to(dtype) for tensor in inputs(37, 41, 2, 1, 48)], causal=causal)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("kind", ["prefix", "scattered", "none", "all"])
def test_masked_keys(kind: str, causal: bool, poison: None, assert_accurate: Any) -> None:
    tensors = inputs(35, 50, 2, 1, 40 if kind == "scattered" else 16, 3)  # 40 in two pieces
    mask = {
        "prefix": torch.arange(50) < torch.tensor([[17], [50], [0]]),
        "scattered": torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) > 0.4,
        "none": torch.zeros(3, 50, dtype=torch.bool),
        "all": torch.ones(3, 50, dtype=torch.bool),
    }[kind]
    compare(assert_accurate, tensors, mask=mask, causal=causal)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_packed_sequences_of_any_lengths(causal: bool, poison: None, assert_accurate: Any, launched: Any) -> None:
    queries, keys = offsets(3, 0, 41, 1, 33), offsets(50, 5, 0, 1, 20)
    with launched(*KERNELS):
        compare(assert_accurate, inputs(78, 76, 2, 1, 24, None), cu_q=queries, cu_k=keys, causal=causal)


def test_tokens_after_the_last_sequence_give_zeros(poison: None) -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs(20, 20, 1, 1, 16, None)]
    out, lse = attention(*tensors, cu_q=offsets(7, 6), max_q=7, max_k=7, return_lse=True)
    grads = torch.autograd.grad(out.sum(), tensors)
    assert not any(tensor[13:].any() for tensor in (out, *grads))
    assert (lse[:, 13:] == -torch.inf).all()
    exact, _ = exact_attention(*(tensor[:13].double() for tensor in tensors), cu_q=offsets(7, 6))
    torch.testing.assert_close(out[:13].double(), exact, atol=1e-6, rtol=1e-5)


# The check holds no state, so that one will do for all examples.
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([(1, 1), (4, 2)]), st.integers(1, 40), st.booleans())
def test_shapes_at_random(
    assert_accurate: Any, rows: int, columns: int, heads: tuple, width: int, causal: bool
) -> None:
    compare(assert_accurate, inputs(rows, columns, *heads, width, 1), causal=causal)


@pytest.mark.parametrize("strided", [False, True])
def test_nothing_outside_the_inputs_is_read(strided: bool, poison: None, guard: Any, assert_accurate: Any) -> None:
    tensors = inputs(35, 21, 2, 2, 24)
    weights = [torch.ones(tensors[0].shape), torch.ones(2, 2, 35)]
    exact = both_passes(exact_attention, [tensor.double() for tensor in tensors], weights)
    guarded = [guard(tensor, strided).requires_grad_() for tensor in tensors]
    out, lse = attention(*guarded, return_lse=True)
    found = [out, lse, *torch.autograd.grad(out.sum() + lse.sum(), guarded)]
    for a, b in zip(found, exact, strict=True):
        assert_accurate(a, b)


def test_heads_before_tokens_and_views_of_one_projection(assert_accurate: Any) -> None:
    q, k, v = torch.randn(2, 20, 3, 2, 24).unbind(2)  # as from one linear layer
    exact, _ = exact_attention(q.double(), k.double(), v.double())
    assert_accurate(attention(q, k, v), exact)
    turned = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v)]
    assert_accurate(attention(*turned), exact)


def test_the_same_inputs_give_the_same_bits() -> None:
    tensors = inputs(40, 50, 2, 1, 16, 1)
    weights = [torch.randn(1, 40, 2, 16), torch.randn(1, 2, 40)]
    first, second = (
        both_passes(lambda *args: attention(*args, causal=True, return_lse=True), tensors, weights) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_large_scores_and_another_scale(assert_accurate: Any) -> None:
    tensors = [tensor * 8 for tensor in inputs(20, 40, 1, 1, 16)]
    exact, total = exact_attention(*(tensor.double() for tensor in tensors), scale=0.5)
    out, lse = attention(*tensors, scale=0.5, return_lse=True)
    assert_accurate(out, exact, limit=2e-5)  # scores of some 500: their own rounding moves weights by 3e-5
    assert_accurate(lse, total)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("width", [16, 72])
def test_tangents_equal_those_of_the_reference(
    width: int, causal: bool, poison: None, assert_accurate: Any, launched: Any
) -> None:
    tensors = inputs(35, 41, 2, 1, width)
    moves = [torch.randn_like(tensor) for tensor in tensors]

    def exact_of(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = exact_attention(*tensors, causal=causal)
        return out, torch.where(lse.isfinite(), lse, 0.0)

    doubles = tuple(x.double() for x in tensors), tuple(x.double() for x in moves)
    (exact, _), (exact_tangent, exact_slope) = torch.func.jvp(exact_of, *doubles)
    with launched("attention_tangent"):
        out, tangent = attention_jvp(*tensors, *moves, causal=causal)
        assert_accurate(out, exact)
        assert_accurate(tangent, exact_tangent)
    with launched("attention_forward", "attention_tangent"):
        (out, _), (tangent, slope) = torch.func.jvp(
            lambda *tensors: attention(*tensors, causal=causal, return_lse=True), tuple(tensors), tuple(moves)
        )
    for a, b in ((out, exact), (tangent, exact_tangent), (slope, exact_slope)):
        assert_accurate(a, b)


@pytest.mark.parametrize("form", ["masked", "packed"])
def test_tangents_of_masked_and_packed_attention(form: str, poison: None, assert_accurate: Any) -> None:
    if form == "masked":
        tensors, options = inputs(20, 35, 1, 1, 16), {"mask": torch.arange(35) % 5 != 3}
        options["mask"] = options["mask"].repeat(2, 1)
    else:  # the first row of a sequence sees one key
        tensors, options = inputs(50, 50, 1, 1, 16, None), {"cu_q": offsets(7, 0, 43), "causal": True}
    moves = [torch.randn_like(tensor) for tensor in tensors]
    doubles = tuple(x.double() for x in tensors), tuple(x.double() for x in moves)
    exact = torch.func.jvp(lambda *tensors: exact_attention(*tensors, **options), *doubles)
    found = torch.func.jvp(
        lambda *tensors: attention(*tensors, **options, return_lse=True), tuple(tensors), tuple(moves)
    )
    for ours, wanted in zip(found, exact, strict=True):  # results, then tangents; of each the sums of exponentials too
        for a, b in zip(ours, wanted, strict=True):
            assert_accurate(a, b)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("direct", [False, True], ids=["func.jvp", "attention_jvp"])
def test_a_few_step_objective_learns_through_the_primal(direct: bool, causal: bool, assert_accurate: Any) -> None:
    q, k, v = inputs(20, 20, 1, 1, 16)
    move, weight = torch.randn_like(q), torch.eye(16).requires_grad_()

    def gradient(form: Callable[..., Tensor], dtype: torch.dtype, direct: bool) -> Tensor:
        a, b, c, d, w = (x.to(dtype) for x in (q, k, v, move, weight))
        if direct:
            nothing = torch.zeros_like(b), torch.zeros_like(c)
            out, tangent = attention_jvp(a @ w, b, c, d @ w, *nothing, causal=causal)
        else:
            out, tangent = torch.func.jvp(lambda a: form(a @ w, b, c, causal=causal), (a,), (d,))
        return torch.autograd.grad((out - (out + tangent).detach() + out).square().sum(), weight)[0]

    exact = gradient(lambda *tensors, **options: exact_attention(*tensors, **options)[0], torch.float64, False)
    assert_accurate(gradient(attention, torch.float32, direct), exact.double(), limit=4e-6)


def test_the_primal_of_a_tangent_has_all_its_gradients(assert_accurate: Any) -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs(20, 20, 2, 1, 16)]
    weight = torch.randn(2, 20, 2, 16)
    out, _ = attention_jvp(*tensors, *(torch.ones_like(tensor) for tensor in tensors), causal=True)
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    exact = torch.autograd.grad((exact_attention(*doubles, causal=True)[0] * weight).sum(), doubles)
    for found, wanted in zip(torch.autograd.grad((out * weight).sum(), tensors), exact, strict=True):
        assert_accurate(found, wanted)
