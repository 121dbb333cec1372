"""Around all requests: which Host they may name, and a line in the log for each."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

from mm.serving.errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class AllowedHosts:
    """Refuses requests for another Host than `hosts`: a web page whose name is made to lead here may not use this."""

    def __init__(self, app: App, hosts: Sequence[str]) -> None:
        self.app, self.hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            named = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
            host = named if named.endswith("]") else named.rpartition(":")[0] or named
            if host not in self.hosts:
                message = f"Host {host[:80]!r}: not a name of this server; mm serve --allow-host adds one"
                error = ApiError(421, message, code="wrong_host")
                await JSONResponse(error.body(), error.status_code)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class AccessLog:
    """A line on stderr for each request: method, path, status, milliseconds. Neither queries nor headers are in it."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            path = scope.get("raw_path", b"").decode("latin-1")[:200]  # as it was sent: no line breaks
            spent = 1000 * (time.perf_counter() - start)
            print(f"{scope['method'][:20]} {path} {status} {spent:.0f} ms", file=sys.stderr, flush=True)
