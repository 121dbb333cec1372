from __future__ import annotations

import importlib.util
import os
import pickle
import random
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mm.config import ConfigError
from mm.data import remote, transport
from mm.data.remote import Facts, Options, Unavailable
from servers import Fault, HttpServer, http_server, s3_environment, s3_server, s3_upload

SIZE = 700_001  # several pieces, none of them whole
DATA = random.Random(0).randbytes(SIZE)
QUICK = Options(tries=4, stall=10.0, first_delay=0.01, chunk=100_000)
SHORT = QUICK._replace(stall=0.25)  # where the server stalls
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HttpServer]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.tar").write_bytes(DATA)
    with http_server(tmp_path / "served") as running:
        yield running


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("bucket")
    (folder / "sub").mkdir()
    for name, data in (("a.tar", DATA), ("b.tar", b"b"), ("b.txt", b""), ("sub/c.tar", b"c"), ("empty.tar", b"")):
        (folder / name).write_bytes(data)
    with s3_server():
        yield s3_upload("bucket", folder)


def all_of(url: str, start: int = 0, options: Options = QUICK) -> bytes:
    return b"".join(remote.chunks(url, start, options))


def patience(fault: Fault) -> Options:
    return SHORT if fault.silent or fault.trickle or fault.stall_after is not None else QUICK


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat x.tar",
        "file:///etc/passwd",
        "ftp://host/x.tar",
        "simplecache::http://host/x.tar",
        "s3://bucket/x.zip::http://host/x.tar",
        "http://host/x.tar?of=file:///etc/passwd",
        "local://x.tar",
        "s3://",
        "x.tar",
    ],
)
def test_only_stores_on_the_list_are_opened(url: str) -> None:
    for action in (remote.check, remote.glob, remote.facts, remote.read_small, lambda url: next(remote.chunks(url))):
        with pytest.raises(ConfigError, match=r"https://.*s3://"):
            action(url)
    with pytest.raises(ConfigError):
        remote.write_small(url, b"")


def test_a_store_whose_reader_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "s3fs" else name)
    remote.check("https://host/x.tar")
    with pytest.raises(ConfigError, match=r"s3://bucket/x.tar.*pip install s3fs"):
        remote.check("s3://bucket/x.tar")


def test_the_import_brings_no_backend(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = "import sys, mm.data.shard_cache; print(*{'fsspec', 'aiohttp', 's3fs'} & set(sys.modules))"
    result = run_python("-c", code)
    assert (result.stdout.strip(), result.returncode) == ("", 0), result.stderr


def test_http_folders_and_patterns_name_their_shards(server: HttpServer) -> None:
    for name in ("b.tar", "b.txt", "sub/c.tar", "has space.tar"):
        (server.folder / name).parent.mkdir(exist_ok=True)
        (server.folder / name).write_bytes(b"x")
    url = server.url
    assert remote.glob(f"{url}/nowhere.tar") == [f"{url}/nowhere.tar"]
    assert not server.log  # a plain name is not looked up
    assert remote.glob(f"{url}/") == [f"{url}/a.tar", f"{url}/b.tar", f"{url}/has%20space.tar"]
    assert remote.glob(f"{url}/[b-h]*.tar") == [f"{url}/b.tar", f"{url}/has%20space.tar"]
    assert remote.glob(f"{url}/*/c.tar") == [f"{url}/sub/c.tar"]
    assert remote.glob(f"{url}/z*.tar") == remote.glob(f"{url}/nowhere/") == []
    assert remote.read_small(f"{url}/has%20space.tar") == b"x"
    server.faults["/sub/"] = Fault(status=403)
    with pytest.raises(Unavailable, match=r"/sub/: 403 permission denied"):
        remote.glob(f"{url}/sub/", QUICK)
    with pytest.raises(ConfigError, match=r"host or bucket"):
        remote.glob("https://*.com/x.tar")


FAULTS = {
    "none": Fault(),
    "503 twice": Fault(status=503, times=2),
    "429 once, HEAD too": Fault(status=429, times=2, methods=("HEAD", "GET")),
    "no HEAD": Fault(status=405, methods=("HEAD",)),
    "no answer once": Fault(silent=True, times=1),
    "stalls in the body": Fault(stall_after=250_000, times=1),
    "cut once": Fault(cut_after=333_333, times=1),
    "every answer is cut": Fault(cut_after=150_000),
    "no ranges": Fault(ranges=False, methods=("HEAD", "GET")),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_bytes_are_exact_whatever_goes_wrong(server: HttpServer, fault: Fault) -> None:
    for start in (0, 123_456):
        server.faults["/a.tar"] = Fault(**vars(fault))
        assert all_of(f"{server.url}/a.tar", start, patience(fault)) == DATA[start:]


def test_a_cut_is_mended_without_ranges_too(server: HttpServer) -> None:
    server.faults["/a.tar"] = Fault(ranges=False, cut_after=333_333, times=1)
    (server.folder / "b.tar").write_bytes(DATA)
    assert all_of(f"{server.url}/a.tar") == DATA
    server.faults["/b.tar"] = Fault(ranges=False)
    assert all_of(f"{server.url}/b.tar") == DATA
    assert len(server.gets("/b.tar")) == 1  # one body, however many pieces


def test_what_was_yielded_is_not_asked_for_again(server: HttpServer) -> None:
    server.faults["/a.tar"] = Fault(cut_after=150_000)
    reached, starts = 0, {0}
    for piece in remote.chunks(f"{server.url}/a.tar", 0, QUICK):
        assert len(piece) <= QUICK.chunk
        starts.add(reached := reached + len(piece))
    asked = [request.start for request in server.gets("/a.tar")]
    assert len(asked) == 5 and set(asked) <= starts
    assert server.sent("/a.tar") == SIZE  # each byte once


def test_empty_objects_are_empty(server: HttpServer, bucket: str) -> None:
    (server.folder / "empty.tar").write_bytes(b"")
    for url in (f"{server.url}/empty.tar", f"{bucket}/empty.tar"):
        assert remote.facts(url).size == 0
        assert all_of(url) == remote.read_small(url) == b""
    server.faults["/empty.tar"] = Fault(status=405, methods=("HEAD",))
    assert remote.facts(f"{server.url}/empty.tar").size == 0


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [(404, "missing", "404 not found"), (403, "forbidden", "denied"), (418, "refused", "418")],
)
def test_what_will_never_work_is_not_tried_again(server: HttpServer, status: int, kind: str, words: str) -> None:
    server.faults["/a.tar"] = Fault(status=status)
    with pytest.raises(Unavailable, match=rf"{server.url}/a.tar: .*{words}") as caught:
        all_of(f"{server.url}/a.tar")
    assert caught.value.kind == kind
    assert len(server.gets("/a.tar")) == 1
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.kind) == (str(caught.value), kind)


HOPELESS = {
    "stalled: no answer": Fault(silent=True),
    "stalled: no byte for 0.8 s at byte 70000": Fault(stall_after=70_000),
    "stalled: no byte": Fault(stall_after=0),
    "503": Fault(status=503),
    "connection cut": Fault(cut_after=0),
}


@pytest.mark.parametrize(("words", "fault"), HOPELESS.items(), ids=HOPELESS)
def test_a_server_that_fails_for_good_ends_the_read(server: HttpServer, words: str, fault: Fault) -> None:
    url = f"{server.url}/a.tar"
    known = remote.facts(url, QUICK)
    server.faults["/a.tar"] = fault
    options = patience(fault)._replace(tries=2)
    if fault.stall_after:
        options = options._replace(tries=1, stall=0.8)
    began = time.monotonic()
    with pytest.raises(Unavailable, match=rf"{url}: {words}.*of {SIZE}"):
        list(remote.chunks(url, 0, options, known))
    assert time.monotonic() - began < options.tries * options.stall + 1.5
    assert len(server.gets("/a.tar")) == options.tries


def test_a_trickle_counts_as_a_stall(server: HttpServer) -> None:
    known = remote.facts(f"{server.url}/a.tar", QUICK)
    server.faults["/a.tar"] = Fault(trickle=0.05)
    with pytest.raises(Unavailable, match=r"stalled: only \d+ bytes for 0.8 s"):
        list(remote.chunks(f"{server.url}/a.tar", 0, QUICK._replace(tries=1, stall=0.8), known))


class WithCode(Exception):
    code = 429  # as gcsfs has it


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError("Forbidden: b/bucket/o x"), "forbidden"),  # as gcsfs says it
        (type("NoCredentialsError", (Exception,), {})("Unable to locate credentials"), "forbidden"),
        (FileNotFoundError("x"), "missing"),
        (WithCode("slow down"), "failed"),
        (ConnectionResetError("x"), "failed"),
        (TimeoutError(), "failed"),
        (type("ReadTimeoutError", (Exception,), {})("x"), "failed"),
        (OSError(22, "bad bucket name"), "refused"),
        (ValueError("bad\nURL"), "refused"),
    ],
    ids=repr,
)
def test_errors_of_all_libraries_are_understood(error: Exception, kind: str) -> None:
    problem = transport.explain(error, 60)
    assert problem.kind == kind
    assert problem.what and "\n" not in problem.what


def test_nobody_at_the_address_is_said(server: HttpServer) -> None:
    with pytest.raises(Unavailable, match=r"http://127.0.0.1:9/a.tar: Cannot connect.*\(2 tries\)"):
        remote.facts("http://127.0.0.1:9/a.tar", QUICK._replace(tries=2))


def test_a_body_that_is_shorter_than_promised_is_no_object(server: HttpServer) -> None:
    server.faults["/a.tar"] = Fault(length=SIZE + 10, methods=("HEAD", "GET"))
    assert remote.facts(f"{server.url}/a.tar").size == SIZE + 10
    with pytest.raises(Unavailable, match=rf"ends at byte {SIZE}, not {SIZE + 10}"):
        all_of(f"{server.url}/a.tar")


def test_an_object_that_changed_is_no_mixture(server: HttpServer) -> None:
    url = f"{server.url}/a.tar"
    known = remote.facts(url, QUICK)
    assert known == remote.facts(url, QUICK) and known.size == SIZE and known.version
    server.faults["/a.tar"] = Fault(cut_after=150_000)
    pieces = remote.chunks(url, 0, QUICK)
    next(pieces)
    (server.folder / "a.tar").write_bytes(DATA[::-1])
    with pytest.raises(Unavailable, match=r"changed while it was read"):
        list(pieces)
    with pytest.raises(Unavailable, match=r"changed"):
        list(remote.chunks(url, 0, QUICK, known))
    with pytest.raises(Unavailable, match=r"ends at byte"):
        all_of(url, SIZE + 1)


def test_compressed_or_endless_answers_are_refused(server: HttpServer) -> None:
    server.faults["/a.tar"] = Fault(headers={"Content-Encoding": "gzip"}, methods=("HEAD", "GET"))
    with pytest.raises(Unavailable, match=r"Content-Encoding 'gzip'"):
        remote.facts(f"{server.url}/a.tar", QUICK)


def test_small_objects_are_read_and_http_is_not_written(server: HttpServer) -> None:
    url = f"{server.url}/a.tar"
    assert remote.read_small(url, QUICK) == DATA
    assert remote.read_small(f"{server.url}/none", QUICK) is None
    assert all_of(url, SIZE) == b""
    for read_only in (url, "hf://datasets/user/name/a.idx"):
        assert not remote.write_small(read_only, b"x", QUICK)
    with pytest.raises(Unavailable, match=rf"{SIZE} bytes, over the limit of 1000"):
        remote.read_small(url, QUICK, limit=1000)
    server.faults["/a.tar"] = Fault(status=500, methods=("HEAD", "GET"))
    with pytest.raises(Unavailable, match=r"500"):
        remote.read_small(url, QUICK)


def test_s3_is_listed_read_and_written(bucket: str) -> None:
    assert remote.glob(f"{bucket}/") == [f"{bucket}/a.tar", f"{bucket}/b.tar", f"{bucket}/empty.tar"]
    assert remote.glob(f"{bucket}/?.t*") == [f"{bucket}/a.tar", f"{bucket}/b.tar", f"{bucket}/b.txt"]
    assert remote.glob(f"{bucket}/*/c.tar") == [f"{bucket}/sub/c.tar"]
    assert remote.glob(f"{bucket}/none/") == remote.glob("s3://other/") == []
    known = remote.facts(f"{bucket}/a.tar")
    assert known.size == SIZE and known.version
    for start in (0, 99_999, SIZE):
        assert all_of(f"{bucket}/a.tar", start) == DATA[start:]
    assert remote.read_small(f"{bucket}/new.idx") is None
    assert remote.write_small(f"{bucket}/new.idx", b"one")
    before = remote.facts(f"{bucket}/new.idx")
    assert remote.write_small(f"{bucket}/new.idx", b"two")
    assert remote.read_small(f"{bucket}/new.idx") == b"two"
    assert remote.facts(f"{bucket}/new.idx") != before
    for missing in (f"{bucket}/none.tar", f"{bucket}/sub", "s3://other/a.tar"):
        with pytest.raises(Unavailable, match=missing) as caught:
            remote.facts(missing)
        assert caught.value.kind == "missing"


def test_s3_keys_that_are_not_accepted_are_said(bucket: str) -> None:
    def accept(requests: bytes) -> None:
        url, headers = os.environ["AWS_ENDPOINT_URL"] + "/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, requests, headers, method="POST"), timeout=10).close()

    accept(b"0")
    try:
        for action in (remote.facts, lambda url: remote.glob(f"{bucket}/")):
            with pytest.raises(Unavailable, match=r"permission denied") as caught:
                action(f"{bucket}/a.tar")
            assert caught.value.kind == "forbidden"
        assert not remote.write_small(f"{bucket}/b.idx", b"x")
        assert remote.read_small(f"{bucket}/a.tar") is None
    finally:
        accept(b"inf")


S3_FAULTS = {
    "none": Fault(),
    "503 twice": Fault(status=503, times=2),
    "no answer once": Fault(silent=True, times=1),
    "stalls in the body": Fault(stall_after=50_000, times=1),
    "cut once": Fault(cut_after=50_000, times=1),
    "every answer is cut": Fault(cut_after=90_000),  # shorter ranges come through
}


@pytest.mark.parametrize("fault", S3_FAULTS.values(), ids=S3_FAULTS)
def test_s3_bytes_are_exact_whatever_goes_wrong(server: HttpServer, fault: Fault) -> None:
    (server.folder / "bucket").mkdir()
    (server.folder / "a.tar").rename(server.folder / "bucket" / "a.tar")
    server.faults["/bucket/a.tar"] = Fault(**vars(fault))
    with s3_environment(server.url):
        assert all_of("s3://bucket/a.tar", 0, patience(fault)) == DATA
    asked = [request.start for request in server.gets("/bucket/a.tar")]
    assert asked == sorted(asked)


def test_an_s3_server_that_fails_for_good_ends_the_read(server: HttpServer) -> None:
    (server.folder / "bucket").mkdir()
    (server.folder / "a.tar").rename(server.folder / "bucket" / "a.tar")
    url, path = "s3://bucket/a.tar", "/bucket/a.tar"
    with s3_environment(server.url):
        known = remote.facts(url, SHORT._replace(tries=9))
        for fault, words in (
            (Fault(silent=True), "stalled"),
            (Fault(stall_after=10), "stalled"),
            (Fault(status=503), ""),
        ):
            server.faults[path], before = fault, len(server.gets(path))
            began = time.monotonic()
            with pytest.raises(Unavailable, match=rf"{url}: {words}.* at byte 0 of {SIZE} \(2 tries\)"):
                list(remote.chunks(url, 0, patience(fault)._replace(tries=2), known))
            assert time.monotonic() - began < 3
            assert len(server.gets(path)) == before + 2  # no tries but ours
        server.faults[path] = Fault(status=403)
        with pytest.raises(Unavailable, match=r"permission denied"):
            all_of(url)


def test_an_s3_object_that_changes_is_no_mixture(bucket: str) -> None:
    remote.write_small(f"{bucket}/changing.tar", DATA)
    pieces = remote.chunks(f"{bucket}/changing.tar", 0, QUICK)
    next(pieces)
    remote.write_small(f"{bucket}/changing.tar", DATA[::-1])
    with pytest.raises(Unavailable, match=r"changed while it was read"):
        list(pieces)
    with pytest.raises(Unavailable, match=r"changed"):
        list(remote.chunks(f"{bucket}/changing.tar", 0, QUICK, Facts(SIZE, "another")))
