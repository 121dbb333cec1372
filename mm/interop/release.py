"""`mm release`: a model as a folder that other people, and other libraries, load. Written whole or not at all."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.adaptation.lora import compose
from mm.adapters.hub_tokenizer import HubTokenizer
from mm.config import ConfigError
from mm.fields import suggestion
from mm.interop import card, preprocessing, provenance, results
from mm.interop.origin import OBJECTIVES, Origin, check_tokenizer
from mm.interop.sources import read

FORMATS = ("mm", "open_clip", "diffusers", "transformers")
MARK = "release.json"  # says that a folder is a release, and what it holds
CARD = "README.md"
METRICS = "metrics.json"  # what the card quotes, for programs
LARGEST = 1 << 20  # bytes of --about


def release(
    source: str,
    out: str | os.PathLike[str],
    *,
    format: str = "mm",
    licence: str = "",
    files: Sequence[str] = (),
    name: str = "",
    adapter: str = "",
    about: str = "",
    bf16: bool = False,
    load: Callable[..., Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the model that `source` names to the folder `out` in a `format` of FORMATS; returns the folder.

    `licence` as the hub names it (default: what the training shards ask for); `files` hold results beside those of the
    run folder; `name` heads the card (default: that of `out`); `adapter` is a folder with LoRA matrices, which are
    merged; `about` is a file of Markdown for the card. `load`, `mm.load`, is needed by the format diffusers. What the
    card quotes of results is in `metrics.json`, too. `bf16` (format mm) rounds the model's weights.
    A release that lies in `out` is replaced as a whole. Raises ConfigError for a source that cannot be read, a model
    that the format has no place for, and an `out` that holds anything else.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: not a format{suggestion(format, FORMATS)}; one of {', '.join(FORMATS)}")
    if bf16 and format != "mm":
        raise ConfigError(f"--bf16: --format {format} keeps its own precision; leave it out")
    out = Path(os.path.abspath(out))
    if out == Path(os.path.abspath(source)):
        raise ConfigError(f"{out}: is the source itself; give another folder")
    replaceable(out)
    evaluations, words = results.of_files(files), _read(about) if about else ""
    origin = read(source)
    check_tokenizer(source, origin.model, origin.tokenizer)
    if adapter:
        model = origin.build()
        compose(model, adapter)
        origin.tensors = {**model.state_dict(), **origin.extras()}
    train = origin.train
    if bf16:
        origin.tensors = {name: rounded(name, tensor) for name, tensor in origin.tensors.items()}
    folder = Path(source)
    stale: list[str] = []
    if train is not None and folder.is_dir() and not adapter:  # with one, they are of another model
        found, stale = results.of_run(folder, train.run.seed, str(origin.note.get("step", "")))
        evaluations = [*found, *(one for one in evaluations if one not in found)]
    shards = provenance.manifests(train.data.train, folder) if train is not None else []
    licence = licence or provenance.licence_of(shards)
    provenance.check_licence(licence)
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        fresh = stage / out.name
        fresh.mkdir()
        told = _written(origin, format, fresh, out, functools.partial(load, adapter=adapter or None) if load else None)
        text = card.card(origin, format, name or out.name, licence, evaluations, shards, words)
        if not (fresh / CARD).exists():
            (fresh / CARD).write_text(text, encoding="utf-8")
        if evaluations:
            told_of = [one.told() for one in evaluations]
            (fresh / METRICS).write_text(json.dumps(told_of, indent=2) + "\n", encoding="utf-8")
        _mark(fresh, format)
        _swap(stage, fresh, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        say(f"{out.name}/{path.relative_to(out)}  {size(path.stat().st_size)}")
    for line in [*stale, *told]:
        say(line)
    return out


def _written(origin: Origin, format: str, fresh: Path, out: Path, load: Callable[[str], Any] | None) -> list[str]:
    """Write the model's files to `fresh`; what to tell the user."""
    if format == "open_clip":
        from mm.interop import open_clip_out

        return open_clip_out.write(origin, fresh, out)
    if format == "transformers":
        from mm.interop import transformers_out

        return transformers_out.write(origin, fresh, out)
    if format == "diffusers":
        import importlib

        assert load is not None
        if origin.model.denoiser is None:
            raise ConfigError(f"{origin.source}: model.denoiser = None: it cannot draw; --format mm, open_clip do")
        importlib.import_module("mm.interop.diffusers").export(load(origin.source), fresh)
        return [f'load it: diffusers.DiffusionPipeline.from_pretrained("{out}", trust_remote_code=True)']
    from mm.models.export import save_export

    config = provenance.shareable(origin.config())
    whole = (name if name.startswith(OBJECTIVES) else f"model.{name}" for name in origin.tensors)
    state = dict(zip(whole, origin.tensors.values(), strict=True))
    save_export(fresh, state, config, origin.tokenizer.to_json(), origin.note)
    seen = json.dumps(preprocessing.hugging_face(origin.model.image), indent=2) + "\n"
    (fresh / "preprocessor_config.json").write_text(seen, encoding="utf-8")
    told = []
    if isinstance(origin.tokenizer, HubTokenizer) and not origin.tokenizer.serialized:
        told.append(f"the tokenizer {origin.tokenizer.name} is not in this model: it takes token ids, no text")
    return [*told, f'load it: mm.load("{out}")']


def rounded(name: str, tensor: Tensor) -> Tensor:
    """In bfloat16, where it is a weight of the model in float32."""
    return tensor.bfloat16() if tensor.dtype == torch.float32 and not name.startswith(OBJECTIVES) else tensor


def _read(about: str) -> str:
    """Markdown of the user's. Raises ConfigError where it cannot be read."""
    try:
        if Path(about).stat().st_size > LARGEST:
            raise ValueError(f"over {LARGEST >> 20} MB")
        return Path(about).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"--about {about}: not a file of text ({reason})") from error


def replaceable(out: Path) -> None:
    """Raises ConfigError unless `out` can be written without losing anything but an earlier release."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out}: is a file; give a folder that is not there yet")
    inside = {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()}
    if not inside:
        return
    fix = "give another folder"
    try:
        known = set(json.loads((out / MARK).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{out}: is not empty, and no folder that mm release wrote; {fix}") from error
    if others := sorted(inside - known - {MARK}):
        raise ConfigError(f"{out}: holds {others[0]} beside an earlier release; move it away, or {fix}")


def _mark(fresh: Path, format: str) -> None:
    from mm.evaluation.run import commit, versions

    files = sorted(str(path.relative_to(fresh)) for path in fresh.rglob("*") if path.is_file())
    content = {"format": format, "versions": versions(), "commit": commit(), "files": files}
    (fresh / MARK).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in [*files, MARK]:  # whole on the disk before it counts
        os.chmod(fresh / name, (fresh / MARK).stat().st_mode)  # safetensors writes for its owner only
        with open(fresh / name, "rb") as file:
            os.fsync(file.fileno())


def _swap(stage: Path, fresh: Path, out: Path) -> None:
    """Put `fresh` in the place of `out`; where that fails, what was there is put back."""
    old = stage / "before"
    try:
        if out.exists():
            os.rename(out, old)
        os.rename(fresh, out)
    except BaseException:
        if old.exists() and not out.exists():
            os.rename(old, out)
        raise


def size(count: int) -> str:
    """Bytes in words."""
    for unit, each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= each:
            return f"{count / each:.1f} {unit}"
    return f"{count} bytes"
