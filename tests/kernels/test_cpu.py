"""The CPU paths of the kernels against float64 and against the libraries that define them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm_kernels import adaln_modulate, attention, contrastive_loss, qk_norm_rope


def naive(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Attention in float64, one row at a time; a row without keys is zero."""
    out = torch.zeros_like(q, dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = q[b, :, h].double() @ k[b, :, h].double().T * q.shape[-1] ** -0.5
            for i in range(q.shape[1]):
                seen = visible[b, i]
                if seen.any():
                    out[b, i, h] = scores[i, seen].softmax(-1) @ v[b, seen, h].double()
    return out


@pytest.mark.parametrize("grad", [True, False], ids=["explicit", "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 5), (3, 7), (7, 3)])
def test_attention_equals_float64(rows: int, columns: int, causal: bool, grad: bool) -> None:
    torch.manual_seed(rows * 10 + columns)
    q, k, v = (torch.randn(2, n, 3, 8, requires_grad=grad) for n in (rows, columns, columns))
    mask = torch.rand(2, columns) > 0.4
    mask[1] = False  # a sample without a single key
    visible = mask[:, None, :].expand(2, rows, columns)
    if causal:
        visible = visible & torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
    out = attention(q, k, v, mask=mask, causal=causal)
    torch.testing.assert_close(out.double(), naive(q.detach(), k.detach(), v.detach(), visible), atol=1e-6, rtol=1e-5)


def test_both_forms_of_attention_have_the_same_gradients() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 6, 3, 8, requires_grad=True) for _ in range(3))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 4:] = False
    ours = torch.autograd.grad(attention(q, k, v, mask=mask).square().sum(), (q, k, v))
    fused = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask[:, None, None])
    theirs = torch.autograd.grad(fused.square().sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_qk_norm_rope_turns_with_relative_position_only() -> None:
    torch.manual_seed(0)
    from mm.nn.position import rotary_angles

    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    one = torch.ones(8)

    def score(i: int, j: int) -> float:
        cos, sin = rotary_angles(torch.tensor([i, j]), 8)
        a, b = qk_norm_rope(q.expand(1, 2, 1, 8), k.expand(1, 2, 1, 8), one, one, cos, sin)
        return (a[0, 0, 0] @ b[0, 1, 0]).item()

    assert score(3, 5) == pytest.approx(score(10, 12), abs=1e-4)
    assert score(3, 5) != pytest.approx(score(3, 6), abs=1e-3)


def test_adaln_adds_the_gated_branch_before_the_norm() -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    shift, scale, gate = (torch.randn(2, 8) for _ in range(3))
    out, h = adaln_modulate(x, shift, scale, gate, residual)
    torch.testing.assert_close(h, residual + gate[:, None] * x)
    torch.testing.assert_close(out, F.layer_norm(h, (8,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None])


def test_losses_and_gradients_equal_open_clip() -> None:
    from open_clip.loss import ClipLoss, SigLipLoss

    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(12, 16, dtype=torch.float64), dim=-1).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (7.0, -3.0))
    cases = (
        (contrastive_loss(image, text, scale), ClipLoss()(image, text, scale), (image, text, scale)),
        (
            contrastive_loss(image, text, scale, bias, "sigmoid"),
            SigLipLoss()(image, text, scale, bias),
            (image, text, scale, bias),
        ),
    )
    for ours, theirs, inputs in cases:
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="softmax"):
        contrastive_loss(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1), kind="cosine")


def test_the_loss_stays_float32_under_autocast() -> None:
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(12, 16), dim=-1) for _ in range(2))
    scale = torch.tensor([100.0])
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrastive_loss(image, text, scale)
    exact = contrastive_loss(image.double(), text.double(), scale.double())
    torch.testing.assert_close(inside.double(), exact, atol=0, rtol=1e-5)
