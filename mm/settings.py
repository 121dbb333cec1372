"""How a config is read from a Python file, overridden on the command line, saved with a run, and compared."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import os
import re
import runpy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import mm.config as schema
from mm.config import VERSION, ConfigError, TrainConfig
from mm.fields import describe, element, fits, leaves, section, suggestion, tree

# What may differ between a checkpoint and the run that resumes from it; a section stands for all its fields.
MAY_CHANGE = frozenset(
    {"run.dir", "run.steps", "run.log_every", "run.eval_every", "run.sample_every", "run.diagnose_every"}
    | {"run.tensorboard", "run.tracker", "run.project"}
    | {"data.workers", "data.buffer_mb", "data.cache_mb", "data.fetch_gb", "data.stall_seconds"}
    | {"model.latents.source"}  # it may have moved; the weights are in the checkpoint
    | {"parallel", "checkpoint", "health"}
)


def load(path: str | os.PathLike[str]) -> TrainConfig:
    """The config that a run's Python file describes: what its `config()` returns.

    Raises ConfigError where the file is missing, has no `config`, misnames a field or returns something else.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such config file; give a Python file with `def config() -> TrainConfig`")
    try:
        entry = runpy.run_path(os.fspath(path)).get("config")
        if not callable(entry):
            raise ConfigError(f"{path}: defines no config(); add `def config() -> TrainConfig`")
        config = entry()
    except SyntaxError as error:
        raise ConfigError(f"{path}: line {error.lineno}: not Python: {error.msg}") from error
    except (TypeError, AttributeError) as error:
        raise (_misnamed(path, error) or error) from error
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"{path}: config() returned a {type(config).__name__}; return a mm.config.TrainConfig")
    return config


def _misnamed(path: Any, error: Exception) -> ConfigError | None:
    """The clear form of Python's complaint about a field that a config dataclass does not have."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    found = found or re.search(r"'(\w+)' object has no attribute '(\w+)'", str(error))
    kind = getattr(schema, found[1], None) if found else None
    if found is None or not dataclasses.is_dataclass(kind):
        return None
    return ConfigError(f"{path}: {found[1]} has no field {found[2]}" + suggestion(found[2], get_type_hints(kind)))


def override(config: TrainConfig, argv: Sequence[str]) -> TrainConfig:
    """A new config with the fields that `argv` names replaced; the last of several values for one field wins.

    `--data.batch-size 8`, `--data.batch_size=8`; `--parallel.no-compile` or `--parallel.compile False`; an optional
    section is switched off with `--objectives.diffusion None` and on, at its defaults, with `--objectives.align
    default`. `--help` prints every field and exits. Raises ConfigError for an unknown flag or a value of a wrong type.
    """
    if {"-h", "--help"} & set(argv):
        _parse(config, ["--help"])
    config = copy.deepcopy(config)  # the caller's stays as it is
    known = tree(TrainConfig)
    given: dict[str, list[str]] = {}
    for flag, words in _groups(argv):
        name = flag[2:].replace("-", "_")
        positive = re.sub(r"\.no_(\w+)$", r".\1", name)
        if name not in known and known.get(positive) is bool and not words:
            name, words = positive, ["False"]
        if name not in known:
            spelt = [other.replace("_", "-") if "-" in flag[2:] else other for other in known]
            hint = suggestion(flag[2:], spelt, "--") or "; `mm train CONFIG --help` lists them"
            raise ConfigError(f"{flag}: no such field{hint}")
        if element(known[name]):
            raise ConfigError(f"{flag}: is set in the config file only, as a tuple of {element(known[name]).__name__}")
        if section(known[name]):
            _switch(config, flag, name, known[name], words)
        else:
            given[name] = words
    off = [name for name, value, _ in leaves(config) if value is None]
    for name in given:
        for missing in off:
            if name.startswith(missing + "."):
                raise ConfigError(f"--{name}: {missing} = None, which has no fields; add --{missing} default")
    arguments = {name: _spelling(name, known[name], words) for name, words in given.items()}
    whole = _parse(config, [word for args in arguments.values() for word in args])
    if whole is None:
        name = next((name for name, args in arguments.items() if _parse(config, args) is None), "")
        words = given[name]
        shown = " ".join(words) or "nothing"
        if known[name] is str and len(words) > 1:  # as many as a data set has shards
            shown = f"{len(words)} words ({words[0]} ...); put quotes around it, or the shell expands a pattern"
        raise ConfigError(f"--{name}: must be {describe(known[name])}, not {shown}")
    return whole


def _parse(config: TrainConfig, args: list[str]) -> TrainConfig | None:
    """tyro's reading of `args` over `config`; None where it refuses them. `--help` is printed, and exits."""
    import tyro

    def run() -> TrainConfig:
        markers = (tyro.conf.AvoidSubcommands,)  # an optional section is a group of flags, not a subcommand
        return tyro.cli(TrainConfig, default=config, args=args, config=markers, prog="mm train CONFIG")

    if args == ["--help"]:
        return run()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return run()  # its own message is a box of many lines
    except SystemExit:
        return None


def _groups(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each `--flag` with the words that belong to it."""
    groups: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            groups.append((flag, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise ConfigError(f"{word}: not a flag; overrides are written --section.field value")
    return groups


def _switch(config: TrainConfig, flag: str, name: str, hint: Any, values: list[str]) -> None:
    """`--objectives.align default` and `--objectives.align None`: tyro has no flag for a whole section."""
    if type(None) not in get_args(hint):
        example = next(iter(tree(section(hint))))
        raise ConfigError(f"{flag}: a section, not a field; set its fields, as in {flag}.{example}")
    if values not in (["None"], ["default"]):
        raise ConfigError(f"{flag}: must be None (off) or default (on), not {' '.join(values) or 'nothing'}")
    parent, _, last = name.rpartition(".")
    owner: Any = config
    for part in parent.split("."):
        owner = getattr(owner, part)
    setattr(owner, last, None if values == ["None"] else section(hint)())


def _spelling(name: str, hint: Any, values: list[str]) -> list[str]:
    """One field's words as tyro reads them: it has pairs of flags for booleans, `--x.compile` and `--x.no-compile`."""
    if hint is bool and values in (["True"], ["true"], ["False"], ["false"]):
        parent, _, last = name.rpartition(".")
        return [f"--{parent}.{'' if values[0].lower() == 'true' else 'no_'}{last}"]
    return [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as nested dicts of JSON's types; a section that is switched off is None."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(data: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_dict`. A field that `data` lacks keeps its default.

    Raises ConfigError for a field that does not exist or a value of a wrong type.
    """
    return _build(TrainConfig, data, "")


def _build(kind: Any, data: Any, prefix: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{prefix[:-1] or 'config'} = {data!r}: must be an object with the fields of {kind.__name__}")
    hints, values = get_type_hints(kind), {}
    for name, value in data.items():
        if name not in hints:
            raise ConfigError(f"{prefix}{name}: no such field{suggestion(name, hints)}")
        hint = hints[name]
        if section(hint) and not (value is None and fits(None, hint)):
            value = _build(section(hint), value, f"{prefix}{name}.")
        elif element(hint) and isinstance(value, list):
            value = tuple(_build(element(hint), item, f"{prefix}{name}[{i}].") for i, item in enumerate(value))
        elif isinstance(value, list):
            value = tuple(value)
        if not fits(value, hint):
            raise ConfigError(f"{prefix}{name} = {value!r}: must be {describe(hint)}")
        values[name] = value
    lacking = [item.name for item in dataclasses.fields(kind) if item.name not in values and _required(item)]
    if lacking:
        raise ConfigError(f"{prefix}{lacking[0]}: is missing, and has no default; add it")
    return kind(**values)


def _required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def save(config: TrainConfig, path: str | os.PathLike[str]) -> None:
    """Writes the config as JSON with its version; a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"version": VERSION, **to_dict(config)}, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it readable by its owner only
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> TrainConfig:
    """The config that `save` wrote. Raises ConfigError for a file that is missing, damaged or of another version."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; a run folder holds config.json") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error}); restore it from a copy of the run folder") from error
    version = data.pop("version", None) if isinstance(data, dict) else None
    if version != VERSION:
        fix = "update mm" if isinstance(version, int) and version > VERSION else "was it written by mm?"
        raise ConfigError(f"{path}: version = {version}: this mm reads version {VERSION}; {fix}")
    try:
        return from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def difference(saved: TrainConfig, new: TrainConfig) -> list[str]:
    """`field: saved -> new` for every field that must not change when a run is resumed, and did."""
    old, now = ({name: value for name, value, _ in leaves(config)} for config in (saved, new))
    changed = []
    for name in old | now:
        if name in MAY_CHANGE or name.split(".")[0] in MAY_CHANGE:
            continue
        if name in old and name in now:
            before, after = old[name], now[name]
        elif old.get(name, now.get(name)) is None:  # a section, off on one side only
            before, after = (side.get(name, "set") for side in (old, now))
        else:
            continue  # a field of such a section
        if before != after:
            changed.append(f"{name}: {before} -> {after}")
    return changed
