"""The Triton form of `qk_norm_rope` against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm_kernels import qk_norm_rope
from mm_kernels.qk_norm_rope import launch, reference

EPS = 1e-6
NAMES = ("q", "k", "dq", "dk", "dwq", "dwk")
HALVES = (torch.float16, torch.bfloat16)
CASES = {  # shape of q, heads of k, rotation
    "one token": ((1, 1, 1, 64), 1, "table"),
    "odd": ((1, 197, 2, 64), 2, "table"),
    "grouped": ((2, 21, 4, 72), 2, "table"),
    "narrow": ((3, 5, 1, 2), 3, "table"),
    "wide": ((1, 9, 1, 160), 1, "table"),
    "norm only, odd width": ((2, 7, 3, 33), 3, "none"),
    "norm only": ((2, 50, 2, 80), 1, "none"),
    "packed norm": ((83, 2, 16), 2, "none"),
    "packed": ((83, 3, 88), 1, "table"),
    "packed positions": ((61, 2, 96), 2, "positions"),
    "positions by sample": ((3, 11, 2, 128), 1, "positions"),
    "no samples": ((0, 4, 2, 16), 2, "table"),
    "no tokens": ((2, 0, 2, 16), 2, "positions"),
}


def inputs(
    shape: tuple[int, ...], heads: int, rotation: str, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor | None]]:
    """q, k, wq, wk with gradients, and cos, sin, positions."""
    torch.manual_seed(sum(shape) + heads)
    width, tokens = shape[-1], shape[-3]
    q, k = torch.randn(shape).to(dtype), torch.randn(*shape[:-2], heads, width).to(dtype)
    primals = [q, 3 * k, 1 + torch.randn(width) / 4, 1 + torch.randn(width) / 4]
    tables: list[Tensor | None] = [None, None, None]
    if rotation != "none":
        angles = torch.randn(tokens if rotation == "table" else 29, width // 2)
        tables[:2] = angles.cos(), angles.sin()
    if rotation == "positions":
        tables[2] = torch.randint(29, shape[:-2], dtype=torch.int32 if len(shape) == 3 else torch.int64)
    return [primal.requires_grad_() for primal in primals], tables


def exactly(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]


def wide(tables: list[Tensor | None]) -> list[Tensor | None]:
    return [table.double() if table is not None and table.is_floating_point() else table for table in tables]


def with_gradients(function, primals: list[Tensor], tables: list[Tensor | None], grads: list[Tensor]) -> list[Tensor]:
    cos, sin, positions = tables
    if function is qk_norm_rope:
        out = qk_norm_rope(*primals, cos, sin, EPS, positions=positions)
    else:
        out = function(*primals, cos, sin, positions, EPS)
    return [*out, *torch.autograd.grad(out, primals, grads)]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in CASES),
        *((case, half) for half in HALVES for case in ("grouped", "norm only, odd width", "packed positions")),
    ],
    ids=str,
)
def test_results_and_gradients_equal_float64(case, dtype, poison, launched, assert_accurate) -> None:
    shape, heads, rotation = CASES[case]
    primals, tables = inputs(shape, heads, rotation, dtype)
    grads = [torch.randn(primal.shape).to(dtype) for primal in primals[:2]]
    kernels = ("qk_norm_rope", "qk_norm_rope_backward") if primals[0].numel() else ()
    with launched(*kernels):
        ours = with_gradients(qk_norm_rope, primals, tables, grads)
    torchs = with_gradients(reference.forward, primals, tables, grads)
    exact = with_gradients(reference.forward, exactly(primals), wide(tables), exactly(grads))
    for what, a, b, c in zip(NAMES, ours, exact, torchs, strict=True):
        assert a.dtype == c.dtype
        assert_accurate(a, b, None if dtype == torch.float32 else c, what=what)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 3), st.integers(0, 20), st.integers(1, 4), st.integers(1, 70).map(lambda n: 2 * n)),
        st.tuples(st.integers(0, 90), st.integers(1, 5), st.integers(1, 70).map(lambda n: 2 * n)),
    ),
    heads=st.integers(1, 5),
    rotation=st.sampled_from(["none", "table", "positions"]),
)
def test_any_shape_equals_float64(shape, heads, rotation, assert_accurate) -> None:
    primals, tables = inputs(shape, heads, rotation)
    grads = [torch.randn(primal.shape) for primal in primals[:2]]
    ours = with_gradients(qk_norm_rope, primals, tables, grads)
    exact = with_gradients(reference.forward, exactly(primals), wide(tables), exactly(grads))
    for what, a, b in zip(NAMES, ours, exact, strict=True):  # where a width of 2 cancels, errors are those of its terms
        assert_accurate(a, b, size=max(1.0, b.abs().max().item()) if b.numel() else None, what=what)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("case", ["grouped", "packed positions"])
def test_nothing_is_read_outside_of_the_inputs(case, strided, guard, poison, assert_accurate) -> None:
    primals, tables = inputs(*CASES[case])
    grads = [torch.randn(primal.shape) for primal in primals[:2]]
    inside = [guard(primal, strided) for primal in primals], [t if t is None else guard(t, strided) for t in tables]
    ours = with_gradients(qk_norm_rope, *inside, [guard(grad, strided) for grad in grads])
    exact = with_gradients(reference.forward, exactly(primals), wide(tables), exactly(grads))
    for what, a, b in zip(NAMES, ours, exact, strict=True):
        assert_accurate(a, b, what=what)


def test_views_of_one_projection_and_transposes_are_read_in_place() -> None:
    primals, tables = inputs((2, 13, 3, 24), 3, "table")
    plain = [*primals[:2], *(torch.randn(primal.shape) for primal in primals[:2])]
    expected = with_gradients(qk_norm_rope, primals, tables, plain[2:])
    packed = torch.stack(plain, dim=2)  # [B, N, 4, H, D]
    across = torch.stack([x.transpose(1, 2) for x in plain]).transpose(2, 3)  # heads before tokens in memory
    columns = torch.stack([x.transpose(-1, -2).contiguous() for x in plain]).transpose(-1, -2)  # no unit stride
    for views in (packed.unbind(2), across.unbind(0), columns.unbind(0)):
        leaves = [view.detach().requires_grad_() for view in views[:2]]
        found = with_gradients(qk_norm_rope, [*leaves, *primals[2:]], tables, [view.detach() for view in views[2:]])
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_the_same_bits_every_time_and_for_any_number_of_programs(monkeypatch, assert_accurate) -> None:
    primals, tables = inputs((2, 71, 2, 64), 1, "table")
    grads = [torch.randn(primal.shape) for primal in primals[:2]]
    monkeypatch.setattr(launch, "PARTS", 3)  # blocks of rows, 9 and 5, now go round the programs
    ours = with_gradients(qk_norm_rope, primals, tables, grads)
    for a, b in zip(ours, with_gradients(qk_norm_rope, primals, tables, grads), strict=True):
        assert torch.equal(a, b)
    exact = with_gradients(reference.forward, exactly(primals), wide(tables), exactly(grads))
    for what, a, b in zip(NAMES, ours, exact, strict=True):
        assert_accurate(a, b, what=what)


@pytest.mark.parametrize("case", ["grouped", "norm only, odd width", "packed positions", "no tokens"])
def test_tangents_equal_those_of_float64(case, launched, poison, assert_accurate) -> None:
    primals, (cos, sin, positions) = inputs(*CASES[case])
    moves = [torch.randn(primal.shape) for primal in primals]
    with launched(*(["qk_norm_rope_tangent"] if primals[0].numel() else [])):
        out, moved = torch.func.jvp(
            lambda *args: qk_norm_rope(*args, cos, sin, EPS, positions=positions), tuple(primals), tuple(moves)
        )
    tables = wide([cos, sin, positions])
    exact = torch.func.jvp(
        lambda *args: reference.forward(*args, *tables, EPS), tuple(exactly(primals)), tuple(exactly(moves))
    )
    for a, b in zip((*out, *moved), (*exact[0], *exact[1]), strict=True):
        assert_accurate(a, b)


def test_the_primal_of_a_tangent_has_its_gradients() -> None:
    primals, tables = inputs((2, 9, 2, 16), 1, "table")
    q, k, wq, wk = primals
    cos, sin, _ = tables
    (out, _), (moved, _) = torch.func.jvp(lambda q: qk_norm_rope(q, k, wq, wk, cos, sin), (q,), (torch.ones_like(q),))
    grads = torch.autograd.grad((out - moved.detach()).square().sum(), (q, wq))
    plain = qk_norm_rope(q, k, wq, wk, cos, sin)[0]
    for a, b in zip(grads, torch.autograd.grad((plain - moved.detach()).square().sum(), (q, wq)), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(NotImplementedError, match="detach"):
        torch.autograd.grad(moved.sum(), (q,))


def test_what_has_no_derivative_is_refused() -> None:
    (q, k, wq, wk), (cos, sin, _) = inputs((2, 9, 2, 16), 1, "table")
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(
            lambda q: torch.ops.mm.qk_norm_rope(q, k, wq, wk, cos, sin, None, EPS), (q,), (torch.ones_like(q),)
        )
    with pytest.raises(NotImplementedError, match="cos and sin"):
        qk_norm_rope(q, k, wq, wk, cos.clone().requires_grad_(), sin)
    with pytest.raises(NotImplementedError, match="cos and sin"):
        torch.func.jvp(lambda cos: qk_norm_rope(q, k, wq, wk, cos, sin), (cos,), (torch.ones_like(cos),))


def test_a_position_outside_of_the_table_gives_nan_there_only() -> None:
    (q, k, wq, wk), (cos, sin, positions) = inputs((61, 2, 96), 2, "positions")
    right = qk_norm_rope(q, k, wq, wk, cos, sin, positions=positions)
    positions[[5, 60]] = torch.tensor([29, -1], dtype=torch.int32)
    for a, b in zip(qk_norm_rope(q, k, wq, wk, cos, sin, positions=positions), right, strict=True):
        inside = torch.ones(61, dtype=torch.bool)
        inside[[5, 60]] = False
        assert torch.equal(a[inside], b[inside]) and a[~inside].isnan().all()


def test_rows_past_the_end_have_no_share_in_gradients_without_eps() -> None:
    (q, k, wq, wk), _ = inputs((1, 5, 1, 8), 1, "none")
    out = qk_norm_rope(q, k, wq, wk, None, None, 0.0)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad((out[0] + out[1]).sum(), (q, k, wq, wk)))


def test_offsets_past_two_to_the_31_are_reached() -> None:
    far = torch.empty(2**31 + 64, dtype=torch.float16)  # memory that is not touched is not taken
    q = far.as_strided((2, 3, 1, 16), (2**31, 16, 16, 1))
    q.copy_(torch.randn(q.shape))
    weight = torch.ones(16)
    for a, b in zip(
        qk_norm_rope(q, q, weight, weight, None, None),
        qk_norm_rope(q.contiguous(), q.contiguous(), weight, weight, None, None),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", ["grouped", "packed positions"])
def test_the_op_passes_opcheck(case) -> None:
    shape, heads, rotation = CASES[case]
    primals, tables = inputs((*shape[:-1], 8), heads, rotation)
    torch.library.opcheck(torch.ops.mm.qk_norm_rope.default, (*primals, *tables, EPS))
    q, k, *_ = (primal.detach() for primal in primals)
    backward = (torch.randn(q.shape), torch.randn(k.shape), *(primal.detach() for primal in primals), *tables, EPS)
    torch.library.opcheck(torch.ops.mm.qk_norm_rope_backward.default, backward)


def test_the_op_is_one_node_of_compiled_and_exported_programs() -> None:
    primals, (cos, sin, _) = inputs((2, 9, 2, 16), 1, "table")

    def loss(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor) -> Tensor:
        q, k = qk_norm_rope(2 * q, k, wq, wk, cos, sin)
        return (q * k).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    wanted, found = loss(*primals), compiled(*primals)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad(found, primals), torch.autograd.grad(wanted, primals), strict=True):
        torch.testing.assert_close(a, b)

    class Module(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return loss(*args)

    exported = torch.export.export(Module(), tuple(primal.detach() for primal in primals))
    assert "mm.qk_norm_rope.default" in str(exported.graph)
    torch.testing.assert_close(exported.module()(*primals), wanted)
