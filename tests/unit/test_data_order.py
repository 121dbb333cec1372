from __future__ import annotations

import pickle
import time
import tracemalloc
from collections import defaultdict
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mm.data.mixture import CHUNK, Mixture
from mm.data.order import Order, draws, order_hash, sample_seed

pytestmark = pytest.mark.timeout(60)

SIZES = st.lists(st.integers(0, 1000), min_size=1, max_size=8).filter(any)
BLOCKS = st.one_of(st.integers(1, 20), st.integers(1, 10_000), st.sampled_from([1023, 1024, 1025]))
SEEDS = st.integers(0, 2**63)
SOURCES = st.lists(
    st.lists(st.integers(0, 1000), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 20), max_size=4
)


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    sources = [draw(SIZES.filter(lambda sizes: sum(sizes) > 20)), *draw(SOURCES)]
    weight = st.one_of(st.floats(1e-9, 1e9), st.integers(1, 5))
    weights = draw(st.lists(weight, min_size=len(sources), max_size=len(sources)))
    return Mixture(sources, weights, draw(SEEDS), draw(BLOCKS))


def stream(order: Order | Mixture, start: int, stop: int) -> list[tuple[int, int]]:
    epochs, numbers = order.span(start, stop)
    return list(zip(epochs.tolist(), numbers.tolist(), strict=True))


def listed(sizes: list[int], seed: int, block: int, epoch: int) -> NDArray[np.int64]:
    """An epoch's order made the plain way: with a list of all samples."""
    keys = draws(seed, epoch, "order", 0, len(sizes) + sum(sizes))
    shards = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    joined = np.concatenate([shards[shard] for shard in np.argsort(keys[: len(sizes)], kind="stable")])
    blocks = np.arange(sum(sizes)) // block
    return joined[np.lexsort((keys[len(sizes) :], blocks))]


@given(SIZES, SEEDS, BLOCKS)
@settings(max_examples=60, deadline=None)
def test_every_epoch_holds_every_sample_exactly_once(sizes: list[int], seed: int, block: int) -> None:
    order = Order(sizes, seed, block)
    assert order.samples == sum(sizes)
    epochs, numbers = order.span(0, 3 * order.samples)
    for epoch, (of, numbered) in enumerate(zip(np.split(epochs, 3), np.split(numbers, 3), strict=True)):
        assert (of == epoch).all()
        assert np.array_equal(np.sort(numbered), np.arange(order.samples))
        assert np.array_equal(numbered, listed(sizes, seed, block, epoch))


@given(st.data(), SIZES, SEEDS, BLOCKS, st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_any_part_of_the_stream_is_the_same_however_it_is_reached(
    data: st.DataObject, sizes: list[int], seed: int, block: int, world: int
) -> None:
    order = Order(sizes, seed, block)
    end = 3 * order.samples
    a, b, c = sorted(data.draw(st.tuples(*[st.integers(0, end)] * 3)))
    whole = stream(order, 0, end)
    fresh = Order(sizes, seed, block)
    assert stream(fresh, a, c) == whole[a:c]
    assert stream(fresh, a, b) + stream(fresh, b, c) == whole[a:c]
    assert stream(pickle.loads(pickle.dumps(order)), b, c) == whole[b:c]
    rows, n = data.draw(st.integers(1, 32)), data.draw(st.integers(0, 10))
    first = n * rows * world
    slices = [stream(fresh, first + rank * rows, first + (rank + 1) * rows) for rank in range(world)]
    assert list(chain.from_iterable(slices)) == stream(order, first, first + rows * world)


@given(st.data(), mixtures())
@settings(max_examples=25, deadline=None)
def test_each_chunk_of_a_mixture_holds_its_quota_and_each_source_every_sample_once_an_epoch(
    data: st.DataObject, mixture: Mixture
) -> None:
    assert sum(mixture.quotas) == CHUNK and min(mixture.quotas) >= 1
    whole = stream(mixture, 0, 2 * CHUNK)
    passed: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for epoch, number in whole:
        source = int(np.searchsorted(mixture.offsets, number, side="right")) - 1
        passed[source].append((epoch, number - int(mixture.offsets[source])))
    for chunk in range(2):
        numbers = [number for _, number in whole[chunk * CHUNK : (chunk + 1) * CHUNK]]
        assert np.histogram(numbers, [*mixture.offsets[:-1], mixture.samples])[0].tolist() == mixture.quotas
    for source, order in enumerate(mixture.orders):
        assert passed[source] == stream(order, 0, 2 * mixture.quotas[source])
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, 2 * CHUNK)] * 2)))
    copy = pickle.loads(pickle.dumps(mixture))
    assert stream(copy, b, 2 * CHUNK) + stream(copy, a, b) == whole[b:] + whole[a:b]
    assert copy.samples == mixture.samples == sum(order.samples for order in mixture.orders)


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [
        ([1, 3], [2048, 6144]),
        ([0.1, 0.3], [2048, 6144]),
        ([1e-300, 3e-300], [2048, 6144]),
        ([1e308] * 4, [2048] * 4),
        ([1, 1, 1], [2731, 2731, 2730]),  # 2730.67 each: the two left over go to the first
        ([1e-9, 1, 1e-9], [1, 8190, 1]),
        ([1e-9, 1e-9, 1e-9, 1e-9, 1, 1], [1, 1, 1, 1, 4094, 4094]),  # what lifts the small ones is taken evenly
        ([2], [8192]),
    ],
)
def test_quotas_follow_the_weights_whatever_their_scale(weights: list[float], quotas: list[int]) -> None:
    assert Mixture([[5]] * len(weights), weights, seed=0, block=4).quotas == quotas


def test_a_source_keeps_its_order_when_another_grows() -> None:
    small = Mixture([[30, 40], [100]], [1, 1], seed=3, block=16)
    large = Mixture([[30, 40], [500] * 9], [1, 1], seed=3, block=16)
    assert [sample for sample in stream(small, 0, CHUNK) if sample[1] < 70] == [
        sample for sample in stream(large, 0, CHUNK) if sample[1] < 70
    ]


def test_sources_of_equal_sizes_come_in_orders_of_their_own() -> None:
    mixture = Mixture([[100], [100]], [1, 1], seed=0, block=100)
    assert stream(mixture.orders[0], 0, 100) != stream(mixture.orders[1], 0, 100)
    assert stream(mixture, 0, 100) != stream(mixture, CHUNK, CHUNK + 100)


def test_seed_and_epoch_give_another_order() -> None:
    order = Order([40, 60], seed=5, block=16)
    _, numbers = order.span(0, 200)
    assert not np.array_equal(numbers[:100], numbers[100:])
    assert not np.array_equal(numbers, Order([40, 60], seed=6, block=16).span(0, 200)[1])


# a change in any of these literals breaks every run that is to be resumed
def test_order_is_the_one_of_earlier_versions() -> None:
    assert Order([4, 4], seed=0, block=4).span(0, 8)[1].tolist() == [5, 4, 6, 7, 3, 1, 2, 0]
    assert Order([3, 0, 5, 2], seed=1, block=4).span(8, 20)[1].tolist() == [1, 2, 9, 4, 8, 3, 6, 7, 0, 5, 2, 1]
    epochs, numbers = Order([10_000] * 10_000, seed=7, block=16_384).span(10**12 + 12_345, 10**12 + 12_351)
    assert epochs.tolist() == [10_000] * 6
    assert numbers.tolist() == [13896400, 13731170, 13895528, 13894521, 13733494, 13898623]
    assert sample_seed(0, 0, "a") == 9196027511977055662


def test_mixture_is_the_one_of_earlier_versions() -> None:
    mixture = Mixture([[4, 4], [3], [50, 0, 50]], [5, 2, 1], seed=1, block=4)
    assert mixture.quotas == [5120, 2048, 1024]
    epochs, numbers = mixture.span(8185, 8201)
    assert epochs.tolist() == [639, 639, 10, 682, 639, 639, 639, 640, 640, 10, 640, 640, 682, 683, 640, 683]
    assert numbers.tolist() == [1, 5, 31, 8, 6, 4, 7, 1, 0, 38, 2, 3, 9, 9, 5, 8]


def test_reads_stay_within_a_block() -> None:
    _, numbers = Order([100] * 10, seed=1, block=100).span(0, 1000)
    for block in numbers.reshape(10, 100):
        assert len(set(block // 100)) == 1  # blocks of a shard's size hold one shard each
    assert not np.array_equal(np.sort(numbers), numbers)


def test_blocks_of_one_keep_the_order_within_a_shard() -> None:
    _, numbers = Order([100] * 10, seed=1, block=1).span(0, 1000)
    assert (np.diff(numbers.reshape(10, 100)) == 1).all()
    assert not np.array_equal(np.sort(numbers), numbers)


def test_draws_begin_anywhere() -> None:
    whole = draws(1, 2, "use", 0, 40)
    for start in range(12):
        assert np.array_equal(draws(1, 2, "use", start, 40), whole[start:])
    assert len(set(whole.tolist()) & set(draws(1, 2, "another", 0, 40).tolist())) == 0


def test_resuming_in_a_large_index_costs_neither_time_nor_memory() -> None:
    sizes = np.full(10_000, 10_000)
    tracemalloc.start()
    try:
        start = time.perf_counter()
        Order(sizes, seed=1, block=4096).span(777 * 10**8 + 12_345_678, 777 * 10**8 + 12_345_934)
        seconds, most = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 2e6  # a list of all samples takes 800 MB
    assert seconds < 0.5  # about 1 ms; the rest is for a busy machine


def test_a_long_pass_keeps_a_few_pages_only() -> None:
    order = Mixture([[1000] * 1000, [1000] * 500], [2, 1], seed=1, block=1024)
    order.span(0, 256)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for n in range(0, 200_000, 256):
            order.span(n, n + 256)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 1e6  # four chunks of 128 KiB, four pages of 8 KiB a source


def test_a_pickled_order_carries_its_sizes_only() -> None:
    order = Order([1000] * 100, seed=1, block=4096)
    empty = len(pickle.dumps(order))
    order.span(0, 50_000)
    assert len(pickle.dumps(order)) == empty < 2000


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


@pytest.mark.parametrize(
    ("sources", "weights", "reason"),
    [
        ([[3], [4]], [1, 0], "0 of source 1 must be positive"),
        ([[3], [4]], [-2, 1], "-2 of source 0"),
        ([[3], [4]], [1, float("nan")], "nan of source 1"),
        ([[3], [4]], [1, float("inf")], "inf of source 1"),
        ([[3], [4]], [1], "1 weights for 2 sources"),
        ([[3], [0, 0]], [1, 1], "source 1 of 2 holds no samples"),
        ([], [], "0 sources"),
    ],
)
def test_impossible_mixtures_are_refused(sources: list[list[int]], weights: list[float], reason: str) -> None:
    with pytest.raises(ValueError, match=f"data.weights: .*{reason}"):
        Mixture(sources, weights, seed=0, block=4)
