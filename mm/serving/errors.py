"""Errors in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, for whatever goes wrong."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

NOT_UTF8 = "string_unicode"  # pydantic's name for half of a surrogate pair
CODES = {404: "not_found", 405: "method_not_allowed", 415: "unsupported_media_type"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every answer but 2xx holds."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An answer that is an error. Raised anywhere while a request is handled, pydantic's validators included."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, " ".join(message.split()), headers)
        self.param, self.code = param, code or CODES.get(status)

    def body(self) -> dict[str, Any]:
        detail = {"message": self.detail, "type": _type(self.status_code), "param": self.param, "code": self.code}
        return {"error": detail}


def bad(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400: what a user got wrong, in one line that names field, value and fix."""
    return ApiError(400, message, param=param, code=code)


def over(name: str, flag: str, value: Any, limit: Any, unit: str, status: int = 400) -> ApiError:
    """A limit that a request is over: names it, the value, and the flag of `mm serve` that sets it."""
    message = f"{name}: {value} {unit}, over this server's limit of {limit} (mm serve {flag})"
    return ApiError(status, message, param=name.split("[")[0], code="limit_exceeded")


def failed() -> ApiError:
    """500: the traceback goes to the server's log, and nothing of it to the client."""
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def short(value: Any) -> str:
    """A value as an error quotes it: one line, bounded."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value[:80] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def _type(status: int) -> str:
    if status >= 500:
        return "server_error"
    return {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")


def _invalid(error: RequestValidationError) -> ApiError:
    """The first of a request's faults."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param, words = ".".join(place) or None, first["msg"]
    if first["type"] == "missing":
        return bad(f"{param or 'body'}: is required", param, "missing")
    if first["type"] == NOT_UTF8:
        return bad(f"{param}: holds half of a surrogate pair, which is no text; send UTF-8", param)
    words = words.removeprefix("Input ").replace("should", "must")
    value = first.get("input")
    return bad(f"{param or 'body'} = {short(value)}: {words[0].lower()}{words[1:]}", param)


def _answer(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status_code, error.headers)


async def _http(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return _answer(error)
    words = {404: "no such path; /openapi.json lists them", 405: "method not allowed for this path"}
    headers = dict(error.headers) if error.headers else None
    return _answer(ApiError(error.status_code, words.get(error.status_code, str(error.detail)), headers=headers))


async def _validation(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _answer(_invalid(error))


async def _unexpected(_request: Request, _error: Exception) -> JSONResponse:
    return _answer(failed())


def install(app: FastAPI) -> None:
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(Exception, _unexpected)
