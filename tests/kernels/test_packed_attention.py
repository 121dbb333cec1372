"""Packed attention on a CPU: memory, maxima, and tokens of no sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact_attention import inputs, offsets

from mm_kernels import attention
from mm_kernels.attention import reference


def test_long_sequences_among_short_ones_take_no_memory_for_padding(monkeypatch: Any) -> None:
    """In halves, quarters ... each padded to its own longest one, the result is that of all at once."""
    lengths = (3, 1, 40, 2, 0, 5, 4)
    tensors = [tensor.double().requires_grad_() for tensor in inputs(58, 58, 2, 1, 16, None)]
    seen = []
    whole = reference.explicit_attention
    monkeypatch.setattr(
        reference, "explicit_attention", lambda q, *rest, **more: (seen.append(q.shape), whole(q, *rest, **more))[1]
    )
    results = []
    for limit in (1 << 24, 500):
        monkeypatch.setattr(reference, "SCORES", limit)
        out, lse = attention(*tensors, cu_q=offsets(*lengths), causal=True, return_lse=True)
        total = out.square().sum() + lse[:, :55].nan_to_num(neginf=0.0).sum()
        results.append([out, lse, *torch.autograd.grad(total, tensors)])
    assert len(seen) > 4 and max(shape[0] for shape in seen[1:]) < len(lengths)
    assert results[0][0][55:].eq(0).all() and results[0][1][:, 55:].isinf().all()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_a_maximum_that_is_too_small_is_refused() -> None:
    tensors = inputs(8, 8, 1, 1, 16, None)
    with pytest.raises(ValueError, match="max_q = 4: a sequence has 6 tokens"):
        attention(*tensors, cu_q=offsets(6, 2), max_q=4, max_k=8)


def test_compiled_calls_without_maxima_pad_no_sequence_to_all_tokens() -> None:
    tensors = inputs(16, 16, 2, 1, 16, None)
    compiled = torch.compile(lambda *tensors: attention(*tensors, cu_q=offsets(5, 7, 4)), backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), attention(*tensors, cu_q=offsets(5, 7, 4)))


def test_tokens_of_no_sequence_give_zeros() -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs(8, 8, 1, 1, 16, None)]
    out = attention(*tensors, cu_q=torch.tensor([0, 5, 6], dtype=torch.int32))
    assert out[6:].eq(0).all() and out[:6].ne(0).any()
    nothing = attention(*(tensor[:0] for tensor in tensors), cu_q=offsets(0))
    assert nothing.shape == (0, 1, 16) and nothing.requires_grad
    queries, keys = torch.randn(0, 1, 16, requires_grad=True), torch.randn(5, 1, 16, requires_grad=True)
    for q, k, cu_q, cu_k in (
        (queries, keys, offsets(0, 0), offsets(2, 3)),
        (keys, queries, offsets(2, 3), offsets(0, 0)),
    ):
        out = attention(q, k, k, cu_q=cu_q, cu_k=cu_k)
        assert not out.any() and all(not gradient.any() for gradient in torch.autograd.grad(out.sum(), (q, k)))


@pytest.mark.parametrize("wrong", [[1, 4, 8], [0, 5, 3], [0, 4, 9], [[0, 8]], []])
@pytest.mark.parametrize("longest", [None, 8])
def test_offsets_that_cannot_be_meant_are_refused(wrong: list[Any], longest: int | None) -> None:
    tensors = inputs(8, 8, 1, 1, 16, None)
    with pytest.raises(ValueError, match="cu_q"):
        attention(*tensors, cu_q=torch.tensor(wrong, dtype=torch.int32), max_q=longest, max_k=longest)
    with pytest.raises(ValueError, match="cu_q"):
        attention(*tensors, cu_q=torch.tensor([0.0, 8.0]))
