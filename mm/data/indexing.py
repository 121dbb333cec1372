"""`mm shards index` and `mm shards verify`: every shard read once from end to end, several at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mm.data import sidecar
from mm.data.joined import open_table
from mm.data.shards import expand
from mm.data.table import Table, keys_of
from mm.data.watch import end_with_parent

_NAMED = 5  # keys that a line of the report names


class Report(NamedTuple):
    """What was found in one shard: `problem` "" where nothing is wrong, `note` what is worth saying all the same."""

    shard: str
    bytes: int
    samples: int
    problem: str = ""
    note: str = ""
    lost: int = 0  # samples that are damaged or gone
    read: bool = True  # False: its index was up to date
    failed: bool = False  # it could not be read, or its index not be written


def index(spec: str, workers: int = 0) -> list[Report]:
    """Writes the sidecar of every shard that `spec` names and that has none, or an old one; one report a shard.

    To resume after an interruption, call it again. `workers` 0: one a core. Raises ConfigError where nothing is named.
    """
    shards = expand(spec, mixed=True)
    reports = _over(shards, _index_one, workers, "indexing")
    if not any(report.failed for report in reports):
        open_table(shards, anew=True)  # so that the first start is as fast as the others
    return reports


def verify(spec: str, workers: int = 0) -> list[Report]:
    """Compares every shard with its sidecar, byte for byte by SHA-256; without one only its structure is checked."""
    return _over(expand(spec, mixed=True), _verify_one, workers, "verifying")


def _over(shards: Sequence[str], work: Callable[[str], Report], workers: int, what: str) -> list[Report]:
    count = min(workers or os.cpu_count() or 1, len(shards))
    total = sum(os.path.getsize(shard) for shard in shards if os.path.isfile(shard))
    found: dict[str, Report] = {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mm.data.indexing"])
    with (
        ProcessPoolExecutor(count, context, _start_worker, (str(sidecar.cache_folder()),)) as pool,
        tqdm(total=total or None, desc=what, unit="B", unit_scale=True, disable=None) as bar,
    ):
        waiting = [pool.submit(work, shard) for shard in shards]
        try:
            for future in as_completed(waiting):  # not wait: asked for each of many shards, it looks at all of them
                report = future.result()
                found[report.shard] = report
                bar.update(report.bytes)
        except BaseException:  # Ctrl-C: what is being read is finished, the rest is left
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [found[shard] for shard in shards]


def _start_worker(cache: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides; no sidecar is left half written
    end_with_parent()
    os.environ["MM_CACHE"] = cache  # the fork server may have been started before it was set


def _index_one(shard: str) -> Report:
    try:
        old = sidecar.find(shard)
        new = sidecar.fresh(shard, old, whole=True)
        if new is not old:
            sidecar.keep(shard, new)
    except OSError as error:
        return Report(shard, 0, 0, f"cannot be indexed: {error.strerror or error}", failed=True)
    about = new.shards[0]
    problem = _problem(about.damage, about.lost, about.partial)
    changed = old is not None and old.shards[0].sha256 not in ("", about.sha256)
    note = "changed since they were indexed: the index now says what is there" if changed else ""
    return Report(shard, about.bytes, about.rows, problem, note, len(about.lost) + len(about.partial), new is not old)


def _verify_one(shard: str) -> Report:
    old: Table | None = None
    try:
        old = sidecar.find(shard)
        new = sidecar.scan(shard, whole=True)
    except OSError as error:
        rows = old.shards[0].rows if old is not None else 0
        return Report(shard, 0, 0, f"cannot be read: {error.strerror or error}", "", rows, failed=True)
    now = new.shards[0]
    if old is None or old.shards[0].sha256 == now.sha256:
        known = sidecar.missing(shard, new, None) if old is None else (old.shards[0].lost, old.shards[0].partial)
        note = "not indexed: only their structure was checked" if old is None else ""
        return Report(shard, now.bytes, now.rows, _problem(now.damage, *known), note, sum(map(len, known)))
    gone, damaged, added = _difference(old, new)
    problem = _problem(now.damage or "changed since it was indexed", gone, damaged, added)
    return Report(shard, now.bytes, now.rows, problem, "", len(gone) + len(damaged))


def _problem(what: str, lost: Sequence[str], damaged: Sequence[str], added: Sequence[str] = ()) -> str:
    parts = [what] if what else []
    for names, how in ((lost, "lost"), (damaged, "damaged"), (added, "added")):
        if names:
            parts.append(f"{len(names)} samples {how}{_some(names)}")
    return "; ".join(parts)


def _difference(old: Table, new: Table) -> tuple[list[str], list[str], list[str]]:
    """Keys that are gone, whose image or sizes differ, and that are new."""
    before, after = _prints(old), _prints(new)
    gone = [key for key in before if key not in after] + [key for key in old.shards[0].lost if key not in after]
    partial = old.shards[0].partial
    damaged = [key for key, value in before.items() if key in after and (after[key] != value or key in partial)]
    return gone, damaged, [key for key in after if key not in before]


def _prints(table: Table) -> dict[str, tuple[int, ...]]:
    columns = [table.sizes(part) for part in ("image", "txt", "caption", "json")]
    columns.append(table.columns.get("crc", np.zeros(len(table), np.uint32)))
    return dict(zip(keys_of(table), zip(*(column.tolist() for column in columns), strict=True), strict=True))


def _some(keys: Sequence[str]) -> str:
    return f" ({', '.join(keys[:_NAMED])}{', ...' if len(keys) > _NAMED else ''})"


def summary(reports: Sequence[Report], done: str, seconds: float) -> str:
    """One line over all shards, such as `indexed 12 shards, 3,320 samples, 12.3 MB in 0.8 s`."""
    read = [report for report in reports if report.read and not report.failed]
    current = sum(not report.read for report in reports)
    size = sum(report.bytes for report in read) / 1e6
    rate = f", {size / seconds:.0f} MB/s" if size > 10 else ""
    parts = [
        f"{done} {len(read)} shards, {sum(r.samples for r in read):,} samples, {size:,.1f} MB in {seconds:.1f} s{rate}"
    ]
    if current:
        parts.append(f"{current} were up to date")
    bad, lost = sum(bool(report.problem) for report in reports), sum(report.lost for report in reports)
    parts.append(f"{bad} with problems, {lost:,} samples lost or damaged" if bad else "nothing is wrong")
    return "; ".join(parts)


def timed(work: Callable[[], list[Report]]) -> tuple[list[Report], float]:
    """Reports, and the seconds that they took."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start
