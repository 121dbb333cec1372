"""The results of evaluations that lie in a run folder, and their numbers as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mm.evaluation.charts import line_chart
from mm.evaluation.confusion import checked, guesses_of, heatmap, names_table, pairs_of, pairs_table
from mm.evaluation.report import headline_table
from mm.evaluation.report_page import Section, card, legend, table
from mm.evaluation.run import headlines

LARGEST = 1 << 30  # bytes of a file with results
FEW = 12  # metrics a table shows without being opened
LED = ("acc1", "acc5", "image_retrieval_recall@5", "text_retrieval_recall@5", "fid", "kid", "clip_score", "loss")
TITLES = {"acc1": "Top-1", "acc5": "Top-5", "fid": "FID", "kid": "KID", "clip_score": "CLIP score", "loss": "Loss"}
TITLES |= {"image_retrieval_recall@5": "Image found, R@5", "text_retrieval_recall@5": "Caption found, R@5"}
Row = dict[str, Any]


@dataclass
class Found:
    """A result and the file it is from."""

    file: str
    result: dict[str, Any]

    def rows(self) -> Iterator[Row]:
        """The tasks that are written as rows, where they are what they should be."""
        rows = self.result.get("tasks")
        for row in rows if isinstance(rows, list) else []:
            if isinstance(row, dict) and isinstance(row.get("metrics"), dict):
                yield row


def read_results(run: Path) -> tuple[list[Found], dict[str, Any], list[str]]:
    """Results in `run`, oldest first and each once; what the demo noted beside its own; files that were not read."""
    found: dict[str, Found] = {}
    demo: dict[str, Any] = {}
    broken = []
    files = [*run.glob("*.json"), *run.glob("*/results.json")]
    for path in sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name)):
        name = path.relative_to(run).as_posix()
        try:
            if path.stat().st_size > LARGEST:
                raise ValueError(f"over {LARGEST >> 30} GB")
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            broken.append(f"{name}: not read ({' '.join(str(error).split())[:80]})")
            continue
        if not isinstance(value, dict):
            continue
        several = value.get("results")
        if isinstance(several, list):
            demo = {key: value[key] for key in ("seconds", "machine") if isinstance(value.get(key), dict)}
        for result in several if isinstance(several, list) else [value]:
            if _is_result(result):
                found.setdefault(json.dumps(result, sort_keys=True), Found(name, result))
    return list(found.values()), demo, broken


def _is_result(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("versions"), dict):
        return False
    parts = ("zero_shot", "retrieval", "generation")
    return any(isinstance(value.get(part), dict) for part in parts) or isinstance(value.get("tasks"), list)


def task_cards(found: Sequence[Found]) -> list[str]:
    """The metrics of tasks that lead a report, the newest of each task, data set and name."""
    chosen: dict[tuple[str, str, str], str] = {}
    for one in found:
        for row in one.rows():
            led = row.get("name", "") in ("zero_shot", "generation") and headlines(one.result)
            for name in LED if not led else ():
                value = _number(row["metrics"].get(name))
                if value is not None:
                    share = name.startswith("acc") or "recall" in name
                    shown = f"{100 * value:.1f}" if share else f"{value:.4g}"
                    where = f"{row.get('name', row.get('task', ''))} on {row.get('dataset', 'its data')}"
                    around = _around(row, name, 100 if share else 1)
                    key = (str(row.get("name")), str(row.get("dataset")), name)
                    chosen[key] = card(shown, "%" if share else "", TITLES[name], where, around)
    return list(chosen.values())


def _around(row: Row, name: str, scale: float = 1) -> str:
    error, n = _number(_of(row, "errors", name)), _of(row, "n", name)
    words = f"± {scale * error:.2g} standard error" if error is not None else "no standard error"
    return f"{words}, n = {n}" if n else words


def number_tables(found: Sequence[Found]) -> Section:
    """Every number of every result with its standard error, newest result first."""
    parts = []
    for one in reversed(found):
        result = one.result
        facts = [f"on {', '.join(map(str, result.get('data') or []))}" if result.get("data") else ""]
        facts += [f"step {result['step']}" if result.get("step") is not None else ""]
        facts += [f"commit {result['commit']}" if result.get("commit") else ""]
        line = escape(", ".join(fact for fact in facts if fact))
        parts.append(f'<h3>{escape(one.file)}</h3><p class="note">{line}</p>{headline_table([result])}')
        for row in one.rows():
            parts.append(_metrics_table(row))
    note = "Each with its standard error and the number of samples it is of."
    return Section("All numbers", "".join(parts), note)


def _metrics_table(row: Row) -> str:
    rows = []
    for name, value in row["metrics"].items():
        error = _number(_of(row, "errors", name))
        shown = "–" if _number(value) is None else f"{value:.4g}"
        rows.append([str(name), shown, "" if error is None else f"± {error:.2g}", str(_of(row, "n", name) or "")])
    body = table([f"{row.get('name', row.get('task'))} on {row.get('dataset')}", "value", "error", "n"], rows)
    if len(rows) <= FEW:
        return body
    words = escape(f"{row.get('name', row.get('task'))} on {row.get('dataset')}: {len(rows)} numbers")
    return f'<details class="many"><summary>{words}</summary>{body}</details>'


def confusions(found: Sequence[Found]) -> Section:
    """A heatmap and pairs of each task that has counts; of captions the names that are given wrongly."""
    parts = []
    for one in reversed(found):
        for row in one.rows():
            matrix = checked(_of(row, "detail", "confusion"))
            if matrix is not None:
                labels, counts = matrix
                title = f"{row.get('name', row.get('task'))} on {row.get('dataset')}"
                pairs = pairs_of(labels, counts)
                totals = {label: sum(line) for label, line in zip(labels, counts, strict=True)}
                drawn = heatmap(labels, counts, title=f"Confusion matrix of {title}: rows are true classes")
                note = '<p class="note">Rows: what it is. Columns: what it was taken for.</p>'
                parts.append(f"<h3>{escape(title)}</h3>{note}{drawn}{pairs_table(pairs, totals)}")
    if not parts:
        for one in reversed(found):
            guesses, names = guesses_of(one.result)
            wrong = sum(true != guess for true, guess in guesses)
            if wrong:
                line = f"{wrong} of {len(guesses)} pictures were given another's name, of {names:,} names."
                parts.append(f"<h3>{escape(one.file)}</h3><p>{line}</p>{names_table(guesses)}")
                break
    return Section("What is taken for what", "".join(parts))


def noise_curves(found: Sequence[Found]) -> Section:
    """The loss of denoising at each noise level, with the caption and without."""
    parts = []
    for row in _with(found, "denoising"):
        detail = row.get("detail") or {}
        series, names = [], []
        for key, name in (("curve", "with the caption"), ("unconditional_curve", "without a caption")):
            points = _points(detail.get("sigma"), detail.get(key))
            if points:
                series.append(points)
                names.append(name)
        chart = line_chart(series, title="Loss of denoising over the noise level, 0 clean to 1 noise", smooth=0.0)
        if chart:
            words = f"<h3>{escape(str(row.get('dataset')))}</h3>{chart}{legend(names)}"
            parts.append(f'<figure class="card" style="margin:0">{words}</figure>')
    body = f'<div class="charts">{"".join(parts)}</div>' if parts else ""
    return Section("Denoising by noise level", body, "Mean squared error; 0 is a clean picture, 1 pure noise.")


def robustness_tables(found: Sequence[Found]) -> Section:
    """Top-1 by corruption and severity, each cell as strong as its share."""
    parts = []
    for row in _with(found, "robustness"):
        detail = row.get("detail") or {}
        severities, shares = detail.get("severities"), detail.get("table")
        if not isinstance(severities, list) or not isinstance(shares, dict):
            continue
        clean = _number(row["metrics"].get("acc1"))
        head = "".join(f'<th scope="col">severity {escape(str(severity))}</th>' for severity in severities)
        body = []
        for name, line in shares.items():
            if isinstance(line, list) and len(line) == len(severities):
                cells = "".join(_shade(_number(share)) for share in line)
                body.append(f'<tr><th scope="row">{escape(str(name)).replace("_", " ")}</th>{cells}</tr>')
        first = "" if clean is None else f"clean {100 * clean:.1f} %"
        top = f'<thead><tr><th scope="col">{first}</th>{head}</tr></thead>'
        heading = f"<h3>{escape(str(row.get('dataset')))}</h3>"
        body_ = "".join(body)
        parts.append(f'{heading}<div class="scroll"><table class="shades">{top}<tbody>{body_}</tbody></table></div>')
    return Section("Robustness", "".join(parts), "Top-1 in per cent of pictures made worse, by how and how much.")


def _shade(share: float | None) -> str:
    if share is None:
        return "<td>–</td>"
    return f'<td style="--share:{min(max(share, 0.0), 1.0):.3f}">{100 * share:.1f}</td>'


def _with(found: Sequence[Found], kind: str) -> Iterator[Row]:
    for one in reversed(found):
        for row in one.rows():
            if kind in (row.get("kind"), row.get("name"), row.get("task")) and isinstance(row.get("detail"), dict):
                yield row


def _points(xs: Any, ys: Any) -> list[tuple[float, float]]:
    if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
        return []
    return [
        (float(x), float(y)) for x, y in zip(xs, ys, strict=True) if _number(x) is not None and _number(y) is not None
    ]


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def _of(row: Row, part: str, name: str) -> Any:
    inner = row.get(part)
    return inner.get(name) if isinstance(inner, dict) else None
