"""A trained model as three plain files: weights as safetensors, the config, the tokenizer. Loading runs no code."""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.adapters.text import tokenizer_from_json
from mm.config import ConfigError, TrainConfig
from mm.models.bounded import build
from mm.models.model import Model

if TYPE_CHECKING:
    from torch import Tensor

    from mm.adapters.text import Tokenizer

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
EXPORT = "export"  # inside a run folder
SHIPPED = {"openmoji": Path(__file__).resolve().parents[1] / "shipped" / "openmoji"}  # models that come with mm


def save_export(
    folder: str | os.PathLike[str], state: dict[str, Tensor], config: TrainConfig, tokenizer: str, note: dict[str, Any]
) -> None:
    """Write `state` (of a `TrainStep`), the config and the serialised tokenizer to `folder`, over what was there.

    `note` goes into the safetensors metadata: the step, the commit, whatever a reader should know.
    """
    from safetensors.torch import save_file

    from mm.settings import save

    folder = Path(folder)
    fresh = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    metadata = {"mm": json.dumps(note, sort_keys=True)}  # one entry: several are written in no fixed order
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, fresh / WEIGHTS, metadata=metadata)
    save(config, fresh / CONFIG)
    (fresh / TOKENIZER).write_text(tokenizer, encoding="utf-8")
    os.chmod(fresh / WEIGHTS, (fresh / TOKENIZER).stat().st_mode)  # safetensors writes for its owner only
    folder.mkdir(exist_ok=True)
    for name in (TOKENIZER, CONFIG, WEIGHTS):  # file by file: at any moment each is there whole, old or new
        with open(fresh / name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(fresh / name, folder / name)
    fresh.rmdir()


def read_export(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Tokenizer, TrainConfig, dict[str, Any]]:
    """The tensors by name, the tokenizer, the config and the note, from `save_export`'s files.

    Raises ConfigError where a file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    from mm.settings import read

    folder = Path(folder)
    missing = [name for name in (WEIGHTS, CONFIG, TOKENIZER) if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder}: not a released model: no {', '.join(missing)}")
    config = read(folder / CONFIG)
    try:
        tokenizer = tokenizer_from_json((folder / TOKENIZER).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            note = json.loads((file.metadata() or {}).get("mm", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder}: damaged: {error}") from error
    return state, tokenizer, config, note


def load_export(folder: str | os.PathLike[str]) -> tuple[Model, dict[str, Tensor], TrainConfig, dict[str, Any]]:
    """The model in evaluation mode, the objectives' own tensors, the config and the note, from `save_export`'s files.

    Raises ConfigError as `read_export`, and where the weights are not those of the config.
    """
    state, tokenizer, config, note = read_export(folder)
    model = build(lambda: Model(config.model, tokenizer, init=False), state.values(), str(folder))
    for name in set(model.adapters) - set(parts_of(state, model.adapters)):
        del model.adapters[name], model.encoders[name]
    ours = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    expected = model.state_dict()
    odd = sorted(set(expected) ^ set(ours)) or [
        name for name, tensor in expected.items() if tensor.shape != ours[name].shape
    ]
    if odd:
        raise ConfigError(f"{folder}: {WEIGHTS} does not fit {CONFIG}: {odd[0]} and {len(odd) - 1} more differ")
    model.load_state_dict(ours)
    extras = {name: tensor for name, tensor in state.items() if not name.startswith("model.")}
    return model.eval().requires_grad_(False), extras, config, note


def parts_of(state: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """Those of the modalities that have a tensor in an export; a backbone of timm's comes without text.

    All of them where none has one: what lacks everything is damaged, and said to be.
    """
    names = tuple(names)
    there = {key.removeprefix("model.encoders.").split(".")[0] for key in state if key.startswith("model.encoders.")}
    return tuple(name for name in names if name in there) or names


def find_export(source: str | os.PathLike[str]) -> Path:
    """The folder with the weights: `source` itself or its `export/`, or that of a model in `SHIPPED`.

    A folder of your own with a shipped model's name is `./openmoji`. Raises ConfigError where there are no weights.
    """
    name = os.fspath(source)
    folder = SHIPPED.get(name) or Path(name)
    if name in SHIPPED and not folder.is_dir():
        raise ConfigError(f"{name}: does not come with this copy of mm; give a run folder or a released folder")
    if (folder / WEIGHTS).is_file():
        return folder
    if (folder / EXPORT).is_dir():
        return folder / EXPORT
    if not folder.is_dir():
        what = "is a file, not a run folder" if folder.exists() else "no such run folder"
        raise ConfigError(f"{source}: {what}{_neighbours(folder)}")
    if (folder / CONFIG).is_file():
        raise ConfigError(
            f"{source}: has no {EXPORT}/ yet; let its training finish (the same mm train command resumes)"
        )
    if (folder / "open_clip_config.json").is_file():
        raise ConfigError(f"{source}: is a folder of open_clip's; write open_clip:local-dir:{source}")
    inside = sorted(path.parent.parent.name for path in folder.glob(f"*/{EXPORT}/{WEIGHTS}"))
    hint = f"; it holds the runs {', '.join(inside)}" if inside else "; a run folder holds config.json and export/"
    raise ConfigError(f"{source}: not a run folder{hint}")


def _neighbours(folder: Path) -> str:
    """The names beside a missing folder that are most like it."""
    parent = folder.parent
    if not parent.is_dir():
        return f"; the folder {parent} does not exist either"
    names = sorted(path.name for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    close = difflib.get_close_matches(folder.name, names, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(str(parent / name) for name in close)}?"
    return "; `mm demo` trains one in runs/demo"
