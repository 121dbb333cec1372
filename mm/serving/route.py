"""What happens around every endpoint: the key, a place in the queue, the body, the deadline, and a client that left."""

from __future__ import annotations

import asyncio
import hmac
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mm.serving.body import BoundedRequest
from mm.serving.errors import ApiError, ErrorBody, failed
from mm.serving.service import RETRY, Service

JSON = "application/json"
WORDS = {
    400: "The request is wrong: the message names field, value and fix",
    401: "No key, or a wrong one",
    404: "No such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is of another media type, or compressed",
    429: "Too many requests are waiting",
    500: "The server failed",
    503: "The server is being stopped, or the request took too long",
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the document: what an endpoint may answer instead, always in the same shape."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        found[status] = {"model": ErrorBody, "description": WORDS[status]}
        if status in (429, 503):
            found[status]["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "string"}}}
    return found


MODEL_REFUSALS = refusals(400, 404, 408, 413, 415, 429, 500, 503)  # of an endpoint that runs the model


Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class KeyRoute(APIRoute):
    """An endpoint that asks for the key, if there is one: nothing of the request is read before."""

    def get_route_handler(self) -> Handler:
        inner = self.around(super().get_route_handler())

        async def handle(request: Request) -> Response:
            check_key(request)
            try:
                return await inner(request)
            except (HTTPException, RequestValidationError):
                raise
            except Exception as error:  # starlette would answer too, and then have the connection closed
                traceback.print_exception(error)
                raise failed() from error

        return handle

    def around(self, inner: Handler) -> Handler:
        return inner


class ModelRoute(KeyRoute):
    """An endpoint that runs the model. Media types other than JSON are those that its `openapi_extra` names."""

    def around(self, inner: Handler) -> Handler:
        described = (self.openapi_extra or {}).get("requestBody", {}).get("content", {})
        accepted = (JSON, *(media for media in described if media != JSON))

        async def handle(request: Request) -> Response:
            service: Service = request.app.state.service
            with service.admitted():
                bounded = BoundedRequest(request.scope, request.receive)
                bounded.limit = service.limits.max_body
                deadline = asyncio.get_running_loop().time() + service.limits.timeout
                try:
                    async with asyncio.timeout_at(deadline):
                        await bounded.read(accepted)
                except TimeoutError as error:
                    message = f"the body did not arrive within {service.limits.timeout:g} s (mm serve --timeout)"
                    raise ApiError(408, message, code="timeout") from error
                except ClientDisconnect:
                    return gone()
                return await _until(deadline, service.limits.timeout, inner(bounded), request)

        return handle


async def _until(deadline: float, seconds: float, work: Coroutine[Any, Any, Response], request: Request) -> Response:
    """The answer; none where the client leaves first: what has not begun for it then never will."""
    tasks = {asyncio.ensure_future(work), watch := asyncio.ensure_future(_left(request))}
    try:
        left = deadline - asyncio.get_running_loop().time()
        done, _ = await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finished = done - {watch}
        if finished:
            return finished.pop().result()
        if watch in done:
            return gone()
        message = f"not done within {seconds:g} s (mm serve --timeout); ask for less, or try again"
        raise ApiError(503, message, code="timeout", headers=RETRY)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _left(request: Request) -> Response:
    """Returns once the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    return gone()


def gone() -> Response:
    return Response(status_code=499)  # nginx's number; nobody reads it but the access log


def check_key(request: Request) -> None:
    """Raises ApiError 401 where the server has a key and the request does not show it."""
    key = request.app.state.service.api_key
    if key is None:
        return
    scheme, _, shown = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(shown.strip().encode("latin-1"), key.encode())  # header values are Latin-1
    if scheme.lower() != "bearer" or not right:
        said = "the API key is wrong" if shown else "an API key is needed"
        headers = {"WWW-Authenticate": "Bearer"}
        raise ApiError(401, f"{said}; send Authorization: Bearer KEY", code="invalid_api_key", headers=headers)
