"""Real servers on loopback for tests: HTTP with scripted faults, and S3 as moto speaks it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock


@dataclass
class Fault:
    """What goes wrong at one path. `Fault(status=503, times=2)`: the first two requests of `methods` meet it."""

    status: int = 0  # answered with this and an empty body
    delay: float = 0.0  # seconds before the answer
    silent: bool = False  # the request is taken, and never answered
    stall_after: int | None = None  # bytes of a body after which no more come, on an open connection
    cut_after: int | None = None  # bytes of a body after which the connection is closed
    trickle: float = 0.0  # seconds between two bytes
    ranges: bool = True  # False: every answer is the whole object
    length: int | None = None  # what Content-Length claims of the whole object
    headers: dict[str, str] = field(default_factory=dict)  # sent instead of, or beside, the usual ones
    times: int = 1_000_000  # requests that meet the fault; later ones do not
    methods: tuple[str, ...] = ("GET",)


class Request(NamedTuple):
    """One line of the log: the range's first byte (0 without one), and bytes of body sent."""

    method: str
    path: str
    status: int
    start: int
    sent: int


class HttpServer(ThreadingHTTPServer):
    """Serves a folder: files with ETag, Last-Modified and ranges, folders as pages of links.

    `url` has no slash at its end; `faults` are by path ("/a.tar") and may be changed at any time; `log` holds requests
    in the order of the answers.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.faults: dict[str, Fault] = {}
        self.log: list[Request] = []
        self.stopped = threading.Event()
        self.lock = threading.Lock()

    def gets(self, path: str) -> list[Request]:
        """The log's GET requests of a path."""
        return [request for request in list(self.log) if request.path == path and request.method == "GET"]

    def sent(self, path: str) -> int:
        """Bytes of bodies sent for a path."""
        return sum(request.sent for request in self.gets(path))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is what the tests are about."""


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HttpServer

    def __init__(self, request: Any, client_address: Any, server: HttpServer) -> None:
        super().__init__(request, client_address, server, directory=str(server.folder))

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        """Not to the terminal."""

    def _fault(self) -> Fault:
        with self.server.lock:
            fault = self.server.faults.get(self.path)
            if fault is None or self.command not in fault.methods or fault.times <= 0:
                return Fault()
            fault.times -= 1
            return fault

    def _answer(self) -> None:
        fault, path = self._fault(), Path(self.translate_path(self.path))
        self.server.stopped.wait(fault.delay)
        if fault.silent:
            self._log(0, 0, 0)
            self.server.stopped.wait(60)
            self.close_connection = True
        elif fault.status or not path.exists():
            self._log(fault.status or 404, 0, 0)
            self.send_response(fault.status or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path.is_dir():
            self._log(200, 0, 0)
            super().do_HEAD() if self.command == "HEAD" else super().do_GET()
        else:
            self._file(path, fault)

    def _file(self, path: Path, fault: Fault) -> None:
        data, found = path.read_bytes(), path.stat()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if fault.ranges else None
        start, end = (int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))) if asked else (0, len(data))
        status = 206 if asked else 200
        total = len(data) if fault.length is None else fault.length
        headers = {
            "Content-Length": str(end - start if asked else total),
            "ETag": f'"{found.st_mtime_ns:x}-{found.st_size:x}"',
            "Last-Modified": self.date_time_string(int(found.st_mtime)),
        }
        if asked and start >= len(data):
            status, start, end = 416, 0, 0
            headers |= {"Content-Length": "0", "Content-Range": f"bytes */{len(data)}"}
        elif asked:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
        self.send_response(status)
        for name, value in (headers | fault.headers).items():
            self.send_header(name, value)
        self.end_headers()
        body = data[start:end] if self.command == "GET" else b""
        limits = [limit for limit in (fault.stall_after, fault.cut_after) if limit is not None]
        sent = body[: min(limits, default=len(body))]
        self._log(status, start, len(sent))  # before they arrive, so that who has them all finds it in the log
        if fault.trickle:
            for place in range(len(sent)):
                self.wfile.write(sent[place : place + 1])
                if self.server.stopped.wait(fault.trickle):
                    return
        self.wfile.write(sent)
        self.wfile.flush()
        if len(sent) < len(body) or total > len(data):
            if fault.stall_after is not None:
                self.server.stopped.wait(60)
            self.close_connection = True

    def _log(self, status: int, start: int, sent: int) -> None:
        self.server.log.append(Request(self.command, self.path, status, start, sent))


@contextlib.contextmanager
def http_server(folder: Path | str) -> Iterator[HttpServer]:
    """A server of the files in `folder`, on a free port of 127.0.0.1.

    `with http_server(shards) as server: expand(f"{server.url}/train-*.tar")`; see HttpServer for `faults` and `log`.
    As S3 endpoint it serves `s3://bucket/key` out of `folder/bucket/key`, reading only: see `s3_environment`.
    """
    server = HttpServer(Path(folder))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def s3_environment(endpoint: str) -> Iterator[None]:
    """The AWS_* variables for an endpoint; processes started meanwhile inherit them (not a forkserver's children,
    where it runs already)."""
    import s3fs

    variables = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    s3fs.S3FileSystem.clear_instance_cache()
    with mock.patch.dict(os.environ, variables):
        yield
    s3fs.S3FileSystem.clear_instance_cache()


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """An empty S3 store in this process; yields its endpoint, with `s3_environment` set for it.

    `with s3_server() as endpoint: url = s3_upload("bucket", shards)`, then `expand(f"{url}/train-*.tar")`.
    """
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it prints every request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with s3_environment(f"http://{host}:{port}"):
            yield f"http://{host}:{port}"
    finally:
        server.stop()


def s3_upload(bucket: str, folder: Path) -> str:
    """Puts every file under `folder` into a bucket, made if need be; returns the URL, `s3://bucket`."""
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        client.upload_file(str(path), bucket, path.relative_to(folder).as_posix())
    return f"s3://{bucket}"
