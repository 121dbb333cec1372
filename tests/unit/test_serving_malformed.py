"""Over a hundred requests that cannot be meant: each gets one clear 4xx, and the server stays well."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from malformed import BODIES, CLASSIFY, EMBED, GOOD, JSON, OTHERS, classify
from served import Served, b64, head, raw, served


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    limits = {"max_body_mb": 1.2, "max_pixels": 1_000_000, "max_images": 4, "max_texts": 50, "max_chars": 2000}
    with served(**limits, max_labels=100, max_work=1e6) as found:
        yield found


def refused(answer: Any, status: int, words: str) -> None:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"] and "\n" not in error["message"] and len(error["message"]) < 400
    assert error["type"] == "invalid_request_error" and error["code"]


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_cannot_be_meant_is_refused_in_one_line(server: Served, name: str) -> None:
    path, body, status, words = BODIES[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    if name == "oversized":
        content = content * 5
        words = "bytes, over this server's limit of 1200000 (mm serve --max-body-mb)"
    refused(server.client.post(path, content=content, headers=JSON), status, words)
    assert server.service.taken == 0 and server.service.batcher.waiting == 0


@pytest.mark.parametrize("name", OTHERS)
def test_a_request_that_cannot_be_meant_is_refused_in_one_line(server: Served, name: str) -> None:
    path, options, status, words = OTHERS[name]
    refused(server.client.post(path, **options), status, words)


def test_a_body_without_an_announced_length_is_refused_as_soon_as_it_is_too_long(server: Served) -> None:
    sent = 0

    def parts() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 100_000
            yield b" " * 100_000

    answer = server.client.post(EMBED, content=parts(), headers=JSON)
    refused(answer, 413, "over this server's limit of 1200000")


def test_a_length_that_is_only_announced_is_refused_before_it_comes(server: Served) -> None:
    assert b"413 " in raw(server.url, head(EMBED, 99_999_999_999))


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"GET / HTTP\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZZ\r\n",
        b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 2_000_000,
    ],
    ids=["blank lines", "TLS", "no version", "a negative length", "broken chunks", "a long header"],
)
def test_what_is_not_http_gets_400(server: Served, data: bytes) -> None:
    answer = raw(server.url, data)
    assert answer.startswith(b"HTTP/1.1 400 ") or not answer


def test_the_server_is_well_after_all_of_them(server: Served) -> None:
    assert len(BODIES) + len(OTHERS) >= 150
    assert server.healthy() and server.service.taken == 0
    assert server.post(EMBED, {"input": "cat"}).status_code == 200
    assert server.post(CLASSIFY, classify(b64(GOOD))).json()[0]["score"] > 0
