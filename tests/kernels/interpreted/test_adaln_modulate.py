"""The Triton form of `adaln_modulate` against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm_kernels import adaln_modulate
from mm_kernels.adaln_modulate import launch, reference

EPS = 1e-6
FORMS = ("plain", "residual", "gated")
SHAPES = {
    "one token": (1, 1, 64),
    "odd": (1, 197, 72),
    "one value": (2, 3, 1),
    "not a power of two": (3, 5, 1152),
    "widest": (2, 3, 4096),
    "just over a block": (2, 7, 257),
    "no samples": (0, 4, 16),
    "no tokens": (2, 0, 16),
}
Five = list[Tensor | None]


def inputs(shape: tuple[int, int, int], form: str, dtype: torch.dtype = torch.float32) -> Five:
    """x, shift, scale, gate, residual, with gradients."""
    torch.manual_seed(sum(shape))
    samples, _, width = shape
    vectors = [torch.randn(samples, width).to(dtype) for _ in range(3)]
    x, residual = torch.randn(shape).to(dtype), 2 * torch.randn(shape).to(dtype) + 1
    found: Five = [x, *vectors, residual]
    if form != "gated":
        found[3] = None
    if form == "plain":
        found[4] = None
    return [None if tensor is None else tensor.requires_grad_() for tensor in found]


def exactly(tensors: Five) -> Five:
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def with_gradients(function, tensors: Five, grads: list[Tensor]) -> list[Tensor]:
    out = function(*tensors, EPS)
    results = [out] if isinstance(out, Tensor) else list(out[: 1 if tensors[4] is None else 2])
    given = [tensor for tensor in tensors if tensor is not None]
    return [*results, *torch.autograd.grad(results, given, grads[: len(results)])]


def compare(assert_accurate, ours: list[Tensor], exact: list[Tensor], torchs: list[Tensor] | None = None) -> None:
    for place, (a, b) in enumerate(zip(ours, exact, strict=True)):
        assert torchs is None or a.dtype == torchs[place].dtype
        # rows of one value, and gradients that a norm cancels, are held against numbers of the size of the inputs
        size = max(1.0, b.abs().max().item()) if b.numel() else None
        assert_accurate(a, b, None if torchs is None else torchs[place], size=size, what=f"tensor {place}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in SHAPES),
        *((case, half) for half in (torch.float16, torch.bfloat16) for case in ("just over a block", "one token")),
    ],
    ids=str,
)
def test_results_and_gradients_equal_float64(case, form, dtype, poison, launched, assert_accurate) -> None:
    tensors = inputs(SHAPES[case], form, dtype)
    grads = [torch.randn(SHAPES[case]).to(dtype) for _ in range(2)]
    kernels = ("adaln_modulate", "adaln_modulate_backward") if tensors[0].numel() else ()
    with launched(*kernels):
        ours = with_gradients(adaln_modulate, tensors, grads)
    torchs = with_gradients(reference.forward, tensors, grads)
    exact = with_gradients(reference.forward, exactly(tensors), exactly(grads))
    compare(assert_accurate, ours, exact, None if dtype == torch.float32 else torchs)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(2, 300)),
    form=st.sampled_from(FORMS),
)
def test_any_shape_equals_float64(shape, form, assert_accurate) -> None:
    tensors, grads = inputs(shape, form), [torch.randn(shape) for _ in range(2)]
    ours = with_gradients(adaln_modulate, tensors, grads)
    exact = with_gradients(reference.forward, exactly(tensors), exactly(grads))
    compare(assert_accurate, ours, exact)


def test_types_may_differ_as_under_autocast(assert_accurate) -> None:
    tensors = inputs((2, 19, 48), "gated")
    mixed = [tensors[0].detach().bfloat16(), tensors[1].detach().bfloat16(), tensors[2], tensors[3], tensors[4]]
    mixed = [tensor.detach().requires_grad_() for tensor in mixed]
    grads = [torch.randn(2, 19, 48).bfloat16(), torch.randn(2, 19, 48)]
    ours, torchs = with_gradients(adaln_modulate, mixed, grads), with_gradients(reference.forward, mixed, grads)
    assert [tensor.dtype for tensor in ours[:2]] == [torch.bfloat16, torch.float32]
    compare(assert_accurate, ours, with_gradients(reference.forward, exactly(mixed), exactly(grads)), torchs)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_read_outside_of_the_inputs(form, strided, guard, poison, assert_accurate) -> None:
    tensors, grads = inputs((2, 37, 72), form), [torch.randn(2, 37, 72) for _ in range(2)]
    inside = [None if tensor is None else guard(tensor, strided) for tensor in tensors]
    ours = with_gradients(adaln_modulate, inside, [guard(grad, strided) for grad in grads])
    compare(assert_accurate, ours, with_gradients(reference.forward, exactly(tensors), exactly(grads)))


def test_transposed_inputs_give_the_same_bits() -> None:
    tensors, grads = inputs((2, 13, 24), "gated"), [torch.randn(2, 13, 24) for _ in range(2)]

    def turned(tensor: Tensor) -> Tensor:
        return tensor.detach().transpose(-1, -2).contiguous().transpose(-1, -2)

    views = [turned(tensor).requires_grad_() for tensor in tensors]
    found = with_gradients(adaln_modulate, views, [turned(grad) for grad in grads])
    for a, b in zip(found, with_gradients(adaln_modulate, tensors, grads), strict=True):
        assert torch.equal(a, b)


def test_expanded_gradients_and_one_result_alone(assert_accurate) -> None:
    tensors = inputs((2, 13, 24), "gated")
    for place in (0, 1):
        ours = torch.autograd.grad(adaln_modulate(*tensors)[place].sum(), tensors, allow_unused=True)
        wide = exactly(tensors)
        exact = torch.autograd.grad(
            reference.forward(*wide, EPS)[place].sum(), wide, allow_unused=True, materialize_grads=True
        )
        for a, b in zip(ours, exact, strict=True):
            assert_accurate(torch.zeros_like(b).float() if a is None else a, b, size=max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("programs", [1, 5])
def test_the_same_bits_every_time_and_for_any_number_of_programs(programs, monkeypatch, assert_accurate) -> None:
    tensors, grads = inputs((2, 29, 520), "gated"), [torch.randn(2, 29, 520) for _ in range(2)]
    monkeypatch.setattr(launch, "PROGRAMS", programs)  # each program now goes over several blocks of rows
    ours = with_gradients(adaln_modulate, tensors, grads)
    for a, b in zip(ours, with_gradients(adaln_modulate, tensors, grads), strict=True):
        assert torch.equal(a, b)
    compare(assert_accurate, ours, with_gradients(reference.forward, exactly(tensors), exactly(grads)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 37, 72), (2, 0, 16)])
def test_tangents_equal_those_of_float64(shape, form, launched, poison, assert_accurate) -> None:
    tensors = inputs(shape, form)
    given = [tensor for tensor in tensors if tensor is not None]
    moves = [torch.randn(tensor.shape) for tensor in given]

    def call(function):
        def called(*args: Tensor):
            rest = iter(args)
            out = function(*(None if tensor is None else next(rest) for tensor in tensors), EPS)
            return (out if isinstance(out, Tensor) else out[0]) if form == "plain" else out

        return called

    with launched(*(["adaln_modulate_tangent"] if given[0].numel() else [])):
        ours = torch.func.jvp(call(adaln_modulate), tuple(given), tuple(moves))
    exact = torch.func.jvp(call(reference.forward), tuple(exactly(given)), tuple(exactly(moves)))
    flat = [[pair] if form == "plain" else list(pair) for pair in (*ours, *exact)]
    compare(assert_accurate, flat[0] + flat[1], flat[2] + flat[3])


def test_the_primal_of_a_tangent_has_its_gradients() -> None:
    x, shift, scale, *_ = inputs((2, 9, 16), "plain")
    out, moved = torch.func.jvp(lambda x: adaln_modulate(x, shift, scale), (x,), (torch.randn(x.shape),))
    grads = torch.autograd.grad((out - moved.detach()).square().sum(), (x, shift, scale))
    plain = adaln_modulate(x, shift, scale)
    wanted = torch.autograd.grad((plain - moved.detach()).square().sum(), (x, shift, scale))
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
    with pytest.raises(NotImplementedError, match="detach"):
        torch.autograd.grad(moved.sum(), (x,))


def test_the_op_refuses_forward_mode() -> None:
    x, shift, scale, *_ = inputs((2, 9, 16), "plain")
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(
            lambda x: torch.ops.mm.adaln_modulate(x, shift, scale, None, None, EPS)[0], (x,), (torch.ones_like(x),)
        )


def test_rows_past_the_end_have_no_share_in_gradients_without_eps() -> None:
    tensors = inputs((1, 5, 8), "gated")
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(adaln_modulate(*tensors, 0.0)[0].sum(), tensors))


def test_offsets_past_two_to_the_31_are_reached() -> None:
    far = torch.empty(2**31 + 64, dtype=torch.float16)  # memory that is not touched is not taken
    x = far.as_strided((2, 3, 16), (2**31, 16, 1))
    x.copy_(torch.randn(x.shape))
    shift, scale = torch.randn(2, 16), torch.randn(2, 16)
    assert torch.equal(adaln_modulate(x, shift, scale), adaln_modulate(x.contiguous(), shift, scale))


@pytest.mark.parametrize("form", FORMS)
def test_the_op_passes_opcheck(form) -> None:
    x, _, scale, gate, _ = tensors = inputs((2, 5, 8), form)
    torch.library.opcheck(torch.ops.mm.adaln_modulate.default, (*tensors, EPS))
    grad, grad_h = torch.randn(x.shape), None if form == "plain" else torch.randn(x.shape)
    branch = x.detach() if form == "gated" else None
    backward = (grad, grad_h, x.detach(), branch, scale.detach(), None if gate is None else gate.detach(), EPS)
    torch.library.opcheck(torch.ops.mm.adaln_modulate_backward.default, backward)


@pytest.mark.parametrize("form", ["plain", "gated"])
def test_the_op_is_one_node_of_compiled_and_exported_programs(form) -> None:
    tensors = inputs((2, 9, 16), form)
    given = [tensor for tensor in tensors if tensor is not None]

    def loss(x: Tensor, shift: Tensor, scale: Tensor, *rest: Tensor) -> Tensor:
        gate = rest[0] if form == "gated" else None
        out = adaln_modulate(2 * x, shift, scale, gate, rest[-1] if rest else None)
        return out.square().sum() if isinstance(out, Tensor) else (out[0] * out[1]).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    wanted, found = loss(*given), compiled(*given)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad(found, given), torch.autograd.grad(wanted, given), strict=True):
        torch.testing.assert_close(a, b)

    class Module(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return loss(*args)

    exported = torch.export.export(Module(), tuple(tensor.detach() for tensor in given))
    assert "mm.adaln_modulate.default" in str(exported.graph)
    torch.testing.assert_close(exported.module()(*given), wanted)
