"""`qk_norm_rope` and `adaln_modulate` on a CPU: the torch form, and the ops with it inside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mm_kernels import adaln_modulate, qk_norm_rope, runtime

EPS = 1e-6


def heads(dtype: torch.dtype = torch.float64, packed: bool = False) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, wq, wk with gradients; cos and sin."""
    torch.manual_seed(0)
    shape = (4,) if packed else (2, 4)
    primals = [torch.randn(*shape, 3, 6), torch.randn(*shape, 1, 6), 1 + torch.randn(6) / 4, 1 + torch.randn(6) / 4]
    angles = torch.randn(4, 3)
    return [x.to(dtype).requires_grad_() for x in primals], angles.cos().to(dtype), angles.sin().to(dtype)


def stream(form: str, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """x, shift, scale, gate, residual with gradients."""
    torch.manual_seed(0)
    found = [torch.randn(2, 5, 6), *(torch.randn(2, 6) for _ in range(3)), torch.randn(2, 5, 6)]
    kept = {"plain": 3, "residual": 3, "gated": 5}[form]
    return [
        x.to(dtype).requires_grad_() if place < kept or (place == 4 and form == "residual") else None
        for place, x in enumerate(found)
    ]


def turned_in_the_complex_plane(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm and rotation of x `[T, H, D]` by another way: a pair is a complex number, a rotation a product."""
    normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    pairs = torch.complex(normed[..., :3], normed[..., 3:]) * torch.complex(cos, sin)[:, None]
    return torch.cat([pairs.real, pairs.imag], -1)


def test_dense_packed_and_looked_up_positions_agree_with_complex_products() -> None:
    (q, k, wq, wk), cos, sin = heads()
    order = torch.randint(4, (2, 4))
    looked_up = qk_norm_rope(q, k, wq, wk, cos, sin, positions=order)
    dense = qk_norm_rope(q, k, wq, wk, cos, sin)
    for sample in range(2):
        packed = qk_norm_rope(q[sample], k[sample], wq, wk, cos, sin)
        places = order[sample]
        for x, weight, a, b, c in zip((q, k), (wq, wk), dense, packed, looked_up, strict=True):
            torch.testing.assert_close(a[sample], turned_in_the_complex_plane(x[sample], weight, cos, sin))
            torch.testing.assert_close(a[sample], b)
            torch.testing.assert_close(
                c[sample], turned_in_the_complex_plane(x[sample], weight, cos[places], sin[places])
            )


@pytest.mark.parametrize("packed", [False, True])
def test_heads_pass_gradcheck_forward_and_backward(packed: bool) -> None:
    primals, cos, sin = heads(packed=packed)
    assert torch.autograd.gradcheck(lambda *args: qk_norm_rope(*args, cos, sin), primals, check_forward_ad=True)
    assert torch.autograd.gradcheck(lambda *args: torch.ops.mm.qk_norm_rope(*args, cos, sin, None, EPS), primals)
    positions = torch.randint(4, primals[0].shape[:-2])
    assert torch.autograd.gradcheck(lambda *args: torch.ops.mm.qk_norm_rope(*args, cos, sin, positions, EPS), primals)
    assert torch.autograd.gradcheck(lambda *args: torch.ops.mm.qk_norm_rope(*args, None, None, None, EPS), primals)


@pytest.mark.parametrize("form", ["plain", "residual", "gated"])
def test_modulation_passes_gradcheck_forward_and_backward(form: str) -> None:
    tensors = stream(form)
    assert torch.autograd.gradcheck(adaln_modulate, tensors, check_forward_ad=True)
    results = 1 if form == "plain" else 2
    assert torch.autograd.gradcheck(lambda *args: torch.ops.mm.adaln_modulate(*args, EPS)[:results], tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_ops_give_what_the_functions_give(dtype: torch.dtype) -> None:
    primals, cos, sin = heads(dtype)
    for a, b in zip(
        torch.ops.mm.qk_norm_rope(*primals, cos, sin, None, EPS), qk_norm_rope(*primals, cos, sin), strict=True
    ):
        assert torch.equal(a, b)
    tensors = stream("gated", dtype)
    for a, b in zip(torch.ops.mm.adaln_modulate(*tensors, EPS), adaln_modulate(*tensors), strict=True):
        assert torch.equal(a, b)


def test_the_ops_pass_opcheck() -> None:
    primals, cos, sin = heads(torch.float32)
    positions = torch.randint(4, (2, 4))
    detached = [x.detach() for x in primals]
    grads = [torch.randn_like(x) for x in detached[:2]]
    for tables in ((cos, sin, None), (cos, sin, positions), (None, None, None)):
        torch.library.opcheck(torch.ops.mm.qk_norm_rope.default, (*primals, *tables, EPS))
        torch.library.opcheck(torch.ops.mm.qk_norm_rope_backward.default, (*grads, *detached, *tables, EPS))
    for form in ("plain", "residual", "gated"):
        tensors = stream(form, torch.float32)
        torch.library.opcheck(torch.ops.mm.adaln_modulate.default, (*tensors, EPS))
        x, _, scale, gate, residual = (None if t is None else t.detach() for t in tensors)
        branch = None if gate is None else x
        torch.library.opcheck(
            torch.ops.mm.adaln_modulate_backward.default, (x.sin(), residual, x, branch, scale, gate, EPS)
        )


def both(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor, *modulation: Tensor) -> Tensor:
    a, b = qk_norm_rope(q, k, wq, wk, cos, sin)
    out, h = adaln_modulate(*modulation)
    return a.square().sum() + b.sum() + (out * h).sum()


def test_on_a_cpu_compiled_programs_see_torch_operations_that_can_be_fused() -> None:
    primals, cos, sin = heads(torch.float32)
    arguments = (*primals, cos, sin, *stream("gated", torch.float32))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    before = runtime.launches.copy()
    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend=keep)(*arguments), both(*arguments))
    assert len(graphs) == 1 and "mm" not in str(graphs[0].graph) and runtime.launches == before


def test_the_function_is_exported_and_the_op_too() -> None:
    class Functions(torch.nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor:
            return both(*arguments)

    class Ops(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return torch.ops.mm.qk_norm_rope(q, k, wq, wk, cos, sin, None, EPS)[0]

    primals, cos, sin = heads(torch.float32)
    arguments = tuple(x.detach() for x in (*primals, cos, sin, *stream("gated", torch.float32)))
    for module, given in ((Functions(), arguments), (Ops(), arguments[:6])):
        torch.testing.assert_close(torch.export.export(module, given).module()(*given), module(*given))


def test_the_ops_refuse_forward_mode_where_torch_would_give_zeros() -> None:
    (q, k, wq, wk), cos, sin = heads()
    tensors = [x.detach() for x in stream("gated")]
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: torch.ops.mm.qk_norm_rope(q, k, wq, wk, cos, sin, None, EPS), (q,), (q,))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda *args: torch.ops.mm.adaln_modulate(*args, EPS), tuple(tensors), tuple(tensors))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        dual = torch.autograd.forward_ad.make_dual(tensors[0], tensors[4])
        torch.ops.mm.adaln_modulate(dual, *tensors[1:], EPS)


def test_shapes_that_a_kernel_would_misread_are_refused() -> None:
    (q, k, wq, wk), cos, sin = heads()
    for match, arguments, positions in (
        ("q .* k", (q, k[:1], wq, wk, cos, sin), None),
        ("q .* k", (q[0, 0], k[0, 0], wq, wk, None, None), None),
        ("wq", (q, k, wq[:1], wk, cos, sin), None),
        ("cos", (q, k, wq, wk, cos[:1], sin[:1]), None),
        ("cos", (q, k, wq, wk, cos, sin[:, :1]), None),
        ("give cos and sin both", (q, k, wq, wk, cos, None), None),
        ("only with them", (q, k, wq, wk, None, None), torch.zeros(2, 4, dtype=torch.int64)),
        ("positions", (q, k, wq, wk, cos, sin), torch.zeros(4, dtype=torch.int64)),
        ("positions", (q, k, wq, wk, cos, sin), torch.zeros(2, 4, dtype=torch.bool)),
        ("even D", (q[..., :5], k[..., :5], wq[:5], wk[:5], cos, sin), None),
    ):
        with pytest.raises(ValueError, match=match):
            qk_norm_rope(*arguments, positions=positions)
    x, shift, scale, gate, residual = stream("gated")
    for match, arguments in (
        ("shift", (x, shift[:1], scale)),
        ("gate", (x, shift, scale, gate[:, :1], residual)),
        ("residual", (x, shift, scale, gate, residual[:, :1])),
        ("without residual", (x, shift, scale, gate)),
    ):
        with pytest.raises(ValueError, match=match):
            adaln_modulate(*arguments)


def test_functions_and_ops_need_no_triton(root: Path) -> None:
    script = "import sys; sys.modules['triton'] = None; import torch, mm_kernels; print(torch.ops.mm.qk_norm_rope)"
    environment = {"PYTHONPATH": str(root / "kernels"), "PATH": ""}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True)


@pytest.mark.parametrize("gated", [False, True])
def test_the_gradient_of_a_modulations_tangent_is_right(gated: bool) -> None:
    """torch's layer norm gets it wrong; a difference of tangents tells."""
    torch.manual_seed(0)
    x, move, other = (torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(3))
    shift, scale, gate = (torch.randn(2, 8, dtype=torch.float64) for _ in range(3))
    branch = (gate, other) if gated else ()

    def tangent(x: Tensor) -> Tensor:
        def of(x: Tensor) -> Tensor:
            out = adaln_modulate(x, shift, scale, *branch)
            return out[0] if gated else out

        return torch.func.jvp(of, (x,), (move,))[1].sin().sum()

    gradient = torch.autograd.grad(tangent(x.requires_grad_()), x)[0]
    step = 1e-6 * other
    difference = (tangent(x.detach() + step) - tangent(x.detach() - step)) / 2
    torch.testing.assert_close((gradient * step).sum(), difference, rtol=1e-6, atol=1e-14)


def test_errors_name_what_is_missing() -> None:
    x, vector = torch.randn(2, 3, 8), torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"x \[3, 8\]: must be \[B, N, D\]"):
        adaln_modulate(x[0], vector, vector)
    with pytest.raises(ValueError, match="scale None"):
        adaln_modulate(x, vector, None)
    with pytest.raises(ValueError, match="wq, wk"):
        qk_norm_rope(x[:, :, None], x[:, :, None], None, None, None, None)
