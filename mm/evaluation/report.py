"""One self-contained HTML page about a run: numbers with their spread, pictures, curves, times, settings."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mm.evaluation.charts import line_chart
from mm.evaluation.gallery import Drawing, Gallery, Guess
from mm.evaluation.images import write_whole
from mm.evaluation.report_page import Section, card, card_grid, image, page
from mm.evaluation.run import Share, headlines

ATTRIBUTION = (
    "Pictures: all emojis designed by OpenMoji, the open-source emoji and icon project. "
    "Licence: CC BY-SA 4.0. Names: the emoji package, after Unicode CLDR."
)
CURVES = {
    "loss/contrastive": "Contrastive loss",
    "loss/diffusion": "Diffusion loss",
    "loss/align": "Alignment loss",
    "samples_per_second": "Images a second",
    "mfu": "Share of the machine's matrix rate (MFU)",
}
CARDS = {  # headline of `run.headlines` -> what the card says
    "zero-shot top-1, held-out names": ("Named right", "pictures it never saw, among the held-out names"),
    "zero-shot top-1, all names": ("Named right, of all names", "the same pictures, among every name there is"),
    "drawing, training captions": ("Drawn from training captions", "right picture among the 10 nearest references"),
    "drawing, held-out captions": ("Drawn from unseen captions", "right picture among the 10 nearest references"),
}


def write_report(
    run_dir: str | os.PathLike[str],
    results: Sequence[dict[str, Any]],
    timings: dict[str, float],
    path: str | os.PathLike[str],
    *,
    gallery: Gallery | None = None,
    machine: dict[str, str] | None = None,
    title: str = "Two encoders, two objectives, one small run",
) -> None:
    """Writes `path`, an HTML file that needs no other.

    `results`: of `evaluate`, one a seed. `timings`: seconds by what took them. `machine`: what is known of it, by name.
    Curves come from `metrics.jsonl` in `run_dir` or in its `seed-*` folders. Raises ValueError without a result.
    """
    if not results:
        raise ValueError("results = []: nothing to report; give what evaluate returned")
    folder = Path(run_dir)
    runs = [folder] if (folder / "metrics.jsonl").is_file() else sorted(folder.glob("seed-*"))
    gallery = gallery or Gallery()
    times = _table("How long it took", [(name, duration(seconds)) for name, seconds in timings.items()])
    beside = _table("The machine", list((machine or {}).items()))
    text = page(
        title,
        lead=_lead(results[0]),
        meta=meta(results),
        cards=card_grid(cards(results)),
        sections=[
            *drawn(gallery.drawings),
            named(gallery.guesses),
            curves([read_metrics(run / "metrics.jsonl") for run in runs]),
            Section("All numbers", headline_table(results)),
        ],
        more=f'<div class="two">{times}{beside}</div>{config_of(runs)}',
        foot=ATTRIBUTION,
    )
    write_whole(path, text.encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; [] where there is none."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path}: damaged: a line is not JSON ({error}); restore it, or move it away") from error


def duration(seconds: float) -> str:
    """75.2 as "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _lead(result: dict[str, Any]) -> str:
    return (
        "A vision encoder and a text encoder, trained together by two objectives at once: contrastive, which brings "
        "a picture and its name to the same place, and diffusion, which learns to draw the picture from the name. "
        f"The data are {result['candidates']:,} emoji with their English names; "
        f"<strong>{result['held_out']} of them were held out</strong> and are what the model is asked about here."
    )


def meta(results: Sequence[dict[str, Any]]) -> list[str]:
    """Date, seeds, steps, version and commit of some results."""
    first = results[0]
    seeds = ", ".join(str(result["seed"]) for result in results)
    return [
        f"{datetime.date.today():%d %B %Y}".lstrip("0"),
        f"{'seeds' if len(results) > 1 else 'seed'} {seeds}",
        f"steps {', '.join(str(result['step']) for result in results)}",
        f"torch {first['versions']['torch']}",
        f"commit {first['commit']}" if first.get("commit") else "",
    ]


def spread(shares: Sequence[Share]) -> tuple[float, str]:
    """Mean in per cent, and the spread in words: over seeds where there are several, else the standard error."""
    values = [100 * share.value for share in shares]
    if len(values) == 1:
        return values[0], f"± {100 * shares[0].error:.1f} standard error, n = {shares[0].n}"
    around = f"± {stdev(values):.1f} over {len(values)} seeds"
    return mean(values), f"{around} ({min(values):.1f} to {max(values):.1f}), n = {shares[0].n}"


def cards(results: Sequence[dict[str, Any]]) -> list[str]:
    """The headlines of results of one kind, one a seed."""
    if not results:
        return []
    heads, found = [headlines(result) for result in results], []
    for title, (what, how) in CARDS.items():
        shares = [head[title] for head in heads if title in head]
        if shares:
            value, around = spread(shares)
            found.append(card(f"{value:.1f}", "%", what, how, around))
    return found


def drawn(drawings: Sequence[Drawing]) -> list[Section]:
    """What was drawn from captions, those that were held out first."""
    return [
        Section(heading, drawing_cells([drawing for drawing in drawings if drawing.held_out is held_out]), note)
        for held_out, heading, note in (
            (True, "Drawn from captions it never saw", "Large: drawn by the model. Small: the emoji of that name."),
            (False, "Drawn from captions of the training set", "The same, for names that were trained on."),
        )
    ]


def drawing_cells(drawings: Sequence[Drawing]) -> str:
    """Each drawing with what it should be beside it."""
    body = "".join(
        f'<figure class="drawing"><div class="pair">{image(cell.picture, "drawn: " + cell.prompt, "drawn")}'
        + (image(cell.reference, "reference: " + cell.prompt, "reference") if cell.reference else "")
        + f"</div><figcaption>{escape(cell.prompt)}</figcaption></figure>"
        for cell in drawings
    )
    return f'<div class="drawings">{body}</div>' if body else ""


def named(guesses: Sequence[Guess]) -> Section:
    """Held-out pictures with the names they were given."""
    found = []
    for guess in guesses:
        right = guess.truth in guess.names
        names = "".join(
            f'<li class="right">✓ {escape(name)}</li>' if name == guess.truth else f"<li>· {escape(name)}</li>"
            for name in guess.names
        )
        miss = "" if right else ' <span class="miss" title="not among the five">✗</span>'
        found.append(
            f'<div class="example">{image(guess.picture, guess.truth)}'
            f'<div><div class="truth">{escape(guess.truth)}{miss}</div><ol>{names}</ol></div></div>'
        )
    note = "Each with its true name, and the five likeliest of all names. Evenly chosen, not picked."
    body = f'<div class="examples">{"".join(found)}</div>' if found else ""
    return Section("Naming held-out pictures", body, note)


def curves(runs: Sequence[list[dict[str, Any]]]) -> Section:
    """What `metrics.jsonl` of some runs logged, over their steps."""
    found = []
    for name, title in CURVES.items():
        series = [[(line["step"], line[name]) for line in lines if name in line] for lines in runs]
        chart = line_chart(series, title=title)
        if chart:
            found.append(f'<figure class="card" style="margin:0"><h3>{escape(title)}</h3>{chart}</figure>')
    note = "Over the steps; one line a seed." if len(runs) > 1 else "Over the steps; faint: each logged step."
    return Section("Training", f'<div class="charts">{"".join(found)}</div>' if found else "", note)


def headline_table(results: Sequence[dict[str, Any]]) -> str:
    """The headlines of each seed, their mean and spread, and recalls."""
    heads = [headlines(result) for result in results]
    names = list(dict.fromkeys(name for head in heads for name in head))
    top = "".join(f"<th>seed {result['seed']}</th>" for result in results) if len(results) > 1 else ""
    rows = []
    for name in names:
        shares = [head[name] for head in heads if name in head]
        value, around = spread(shares)
        ours = [f"{100 * head[name].value:.1f}" if name in head else "" for head in heads]
        each = "".join(f"<td>{text}</td>" for text in ours) if len(results) > 1 else ""
        rows.append(f"<tr><td>{escape(name)}</td><td>{value:.1f} %</td>{each}<td>{escape(around)}</td></tr>")
    recalls = results[0].get("retrieval", {})
    blank = "<td></td>" * (len(results) if len(results) > 1 else 0)
    for name in (name for name in recalls if "@" in name):
        value = mean(100 * result["retrieval"][name] for result in results)
        words = f"recall {name.replace('_', ' ')}, held-out pairs"
        rows.append(f"<tr><td>{words}</td><td>{value:.1f} %</td>{blank}<td>n = {recalls['pairs']}</td></tr>")
    head = f"<tr><th></th><th>mean</th>{top}<th>spread</th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>' if rows else ""


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<div><h2>{title}</h2><table>{body}</table></div>"


def config_of(runs: Sequence[Path]) -> str:
    path = runs[0] / "config.json" if runs else None
    if path is None or not path.is_file():
        return ""
    text = escape(path.read_text(encoding="utf-8"))
    return f"<details><summary>Config of the run</summary><pre>{text}</pre></details>"
