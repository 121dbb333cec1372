from __future__ import annotations

import numpy as np
import pytest

from mm.data.order import Order, order_hash, sample_seed


@pytest.mark.parametrize("block", [1, 7, 64, 10_000])
def test_every_epoch_holds_every_sample_exactly_once(block: int) -> None:
    order = Order([13, 0, 50, 1, 29], seed=3, block=block)
    for epoch in range(3):
        epochs, indices = order.span(epoch * 93, (epoch + 1) * 93)
        assert set(epochs) == {epoch}
        assert sorted(indices) == list(range(93))


def test_a_batch_that_straddles_epochs_drops_and_repeats_nothing() -> None:
    order = Order([10, 11], seed=0, block=8)
    stream = [order.at(position) for position in range(3 * 21)]
    assert len(set(stream)) == len(stream)
    for start in range(0, 3 * 21 - 8, 8):
        epochs, indices = order.span(start, start + 8)
        assert list(zip(epochs.tolist(), indices.tolist(), strict=True)) == stream[start : start + 8]


def test_order_depends_on_seed_and_epoch_only() -> None:
    first = Order([40, 60], seed=5, block=16)
    later = Order([40, 60], seed=5, block=16)
    later.epoch(9)
    assert np.array_equal(first.epoch(2), later.epoch(2))
    assert not np.array_equal(first.epoch(2), first.epoch(3))
    assert not np.array_equal(first.epoch(2), Order([40, 60], seed=6, block=16).epoch(2))


def test_order_is_the_one_of_earlier_versions() -> None:  # a change here breaks every run that is to be resumed
    assert Order([4, 4], seed=0, block=4).epoch(0).tolist() == [5, 4, 6, 7, 3, 1, 2, 0]
    assert sample_seed(0, 0, "a") == 9196027511977055662


def test_reads_stay_within_a_block() -> None:
    order = Order([100] * 10, seed=1, block=100)
    for block in order.epoch(0).reshape(10, 100):
        assert len(set(block // 100)) == 1  # blocks of a shard's size hold one shard each
    assert not np.array_equal(np.sort(order.epoch(0)), order.epoch(0))


def test_seeds_and_hashes_tell_their_inputs_apart() -> None:
    assert len({sample_seed(s, e, k) for s in range(3) for e in range(3) for k in ("a", "b", "0")}) == 27
    assert all(0 <= sample_seed(0, 0, str(i)) < 2**63 for i in range(100))
    assert (
        len({order_hash("", ["a", "b"]), order_hash("", ["b", "a"]), order_hash("", ["ab"]), order_hash("x", ["a"])})
        == 4
    )
    assert len(order_hash("", ["a"])) == 16


@pytest.mark.parametrize(("sizes", "block"), [([], 4), ([0, 0], 4), ([3], 0)])
def test_impossible_orders_are_refused(sizes: list[int], block: int) -> None:
    with pytest.raises(ValueError, match=r"order|shuffle_block"):
        Order(sizes, seed=0, block=block)
