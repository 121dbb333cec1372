"""Evaluation results for a model card: only from the JSON files that `mm evaluate` and `mm demo` wrote."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mm.config import ConfigError
from mm.evaluation.run import Share, headlines

LARGEST = 64 << 20  # bytes of a results file
NEAR = re.compile(r"(pixels_)?nearer_than_(\d+)pct")  # of mm.evaluation.memorisation
BESIDE = ("config.json", "tokenizer.json", "timings.json", "release.json")  # of a run folder: no results


@dataclass
class Found:
    """One evaluation, and the file that holds it."""

    file: str  # its name
    date: str  # when it was written, UTC
    result: dict[str, Any]

    def shares(self) -> dict[str, Share]:
        """Shares of yes-or-no outcomes by what they say, retrieval's among them, which carries no error."""
        recalls: dict[str, Share] = {}
        pairs = self.result.get("retrieval") or {}
        for found in (pairs, pairs.get("modalities") or {}):
            recalls |= {f"retrieval, {k}": Share(v, 0.0, found["pairs"]) for k, v in found.items() if "@" in k}
        heads = {_full(name): share for name, share in headlines(self.result).items()}
        return heads | recalls | self._memorised()

    def _memorised(self) -> dict[str, Share]:
        """The shares of drawings that are suspiciously near to a training picture; 0.01 and 0.05 would be chance."""
        found = {}
        for row in self.result.get("tasks") or []:
            for name, value in row["metrics"].items():
                split, _, kind = name.rpartition("/")
                match = NEAR.fullmatch(kind)
                if match is None or value is None:
                    continue
                whose = f"drawings of {split} captions" if split else "drawings"
                how = "pixels" if match[1] else "features"
                share = Share(value, row["errors"].get(name) or 0.0, row["n"][name])
                found[f"{whose} nearer to a training picture than {100 - int(match[2])} % of real ones, by {how}"] = (
                    share
                )
        return found

    def told(self) -> dict[str, Any]:
        """The evaluation without its samples."""
        about = {name: self.result.get(name) for name in ("step", "seed", "data", "commit", "settings")}
        return {
            "file": self.file,
            "date": self.date,
            **about,
            "metrics": {k: asdict(v) for k, v in self.shares().items()},
        }


def _full(name: str) -> str:
    """A headline that stands alone."""
    return name.replace("… ", "drawing, " if "captions" in name else "zero-shot top-1, ")


def of_run(folder: Path, seed: int, step: str) -> tuple[list[Found], list[str]]:
    """The evaluations in a run folder's JSON files of its model at that step, each once; and what was left out, said.

    Those of other seeds, which the results of several runs hold too, are passed over.
    """
    found: list[Found] = []
    stale = []
    there = (path for path in folder.glob("*.json") if path.name not in BESIDE)
    for path in sorted(there, key=lambda path: path.stem):  # a.json before a-more.json
        for one in read(path, strict=False):
            if one.result.get("seed") not in (seed, None) or one.result in [other.result for other in found]:
                continue
            if step and one.result.get("step") is not None and str(one.result["step"]) != step:
                stale.append(f"left out of the card: {path.name} is of step {one.result['step']}, the model of {step}")
            else:
                found.append(one)
    return found, list(dict.fromkeys(stale))


def of_files(files: Sequence[str]) -> list[Found]:
    """The evaluations in these files. Raises ConfigError for one that holds none."""
    return [one for file in files for one in read(Path(file))]


def read(path: Path, strict: bool = True) -> list[Found]:
    """The evaluations in one file; none, or with `strict` a ConfigError, where it holds none."""
    problem = "no results of mm evaluate or mm demo in it"
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"over {LARGEST >> 20} MB")
        data = json.loads(path.read_text(encoding="utf-8"))
        date = time.strftime("%Y-%m-%d", time.gmtime(path.stat().st_mtime))
    except (OSError, ValueError) as error:
        data, date, problem = None, "", f"not a results file ({error})"
    several = data.get("results") if isinstance(data, dict) else None
    found = []
    for result in several if isinstance(several, list) else [data]:
        if isinstance(result, dict) and _whole(one := Found(path.name, date, result)):
            found.append(one)
    if strict and not found:
        raise ConfigError(f"--results {path}: {problem}; give a file that mm evaluate --out wrote")
    return found


def _whole(one: Found) -> bool:
    try:
        return bool(one.shares())
    except (TypeError, KeyError, AttributeError):
        return False
