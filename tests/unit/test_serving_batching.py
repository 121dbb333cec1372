"""Requests run together, wait no longer than they must, and do not spoil each other."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from served import Served, b64, png, raw, served, tiny_model, until
from test_api import pictures

from mm.serving.batching import Batcher, Closing, Kind

SQUARE, NEGATE = Kind("square"), Kind("negate")


class Fake:
    """Squares numbers. Holds its thread from `hold()` until `go()`; odd things happen to the numbers 13 and 17."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []
        self.free = threading.Event()
        self.free.set()
        self.batcher = Batcher(self.run, size=lambda kind: 4, wait=0.03)

    def run(self, kind: Kind, items: list[int]) -> list[int]:
        self.calls.append((kind.name, items))
        assert self.free.wait(10)
        if 13 in items:
            raise ValueError("13 cannot be meant")
        if 17 in items:
            raise MemoryError("17 is too large")
        return [-item if kind == NEGATE else item**2 for item in items]

    def hold(self) -> None:
        """The thread is busy with a first item, so that what is put next waits."""
        self.free.clear()
        self.batcher.put(SQUARE, [0])
        until(lambda: bool(self.calls))
        self.calls.clear()

    def go(self) -> None:
        self.free.set()


@pytest.fixture
def fake() -> Iterator[Fake]:
    found = Fake()
    yield found
    found.go()
    found.batcher.close()
    assert found.batcher.join(5)


def test_requests_that_arrive_together_run_together(fake: Fake) -> None:
    futures = [fake.batcher.put(SQUARE, [n]) for n in range(4)]
    assert [future.result(5) for future in futures] == [[0], [1], [4], [9]]
    assert fake.calls == [("square", [0, 1, 2, 3])]
    assert fake.batcher.batches["square"] == 1 and fake.batcher.done["square"] == 4


def test_a_lone_request_waits_only_as_long_as_it_must(fake: Fake) -> None:
    start = time.monotonic()
    assert fake.batcher.put(SQUARE, [3]).result(5) == [9]
    assert 0.03 <= time.monotonic() - start < 2
    start = time.monotonic()
    assert fake.batcher.put(SQUARE, [1, 2, 3, 4]).result(5) == [1, 4, 9, 16], "a full batch waits for nobody"


def test_a_large_request_is_cut_and_others_join_its_last_batch(fake: Fake) -> None:
    fake.hold()
    large, small = fake.batcher.put(SQUARE, [1, 2, 3, 4, 5]), fake.batcher.put(SQUARE, [6])
    fake.go()
    assert large.result(5) == [1, 4, 9, 16, 25] and small.result(5) == [36]
    assert [items for _, items in fake.calls] == [[1, 2, 3, 4], [5, 6]]


def test_kinds_do_not_mix_and_take_turns(fake: Fake) -> None:
    fake.hold()
    many, one = fake.batcher.put(SQUARE, list(range(1, 13))), fake.batcher.put(NEGATE, [5])
    time.sleep(0.05)
    fake.go()
    assert one.result(5) == [-5] and len(many.result(5)) == 12
    assert [name for name, _ in fake.calls] == ["square", "negate", "square", "square"]


def test_one_that_fails_fails_alone(fake: Fake) -> None:
    fake.hold()
    futures = [fake.batcher.put(SQUARE, [n]) for n in (2, 13, 17, 3)]
    fake.go()
    assert futures[0].result(5) == [4] and futures[3].result(5) == [9]
    with pytest.raises(ValueError, match="13 cannot be meant"):
        futures[1].result(5)
    with pytest.raises(MemoryError):
        futures[2].result(5)
    assert fake.batcher.put(SQUARE, [5]).result(5) == [25], "the thread lives on"


def test_what_nobody_waits_for_any_more_never_begins(fake: Fake) -> None:
    async def leave() -> None:
        fake.hold()
        task = asyncio.create_task(fake.batcher.submit(SQUARE, [1, 2, 3, 4, 5]))
        stay = asyncio.create_task(fake.batcher.submit(SQUARE, [6]))
        await asyncio.sleep(0.01)
        assert fake.batcher.waiting == 6
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert fake.batcher.waiting == 1
        fake.go()
        assert await stay == [36]

    asyncio.run(leave())
    assert fake.calls == [("square", [6])]


def test_what_had_not_begun_when_it_was_closed_is_given_up(fake: Fake) -> None:
    fake.hold()
    future = fake.batcher.put(SQUARE, [1])
    fake.batcher.close()
    with pytest.raises(Closing):
        future.result(5)
    with pytest.raises(Closing):
        fake.batcher.put(SQUARE, [1])
    fake.go()
    assert fake.batcher.join(5) and not fake.batcher.alive


# over HTTP


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result(30) for future in [threads.submit(call) for call in calls]]


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
        drawn = [answer.json()["data"][0]["b64_json"] for answer in at_once(draw)]
        alone = tiny_model().generate([f"word {seed}" for seed in range(6)], seeds=range(6), steps=2)
        assert drawn == [b64(png_of(image)) for image in alone]
        assert server.service.batcher.batches["draw"] <= 3


def png_of(image: Any) -> bytes:
    from mm.evaluation.images import png_bytes

    return png_bytes(image)


def test_drawings_with_other_settings_do_not_mix() -> None:
    with served(max_wait_ms=100) as server:
        bodies = [{"prompt": "a", "steps": steps, "guidance": guidance} for steps in (1, 2) for guidance in (1, 3)]
        answers = at_once([lambda body=body: server.post(DRAW, body) for body in bodies])
        assert server.service.batcher.batches["draw"] == 4
    for body, answer in zip(bodies, answers, strict=True):
        alone = tiny_model().generate(["a"], seeds=[0], steps=int(body["steps"]), guidance=body["guidance"])[0]  # type: ignore[call-overload]
        assert answer.json()["data"][0]["b64_json"] == b64(png_of(alone))


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
        head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 90\r\n\r\n{"
        assert b"408 Request Timeout" in raw(server.url, head)
        assert server.service.taken == 0


def test_a_client_that_leaves_takes_its_request_along(held: Held) -> None:
    with served() as server, ThreadPoolExecutor(1) as threads:
        first = threads.submit(server.post, DRAW, {"prompt": "a", "steps": 1})
        until(lambda: held.begun == 1)
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "b", "steps": 1}).encode()
        head = f"POST {DRAW} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
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


def test_what_waits_beyond_the_grace_gets_503(held: Held) -> None:
    with served(grace=0.3) as server, ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(server.post, DRAW, {"prompt": "a", "steps": steps}) for steps in (1, 2)]
        until(lambda: held.begun == 1 and server.service.batcher.waiting == 1)
        server.server.should_exit = True
        until(lambda: any(future.done() for future in futures))
        held.go()
        assert sorted(future.result(20).status_code for future in futures) == [200, 503]


def test_embeddings_are_the_same_whatever_else_the_server_does() -> None:
    truth = tiny_model().encode(text=["red heart"])["text"][0]
    with served() as server:
        ask = lambda: server.post("/v1/embeddings", {"input": "red heart", "encoding_format": "float"})  # noqa: E731
        other = lambda: server.post(DRAW, {"prompt": "a", "steps": 3, "n": 3})  # noqa: E731
        answers = at_once([ask, other, ask, other, ask])
    for answer in answers[::2]:
        assert np.float32(answer.json()["data"][0]["embedding"]).tobytes() == truth.numpy().tobytes()
