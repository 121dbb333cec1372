"""Tasks of an evaluation: a small TOML file each, of one of a few kinds; a kind is a function in a file of its own.

    name = "emoji"            # what results call it
    kind = "classification"   # one of KINDS
    version = 1               # goes into results: raise it when numbers can no longer be compared
    needs = ["contrastive"]   # objectives without which a model cannot do it
    templates = ["an emoji of {}"]  # and the settings of the kind, beside these

A kind is `(job: Job, settings: dict) -> Outcome`. Its module names its settings with their defaults in `DEFAULTS`, and
may have `checked(settings) -> settings`, which raises ValueError for a value that cannot be meant: both are looked at
before a model is loaded.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mm.config import ConfigError
from mm.fields import suggestion

if TYPE_CHECKING:
    from mm.evaluation.job import Job
    from mm.evaluation.outcome import Outcome

LARGEST = 16 << 20  # bytes of a task's file
FOLDER = Path(__file__).with_name("tasks")
OBJECTIVES = ("contrastive", "diffusion")
_ABOUT = {"name": str, "kind": str, "version": int, "needs": list}


class Kind(NamedTuple):
    """Where the function of a kind is, imported when it is used, and what CLIP_benchmark calls such a task."""

    module: str
    function: str
    called: str


KINDS = {
    "zero_shot": Kind("mm.evaluation.task_zero_shot", "zero_shot", "zeroshot_classification"),
    "classification": Kind("mm.evaluation.task_classification", "classification", "zeroshot_classification"),
    "retrieval": Kind("mm.evaluation.task_retrieval", "retrieval", "zeroshot_retrieval"),
    "generation": Kind("mm.evaluation.task_generation", "generation", "generation"),
    "probe": Kind("mm.evaluation.probe", "probe", "linear_probe"),
    "robustness": Kind("mm.evaluation.robustness", "robustness", "robustness"),
    "fidelity": Kind("mm.evaluation.drawings", "fidelity", "fidelity"),
    "denoising": Kind("mm.evaluation.denoising", "denoising", "denoising"),
}


@dataclass
class Task:
    """One task with all its settings."""

    name: str
    kind: str
    version: int = 1
    needs: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def called(self) -> str:
        """The task's name in CLIP_benchmark's results."""
        return KINDS[self.kind].called

    @property
    def hash(self) -> str:
        """Of the kind, the version and every setting."""
        said = json.dumps([self.kind, self.version, self.settings], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def run(self, job: Job) -> Outcome:
        kind = KINDS[self.kind]
        function: Callable[[Job, dict[str, Any]], Outcome] = getattr(import_module(kind.module), kind.function)
        return function(job, dict(self.settings))


def shipped() -> list[str]:
    """Names of the tasks that come with mm."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_tasks(names: Sequence[str], changes: Mapping[str, Any] | None = None) -> list[Task]:
    """The tasks of some names or paths of TOML files, each once; `changes` go to those that have such a setting.

    Raises ConfigError for a name, a key or a value that cannot be meant, and two tasks of one name.
    """
    found: dict[str, Task] = {}
    for name in dict.fromkeys(names):
        task = read_task(name, changes)
        if task.name in found:
            raise ConfigError(f"tasks: {name} is called {task.name!r}, as another is; give it a name of its own")
        found[task.name] = task
    return list(found.values())


def read_task(name: str, changes: Mapping[str, Any] | None = None) -> Task:
    """One task; see `read_tasks`."""
    path = FOLDER / f"{name}.toml"
    if name.endswith(".toml") or "/" in name:
        path = Path(name).expanduser()
    elif not path.is_file():
        raise ConfigError(f"tasks: no task {name!r}{suggestion(name, shipped())}; there are {', '.join(shipped())}")
    about, settings = _read(path, name)
    kind = about["kind"]
    module = import_module(KINDS[kind].module)
    defaults: dict[str, Any] = getattr(module, "DEFAULTS", settings)
    for key, value in settings.items():
        if key not in defaults:
            known = [*_ABOUT, *defaults]
            raise ConfigError(f"{name}: {key}: {kind} has no such setting{suggestion(key, known)}")
        _check_type(name, key, value, defaults[key])
    whole = {**defaults, **settings}
    for key, value in (changes or {}).items():
        if key in defaults:
            _check_type(name, key, value, defaults[key])
            whole[key] = value
    try:
        getattr(module, "checked", dict)(dict(whole))
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    return Task(about["name"], kind, about.get("version", 1), tuple(about.get("needs", ())), whole)


def _read(path: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the file says of the task, and the settings of its kind."""
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"{name}: over {LARGEST >> 20} MB; give the TOML file of a task")
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror}); give a task's TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: not TOML ({' '.join(str(error).split())})") from error
    about = {"name": path.stem, **{key: data.pop(key) for key in list(data) if key in _ABOUT}}
    for key, value in about.items():
        if not isinstance(value, _ABOUT[key]) or isinstance(value, bool) or not value:
            raise ConfigError(f"{name}: {key} = {value!r}: must be a {_ABOUT[key].__name__} that says something")
    kind = about.get("kind", "")
    if kind not in KINDS:
        said = f"kind = {kind!r}: no such kind{suggestion(kind, KINDS)}" if kind else "names no kind"
        raise ConfigError(f"{name}: {said}; there are {', '.join(KINDS)}")
    for need in about.get("needs", ()):
        if need not in OBJECTIVES:
            raise ConfigError(f"{name}: needs: {need!r}: no such objective; there are {', '.join(OBJECTIVES)}")
    return about, data


def _check_type(name: str, key: str, value: Any, default: Any) -> None:
    """A number stays a number, and true or false too; what texts and lists may say, the kind knows."""
    if isinstance(default, bool) or isinstance(value, bool):
        fits, what = isinstance(default, bool) and isinstance(value, bool), "true or false"
    elif isinstance(default, (int, float)):
        fits = isinstance(value, (int, float) if isinstance(default, float) else int)
        what = "a number" if isinstance(default, float) else "a whole number"
    else:
        fits, what = not isinstance(value, (int, float)), "a text or a list"
    if not fits and default is not None:
        raise ConfigError(f"{name}: {key} = {value!r}: must be {what}, such as {default!r}")
