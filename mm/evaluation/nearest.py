"""The k rows of a matrix with the largest inner products: all are looked at by faiss, or those of the nearest lists.

Letters: Q queries, N rows, E embedding, L lists.

Whatever found the candidates, their scores are computed here once more, each from its own two vectors in float64:
what is returned does not depend on how rows lay beside each other in a matrix product, and equal rows score equally.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Rows = NDArray[np.int64]

BLOCK = 1 << 13  # rows that go through one product; faiss takes four times as long a row over four times as many
QUERIES = 256  # at once
MARGIN = 16  # candidates beyond k
SAMPLE = 40  # rows a list, from which lists are made
_FEW = 20  # queries: faiss shares out more than these among its own threads


def exact(queries: Floats, matrix: Floats, k: int, progress: Callable[[int], object] | None = None) -> tuple[Rows, Any]:
    """Rows `[Q, k]` and scores float32 `[Q, k]`, highest first, equal ones by row; k at most N.

    `queries` float32 `[Q, E]`; `matrix` float32 or float16 `[N, E]`, which may be a mapped file: it is read in blocks
    and never copied whole. Rows are found by faiss in float32. Its rounding could only swap scores that are closer than
    E · 2⁻²⁴ times the norms (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), so more candidates are
    fetched until the last is further than that from the k-th.
    """
    k = min(k, len(matrix))
    rows = np.zeros((len(queries), k), np.int64)
    scores = np.zeros((len(queries), k), np.float32)
    for start in range(0, len(queries), QUERIES):
        part = slice(start, start + QUERIES)
        some, wanted = np.ascontiguousarray(queries[part], np.float32), k + MARGIN
        left = np.arange(len(some))
        while len(left):
            candidates, about = _candidates(some[left], matrix, min(wanted, len(matrix)))
            open_ = []
            for place, found, rough in zip(left.tolist(), candidates, about, strict=True):
                best, exactly = ranked(some[place], matrix, found, k)
                rows[start + place], scores[start + place] = best, exactly
                slack = len(some[place]) * 2.0**-23 * float(np.linalg.norm(some[place])) * _largest(matrix, found)
                if len(found) < len(matrix) and float(rough.min()) > float(exactly[-1]) - slack:
                    open_.append(place)
            left, wanted = np.array(open_, np.int64), 4 * wanted
        if progress is not None:
            progress(len(some))
    return rows, scores


def ranked(query: Floats, matrix: Floats, rows: Rows, k: int) -> tuple[Rows, NDArray[np.float32]]:
    """The best k of `rows` for one query `[E]`, highest score first, equal ones by row."""
    rows = np.sort(rows)
    scores = (matrix[rows].astype(np.float64) * query.astype(np.float64)).sum(1).astype(np.float32)
    order = np.argsort(-scores, kind="stable")[:k]
    return rows[order], scores[order]


def _largest(matrix: Floats, rows: Rows) -> float:
    """Of the norms of some rows; rows of an index have norm 1, to rounding."""
    return max(1.0, float(np.linalg.norm(matrix[rows].astype(np.float32), axis=1).max()))


def _candidates(queries: Floats, matrix: Floats, k: int) -> tuple[Rows, Any]:
    """The k best rows of each query by faiss' float32, block by block, in no particular order."""
    import faiss

    def block(start: int) -> tuple[Any, Rows]:
        rows = np.ascontiguousarray(matrix[start : start + BLOCK], np.float32)  # no copy of mapped float32
        scores, found = faiss.knn(queries, rows, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
        if (found < 0).any() or not np.isfinite(scores).all():  # faiss leaves out what compares with nothing
            raise ValueError("embeddings: some hold numbers that are not finite; make the index anew")
        return scores, found.astype(np.int64) + start

    # one query at a time is one thread in faiss; blocks side by side use them all
    threads = faiss.omp_get_max_threads() if len(queries) < _FEW else 1
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    with ThreadPoolExecutor(threads) as pool:
        for more, found in pool.map(block, range(0, len(matrix), BLOCK)):
            scores, rows = np.concatenate([scores, more], 1), np.concatenate([rows, found], 1)
            if scores.shape[1] > k:
                best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
                scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
    return rows, scores


@dataclass
class Lists:
    """Rows sorted into L lists by the nearest of L centres (an inverted file: Sivic and Zisserman, ICCV 2003).

    `centres` float32 `[L, E]`; `rows` uint32 `[N]`, list after list; `ends` int64 `[L]`, where each list ends in it.
    """

    centres: NDArray[np.float32]
    rows: NDArray[np.uint32]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, matrix: Floats, *, seed: int = 0, progress: Callable[[int], object] | None = None) -> Lists:
        """About 4 √N lists, their centres by faiss' spherical k-means over a sample of the rows."""
        import faiss

        count, dim = matrix.shape
        lists = int(max(1, min(4 * count**0.5, count // 39 or 1)))  # faiss wants 39 rows a centre
        sample = np.random.default_rng(seed).choice(count, min(count, SAMPLE * lists), replace=False)
        means = faiss.Kmeans(dim, lists, niter=10, seed=seed + 1, spherical=True, verbose=False)
        means.train(matrix[np.sort(sample)].astype(np.float32))
        centres = np.ascontiguousarray(means.centroids, np.float32)
        which = np.empty(count, np.int64)
        for start in range(0, count, BLOCK):
            some = np.ascontiguousarray(matrix[start : start + BLOCK], np.float32)
            found = faiss.knn(some, centres, 1, metric=faiss.METRIC_INNER_PRODUCT)[1]
            which[start : start + BLOCK] = found[:, 0]
            if progress is not None:
                progress(len(some))
        ends = np.cumsum(np.bincount(which, minlength=lists))
        return cls(centres, np.argsort(which, kind="stable").astype(np.uint32), ends)

    def search(self, queries: Floats, matrix: Floats, k: int, probes: int) -> tuple[Rows, Any]:
        """`exact` among the rows of the `probes` nearest lists, and of more where these hold fewer than k."""
        k = min(k, len(matrix))
        rows, scores = np.zeros((len(queries), k), np.int64), np.zeros((len(queries), k), np.float32)
        nearest, _ = exact(queries, self.centres, len(self.centres))  # all, best first
        for place, lists in enumerate(nearest.tolist()):
            found, count = [], 0
            for number, which in enumerate(lists):
                if number >= probes and count >= k:
                    break
                start = int(self.ends[which - 1]) if which else 0
                found.append(self.rows[start : int(self.ends[which])])
                count += len(found[-1])
            query = np.asarray(queries[place], np.float32)
            rows[place], scores[place] = ranked(query, matrix, np.concatenate(found).astype(np.int64), k)
        return rows, scores
