"""A request's body: read no further than its limit, of a media type that is meant, and JSON that holds no surprises."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from fastapi import Request

from mm.serving.errors import ApiError, bad, over

MAX_VALUES = 500_000  # in one JSON body: "[],[],[]," takes thirty times its length in memory


class BoundedRequest(Request):
    """`body` and `json` of a request, which raise ApiError where something is wrong with them."""

    limit = 0  # bytes

    async def body(self) -> bytes:
        """Raises ApiError 413 as soon as more has come, or is announced, than `limit`."""
        if not hasattr(self, "_body"):
            announced = self.headers.get("content-length", "")
            if announced.isdecimal() and int(announced) > self.limit:
                raise too_large(int(announced), self.limit)
            parts, total = [], 0
            async for part in self.stream():
                total += len(part)
                if total > self.limit:
                    raise too_large(total, self.limit)
                parts.append(part)
            self._body = b"".join(parts)
        return self._body

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = parse(await self.body())
        return self._json

    async def read(self, accepted: tuple[str, ...]) -> None:
        """Reads and parses the body, whose media type must be one of `accepted`."""
        media = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media not in accepted:
            said = f"content-type {media[:60]!r}" if media else "no content-type"
            raise ApiError(415, f"{said}: must be {' or '.join(accepted)}", param="content-type")
        coding = self.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            message = f"content-encoding {coding[:60]!r}: compressed bodies are not taken; send it as it is"
            raise ApiError(415, message, param="content-encoding")
        if not await self.body():
            raise bad("body: is empty", code="missing")
        if media == "application/json":
            await self.json()


def parse(data: bytes) -> Any:
    """The JSON in a body. Raises ApiError 400 for anything that is not, NaN and endless nesting included."""
    values = sum(map(data.count, (b",", b"[", b"{")))
    if values > MAX_VALUES:
        message = f"body: JSON of {values} values, over the limit of {MAX_VALUES}; send several requests"
        raise bad(message, code="limit_exceeded")
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise bad(f"body: not UTF-8 text (byte {error.start})", code="invalid_json") from error
    except RecursionError as error:
        raise bad("body: JSON is nested too deeply", code="invalid_json") from error
    except ValueError as error:  # json's own, and Python's for a number of thousands of digits
        words = str(error).partition("; use sys.")[0]
        raise bad(f"body: not valid JSON ({words})", code="invalid_json") from error


def _refuse(name: str) -> NoReturn:
    raise bad(f"body: not valid JSON ({name} is no JSON number)", code="invalid_json")


def too_large(size: int, limit: int) -> ApiError:
    return over("body", "--max-body-mb", size, limit, "bytes", 413)
