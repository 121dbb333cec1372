"""What a streaming library is asked, and how an answer follows from what it gave."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from _common import ROOT
from _peer_sets import EVEN, UNEVEN, cut_copies, cuts, poisoned, shards
from _peers import Library, Run, Runner

STOP = 21  # batches of 20, of 50 in the epoch: odd, for a checkpoint falls anywhere, not where all workers gave equally
MIX_STOP, MIX_END = 15, 30
CUTS = 24
_HANGS = 40.0  # seconds


@dataclass
class Answer:
    """`cell` for the table; `good` where the property holds; `evidence`, what was seen."""

    cell: str
    good: bool
    evidence: Any


class Interview:
    """One library before its data; passes that several questions need are made once."""

    def __init__(self, library: Library, folder: Path) -> None:
        self.library, self.folder = library, folder
        self.runner = Runner(library, folder / "passes")
        self.version = self.runner.version()
        self.plain = shards(folder / "even", EVEN)
        self.even = self._own(self.plain)
        self.uneven = self._own(shards(folder / "uneven", UNEVEN))

    def _own(self, tars: Path) -> Path:
        """The same samples in the format that the library reads."""
        if self.library.tars:
            return tars
        out = tars.with_name(f"{tars.name}-own")
        made = self.runner.run(do="convert", data=[str(tars)], to=str(out))
        if made.errors:
            raise RuntimeError(f"{self.library.name} cannot convert {tars.name}: {made.errors[0]}")
        return out

    def _read(self, data: Path | None = None, **request: Any) -> Run:
        return self.runner.run(data=[str(data or self.even)], **request)

    @cached_property
    def _epoch(self) -> Run:
        return self._read(workers=2)

    @property
    def _can_seed(self) -> bool:
        """Whether it has a deterministic shuffle beside its usual one."""
        return self.library.name.startswith("webdataset")

    @cached_property
    def _ordered(self) -> Run:
        """An epoch in the order that should come again."""
        return self._read(workers=2, seeded=True) if self._can_seed else self._epoch

    @cached_property
    def _saved(self) -> tuple[Run, Path]:
        state = self.folder / "state"
        return self._read(workers=2, stop=STOP, save=str(state)), state

    def tars(self) -> Answer:
        run = self._epoch if self.library.tars else self.runner.run(data=[str(self.plain)], deadline=_HANGS)
        seen = len(set(run.numbers))
        cell = "yes" if seen == sum(EVEN) else "no: converts them"
        return Answer(cell, seen == sum(EVEN), {"samples": seen, "errors": run.errors})

    def once(self) -> Answer:
        return _once(self._epoch, sum(EVEN))

    def once_uneven(self) -> Answer:
        return _once(self._read(self.uneven, workers=2, world=2), sum(UNEVEN))

    def again(self) -> Answer:
        answer = _same(self._epoch, self._read(workers=2))
        if not answer.good and self._can_seed:
            seeded = _same(self._ordered, self._read(workers=2, seeded=True))
            return Answer(f"{answer.cell}; with detshuffle: {seeded.cell}", False, [answer.evidence, seeded.evidence])
        return answer

    def any_workers(self) -> Answer:
        found = [_same(self._ordered, self._read(workers=workers, seeded=self._can_seed)) for workers in (0, 1)]
        return Answer(
            min(found, key=lambda answer: answer.good).cell,
            all(answer.good for answer in found),
            {"0 workers": found[0].evidence, "1 worker": found[1].evidence},
        )

    def any_world(self) -> Answer:
        return _same(self._ordered, self._read(workers=2, world=2, seeded=self._can_seed))

    def resume(self) -> Answer:
        return self._resume(workers=2)

    def resume_workers(self) -> Answer:
        return self._resume(workers=1)

    def resume_world(self) -> Answer:
        return self._resume(workers=2, world=2)

    def _resume(self, **request: Any) -> Answer:
        first, state = self._saved
        if not state.is_file():
            return Answer("no: no state to save", False, {"errors": first.errors})
        rest = self._read(resume=str(state), **request)
        repeated = len(rest.numbers) - len(set(rest.numbers) - set(first.numbers))
        missing = sum(EVEN) - len(set(first.numbers) | set(rest.numbers))
        order = _same(Run([self._epoch.steps[STOP:]], [], [], []), rest)
        evidence = {"repeated": repeated, "missing": missing, "order": order.evidence, "errors": rest.errors}
        if rest.errors:
            return Answer(f"no: {_short(rest.errors[0])}", False, evidence)
        if repeated or missing:
            return Answer(f"no: {repeated} again, {missing} never", False, evidence)
        return Answer("exact" if order.good else "same samples, in another order", order.good, evidence)

    def mixture(self) -> Answer:
        half = sum(EVEN) // 2
        parts = [self._own(shards(self.folder / f"part-{first}", EVEN[:2], first)) for first in (0, half)]
        state = self.folder / "mixed"
        request = {"data": list(map(str, parts)), "weights": [0.7, 0.3], "workers": 2}
        whole = self.runner.run(**request, stop=MIX_END)
        share = sum(number < half for number in whole.numbers) / max(len(whole.numbers), 1)
        first = self.runner.run(**request, stop=MIX_STOP, save=str(state))
        evidence = {"share of 0.7": round(share, 3), "errors": whole.errors + first.errors}
        if whole.errors or first.errors or not state.is_file():
            error = [*whole.errors, *first.errors, "no state to save"][0]
            return Answer(f"no: {_short(error)}", False, evidence)
        rest = self.runner.run(**request, stop=MIX_END - MIX_STOP, resume=str(state))
        order = _same(Run([whole.steps[MIX_STOP:]], [], [], []), rest)
        evidence |= {"errors": rest.errors, "order": order.evidence}
        return Answer("exact" if order.good else order.cell, order.good, evidence)

    def cut(self) -> Answer:
        if not self.library.tars:
            pattern = "*.mds" if self.library.name.startswith("mosaicml") else "*.bin"
            found = cut_copies(self.even, self.folder / "cuts", pattern, (0.1, 0.5, 0.9, 0.999))
            for cut in found:
                folder = cut["folder"]
                run = self.runner.run(do="each", data=[folder], deadline=_HANGS)
                cut["seen"] = run.each[0] if run.each else {"numbers": [], "error": run.errors[0], "said": []}
            return _cut(found, [], sum(EVEN))
        answer = self._cut_tars("cuts", indexed=False)
        if self.library.name == "mm":
            after = self._cut_tars("indexed", indexed=True)
            cell = f"{answer.cell}; indexed before it was cut, {after.cell}"
            return Answer(cell, answer.good and after.good, {"before": answer.evidence, "after": after.evidence})
        return answer

    def _cut_tars(self, name: str, *, indexed: bool) -> Answer:
        found = cuts(self.plain, self.folder / name, CUTS)
        for cut in found:
            if indexed:
                command = [sys.executable, "-m", "mm.cli", "shards", "index", cut["folder"]]
                environment = self.runner.environment()
                subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=60, env=environment)
            os.truncate(cut["shard"], cut["cut"])
        run = self.runner.run(do="each", data=[str(self.plain), *(cut["folder"] for cut in found)], deadline=150)
        for cut, seen in zip(found, run.each[1:], strict=False):
            cut["seen"] = seen
        return _cut([cut for cut in found if "seen" in cut], run.each[0]["said"] if run.each else [], sum(EVEN))

    def pickled(self) -> Answer:
        marker, folder = self.folder / "it-ran", self.folder / "poisoned"
        if self.library.tars:
            poisoned(folder, marker)
        else:
            made = self.runner.run(do="poison", to=str(folder), marker=str(marker))
            if made.errors:
                return Answer("no: not written", True, {"errors": made.errors})
        answer = self._pickled(folder, marker, {})
        if not answer.good and self.library.name.startswith("webdataset"):
            secure = self._pickled(folder, marker, {"WDS_SECURE": "1"})
            return Answer(f"{answer.cell}; with WDS_SECURE=1: {secure.cell}", False, [answer.evidence, secure.evidence])
        return answer

    def _pickled(self, folder: Path, marker: Path, environment: dict[str, str]) -> Answer:
        marker.unlink(missing_ok=True)
        run = self.runner.run(data=[str(folder)], deadline=_HANGS, environment=environment)
        ran, seen = marker.exists(), len(set(run.numbers))
        cell = "runs its code" if ran else f"refused: {_short(run.errors[0])}" if run.errors else "never read"
        return Answer(cell, not ran, {"ran": ran, "samples": seen, "errors": run.errors, "said": run.said[:3]})


def _once(run: Run, total: int) -> Answer:
    distinct = set(run.numbers)
    lengths = [len(batches) for batches in run.ranks]
    repeated, missing = len(run.numbers) - len(distinct), total - len(distinct)
    evidence = {"missing": missing, "repeated": repeated, "batches": lengths, "errors": run.errors}
    wrong = [f"{repeated} repeated"] * bool(repeated) + [f"{missing} missing"] * bool(missing)
    wrong += [f"{' and '.join(map(str, lengths))} batches"] * (len(set(lengths)) > 1) + [*map(_short, run.errors[:1])]
    return Answer(f"no: {', '.join(wrong)}" if wrong else "yes", not wrong, evidence)


def _same(one: Run, other: Run) -> Answer:
    """Whether two passes gave the same global batches, row by row or at least as sets."""
    pairs = list(zip(one.steps, other.steps, strict=False))
    most = max(len(one.steps), len(other.steps))
    rows = sum(a == b for a, b in pairs)
    sets = sum(sorted(a) == sorted(b) for a, b in pairs)
    evidence = {"batches": most, "same rows": rows, "same samples": sets, "errors": one.errors + other.errors}
    if evidence["errors"]:
        return Answer(f"no: {_short(evidence['errors'][0])}", False, evidence)
    if sets == most > 0:
        return Answer("yes" if rows == most else "yes, rows of a batch in another order", True, evidence)
    return Answer(f"no: {sets} of {most} batches", False, evidence)


def _cut(found: list[dict[str, Any]], usual: list[str], total: int) -> Answer:
    """Each cut: an error, something said beyond what a whole set brings, or silence; and whether the loss was told.

    It is told where its number is named, or each sample.
    """
    rows, kinds = [], {"stopped by an error": 0, "reported": 0, "silent": 0, "nothing lost": 0}
    for cut in found:
        seen = cut["seen"]
        missing = total - len(set(seen["numbers"]))
        said = [line for line in seen["said"] if line not in usual]
        kind = (
            "stopped by an error" if seen["error"] else "reported" if said else "silent" if missing else "nothing lost"
        )
        kinds[kind] += 1
        text = " ".join([seen["error"], *said])
        gone = set(cut.get("gone", ()))
        lost = len(gone) or missing
        named = gone & {int(key) for key in re.findall(r"\b\d{6}\b", text)}
        told = len(named) == lost or re.search(rf"\b{lost}\b", text.replace(",", "")) is not None
        row = {"cut": cut["cut"], "lost in it": len(gone) or None, "not given": missing, "kind": kind, "told": told}
        rows.append({**row, "error": seen["error"], "said": said[:2]})
    parts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    told = sum(row["told"] for row in rows)
    return Answer(f"{len(rows)} cuts: {parts}; number of lost samples told in {told}", not kinds["silent"], rows)


def _short(error: str) -> str:
    return error if len(error) <= 70 else error[:67] + "..."
