"""`mm serve` as it is started and stopped."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from served import tiny_run, until

import mm
from mm.cli import main
from mm.commands_serve import _name
from mm.serving.limits import flags


@contextlib.contextmanager
def started(root: Path, *args: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process of `mm serve` on a free port, once it is ready, and its URL."""
    path = os.pathsep.join([str(root), str(root / "kernels")])
    command = [sys.executable, "-m", "mm.cli", "serve", str(tiny_run()), "--device", "cpu", "--port", "0", *args]
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    timer = threading.Timer(120, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"mm serve: tiny on (http://127\.0\.0\.1:\d+) .*\n", line)
        assert found, line + (process.stderr.read() if process.stderr else "")
        yield process, found[1]
    finally:
        timer.cancel()
        process.kill()
        process.wait()


def test_it_prints_where_it_is_answers_and_ends_with_0_when_told_to(root: Path) -> None:
    with started(root, MM_API_KEY="s3cret-key") as (process, url):
        client = httpx.Client(base_url=url, timeout=30)
        assert client.get("/healthz").json()["status"] == "ok"
        assert client.post("/v1/embeddings?token=hidden", json={"input": "x"}).status_code == 401
        key = {"authorization": "Bearer s3cret-key"}
        assert client.post("/v1/embeddings", json={"input": "x"}, headers=key).status_code == 200
        answers: list[httpx.Response] = []
        drawing = {"prompt": "x", "steps": 25}
        draw = threading.Thread(
            target=lambda: answers.append(client.post("/v1/images/generations", json=drawing, headers=key))
        )
        draw.start()
        until(lambda: httpx.get(f"{url}/healthz").json()["queue"]["running"], 60)
        process.send_signal(signal.SIGTERM)
        out, log = process.communicate(timeout=60)
        draw.join(10)
        assert process.returncode == 0 and out == ""
        assert [answer.status_code for answer in answers] == [200], "what was taken is answered"
        assert "s3cret" not in log and "hidden" not in log and "Traceback" not in log
        for line in ("POST /v1/embeddings 401", "POST /v1/embeddings 200", "POST /v1/images/generations 200"):
            assert re.search(rf"^{line} \d+ ms$", log, re.MULTILINE), log


@pytest.mark.slow
def test_ctrl_c_stops_a_quiet_server_that_draws_for_longer_than_its_grace(root: Path) -> None:
    with started(root, "--quiet", "--grace", "0.5", "--max-steps", "100000", "--max-work", "1e12") as (process, url):
        body = {"prompt": "x", "steps": 100_000}
        answers: list[httpx.Response] = []
        draw = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/images/generations", json=body, timeout=30))
        )
        draw.start()
        until(lambda: httpx.get(f"{url}/healthz").json()["queue"]["running"], 60)
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=30)
        draw.join(10)
        assert process.returncode == 0 and log == ""
        assert [answer.status_code for answer in answers] == [503]


def test_a_port_in_use_is_one_line_before_a_model_is_loaded(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mm, "load", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(tiny_run()), "--port", port]) == 2
    error = capfd.readouterr().err
    assert error == f"mm: error: --host 127.0.0.1 --port {port}: address already in use; try another\n"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--port", "70000"], "--port 70000: must be from 0 to 65535"),
        (["--port", "x"], "must be an int at least 0"),
        (["--host", "no.such.host.invalid", "--port", "0"], "--host no.such.host.invalid: not an address"),
        (["--api-key", ""], "--api-key: is empty"),
        (["--api-key", "two words"], "--api-key: is empty, or holds what no header can"),
        (["--cors", "example.com"], "--cors example.com: must be an origin"),
        (["--max-quue", "3"], "unknown flag --max-quue; did you mean --max-queue"),
        (["--max-queue", "0"], "must be an int at least 1"),
        (["--timeout", "nan"], "must be a number at least"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused_in_one_line(
    args: list[str], words: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mm, "load", None)
    assert main(["serve", "RUN", *args]) == 2
    error = capfd.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_server_open_to_others_without_a_key_is_warned_about(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_args: object, **_options: object) -> None:
        raise ValueError("no further")

    monkeypatch.setattr(mm, "load", load)
    monkeypatch.delenv("MM_API_KEY", raising=False)
    arguments = ["serve", "RUN", "--host", "0.0.0.0", "--port", "0"]
    for extra, warned in (([], True), (["--api-key", "k"], False)):
        assert main([*arguments, *extra]) == 2
        assert ("warning: 0.0.0.0 is open to the network" in capfd.readouterr().err) == warned
    assert main([*arguments[:2], "--port", "0"]) == 2
    assert "warning" not in capfd.readouterr().err, "loopback is nobody else's"


def test_every_limit_is_a_flag_with_its_default_in_the_help_and_in_the_document(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    document = (root / "docs" / "serving.md").read_text(encoding="utf-8")
    for flag in flags():
        assert f"{flag.spelled} N" in told and f"{flag.words} (default: {flag.shown})" in told
        assert f"| `{flag.spelled}` | {flag.shown} | {flag.words} |" in document


def test_a_model_is_called_as_its_folder(tmp_path: Path) -> None:
    (tmp_path / "demo" / "export").mkdir(parents=True)
    assert _name(str(tmp_path / "demo")) == _name(str(tmp_path / "demo" / "export")) == "demo"
    assert _name("open_clip:ViT-B-32/openai") == "open_clip:ViT-B-32/openai"
