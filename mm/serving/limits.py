"""What one request, and all of them together, may cost. Each is a flag of `mm serve`; imports nothing slow."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple


def limit(default: float, words: str, low: float = 1) -> Any:
    return field(default=default, metadata={"help": words, "low": low})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_body_mb: float = limit(16.0, "megabytes (10^6 bytes) of a request's body", 0.001)
    max_pixels: int = limit(16_000_000, "pixels of a picture that is sent")
    max_images: int = limit(64, "pictures in a request")
    max_texts: int = limit(2048, "texts in an embeddings request")
    max_chars: int = limit(8000, "characters of a text, label or template")
    max_labels: int = limit(1000, "labels times templates in a classify request")
    max_n: int = limit(10, "pictures drawn for a request")
    max_steps: int = limit(250, "steps of the sampler")
    max_work: float = limit(50e6, "n x width x height x steps of a drawing")
    max_queue: int = limit(64, "requests taken and not answered yet; more get 429")
    max_batch: int = limit(64, "items that run together (pictures: 32, drawings: 8 at most)")
    max_wait_ms: float = limit(5.0, "milliseconds a request waits for others to run with", 0)
    timeout: float = limit(120.0, "seconds a request may take in all; then it gets 408 or 503", 0.001)
    grace: float = limit(30.0, "seconds that requests have to finish once it is stopped; then they get 503", 0)
    label_cache: int = limit(64, "label sets whose encoded labels are kept")

    @property
    def max_body(self) -> int:
        """Bytes."""
        return round(self.max_body_mb * 1e6)


class Flag(NamedTuple):
    """How a limit is spelled on the command line."""

    name: str  # max_pixels
    kind: type[int] | type[float]
    default: float
    low: float
    words: str

    @property
    def spelled(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def shown(self) -> str:
        return f"{self.default:g}" if self.kind is float else str(self.default)


def flags() -> list[Flag]:
    """One for each limit, in the order above."""
    kinds: dict[str, Any] = {"int": int, "float": float}
    plain = Limits()
    return [
        Flag(item.name, kinds[str(item.type)], getattr(plain, item.name), item.metadata["low"], item.metadata["help"])
        for item in fields(plain)
    ]
