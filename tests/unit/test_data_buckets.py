from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mm.data.buckets import Buckets, aspect_codes, aspect_shapes, length_codes
from mm.data.mixture import Mixture
from mm.data.order import Order

pytestmark = pytest.mark.timeout(60)


@dataclass(frozen=True)
class Remainders:
    """A code for each sample number that any process can work out."""

    kinds: int

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return numbers * 7 % 1009 % self.kinds


def rows(order: Order | Mixture | Buckets, start: int, stop: int) -> list[tuple[int, int]]:
    epochs, numbers = order.span(start, stop)
    return list(zip(epochs.tolist(), numbers.tolist(), strict=True))


@st.composite
def orders(draw: st.DrawFn) -> Order | Mixture:
    sizes = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 20))
    seed, block = draw(st.integers(0, 2**63)), draw(st.integers(1, 3000))
    return draw(st.sampled_from([Order(sizes, seed, block), Mixture([sizes, [90, 70]], [2, 1], seed, block)]))


@given(st.data(), orders(), st.integers(1, 40), st.integers(0, 1500), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_buckets_regroup_each_window_into_batches_of_like_code(
    data: st.DataObject, order: Order | Mixture, batch: int, window: int, kinds: int
) -> None:
    codes = Remainders(kinds)
    buckets = Buckets(order, codes, batch, window)
    assert buckets.window >= max(window, batch) and buckets.window % batch == 0 and buckets.window < window + 2 * batch
    assert buckets.samples == order.samples
    whole = rows(buckets, 0, 3 * buckets.window)
    for w in range(3):
        here = slice(w * buckets.window, (w + 1) * buckets.window)
        plain = rows(order, here.start, here.stop)
        assert sorted(whole[here]) == sorted(plain)
        distinct = set(codes(np.array([number for _, number in plain])).tolist())
        mixed = 0
        for n in range(here.start // batch, here.stop // batch):
            found = codes(np.array([number for _, number in whole[n * batch : (n + 1) * batch]]))
            assert buckets.code(n) == np.sort(found)[batch // 2]
            mixed += len(set(found.tolist())) > 1
        assert mixed <= len(distinct) - 1
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, 3 * buckets.window)] * 2)))
    copy = pickle.loads(pickle.dumps(buckets))
    assert rows(copy, b, 3 * buckets.window) + rows(copy, a, b) == whole[b:] + whole[a:b]
    assert copy.code(1) == buckets.code(1)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_joined_are_the_global_batch(world: int) -> None:
    order = Order([70, 50], seed=4, block=32)
    buckets = Buckets(order, Remainders(3), batch=16, window=60)
    for n in range(12):
        slices = [
            rows(buckets, n * 16 + rank * 16 // world, n * 16 + (rank + 1) * 16 // world) for rank in range(world)
        ]
        assert list(chain.from_iterable(slices)) == rows(buckets, n * 16, (n + 1) * 16)


def test_like_samples_keep_their_order_and_batches_are_shuffled() -> None:
    order = Order([1000], seed=4, block=1000)
    buckets = Buckets(order, Remainders(2), batch=50, window=1000)
    codes = [buckets.code(n) for n in range(20)]
    assert codes != sorted(codes) and codes != [buckets.code(n) for n in range(20, 40)]
    place = {number: position for position, (_, number) in enumerate(rows(order, 0, 1000))}
    for n in range(20):
        batch = [number for _, number in rows(buckets, n * 50, (n + 1) * 50)]
        assert len(set(Remainders(2)(np.array(batch)).tolist())) == 1  # 500 of either kind: no border in a batch
        assert [place[number] for number in batch] == sorted(place[number] for number in batch)


def test_buckets_are_those_of_earlier_versions() -> None:  # a change here breaks every run that is to be resumed
    buckets = Buckets(Order([6, 6], seed=2, block=8), Remainders(3), 4, 12)
    epochs, numbers = buckets.span(0, 24)
    assert epochs.tolist() == [0] * 12 + [1] * 12
    assert numbers.tolist() == [4, 1, 7, 10, 6, 3, 0, 9, 2, 5, 8, 11, 1, 10, 7, 4, 11, 8, 2, 5, 0, 9, 6, 3]
    assert [buckets.code(n) for n in range(6)] == [1, 0, 2, 1, 2, 0]


@pytest.mark.parametrize("wrong", [lambda numbers: numbers / 2, lambda numbers: numbers[1:]])
def test_codes_that_are_none_are_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="whole numbers"):
        Buckets(Order([10], 0, 4), wrong, 4, 8).span(0, 4)  # type: ignore[arg-type]


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="data.batch_size: 0"):
        Buckets(Order([10], 0, 4), Remainders(2), 0, 8)


def test_shapes_have_about_the_pixels_of_the_square() -> None:
    for patch in (1, 8, 14, 16):
        for side in range(1, 40):
            for n in range(1, 12):
                shapes = aspect_shapes(side * patch, patch, n)
                assert 1 <= len(shapes) <= n and (side * patch, side * patch) in shapes
                aspects = [width / height for width, height in shapes]
                assert aspects == sorted(set(aspects)) and aspects[0] >= 0.5 and aspects[-1] <= 2
                assert {(height, width) for width, height in shapes} == set(shapes)
                for width, height in shapes:
                    assert width % patch == height % patch == 0
                    assert 7 / 8 <= width * height / (side * patch) ** 2 <= 1


def test_shapes_are_spread_over_the_whole_range() -> None:
    assert aspect_shapes(32, 8, 3) == [(24, 40), (32, 32), (40, 24)]
    assert aspect_shapes(256, 16, 3) == [(176, 352), (256, 256), (352, 176)]
    assert aspect_shapes(256, 16, 6) == [(176, 352), (208, 304), (256, 256), (304, 208), (352, 176)]


@given(st.lists(st.tuples(st.integers(1, 60_000), st.integers(1, 60_000)), min_size=1, max_size=50))
@settings(max_examples=60, deadline=None)
def test_a_picture_takes_the_shape_nearest_in_log_aspect(sizes: list[tuple[int, int]]) -> None:
    shapes = aspect_shapes(256, 16, 7)
    codes = aspect_codes(*zip(*sizes, strict=True), shapes)
    for (width, height), code in zip(sizes, codes.tolist(), strict=True):
        away = [abs(math.log(width / height) - math.log(w / h)) for w, h in shapes]
        assert away[code] <= min(away) + 1e-12  # rounding of the logarithms


def test_a_picture_half_way_takes_the_wider_shape_and_one_of_unknown_size_the_square() -> None:
    shapes = [(100, 400), (200, 200), (400, 100)]
    assert aspect_codes(
        [100, 99, 101, 0, 10, 0, 2000, 1999], [200, 200, 200, 0, 0, 10, 1000, 1000], shapes
    ).tolist() == [
        *[1, 0, 1],
        *[1, 1, 1],
        *[2, 1],
    ]
    assert aspect_codes([], [], shapes).tolist() == []
    assert aspect_codes([5, 500], [500, 5], [(224, 224)]).tolist() == [0, 0]


def test_texts_up_to_an_edge_belong_to_it() -> None:
    assert length_codes([0, 16, 17, 64, 65, 10**9], [16, 64]).tolist() == [0, 0, 1, 1, 2, 2]
    assert length_codes(np.array([3], dtype=np.int32), []).tolist() == [0]


def test_shapes_and_edges_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="image.size: 100 must be a multiple of image.patch = 16"):
        aspect_shapes(100, 16, 5)
    with pytest.raises(ValueError, match="0 must be at least 1"):
        aspect_shapes(96, 16, 0)
    with pytest.raises(ValueError, match="narrow ones first"):
        aspect_codes([1], [1], [(2, 1), (1, 2)])
    with pytest.raises(ValueError, match="must rise"):
        length_codes([1], [64, 64])
