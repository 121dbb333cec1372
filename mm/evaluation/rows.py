"""What an evaluation writes: a row a task in CLIP_benchmark's shape and more, and a record a sample.

`outcomes` of a row are what each sample adds to its metrics, in columns beside `keys`, so that `mm compare` needs
nothing but two results: for ImageNet's 50,000 pictures about 2 MB. The records file has all that is known of a sample.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm.config import ConfigError
from mm.evaluation.images import write_whole
from mm.evaluation.outcome import Outcome
from mm.evaluation.task import Task

LANGUAGE = "en"
SHAPE = ("dataset", "model", "pretrained", "task", "metrics", "language")  # CLIP_benchmark's
MOST_OUTCOMES = 250_000  # samples whose outcomes are kept within a row
BESIDE = {"mean_per_class_recall": "truth", "ece": "confidence"}  # what these are of, beside acc1
RECORDS = (".jsonl", ".parquet")


def row(task: Task, outcome: Outcome, about: dict[str, Any], detail: dict[str, Any] | None = None) -> dict[str, Any]:
    """One task's row; `about` is what all rows of an evaluation say, `detail` stands in for the outcome's own.

    A metric that is NaN is null, and so is an error that is not known.
    """
    hashes = {"labels": None, "templates": None, **about["hashes"], "task": task.hash, **outcome.hashes}
    found = {
        "name": task.name,
        "kind": task.kind,
        **about,
        "task": task.called,
        "metrics": {name: metric.value for name, metric in outcome.metrics.items()},
        "language": LANGUAGE,
        "errors": {name: metric.error for name, metric in outcome.metrics.items()},
        "n": {name: metric.n for name, metric in outcome.metrics.items()},
        "task_version": task.version,
        "settings": task.settings,
        "hashes": hashes,
        "seeds": {**about["seeds"], "task": task.settings.get("seed")},
        "detail": outcome.detail if detail is None else detail,
        "outcomes": outcomes(outcome),
    }
    return plain(found)


def outcomes(outcome: Outcome) -> dict[str, list[Any]] | None:
    """Columns over the samples that have a record with every metric's field; None where there are none, or too many."""
    names = list(outcome.metrics)
    names += [BESIDE[name] for name in BESIDE if name in outcome.metrics]
    records = outcome.records
    if not records or len(records) > MOST_OUTCOMES:
        return None
    columns = [name for name in dict.fromkeys(names) if all(name in record for record in records)]
    if not columns:
        return None
    return {"keys": [record["key"] for record in records]} | {
        name: [record[name] for record in records] for name in columns
    }


def plain(value: Any) -> Any:
    """The same as JSON can say it: no NaN, no numbers of numpy's, names as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def text_of(result: dict[str, Any]) -> str:
    """JSON, indented but for the outcomes, whose columns are a line each."""
    lines: list[str] = []
    sign = secrets.token_hex(16)  # no text of a data set holds it

    def mark(columns: Any) -> Any:
        if columns is None:
            return None
        marks = {}
        for name, values in columns.items():
            marks[name] = f"{sign}{len(lines)}"
            lines.append(json.dumps(values, separators=(",", ":")))
        return marks

    shown = {**result, "tasks": [{**row, "outcomes": mark(row["outcomes"])} for row in result["tasks"]]}
    text = json.dumps(shown, indent=1)
    return re.sub(rf'"{sign}(\d+)"', lambda found: lines[int(found[1])], text) + "\n"


def is_folder(out: str | os.PathLike[str]) -> bool:
    """Whether `--out` means a folder: it ends in a slash, or is one."""
    return os.fspath(out).endswith(("/", os.sep)) or Path(out).is_dir()


def write_results(result: dict[str, Any], out: str | os.PathLike[str]) -> list[Path]:
    """Writes a file; or into a folder `results.json` and in `clip_benchmark/` a file a task in that tool's exact shape,
    of which `clip_benchmark build FOLDER/clip_benchmark` makes its table. Returns the files."""
    if not is_folder(out):
        write_whole(out, text_of(result).encode())
        return [Path(out)]
    written = [Path(out) / "results.json"]
    for row in result["tasks"]:
        words = (row["dataset"], row["model"], row["pretrained"], row["language"], row["name"])
        name = re.sub(r"[^\w.-]+", "_", "_".join(word for word in words if word)).strip("_.")
        path = Path(out) / "clip_benchmark" / f"{name[:200]}.json"
        write_whole(path, json.dumps({key: row[key] for key in SHAPE}).encode())
        written.append(path)
    write_whole(written[0], text_of(result).encode())
    return written


def unchanged(
    out: str | os.PathLike[str], tasks: Sequence[Task], hashes: dict[str, Any], told: dict[str, Any]
) -> dict[str, Any] | None:
    """The result at `out`, if it is of the same tasks, data, words, model and precision; None where it is not."""
    file = Path(out) / "results.json" if is_folder(out) else Path(out)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        there = [(row["name"], row["hashes"]) for row in found["tasks"]]
        precision = found["settings"]["precision"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or no result: it is made anew
        return None
    wanted = [(task.name, {**hashes, "task": task.hash}) for task in tasks]
    same = [(name, {key: said.get(key) for key in hashes} | {"task": said.get("task")}) for name, said in there]
    return found if same == wanted and precision == told["precision"] else None


def check_records(path: str | os.PathLike[str]) -> None:
    """Raises ConfigError where records cannot be written as that: before a model is loaded."""
    if Path(path).suffix not in RECORDS:
        raise ConfigError(f"records = {os.fspath(path)!r}: must end in {' or '.join(RECORDS)}")
    if Path(path).suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"records = {os.fspath(path)!r}: needs pyarrow; pip install pyarrow, or write .jsonl")


def write_records(path: str | os.PathLike[str], found: Sequence[tuple[str, Outcome]]) -> None:
    """Every sample of every task, with the task's name: a JSON object a line, or a parquet table with a column a field.

    In a table, a field that holds several kinds of things is written as JSON.
    """
    rows = [{"task": name, **plain(record)} for name, outcome in found for record in outcome.records]
    if Path(path).suffix == ".jsonl":
        write_whole(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows).encode())
        return
    import pyarrow as pa
    import pyarrow.parquet as parquet

    columns = {}
    for name in dict.fromkeys(key for one in rows for key in one):
        values = [one.get(name) for one in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            columns[name] = pa.array([None if value is None else json.dumps(value) for value in values])
    stream = io.BytesIO()
    parquet.write_table(pa.table(columns), stream)
    write_whole(path, stream.getvalue())
