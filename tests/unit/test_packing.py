"""A packed batch is the padded one without its padding, forwards and backwards."""

from __future__ import annotations

import pytest
import torch

from mm.models.encoder import Encoder
from mm.nn.packing import layout
from mm.types import Tokens


@pytest.fixture
def mask() -> torch.Tensor:
    return torch.arange(7) < torch.tensor([[3], [7], [1], [5]])


def test_packing_keeps_real_tokens_in_order_and_fills_up_to_a_fifth_of_the_batch(mask: torch.Tensor) -> None:
    x = torch.arange(28.0).view(4, 7, 1)
    found = layout(mask)
    packed = found.pack(x)
    assert packed.shape == (18, 1)  # 3 + 7 + 1 + 5 tokens; a fifth of 28 is 6
    assert torch.equal(packed[:16, 0], x[mask][:, 0])
    assert torch.equal(found.unpack(packed)[mask], x[mask])
    assert found.real.sum() == 16


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_packed_encoder_equals_the_padded_one_with_all_gradients(mask: torch.Tensor, pool: str, causal: bool) -> None:
    torch.manual_seed(0)
    encoder = Encoder(32, 2, 2, 16, pool=pool, causal=causal)
    x = torch.randn(4, 7, 32)
    results = []
    for training in (True, False):
        encoder.train(training)
        encoder.zero_grad()
        leaf = x.clone().requires_grad_()
        encoded = encoder(Tokens(leaf, mask=mask))
        tokens = encoded.tokens.x[mask]
        (encoded.pooled.square().mul(torch.arange(16.0)).sum() + tokens.sin().sum()).backward()
        assert leaf.grad is not None
        results.append([encoded.pooled, tokens, leaf.grad[mask], *(p.grad for p in encoder.parameters())])
    for packed, padded in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-4)
