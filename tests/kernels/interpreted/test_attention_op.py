"""The Triton form of `mm::attention` as torch sees it: opcheck, compile, export, forward mode, types."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact_attention import exact_attention, inputs, offsets
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from mm_kernels.attention import attention, attention_jvp

KERNELS = "attention_forward", "attention_delta", "attention_dq", "attention_dkdv"


def test_the_tangent_has_no_backward_and_the_op_no_forward_mode() -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs(3, 3, 1, 1, 16)]
    _, tangent = attention_jvp(*tensors, *tensors)
    with pytest.raises(NotImplementedError, match="detach"):
        tangent.sum().backward()
    op, rest = torch.ops.mm.attention, (None, None, None, 3, 3, False, 0.25)
    detached = tuple(tensor.detach() for tensor in tensors)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda *tensors: op(*tensors, *rest), detached, detached)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_the_op_keeps_torchs_contract(packed: bool) -> None:
    tensors = [x.requires_grad_() for x in inputs(9, 9, 2, 1, 16, None if packed else 2)]
    places = (None, offsets(4, 5), offsets(4, 5)) if packed else (torch.ones(2, 9, dtype=torch.bool), None, None)
    torch.library.opcheck(torch.ops.mm.attention, (*tensors, *places, 9, 9, True, 0.25))


def test_compiled_calls_launch_the_kernels(launched: Any) -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs(9, 9, 2, 1, 16)]
    compiled = torch.compile(lambda *tensors: attention(*tensors, causal=True) * 2, backend="aot_eager", fullgraph=True)
    with launched(*KERNELS):
        out = compiled(*tensors)
        grads = torch.autograd.grad(out.sum(), tensors)
    plain = attention(*tensors, causal=True) * 2
    assert torch.equal(out, plain)
    for a, b in zip(grads, torch.autograd.grad(plain.sum(), tensors), strict=True):
        assert torch.equal(a, b)


def test_compiled_tangents_leave_the_graph_and_are_right() -> None:
    q, k, v = inputs(5, 5, 2, 1, 16)

    def tangent(q: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda q: attention(q, k, v) * 2, (q,), (q,))

    for found, plain in zip(torch.compile(tangent, backend="aot_eager")(q), tangent(q), strict=True):
        assert torch.equal(found, plain)


def test_exported_models_hold_the_op() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, causal=True)

    tensors = tuple(inputs(9, 9, 2, 1, 16))
    program = torch.export.export(Model(), tensors)
    assert any("mm.attention" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(*tensors), Model()(*tensors))


def test_offsets_need_not_be_contiguous() -> None:
    tensors = inputs(16, 16, 2, 1, 16, None)
    column = torch.stack([offsets(5, 7, 4)] * 2, 1)[:, 0]
    assert not column.is_contiguous()
    assert torch.equal(attention(*tensors, cu_q=column), attention(*tensors, cu_q=column.contiguous()))


def test_any_gradient_of_the_statistic_of_a_row_without_keys_is_nothing() -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs(6, 3, 2, 1, 16)]
    found = []
    for bad in (0.0, torch.nan):
        out, lse = attention(*tensors, causal=True, return_lse=True)
        found.append(torch.autograd.grad((out, lse), tensors, (out.detach(), torch.where(lse.isinf(), bad, 1.0))))
    for plain, guarded in zip(*found, strict=True):
        assert torch.equal(plain, guarded)


def test_derivatives_that_kernels_do_not_have_are_refused_and_not_zero() -> None:
    q, k, v = inputs(5, 5, 1, 1, 16)
    with pytest.raises(NotImplementedError, match="torch.func.grad"):
        torch.func.grad(lambda q: attention(q, k, v).sum())(q)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="attention_backward has no forward-mode"):
        dual = forward_ad.make_dual(q.requires_grad_(), torch.ones_like(q))
        torch.autograd.grad(attention(dual, k, v).square().sum(), dual)


def test_torchs_flop_counter_counts_the_op() -> None:
    def flop(tensors: list[Tensor], **places: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            attention(*(tensor.requires_grad_() for tensor in tensors), **places).sum().backward()
        return counter.get_total_flops()

    assert flop(inputs(8, 10, 4, 2, 16)) == 7 * 2 * 2 * 8 * 10 * 4 * 16  # two products forwards, five backwards
    assert flop(inputs(9, 9, 4, 2, 16, None), cu_q=offsets(4, 5), causal=True) == 7 * 2 * (4 * 4 + 5 * 5) * 4 * 16


def test_types_that_the_kernels_do_not_take_are_torchs_and_mixed_ones_refused() -> None:
    tensors = [tensor.double() for tensor in inputs(5, 6, 1, 1, 16)]
    torch.testing.assert_close(attention(*tensors), exact_attention(*tensors)[0])
    with pytest.raises(ValueError, match="one floating type"):
        attention(tensors[0].float(), tensors[1].half(), tensors[2].half())
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(tensors[0].float(), tensors[1].half(), tensors[2].half()).dtype == torch.bfloat16
