"""Many clients at once: requests that share a call, a full queue, deadlines, clients that leave, and the end."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from served import b64, head, png, raw, served, tiny_model, until
from test_api import pictures


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result(30) for future in [threads.submit(call) for call in calls]]


def pixels(answer: httpx.Response) -> bytes:
    """Of the first picture of an answer."""
    file = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(file))).tobytes()


class Held:
    """A model whose `generate` waits until `go`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.draw, self.begun, self.free = tiny_model().generate, 0, threading.Event()
        patch.setattr(tiny_model(), "generate", self.generate)

    def generate(self, *args: Any, **options: Any) -> Any:
        self.begun += 1
        assert self.free.wait(20)
        return self.draw(*args, **options)

    def go(self) -> None:
        self.free.set()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    found = Held(monkeypatch)
    yield found
    found.go()


DRAW = "/v1/images/generations"


def test_many_clients_at_once_get_what_each_would_get_alone_in_fewer_calls() -> None:
    texts, images = [f"word {n}" for n in range(24)], pictures(12)
    truth = tiny_model().encode(text=texts, image=images)
    chances = tiny_model().classifier(["a", "b"])(images)
    with served(max_wait_ms=200) as server:
        embed = [lambda text=text: server.post("/v1/embeddings", {"input": text}) for text in texts]
        answers = at_once(embed)
        found = torch.tensor([answer.json()["data"][0]["embedding"] for answer in answers])
        assert torch.equal(found, truth["text"])
        assert server.service.batcher.batches["text"] <= 6 and server.service.batcher.done["text"] == 24
        parameters = {"candidate_labels": ["a", "b"]}
        bodies = [{"inputs": b64(png(image)), "parameters": parameters} for image in images]
        answers = at_once([lambda body=body: server.post("/v1/classify", body) for body in bodies])
        for answer, row in zip(answers, chances.tolist(), strict=True):
            assert {item["label"]: item["score"] for item in answer.json()} == dict(zip(["a", "b"], row, strict=True))
        assert server.service.batcher.batches["image"] <= 4 and server.service.batcher.done["image"] == 12
        assert server.service.batcher.batches["labels"] >= 1

        draw = [
            lambda seed=seed: server.post(DRAW, {"prompt": f"word {seed}", "seed": seed, "steps": 2})
            for seed in range(6)
        ]
        drawn = [pixels(answer) for answer in at_once(draw)]
        alone = tiny_model().generate([f"word {seed}" for seed in range(6)], seeds=range(6), steps=2)
        assert drawn == [image.tobytes() for image in alone]
        assert server.service.batcher.batches["draw"] <= 3


def test_drawings_with_other_settings_do_not_mix() -> None:
    with served(max_wait_ms=100) as server:
        bodies = [{"prompt": "a", "steps": steps, "guidance": guidance} for steps in (1, 2) for guidance in (1, 3)]
        answers = at_once([lambda body=body: server.post(DRAW, body) for body in bodies])
        assert server.service.batcher.batches["draw"] == 4
    for body, answer in zip(bodies, answers, strict=True):
        alone = tiny_model().generate(["a"], seeds=[0], steps=int(body["steps"]), guidance=body["guidance"])[0]  # type: ignore[call-overload]
        assert pixels(answer) == alone.tobytes()


def test_a_full_queue_answers_429_and_takes_requests_again_later(held: Held) -> None:
    with served(max_queue=2) as server:
        with ThreadPoolExecutor(2) as threads:
            taken = [threads.submit(server.post, DRAW, {"prompt": "a", "steps": steps}) for steps in (1, 2)]
            until(lambda: server.service.taken == 2 and held.begun == 1)
            full = server.post("/v1/embeddings", {"input": "x"})
            assert full.status_code == 429 and full.json()["error"]["code"] == "queue_full"
            assert int(full.headers["retry-after"]) >= 1 and "2 requests" in full.json()["error"]["message"]
            health = server.client.get("/healthz").json()
            assert health["status"] == "ok" and health["queue"]["requests"] == health["queue"]["limit"] == 2
            held.go()
            assert [future.result(20).status_code for future in taken] == [200, 200]
        assert server.post("/v1/embeddings", {"input": "x"}).status_code == 200


def test_a_request_that_takes_too_long_is_answered_and_its_rest_never_begins(held: Held) -> None:
    with served(timeout=0.3) as server:
        late = server.post(DRAW, {"prompt": "a", "n": 10, "steps": 1})
        assert late.status_code == 503 and "0.3 s" in late.json()["error"]["message"]
        assert late.headers["retry-after"] and server.service.batcher.waiting == 0 and server.service.taken == 0
        held.go()
        until(lambda: server.service.batcher.running == 0)
        assert held.begun == 1, "the other two of ten, which fit into no batch of eight"


def test_a_body_that_does_not_arrive_is_given_up(held: Held) -> None:
    with served(timeout=0.3) as server:
        assert b"408 Request Timeout" in raw(server.url, head("/v1/embeddings", 90) + b"{")
        assert server.service.taken == 0


def test_a_client_that_leaves_takes_its_request_along(held: Held) -> None:
    with served() as server, ThreadPoolExecutor(1) as threads:
        first = threads.submit(server.post, DRAW, {"prompt": "a", "steps": 1})
        until(lambda: held.begun == 1)
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "b", "steps": 1}).encode()
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head(DRAW, len(body)) + body)
            until(lambda: server.service.batcher.waiting == 1)
        until(lambda: server.service.batcher.waiting == 0 and server.service.taken == 1)
        held.go()
        assert first.result(20).status_code == 200 and held.begun == 1


def test_a_stopped_server_answers_what_it_took_and_nothing_more(held: Held) -> None:
    with served() as server, ThreadPoolExecutor(1) as threads:
        idle = server.client.get("/healthz")
        assert idle.status_code == 200
        first = threads.submit(server.post, DRAW, {"prompt": "a", "steps": 1})
        until(lambda: held.begun == 1)
        server.service.closing = True  # what a signal does first
        refused = server.post("/v1/embeddings", {"input": "x"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert server.client.get("/healthz").status_code == 503
        server.server.should_exit = True
        time.sleep(0.2)
        held.go()
        answer = first.result(20)
        assert answer.status_code == 200 and len(answer.json()["data"]) == 1


def test_what_is_not_done_within_the_grace_gets_503(held: Held) -> None:
    with served(grace=0.3) as server, ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(server.post, DRAW, {"prompt": "a", "steps": steps}) for steps in (1, 2)]
        until(lambda: held.begun == 1 and server.service.batcher.waiting == 1)
        server.server.should_exit = True
        assert [future.result(20).status_code for future in futures] == [503, 503]
        held.go()


def test_embeddings_are_the_same_whatever_else_the_server_does() -> None:
    truth = tiny_model().encode(text=["red heart"])["text"][0]
    with served() as server:
        ask = lambda: server.post("/v1/embeddings", {"input": "red heart", "encoding_format": "float"})  # noqa: E731
        other = lambda: server.post(DRAW, {"prompt": "a", "steps": 3, "n": 3})  # noqa: E731
        answers = at_once([ask, other, ask, other, ask])
    for answer in answers[::2]:
        assert np.float32(answer.json()["data"][0]["embedding"]).tobytes() == truth.numpy().tobytes()
