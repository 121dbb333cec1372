"""The torch forms of attention, which a CPU runs, against float64; the kernels' tests are in interpreted/."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact_attention import exact_attention
from torch import Tensor

from mm_kernels import attention
from mm_kernels.attention import EXPLICIT_SCORES, attention_jvp


def inputs(*lengths: int, heads: int = 4, key_heads: int = 2, width: int = 8, **kind: Any) -> list[Tensor]:
    """q, k, v `[2, N, H, D]`, N from `lengths`: of queries and of keys."""
    torch.manual_seed(sum(lengths))
    shapes = ((lengths[0], heads), (lengths[-1], key_heads), (lengths[-1], key_heads))
    return [torch.randn(2, n, h, width, **kind) for n, h in shapes]


def packed_inputs(**kind: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v `[T, H, D]` of ragged sequences, with an empty one on either side, and the options that say so."""
    torch.manual_seed(0)
    queries, keys = torch.tensor([0, 3, 3, 10, 11]).int(), torch.tensor([0, 5, 7, 7, 13]).int()
    tensors = [torch.randn(n, h, 8, **kind) for n, h in ((11, 4), (13, 2), (13, 2))]
    return tensors, {"cu_q": queries, "cu_k": keys}


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("grad", [False, True], ids=["fused", "explicit"])
@pytest.mark.parametrize("lengths", [(1, 1), (5, 9), (9, 5), (3, 0), (0, 3)])
def test_dense_attention_equals_float64(
    lengths: tuple[int, int], grad: bool, causal: bool, assert_accurate: Any
) -> None:
    tensors = inputs(*lengths, requires_grad=grad)
    mask = torch.rand(2, lengths[1]) > 0.3
    exact, total = exact_attention(*(x.detach().double() for x in tensors), mask=mask, causal=causal)
    assert_accurate(attention(*tensors, mask=mask, causal=causal), exact)
    out, lse = attention(*tensors, mask=mask, causal=causal, return_lse=True)
    assert_accurate(out, exact)
    assert_accurate(lse, total)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_bf16_without_gradient_is_as_exact_as_torchs_own(compiled: bool) -> None:
    tensors = inputs(140, 151, width=64)
    mask = torch.rand(2, 151) > 0.3
    mask[1] = False  # a sample that sees no key gives zeros
    exact = exact_attention(*(x.double() for x in tensors), mask=mask)[0]
    q, k, v = (x.bfloat16() for x in tensors)
    call = torch.compile(attention, backend="aot_eager") if compiled else attention
    ours = call(q, k, v, mask=mask)
    heads = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
    theirs = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), *heads, mask[:, None, None])
    assert not ours[1].any()
    error = (theirs.transpose(1, 2)[0].double() - exact[0]).norm()
    assert (ours[0].double() - exact[0]).norm() <= 2 * error
    alone = attention(q[:1], k[:1], v[:1], mask=mask[:1])
    assert torch.equal(ours[:1], alone)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_packed_attention_equals_float64(causal: bool, assert_accurate: Any) -> None:
    tensors, options = packed_inputs()
    exact, total = exact_attention(*(x.double() for x in tensors), **options, causal=causal)
    out, lse = attention(*tensors, **options, causal=causal, return_lse=True)
    assert_accurate(out, exact)
    assert_accurate(lse, total)
    longest = attention(*tensors, **options, max_q=9, max_k=8, causal=causal)
    torch.testing.assert_close(longest, out)


def test_tokens_after_the_last_sequence_give_zeros() -> None:
    tensors, options = packed_inputs(requires_grad=True)
    padded = [torch.cat([x, torch.randn(3, *x.shape[1:])]) for x in tensors]
    out, lse = attention(*padded, **options, return_lse=True)
    torch.testing.assert_close(out[:11], attention(*tensors, **options))
    assert not out[11:].any() and (lse[:, 11:] == -torch.inf).all()


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_gradients_and_tangents_pass_gradcheck(form: str) -> None:
    if form == "dense":
        tensors, options = inputs(3, 4, width=3, dtype=torch.float64), {"mask": torch.tensor([[True, False] * 2] * 2)}
    else:
        tensors, options = packed_inputs(dtype=torch.float64)
    tensors = [x.requires_grad_() for x in tensors]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention(*tensors, **options, causal=True, return_lse=True)
        return out, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=form == "dense")


def test_attention_jvp_is_the_derivative_and_differentiable() -> None:
    tensors, moves = inputs(5, 7, dtype=torch.float64), inputs(5, 8, 7, dtype=torch.float64)
    out, tangent = attention_jvp(*tensors, *moves, causal=True)
    step = 1e-6
    further, back = (
        attention(*(x + sign * step * y for x, y in zip(tensors, moves, strict=True)), causal=True) for sign in (1, -1)
    )
    torch.testing.assert_close(out, attention(*tensors, causal=True))
    torch.testing.assert_close(tangent, (further - back) / (2 * step), atol=1e-7, rtol=1e-6)
    query = tensors[0].requires_grad_()
    assert torch.autograd.grad(attention_jvp(query, *tensors[1:], *moves)[1].sum(), query)[0].abs().sum() > 0


def test_long_sequences_have_forward_mode_too() -> None:
    n = int(EXPLICIT_SCORES**0.5) + 1
    q, k, v = inputs(n, n, heads=1, key_heads=1, width=2)
    _, tangent = torch.func.jvp(lambda q: attention(q, k, v), (q,), (torch.ones_like(q),))
    assert tangent.abs().sum() > 0


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_the_op_keeps_torchs_contract(packed: bool) -> None:
    tensors, rest = inputs(5, 6), (torch.ones(2, 6, dtype=torch.bool), None, None, 5, 6)
    if packed:
        tensors, options = packed_inputs()
        rest = (None, *options.values(), 7, 6)
    torch.library.opcheck(torch.ops.mm.attention, (*(x.requires_grad_() for x in tensors), *rest, True, 0.3))


def test_the_op_and_the_function_have_the_same_gradients() -> None:
    tensors = [x.requires_grad_() for x in inputs(5, 6)]
    ours = torch.autograd.grad(attention(*tensors, causal=True, scale=0.3).square().sum(), tensors)
    out, _ = torch.ops.mm.attention(*tensors, None, None, None, 5, 6, True, 0.3)
    for a, b in zip(ours, torch.autograd.grad(out.square().sum(), tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_the_op_refuses_forward_mode() -> None:
    tensors = tuple(inputs(3, 3))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda *x: torch.ops.mm.attention(*x, None, None, None, 3, 3, False, 0.3), tensors, tensors)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_compiled_and_exported_calls_equal_plain_ones(packed: bool) -> None:
    tensors, options = packed_inputs() if packed else (inputs(5, 6), {})

    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, **options, max_q=7, max_k=6, causal=True) if packed else attention(q, k, v)

    plain = Model()(*tensors)
    torch.testing.assert_close(torch.compile(Model(), backend="aot_eager", fullgraph=True)(*tensors), plain)
    torch.testing.assert_close(torch.export.export(Model(), tuple(tensors)).module()(*tensors), plain)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale": 0.0}, "positive"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, "mask"),
        ({"cu_q": torch.tensor([0, 5])}, "T, H, D"),
        ({"scale": float("nan")}, "positive"),
        ({"mask": torch.ones(2, 6)}, "float32: must be bool"),
        ({"cu_k": torch.tensor([0, 5])}, "cu_q"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        attention(*inputs(5, 6), **options)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        attention(*inputs(5, 6, heads=3))


def test_errors_say_what_to_do() -> None:
    q, k, v = inputs(5, 5)
    with pytest.raises(ValueError, match="needs cu_q"):
        attention(q[0], k[0], v[0])
    with pytest.raises(ValueError, match="cu_q .*int32"):
        attention(q[0], k[0], v[0], cu_q=[0, 5])
    with pytest.raises(ValueError, match="floating type"):
        attention(q.long(), k.long(), v.long())
    with pytest.raises(ValueError, match="tk: must be a tensor"):
        attention_jvp(q, k, v, q, None, None)
    out, tangent = attention_jvp(q, k, v, q.double(), k, v)
    assert out.dtype == tangent.dtype == q.dtype


def test_shapes_are_known_on_the_meta_device() -> None:
    q, k, v = (tensor.to("meta") for tensor in inputs(5, 7))
    assert attention(q, k, v, causal=True).shape == q.shape


def test_exported_packed_calls_take_any_number_of_sequences_and_tokens() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
            return attention(q, k, v, cu_q=offsets, max_q=7, max_k=7, causal=True)

    def example(*lengths: int) -> tuple[Tensor, ...]:
        tensors = [torch.randn(sum(lengths), heads, 8) for heads in (4, 2, 2)]
        return *tensors, torch.tensor([0, *lengths]).cumsum(0).int()

    tokens, sequences = torch.export.Dim("T", min=2), torch.export.Dim("S", min=3)
    shapes = {"q": {0: tokens}, "k": {0: tokens}, "v": {0: tokens}, "offsets": {0: sequences}}
    program = torch.export.export(Model(), example(3, 7, 2), dynamic_shapes=shapes).module()
    for given in (example(3, 7, 2), example(1, 2, 3, 7, 4)):
        torch.testing.assert_close(program(*given), Model()(*given))
