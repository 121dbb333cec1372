"""A run folder: who may write to it, which config it belongs to, and the tokenizer that its model was built with."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

from mm import settings
from mm.adapters.text import ClipTokenizer, Tokenizer, tokenizer_from_json, train_tokenizer
from mm.config import ConfigError, TrainConfig
from mm.distributed.world import World


@contextlib.contextmanager
def locked(run: Path, world: World) -> Iterator[None]:
    """Hold a run folder for these processes alone. Raises ConfigError where others train in it."""
    with contextlib.ExitStack() as held:

        def hold() -> None:
            run.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(open(run / ".lock", "w", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem = f"run.dir = {run}: another process is training there; choose another folder"
                raise ConfigError(problem) from None
            except OSError as error:
                problem = f"run.dir = {run}: its file system keeps no locks ({error.strerror}); mount it with flock"
                raise ConfigError(problem) from None

        world.lead(hold)
        yield


def saved_config(run: Path) -> TrainConfig | None:
    """The config of the run that the folder holds, or None for a new folder."""
    path = run / "config.json"
    return settings.read(path) if path.exists() else None


def claim(run: Path, config: TrainConfig) -> None:
    """Write the config into a new folder. Raises ConfigError where the folder holds a run of another config."""
    saved = saved_config(run)
    if saved is not None and (changes := settings.difference(saved, config)):
        raise ConfigError(f"run.dir = {run} holds another run ({'; '.join(changes)}); choose another folder")
    settings.save(config, run / "config.json")


def tokenizer_of(
    run: Path, config: TrainConfig, captions: Callable[[], list[str]], given: Tokenizer | None = None
) -> Tokenizer:
    """The run's own tokenizer; for a new run the `given` one, or CLIP's, or one made from the training captions."""
    path = run / "tokenizer.json"
    if path.exists() and (run / "config.json").exists():  # else it was left by a run that never began
        return tokenizer_from_json(path.read_text(encoding="utf-8"))
    text = config.model.text
    if given is not None:
        tokenizer = given
    else:
        tokenizer = ClipTokenizer() if text.tokenizer == "clip" else train_tokenizer(captions(), text.vocab_size)
    fresh = run / ".tokenizer.tmp"
    fresh.write_text(tokenizer.to_json(), encoding="utf-8")
    fresh.replace(path)
    return tokenizer
