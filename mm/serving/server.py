"""The server: a port of its own before a model is loaded, one line when it is ready, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn

from mm.serving.access import LOOPBACK, AccessLog, App

if TYPE_CHECKING:
    from mm.serving.service import Service

CONNECTIONS = 1000  # at once; more are refused
HEADER = 32_768  # bytes of a request's head
LAST = 2.0  # seconds for answers to leave, after all that waited has been given up


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the port, and does not listen yet. Raises ValueError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host}: not an address of this machine ({error})") from error
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port is free again as soon as its server ended
        found.bind(address)
    except OSError as error:
        found.close()
        raise ValueError(
            f"--host {host} --port {port}: {(error.strerror or str(error)).lower()}; try another"
        ) from error
    return found


def url_of(host: str, sock: socket.socket) -> str:
    port = sock.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def only_loopback(sock: socket.socket) -> bool:
    return sock.getsockname()[0].startswith(("127.", "::1"))


class Server(uvicorn.Server):
    """uvicorn, whose SIGTERM and Ctrl-C end it with exit code 0 once what was taken is answered, or time is over."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self.ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, without raising the signals again once they have been obeyed."""
        in_main = threading.current_thread() is threading.main_thread()  # no other may take signals
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.service.closing = True  # requests on open connections get 503
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self.service.limits.grace, self.service.give_up)
        await super().shutdown(sockets)
        timer.cancel()
        self.service.close()


def configured(app: App, grace: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        h11_max_incomplete_event_size=HEADER,
        timeout_graceful_shutdown=int(grace + LAST) + 1,
    )


def run(app: App, service: Service, sock: socket.socket, *, ready: str, quiet: bool) -> int:
    """Serves until SIGTERM or Ctrl-C; `ready` is printed once it answers. Returns the exit code."""
    service.warm_up()
    config = configured(app if quiet else AccessLog(app), service.limits.grace)
    Server(config, service, lambda: print(ready, flush=True)).run([sock])
    if not service.batcher.join(LAST):  # deep in a long batch: a thread that computes cannot be ended otherwise
        sys.stdout.flush()
        os._exit(0)
    return 0


__all__ = ["LOOPBACK", "Server", "bind", "configured", "only_loopback", "run", "url_of"]
