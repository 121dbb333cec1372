"""A packed batch is the padded one without its padding, forwards and backwards."""

from __future__ import annotations

import pytest
import torch

from mm.models.encoder import Encoder
from mm.nn.packing import layout, span
from mm.types import Tokens


@pytest.fixture
def mask() -> torch.Tensor:
    return torch.arange(7) < torch.tensor([[3], [7], [2], [5]])


def test_packing_keeps_real_tokens_in_order_and_rounds_their_number_up(mask: torch.Tensor) -> None:
    x = torch.arange(28.0).view(4, 7, 1)
    found = layout(mask)
    packed = found.pack(x)
    assert packed.shape == (18, 1)  # 3 + 7 + 2 + 5 tokens; a multiple of an eighth of 16
    assert torch.equal(packed[:17, 0], x[mask][:, 0]) and not packed[17:].any()
    assert torch.equal(found.pad(packed)[mask], x[mask])
    assert found.kept.sum() == 17 and found.offsets.tolist() == [0, 3, 10, 12, 17]


@pytest.mark.parametrize(("tokens", "rows"), [(0, 0), (1, 1), (15, 15), (16, 16), (17, 18), (2415, 2560), (2561, 2816)])
def test_at_most_an_eighth_of_the_rows_fills_up(tokens: int, rows: int) -> None:
    mask = torch.arange(max(tokens, 1)) < torch.tensor([[tokens]])
    assert len(layout(mask).place) == rows


@pytest.mark.parametrize("context", [7, 40])
@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_packed_encoder_equals_the_padded_one_with_all_gradients(
    mask: torch.Tensor, context: int, pool: str, causal: bool
) -> None:
    torch.manual_seed(0)
    mask = torch.nn.functional.pad(mask, (0, context - 7))
    encoder = Encoder(32, 2, 2, 16, pool=pool, causal=causal)
    x = torch.randn(4, context, 32)
    results = []
    for training in (True, False):
        encoder.train(training)
        encoder.zero_grad()
        leaf = x.clone().requires_grad_()
        encoded = encoder(Tokens(leaf, mask=mask))
        tokens = encoded.tokens.x[mask[:, : encoded.tokens.x.shape[1]]]
        (encoded.pooled.square().mul(torch.arange(16.0)).sum() + tokens.sin().sum()).backward()
        assert leaf.grad is not None
        results.append([encoded.pooled, tokens, leaf.grad[mask], *(p.grad for p in encoder.parameters())])
    for packed, padded in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pool", ["mean", "last", "cls"])
def test_an_encoder_takes_packed_tokens_and_gives_packed_ones(mask: torch.Tensor, pool: str) -> None:
    torch.manual_seed(0)
    encoder = Encoder(32, 2, 2, 16, pool=pool, causal=True).eval()
    x, ragged = torch.randn(4, 7, 32), layout(mask)
    padded = encoder(Tokens(x, mask=mask))
    packed = encoder(Tokens(ragged.pack(x), cu_seqlens=ragged.offsets, max_len=7))
    assert packed.tokens.x.shape == (18, 32)
    torch.testing.assert_close(packed.tokens.x[:17], padded.tokens.x[mask], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(packed.pooled, padded.pooled, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_real_tokens_may_be_anywhere_in_a_row(pool: str) -> None:
    torch.manual_seed(0)
    encoder = Encoder(32, 2, 2, 16, pool=pool, causal=True)
    x, mask = torch.randn(3, 5, 32), torch.tensor([[0, 1, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 0, 0, 0]]).bool()
    packed, padded = encoder.train()(Tokens(x, mask=mask)), encoder.eval()(Tokens(x, mask=mask))
    torch.testing.assert_close(packed.pooled, padded.pooled, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(packed.tokens.x[mask], padded.tokens.x[mask], atol=1e-5, rtol=1e-5)


def test_the_longest_of_packed_tokens_is_found_where_it_is_not_said() -> None:
    encoder, x = Encoder(32, 1, 2, 16).eval(), torch.randn(9, 32)
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    said, found = (encoder(Tokens(x, cu_seqlens=offsets, max_len=longest)).pooled for longest in (5, 0))
    assert torch.equal(said, found)


@pytest.mark.parametrize(("longest", "columns"), [(1, 16), (16, 16), (17, 20), (20, 20)])
def test_columns_of_nothing_but_padding_are_left_out(longest: int, columns: int) -> None:
    mask = torch.arange(20) < torch.tensor([[1], [longest]])
    assert span(mask) == columns
    encoded = Encoder(32, 1, 2, 16, pool="last").train()(Tokens(torch.randn(2, 20, 32), mask=mask))
    assert encoded.tokens.x.shape[1] == columns and torch.equal(encoded.tokens.mask, mask[:, :columns])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pool", ["last", "cls", "end", "mean"])
def test_the_pooled_token_alone_has_the_same_vector_and_gradients(pool: str, causal: bool, training: bool) -> None:
    torch.manual_seed(0)
    encoder = Encoder(32, 2, 2, 16, pool=pool, causal=causal, norm_after_pool=pool == "cls").train(training)
    x, mask = torch.randn(4, 7, 32), torch.arange(7) < torch.tensor([[3], [7], [1], [5]])
    tokens = {
        "masked": Tokens(x, mask=mask),
        "dense": Tokens(x),
        "packed": Tokens(layout(mask).pack(x), cu_seqlens=layout(mask).offsets, max_len=7),
    }
    for kind, given in tokens.items():
        if kind == "packed" and pool == "end":
            continue  # of padding
        found = []
        for lean in (False, True):
            encoder.zero_grad()
            pooled = encoder(given, pooled_only=lean).pooled
            (pooled * torch.arange(16.0)).sum().backward()
            found.append([pooled, *(p.grad.clone() for p in encoder.parameters() if p.grad is not None)])
        for whole, lean_one in zip(*found, strict=True):
            torch.testing.assert_close(lean_one, whole, atol=1e-5, rtol=1e-4)
    assert pool == "mean" or encoder(Tokens(x), pooled_only=True).tokens.x.shape == (4, 0, 32)


def test_a_text_of_no_tokens_has_the_vector_of_nothing() -> None:
    encoder = Encoder(32, 2, 2, 16, pool="last", causal=True).train()
    tokens = Tokens(torch.randn(2, 7, 32), mask=torch.arange(7) < torch.tensor([[3], [0]]))
    torch.testing.assert_close(encoder(tokens, pooled_only=True).pooled, encoder(tokens).pooled)
