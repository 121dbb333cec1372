"""A real server on loopback for tests: uvicorn in a thread of this process, with a random model of the debug size."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

import mm
from mm.api import LoadedModel
from mm.serving.app import create_app
from mm.serving.limits import Limits
from mm.serving.server import Server, bind, configured
from mm.serving.service import Service

ROOT = Path(__file__).resolve().parents[1]
NAME = "tiny"


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="mm-served-")


@functools.cache
def tiny_run() -> Path:
    """A run folder with random weights, made once."""
    from test_api import export, tiny

    return export(ROOT, Path(_folder().name) / NAME, tiny(ROOT))


@functools.cache
def tiny_model() -> LoadedModel:
    return mm.load(str(tiny_run()), device="cpu")


class Served:
    """`url`, its `service`, and a client whose paths are relative to it."""

    def __init__(self, url: str, service: Service, server: Server) -> None:
        self.url, self.service, self.server = url, service, server
        self.client = httpx.Client(base_url=url, timeout=30)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options) if body is not None else self.client.post(path, **options)

    def healthy(self) -> bool:
        answer = self.client.get("/healthz")
        return answer.status_code == 200 and answer.json()["status"] == "ok"


@contextlib.contextmanager
def served(
    model: Any = None, *, api_key: str | None = None, wrap: Callable[[Any], Any] = lambda app: app, **options: Any
) -> Iterator[Served]:
    """Options are limits, and `cors` and `hosts` of `create_app`."""
    outside = {name: options.pop(name) for name in ("cors", "hosts") if name in options}
    service = Service(model or tiny_model(), Limits(**options), name=NAME, api_key=api_key)
    sock = bind("127.0.0.1", 0)
    ready = threading.Event()
    app = wrap(create_app(service, **outside))
    server = Server(configured(app, service.limits.grace), service, ready.set)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    assert ready.wait(30), "the server did not start"
    found = Served(f"http://127.0.0.1:{sock.getsockname()[1]}", service, server)
    try:
        yield found
    finally:
        found.client.close()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


def png(picture: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind)
    return stream.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def until(condition: Callable[[], Any], seconds: float = 10) -> None:
    """Waits for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def head(path: str, length: int) -> bytes:
    """The head of a request whose body is said to have so many bytes of JSON."""
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def raw(url: str, data: bytes, *, wait: float = 10) -> bytes:
    """What a server answers to these bytes on a connection of their own; nothing where it hangs up."""
    host, port = url.removeprefix("http://").split(":")
    parts: list[bytes] = []
    hung_up = contextlib.suppress(ConnectionResetError, BrokenPipeError)
    with hung_up, socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(data)
        while part := connection.recv(65536):
            parts.append(part)
            if b"\r\n\r\n" in b"".join(parts) and b"".join(parts).endswith(b"}"):
                break
    return b"".join(parts)
