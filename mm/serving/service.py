"""What all requests share: the model's thread, the threads that prepare, the limits, and who is let in."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from mm.models.fingerprint import model_hash
from mm.serving.batching import Batcher, Closing, Kind
from mm.serving.engine import Engine
from mm.serving.errors import ApiError, bad

if TYPE_CHECKING:
    from mm.api import LoadedModel
    from mm.serving.limits import Limits

T = TypeVar("T")
PREPARING = 4  # threads; each may hold one large decoded picture
# with a full queue of Q requests that take d seconds each, a place is free after about d / Q: soon
RETRY = {"Retry-After": "1"}


class Service:
    """`name` is what clients call the model; `hash` says which one it is. `api_key`: what a client must show."""

    def __init__(self, model: LoadedModel, limits: Limits, *, name: str, api_key: str | None = None) -> None:
        self.limits, self.name, self.api_key = limits, name, api_key
        self.hash, self.started = model_hash(model), int(time.time())
        self.engine = Engine(model, max_batch=limits.max_batch, label_cache=limits.label_cache)
        self.batcher = Batcher(self.engine.run, size=self.engine.size, wait=limits.max_wait_ms / 1000)
        self.threads = ThreadPoolExecutor(PREPARING, "prepare")
        self.taken = 0  # requests let in and not answered
        self.closing = False

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Counts a request. Raises ApiError 429 where there are too many, 503 where the server is being stopped."""
        if self.closing:
            raise closing()
        if self.taken >= self.limits.max_queue:
            raise ApiError(
                429,
                f"{self.taken} requests are waiting, which is this server's limit (mm serve --max-queue); try again",
                code="queue_full",
                headers=RETRY,
            )
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    async def run(self, kind: Kind, items: Sequence[Any]) -> list[Any]:
        """The model's results. Raises ApiError 400 for what the model refuses, 503 where it is being stopped."""
        try:
            return await self.batcher.submit(kind, items)
        except Closing as error:
            raise closing() from error
        except ValueError as error:
            raise bad(str(error)) from error

    async def apart(self, function: Callable[..., T], *args: Any) -> T:
        """`function` in a thread that prepares. A ValueError is what a user got wrong: raises ApiError 400."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, function, *args)
        except ValueError as error:
            raise bad(str(error)) from error

    def check_model(self, asked: str | None) -> None:
        """Raises ApiError 404 unless `asked` is None or the model served."""
        if asked is not None and asked != self.name:
            message = f"model = {asked[:80]!r}: this server has {self.name!r} only"
            raise ApiError(404, message, param="model", code="model_not_found")

    def warm_up(self) -> None:
        for kind, item in self.engine.warm_up():
            self.batcher.put(kind, [item]).result()

    def give_up(self) -> None:
        """Whoever still waits for the model gets 503."""
        self.closing = True
        self.batcher.close()

    def close(self) -> None:
        """Nothing is answered any more."""
        self.give_up()
        self.threads.shutdown(wait=False, cancel_futures=True)


def closing() -> ApiError:
    return ApiError(503, "the server is being stopped; try again soon", code="shutting_down", headers=RETRY)
