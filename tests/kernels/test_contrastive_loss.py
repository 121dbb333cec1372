"""The contrastive loss on a CPU: tiled and whole forms against float64 and open_clip, and as a torch operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm_kernels import contrastive_loss
from mm_kernels.contrastive_loss import SMALL, contrastive_loss_reference
from mm_kernels.contrastive_loss.op import contrastive_loss_op

Loss = Callable[..., Tensor]


def batch(n: int, width: int, scale: float = 10.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """image, text, scale, bias; texts lean to their images, so that the loss is neither trivial nor solved."""
    torch.manual_seed(n * width)
    image = F.normalize(torch.randn(n, width, dtype=torch.float64), dim=-1)
    text = F.normalize(image + torch.randn(n, width, dtype=torch.float64) * 2 / width**0.5, dim=-1)
    numbers = (torch.tensor([x], dtype=torch.promote_types(dtype, torch.float32)) for x in (scale, -scale))
    return image.to(dtype), text.to(dtype), *numbers


def value_and_gradients(loss: Loss, inputs: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    """Gradients of 3 times the value."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves, **options)
    return value.detach(), *torch.autograd.grad(3 * value, leaves)


def arguments(inputs: tuple[Tensor, ...], kind: str) -> tuple[Tensor, ...]:
    return inputs if kind == "sigmoid" else inputs[:3]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("n", "width", "chunk"), [(1, 1, 1), (2, 3, 7), (5, 4, 2), (70, 40, 16), (70, 40, 33), (97, 72, 97)]
)
def test_tiles_equal_float64(n: int, width: int, chunk: int, kind: str, assert_accurate: Loss) -> None:
    inputs = arguments(batch(n, width), kind)
    exact = value_and_gradients(contrastive_loss_reference, tuple(x.double() for x in inputs), kind=kind)
    ours = value_and_gradients(contrastive_loss, inputs, kind=kind, chunk=chunk)
    for name, found, wanted in zip(("value", "image", "text", "scale", "bias"), ours, exact, strict=False):
        # the scale's gradient is a difference of sums as large as the logits
        assert_accurate(found, wanted, size=max(1.0, wanted.abs().max().item()) if name == "scale" else None, what=name)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 40),
    width=st.integers(1, 20),
    chunk=st.integers(1, 50),
    scale=st.floats(0.1, 100),
    kind=st.sampled_from(["softmax", "sigmoid"]),
)
def test_any_sizes_chunks_and_scales_equal_the_whole(n: int, width: int, chunk: int, scale: float, kind: str) -> None:
    inputs = arguments(batch(n, width, scale, torch.float64), kind)
    exact = value_and_gradients(contrastive_loss_reference, inputs, kind=kind)
    ours = value_and_gradients(contrastive_loss, inputs, kind=kind, chunk=chunk)
    for found, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_lose_nothing_but_the_last_rounding(
    dtype: torch.dtype, kind: str, assert_accurate: Loss
) -> None:
    inputs = arguments(batch(70, 40, dtype=dtype), kind)
    exact = value_and_gradients(contrastive_loss_reference, tuple(x.double() for x in inputs), kind=kind)
    torchs = value_and_gradients(contrastive_loss_reference, inputs, kind=kind)
    ours = value_and_gradients(contrastive_loss, inputs, kind=kind, chunk=32)
    assert [x.dtype for x in ours[1:3]] == [dtype, dtype] and ours[0].dtype == torch.float32
    for found, wanted, theirs in zip(ours, exact, torchs, strict=True):
        assert_accurate(found, wanted, theirs)


def test_a_small_loss_keeps_its_digits() -> None:
    """All logits in float32 lose them: r - s, two numbers near 30 whose difference is 1e-9 here."""
    image = F.normalize(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    image = torch.linalg.qr(image)[0].float()
    inputs = image, image.clone(), torch.tensor([22.0])
    tiled = value_and_gradients(contrastive_loss, inputs, chunk=4)
    exact = 5 * torch.tensor(-22.0, dtype=torch.float64).exp()  # five others at cosine 0, one pair at 1
    assert tiled[0].double().item() == pytest.approx(exact.item(), rel=1e-4)
    assert contrastive_loss_reference(*inputs).item() != pytest.approx(exact.item(), rel=1e-1)


def test_logits_far_apart_neither_overflow_nor_vanish(assert_accurate: Loss) -> None:
    image, text, scale, _ = batch(40, 8, scale=100.0)
    image = image * torch.linspace(0.01, 9, 40)[:, None]  # rows whose largest logits lie hundreds apart
    inputs = image, text, scale
    exact = value_and_gradients(contrastive_loss_reference, tuple(x.double() for x in inputs))
    for found, wanted in zip(value_and_gradients(contrastive_loss, inputs, chunk=16), exact, strict=True):
        assert_accurate(found, wanted, limit=2e-5)  # float32 holds a logit of 900 to 3e-5


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_tiles_equal_open_clip(kind: str) -> None:
    from open_clip.loss import ClipLoss, SigLipLoss

    inputs = arguments(batch(37, 24), kind)
    theirs = value_and_gradients(ClipLoss() if kind == "softmax" else SigLipLoss(), inputs)
    ours = value_and_gradients(contrastive_loss, inputs, kind=kind, chunk=10)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def test_inputs_between_nan_and_scratch_full_of_nan_change_nothing(poison: None, guard: Loss) -> None:
    for kind in ("softmax", "sigmoid"):
        inputs = arguments(batch(45, 12), kind)
        plain = value_and_gradients(contrastive_loss, inputs, kind=kind, chunk=16)
        leaves = [guard(x, strided=x.ndim == 2).requires_grad_() for x in inputs]
        value = contrastive_loss(*leaves, kind=kind, chunk=16)
        for found, wanted in zip((value, *torch.autograd.grad(3 * value, leaves)), plain, strict=True):
            torch.testing.assert_close(found, wanted, atol=0, rtol=0)  # and again to the bit


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_gradcheck(kind: str) -> None:
    inputs = [x.requires_grad_() for x in arguments(batch(7, 5, scale=2.0, dtype=torch.float64), kind)]
    bias = inputs[3] if kind == "sigmoid" else None
    for chunk in (None, 3):
        assert torch.autograd.gradcheck(lambda *x, c=chunk: contrastive_loss(*x[:3], bias, kind, chunk=c), inputs)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gradients", [True, False])
def test_operator_passes_opcheck(kind: str, gradients: bool) -> None:
    image, text, scale, bias = (x.requires_grad_(gradients) for x in batch(9, 6))
    last = bias if kind == "sigmoid" else None
    torch.library.opcheck(contrastive_loss_op, (image, text, scale, last, kind, 4, "", False, gradients))


def test_compiled_and_exported_it_is_one_operator() -> None:
    inputs = batch(9, 6)

    def loss(*x: Tensor) -> Tensor:
        return contrastive_loss(*x, kind="sigmoid", chunk=4)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for found, wanted in zip(value_and_gradients(compiled, inputs), value_and_gradients(loss, inputs), strict=True):
        torch.testing.assert_close(found, wanted, atol=0, rtol=0)

    class Module(torch.nn.Module):
        def forward(self, *x: Tensor) -> Tensor:
            return loss(*x)

    program = torch.export.export(Module(), inputs)
    assert torch.ops.mm.contrastive_loss.default in [node.target for node in program.graph.nodes]
    torch.testing.assert_close(program.module()(*inputs), loss(*inputs))


def test_tangents_and_second_derivatives_are_refused_and_not_zero() -> None:
    image, text, scale, _ = batch(9, 6)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: contrastive_loss(x, text, scale, chunk=4), (image,), (image,))
    with pytest.raises(NotImplementedError, match="second"):
        leaf = image.clone().requires_grad_()
        torch.autograd.grad(contrastive_loss(leaf, text, scale, chunk=4), leaf, create_graph=True)
    whole = torch.func.jvp(lambda x: contrastive_loss(x, text, scale), (image,), (image,))[1]
    assert whole != 0


def test_only_what_asks_for_a_gradient_gets_one_and_none_costs_none() -> None:
    image, text, scale, bias = batch(9, 6)
    text.requires_grad_()
    contrastive_loss(image, text, scale, bias, "sigmoid", chunk=4).backward()
    assert text.grad is not None and image.grad is None and scale.grad is None
    with torch.no_grad():
        assert not contrastive_loss(image, text, scale, bias, "sigmoid", chunk=4).requires_grad


def test_tiles_stay_float32_under_autocast() -> None:
    inputs = batch(12, 16, scale=100.0)[:3]
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrastive_loss(*inputs, chunk=5)
    torch.testing.assert_close(inside, contrastive_loss(*inputs, chunk=5), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (3, {"kind": "cosine"}, "softmax"),
        (3, {"ring": True}, "ring"),
        (3, {"chunk": 0}, "chunk = 0"),
        (0, {}, "no pairs"),
        (0, {"chunk": 2}, "no pairs"),
    ],
)
def test_wrong_calls_are_refused(n: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contrastive_loss(torch.ones(n, 2), torch.ones(n, 2), torch.ones(1), **options)
    with pytest.raises(ValueError, match="both must be"):
        contrastive_loss(torch.ones(3, 2), torch.ones(2, 2), torch.ones(1))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("smallest", [2, SMALL + 1])
def test_exported_losses_take_batches_of_any_size(kind: str, smallest: int) -> None:
    class Module(torch.nn.Module):
        def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
            return contrastive_loss(image, text, scale, kind=kind)

    most = 4096 if smallest > 2 else SMALL
    rows = torch.export.Dim("N", min=smallest, max=most)
    inputs = batch(smallest + 9, 4)[:3]
    program = torch.export.export(Module(), inputs, dynamic_shapes=({0: rows}, {0: rows}, None)).module()
    others = batch(smallest + 30, 4)[:3]
    torch.testing.assert_close(program(*others), Module()(*others))


def test_what_is_no_number_is_refused() -> None:
    image, text, scale, _ = batch(5, 4)
    for wrong in (14.3, torch.ones(2)):
        with pytest.raises(ValueError, match="logit_scale.* one number"):
            contrastive_loss(image, text, wrong)
    with pytest.raises(ValueError, match="logit_bias"):
        contrastive_loss(image, text, scale, "sigmoid")
    image, text, scale, _ = batch(SMALL + 1, 4)
    with pytest.raises(NotImplementedError, match="at most 1,024 pairs"):
        torch.func.grad(lambda image: contrastive_loss(image, text, scale))(image)
