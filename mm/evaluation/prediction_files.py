"""Predictions as files: lines of JSON, CSV or parquet, grown beside their place and put there once they are whole."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mm.evaluation.predictions import Prediction

SUFFIXES = (".jsonl", ".csv", ".parquet")
_ROWS = 1024  # of a parquet row group

Add = Callable[[Prediction], None]


def record(prediction: Prediction, fields: Sequence[str]) -> dict[str, Any]:
    """As JSON: those of "image" (its path), "key", "shard", "captions" that `fields` names, and "top"."""
    known = {"image": prediction.key, "key": prediction.key, "shard": prediction.shard, "captions": prediction.captions}
    top = [{"label": label, "probability": share} for label, share in prediction.top]
    return {name: known[name] for name in fields} | {"top": top}


def check_out(path: str) -> None:
    """Raises ValueError unless `path` ends as a format that `writing` knows, and is no folder."""
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"{path}: predictions are written as {', '.join(SUFFIXES)}; name a file that ends so")
    if os.path.isdir(path):
        raise ValueError(f"{path}: is a folder; name a file in it")


@contextmanager
def writing(path: str | os.PathLike[str], fields: Sequence[str], places: int) -> Iterator[Add]:
    """A function that adds a prediction to `path`, which is there once the block has ended, and only if it ended well.

    Meanwhile a hidden file beside it grows. `fields` as of `record`; `places`: labels of each prediction. Makes the
    folder.
    """
    path = Path(path)
    check_out(str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")  # of this job alone
    os.close(handle)
    part = Path(name)
    kind = {".jsonl": _lines, ".csv": _table, ".parquet": _parquet}[path.suffix]
    try:
        with kind(part, tuple(fields), places) as add:
            yield add
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(part, 0o644)  # mkstemp makes it readable by its owner only
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _lines(part: Path, fields: Sequence[str], places: int) -> Iterator[Add]:
    with part.open("w", encoding="utf-8") as file:

        def add(prediction: Prediction) -> None:
            file.write(json.dumps(record(prediction, fields)) + "\n")

        yield add


@contextmanager
def _table(part: Path, fields: Sequence[str], places: int) -> Iterator[Add]:
    """A row a picture; captions, of which there may be several, as JSON."""
    with part.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = csv.writer(file)
        table.writerow([*fields, *(f"{what}_{n}" for n in range(1, places + 1) for what in ("label", "probability"))])

        def add(prediction: Prediction) -> None:
            known = record(prediction, fields)
            told = [known[name] if isinstance(known[name], str) else json.dumps(known[name]) for name in fields]
            table.writerow([*told, *(value for pair in prediction.top for value in pair)])

        yield add


@contextmanager
def _parquet(part: Path, fields: Sequence[str], places: int) -> Iterator[Add]:
    """Columns `labels` and `probabilities` hold a list each, the likeliest first."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    texts = pa.list_(pa.string())
    columns = [(name, texts if name == "captions" else pa.string()) for name in fields]
    schema = pa.schema([*columns, ("labels", texts), ("probabilities", pa.list_(pa.float32()))])
    rows: list[dict[str, Any]] = []
    with parquet.ParquetWriter(part, schema) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            rows.clear()

        def add(prediction: Prediction) -> None:
            known = record(prediction, fields)
            top = known.pop("top")
            known = {name: _text(value) if isinstance(value, str) else value for name, value in known.items()}
            known["labels"] = [one["label"] for one in top]
            known["probabilities"] = [one["probability"] for one in top]
            rows.append(known)
            if len(rows) == _ROWS:
                flush()

        yield add
        if rows:
            flush()


def _text(name: str) -> str:
    """A path's bytes that are no text, written out."""
    return name.encode("utf-8", "backslashreplace").decode()
