"""A report on any run: what its folder holds, and what its model makes of held-out shards, on one page."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.config import ConfigError
from mm.evaluation.gallery import Drawing
from mm.evaluation.images import write_whole
from mm.evaluation.report import cards, config_of, curves, drawing_cells, duration, read_metrics
from mm.evaluation.report_examples import Pictures, read_pictures, retrieval_sections, retrieved
from mm.evaluation.report_page import Section, card_grid, page, table
from mm.evaluation.report_results import (
    Found,
    confusions,
    noise_curves,
    number_tables,
    read_results,
    robustness_tables,
    task_cards,
)
from mm.evaluation.run import headlines
from mm.evaluation.samples import evenly

if TYPE_CHECKING:
    from mm.config import TrainConfig
    from mm.evaluation.inference import Inference

MOST_CARDS = 8


def run_facts(run: Path) -> tuple[TrainConfig | None, list[list[dict[str, Any]]], list[Found]]:
    """Config, metrics and results of a run folder. Raises ConfigError where it holds nothing that can be reported."""
    if not run.is_dir():
        what = "is a file, not a run folder" if run.exists() else "no such run folder"
        raise ConfigError(f"{run}: {what}; give the folder that mm train or mm demo wrote")
    from mm.settings import read

    config = read(run / "config.json") if (run / "config.json").is_file() else None
    folders = [run] if (run / "metrics.jsonl").is_file() else sorted(run.glob("seed-*"))
    metrics = [lines for folder in folders if (lines := read_metrics(folder / "metrics.jsonl"))]
    results, _, _ = read_results(run)
    if config is None and not metrics and not results:
        raise ConfigError(f"{run}: holds no config.json, metrics.jsonl or results; nothing to report")
    return config, metrics, results


def write_run_report(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    inference: Inference | None = None,
    files: Sequence[str] = (),
    draw: int = 16,
    limit: int = 1000,
    notes: Sequence[str] = (),
    progress: bool = False,
) -> list[str]:
    """Writes the page `out`, an HTML file that needs no other; returns what was left out of it, a line each.

    Curves of `metrics.jsonl` and every result of `mm evaluate` that lies in the run folder as JSON. With the model
    (`inference`) and shards `files` also retrieval among their first `limit` pictures, and `draw` of their captions
    drawn, each with its number as seed. `notes` are further lines of what is left out.
    """
    run = Path(run)
    config, metrics, results = run_facts(run)
    _, demo, broken = read_results(run)
    left_out = [*notes, *broken]
    if inference is not None:
        config = inference.config
    examples: list[Section] = []
    pictures = None
    if inference is not None and files:
        captions = config.data.caption.split("::")[0] if config is not None else "txt"
        pictures = read_pictures(inference, files, captions=captions, limit=limit, progress=progress)
        if inference.config.objectives.contrastive is not None and "text" in inference.model.encoders:
            examples = retrieval_sections(*retrieved(inference, pictures, progress=progress), len(pictures))
        if draw and inference.config.objectives.diffusion is not None:
            cells = drawing_cells(_drawings(inference, pictures, draw, progress))
            note = "Large: drawn by the model, number i with seed i. Small: the picture of that caption. Evenly chosen."
            examples = [Section("Drawn from captions", cells, note), *examples]
    led = [found.result for found in results if headlines(found.result)]
    numbers = [*cards(led[-1:]), *task_cards(results)][:MOST_CARDS]
    if not results:
        left_out.append("numbers: no results; mm evaluate RUN --data SHARDS --out RUN/results.json writes some")
    sections = [
        *examples,
        curves(metrics),
        confusions(results),
        noise_curves(results),
        robustness_tables(results),
        number_tables(results),
        Section("Times and machine", _demo(demo)),
    ]
    text = page(
        f"Report on {run.resolve().name}",
        lead=_lead(config, metrics, inference),
        meta=_meta(config, metrics, results, files),
        cards=card_grid(numbers),
        sections=sections,
        more=_left_out(left_out) + config_of([run]),
        foot=_attribution(files) or "Made by mm report.",
    )
    write_whole(out, text.encode())
    return left_out


def _drawings(inference: Inference, pictures: Pictures, count: int, progress: bool) -> list[Drawing]:
    places = evenly(list(range(len(pictures))), count)
    prompts = [pictures.captions[place][0] for place in places]
    pixels = inference.generate(prompts, progress=progress)
    made = inference.processor("image").render(pixels)
    return [
        Drawing(prompt, picture, pictures.images[place], True)
        for prompt, picture, place in zip(prompts, made, places, strict=True)
    ]


def _lead(config: TrainConfig | None, metrics: Sequence[list[dict[str, Any]]], inference: Inference | None) -> str:
    """In a sentence or two what was trained, on what and for how long."""
    if config is None:
        return ""
    model, names = config.model, []
    for name in ("contrastive", "diffusion", "align"):
        if getattr(config.objectives, name, None) is not None:
            names.append(name)
    words = [f"A vision encoder for pictures of {model.image.size} × {model.image.size} pixels and a text encoder"]
    if inference is not None:
        count = sum(parameter.numel() for parameter in inference.model.parameters())
        words.append(f", {count / 1e6:.1f} million parameters in all")
    if names:
        words.append(f", trained by the {' and the '.join(names)} objective{'s' if len(names) > 1 else ''}")
    last = metrics[-1][-1] if metrics and metrics[-1] else {}
    if last.get("step") and last.get("samples"):
        words.append(f" for {last['step']:,} steps, {last['samples']:,} samples")
    return escape("".join(words) + ".")


def _meta(
    config: TrainConfig | None,
    metrics: Sequence[list[dict[str, Any]]],
    results: Sequence[Found],
    files: Sequence[str],
) -> list[str]:
    newest = results[-1].result if results else {}
    seconds = sum(line.get("seconds", 0.0) for lines in metrics for line in lines)
    return [
        f"{datetime.date.today():%d %B %Y}".lstrip("0"),
        f"seed {config.run.seed}" if config is not None else "",
        f"batch {config.data.batch_size:,}" if config is not None else "",
        f"{duration(seconds)} of steps logged" if seconds else "",
        f"pictures of {Path(files[0]).name}{f' and {len(files) - 1} more' if len(files) > 1 else ''}" if files else "",
        f"torch {newest['versions'].get('torch')}" if newest else "",
        f"commit {newest['commit']}" if newest.get("commit") else "",
    ]


def _demo(demo: dict[str, Any]) -> str:
    """What `mm demo` noted: seconds by what took them, and the machine."""
    seconds, machine = demo.get("seconds", {}), demo.get("machine", {})
    times = [[str(name), duration(took)] for name, took in seconds.items() if isinstance(took, int | float)]
    facts = [[str(name), str(fact)] for name, fact in machine.items()]
    if not times and not facts:
        return ""
    return f'<div class="two"><div>{table([], times)}</div><div>{table([], facts)}</div></div>'


def _left_out(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<h2>Left out</h2><ul class="note">{items}</ul>'


def _attribution(files: Sequence[str]) -> str:
    """What the manifests beside the shards ask to be said of their pictures."""
    found = []
    for folder in dict.fromkeys(Path(file).parent for file in files if "://" not in file):
        manifest = folder / "shards.json"
        if manifest.is_file() and manifest.stat().st_size < 64 << 20:
            value = json.loads(manifest.read_text(encoding="utf-8"))
            words = value.get("attribution") if isinstance(value, dict) else None
            found += [words] if isinstance(words, str) else []
    return " ".join(dict.fromkeys(found))
