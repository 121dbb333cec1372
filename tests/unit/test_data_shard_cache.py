from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mm.data import remote, shard_cache
from mm.data.remote import Facts, Options, Unavailable
from mm.data.shard_cache import ShardCache
from servers import Fault, HttpServer, http_server, s3_server, s3_upload

SIZE = 300_000
NAMES = [f"{letter}.tar" for letter in "abcd"]
QUICK = Options(tries=2, stall=10.0, first_delay=0.01, chunk=50_000)
SHORT = QUICK._replace(stall=0.4)  # where the server stalls
FETCH = """
import sys
from mm.data.remote import Facts, Options
from mm.data.shard_cache import ShardCache
folder, url, size, version = sys.argv[1:]
print("up", flush=True)
sys.stdin.readline()
print(ShardCache(folder, 10**9, Options(stall=20, chunk=50_000)).path(url, Facts(int(size), version)), flush=True)
"""
pytestmark = pytest.mark.timeout(60)


def content(name: str) -> bytes:
    return random.Random(name).randbytes(SIZE)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HttpServer]:
    (tmp_path / "served").mkdir()
    for name in NAMES:
        (tmp_path / "served" / name).write_bytes(content(name))
    with http_server(tmp_path / "served") as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(str(tmp_path / "cache"), 10**9, QUICK)


def read(path: str) -> bytes:
    return Path(path).read_bytes()


def files(cache: ShardCache, ending: str = "") -> list[Path]:
    return sorted(path for path in Path(cache.folder).iterdir() if path.name.endswith(ending))


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def process(cache: ShardCache, url: str, known: Facts, root: Path) -> subprocess.Popen[str]:
    """One that fetches when told by `go`."""
    command = [sys.executable, "-c", FETCH, cache.folder, url, str(known.size), known.version]
    return subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(started: subprocess.Popen[str]) -> None:
    assert started.stdin and started.stdout and started.stdout.readline() == "up\n"
    started.stdin.write("\n")
    started.stdin.flush()


def test_an_object_is_fetched_once(server: HttpServer, cache: ShardCache) -> None:
    url = f"{server.url}/a.tar"
    known = remote.facts(url)
    assert read(cache.path(url, known)) == content("a.tar")
    before = len(server.log)
    assert read(pickle.loads(pickle.dumps(cache)).path(url, known)) == content("a.tar")
    assert len(server.log) == before  # not a request
    assert cache.path(url) == cache.path(url, known)
    assert server.sent("/a.tar") == SIZE
    assert [path.suffix for path in files(cache)] == [".tar"]


def test_threads_share_one_fetch(server: HttpServer, cache: ShardCache) -> None:
    server.faults["/a.tar"] = Fault(delay=0.3)
    with ThreadPoolExecutor(6) as pool:
        paths = set(pool.map(cache.path, [f"{server.url}/a.tar"] * 6))
    assert len(paths) == 1 and read(paths.pop()) == content("a.tar")
    assert len(server.gets("/a.tar")) == 1
    assert [path.suffix for path in files(cache)] == [".tar"]


def test_processes_share_one_fetch(server: HttpServer, cache: ShardCache, root: Path) -> None:
    url = f"{server.url}/a.tar"
    server.faults["/a.tar"] = Fault(delay=0.8)
    started = [process(cache, url, remote.facts(url), root) for _ in range(2)]
    for one in started:
        go(one)
    paths = {one.communicate(timeout=30)[0].strip() for one in started}
    assert len(paths) == 1 and read(paths.pop()) == content("a.tar")
    assert len(server.gets("/a.tar")) == 1


def test_a_killed_fetch_is_continued(server: HttpServer, cache: ShardCache, root: Path) -> None:
    url = f"{server.url}/a.tar"
    server.faults["/a.tar"] = Fault(stall_after=200_000, times=1)
    known = remote.facts(url)
    killed = process(cache, url, known, root)
    go(killed)
    until(lambda: os.path.isdir(cache.folder) and any(path.stat().st_size == 200_000 for path in files(cache, ".part")))
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=10)
    assert not files(cache, ".tar")
    assert read(cache.path(url, known)) == content("a.tar")
    assert [request.start for request in server.gets("/a.tar")] == [0, 200_000]
    assert [path.suffix for path in files(cache)] == [".tar"]


def test_a_partial_file_of_another_version_is_not_continued(server: HttpServer, cache: ShardCache) -> None:
    url = f"{server.url}/a.tar"
    server.faults["/a.tar"] = Fault(cut_after=200_000, times=1)
    with pytest.raises(Unavailable, match=r"connection cut at byte 200000"):
        ShardCache(cache.folder, 10**9, QUICK._replace(tries=1)).path(url)
    assert [path.stat().st_size for path in files(cache, ".part")] == [200_000]
    (server.folder / "a.tar").write_bytes(content("new"))
    assert read(cache.path(url)) == content("new")


def test_what_changed_since_it_was_indexed_is_refused(server: HttpServer, cache: ShardCache) -> None:
    url = f"{server.url}/a.tar"
    old = remote.facts(url)
    (server.folder / "a.tar").write_bytes(content("new")[1:])
    with pytest.raises(Unavailable, match=rf"{url}: changed since it was indexed: was {SIZE} bytes.*mm shards index"):
        cache.path(url, old)
    assert read(cache.path(url)) == content("new")[1:]
    with pytest.raises(Unavailable, match=r"changed since"):
        cache.path(url, Facts(SIZE, remote.facts(url).version))


def test_a_change_during_the_fetch_leaves_nothing(server: HttpServer, cache: ShardCache) -> None:
    url = f"{server.url}/a.tar"
    server.faults["/a.tar"] = Fault(stall_after=200_000, times=1)
    cache.options = SHORT
    with ThreadPoolExecutor(1) as pool:
        fetched = pool.submit(cache.path, url)
        until(lambda: bool(server.gets("/a.tar")))
        (server.folder / "a.tar").write_bytes(content("new"))
        with pytest.raises(Unavailable, match=r"changed while it was read"):
            fetched.result()
    assert not files(cache, ".tar") and not files(cache, ".part")
    assert read(cache.path(url)) == content("new")


def test_a_damaged_file_is_fetched_again(server: HttpServer, cache: ShardCache) -> None:
    path = cache.path(f"{server.url}/a.tar")
    os.truncate(path, 100)
    assert read(cache.path(f"{server.url}/a.tar")) == content("a.tar")
    Path(path).rename(f"{path[:-4]}.part")
    with open(f"{path[:-4]}.part", "ab") as longer:
        longer.write(b"more")
    assert read(cache.path(f"{server.url}/a.tar")) == content("a.tar")


def test_the_least_recently_used_make_room(server: HttpServer, cache: ShardCache) -> None:
    cache.limit_bytes = int(2.5 * SIZE)
    urls = [f"{server.url}/{name}" for name in NAMES]
    a, b = cache.path(urls[0]), cache.path(urls[1])
    held = cache.open(urls[1])
    cache.path(urls[0])  # used again
    c = cache.path(urls[2])
    assert {str(path) for path in files(cache)} == {a, c}
    assert os.pread(held, SIZE, 0) == content("b.tar")  # who has it open reads on
    os.close(held)
    d = cache.path(urls[3])
    assert {str(path) for path in files(cache)} == {c, d} and b not in (c, d)
    assert sum(path.stat().st_size for path in files(cache)) <= cache.limit_bytes


def test_an_object_larger_than_the_limit_still_works(server: HttpServer, cache: ShardCache) -> None:
    cache.limit_bytes = SIZE // 3
    for name in NAMES[:2]:
        assert read(cache.path(f"{server.url}/{name}")) == content(name)
        assert len(files(cache)) == 1


def test_only_our_files_make_room(server: HttpServer, cache: ShardCache, tmp_path: Path) -> None:
    cache.limit_bytes = SIZE
    os.mkdir(cache.folder)
    (tmp_path / "precious").write_bytes(b"x" * SIZE)
    foreign = [Path(cache.folder, name) for name in ("notes.txt", "x.tar", f"{'0' * 40}.tar.bak")]
    for path in foreign:
        path.write_bytes(b"y" * SIZE)
    link = Path(cache.folder, f"{'0' * 40}.tar")
    link.symlink_to(tmp_path / "precious")
    for name in NAMES:
        cache.path(f"{server.url}/{name}")
    assert all(path.exists() for path in (*foreign, link, tmp_path / "precious"))
    assert len(files(cache)) == len(foreign) + 2


def test_links_in_the_folder_are_not_followed(server: HttpServer, cache: ShardCache, tmp_path: Path) -> None:
    url = f"{server.url}/a.tar"
    whole = Path(cache.path(url))
    (tmp_path / "precious").write_bytes(content("b.tar"))
    for name in (whole, whole.with_suffix(".part")):
        whole.unlink(missing_ok=True)
        name.symlink_to(tmp_path / "precious")
        with pytest.raises(Unavailable, match=r"another folder"):
            cache.path(url)
        name.unlink()
    assert (tmp_path / "precious").read_bytes() == content("b.tar")


def test_abandoned_partial_files_make_room_but_not_those_being_written(
    server: HttpServer, cache: ShardCache, root: Path
) -> None:
    cache.limit_bytes = 2 * SIZE
    url = f"{server.url}/a.tar"
    server.faults["/a.tar"] = Fault(stall_after=200_000, times=1)
    writing = process(cache, url, remote.facts(url), root)
    go(writing)
    until(lambda: os.path.isdir(cache.folder) and any(path.stat().st_size == 200_000 for path in files(cache, ".part")))
    abandoned = Path(cache.folder, f"{'0' * 40}.part")
    abandoned.write_bytes(b"x" * SIZE)
    cache.path(f"{server.url}/b.tar")
    assert not abandoned.exists() and len(files(cache, ".part")) == 1
    writing.kill()
    writing.communicate(timeout=10)
    cache.path(f"{server.url}/c.tar")
    assert len(files(cache, ".part")) == 0


def test_a_full_disk_is_said_before_the_fetch(
    server: HttpServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.path(f"{server.url}/a.tar")
    monkeypatch.setattr(shard_cache, "_free", lambda folder: SIZE - 1)
    with pytest.raises(
        Unavailable, match=rf"b.tar: {SIZE} bytes more do not fit in .*cache, where {SIZE - 1} are free"
    ):
        cache.path(f"{server.url}/b.tar")
    assert not server.gets("/b.tar")
    assert not files(cache, ".tar")  # it made what room it could


def test_a_folder_that_cannot_be_written_is_said(server: HttpServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Unavailable, match=r"a.tar: cannot be kept in .*/file/cache: Not a directory"):
        ShardCache(str(tmp_path / "file" / "cache"), 10**9, QUICK).path(f"{server.url}/a.tar")


def test_who_waited_for_a_failure_does_not_try_for_as_long_again(server: HttpServer, cache: ShardCache) -> None:
    known = remote.facts(f"{server.url}/a.tar")
    server.faults["/a.tar"] = Fault(silent=True)
    cache.options = SHORT

    def fetch(_: int) -> str:
        with pytest.raises(Unavailable) as caught:
            cache.path(f"{server.url}/a.tar", known)
        return str(caught.value)

    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        said = set(pool.map(fetch, range(8)))
    assert len(said) == 1 and "stalled" in said.pop()
    assert time.monotonic() - began < 3 * SHORT.tries * SHORT.stall
    assert len(server.gets("/a.tar")) == SHORT.tries
    del server.faults["/a.tar"]
    assert read(cache.path(f"{server.url}/a.tar", known)) == content("a.tar")
    assert [path.suffix for path in files(cache)] == [".tar"]


def test_a_lock_on_a_file_that_is_gone_by_then_is_none(tmp_path: Path) -> None:
    part = str(tmp_path / "x.part")

    def wait() -> tuple[int, bool]:
        with shard_cache._locked(part) as (fd, waited):
            return os.fstat(fd).st_size, os.path.samestat(os.fstat(fd), os.stat(part)) and waited > 0

    with ThreadPoolExecutor(1) as pool:
        with shard_cache._locked(part) as (fd, waited):
            assert waited == 0
            os.write(fd, b"whole")
            second = pool.submit(wait)
            time.sleep(0.2)
            os.rename(part, tmp_path / "x.tar")
        assert second.result(timeout=10) == (0, True)
    assert os.listdir(tmp_path) == ["x.tar"]


def test_what_comes_next_is_fetched_ahead(server: HttpServer, cache: ShardCache) -> None:
    urls = [f"{server.url}/{name}" for name in NAMES]
    known = [remote.facts(url) for url in urls]
    cache.ahead([(f"{server.url}/none.tar", None), ("pipe:x", None), (urls[0], known[0]), (urls[1], None)])
    until(lambda: os.path.isdir(cache.folder) and len(files(cache, ".tar")) == 2)
    until(lambda: not any(thread.name == "mm-shards-ahead" for thread in threading.enumerate()))
    assert read(cache.path(urls[1], known[1])) == content("b.tar")
    cache.ahead([(urls[2], known[2])])
    until(lambda: len(files(cache, ".tar")) == 3)
    assert [server.sent(f"/{name}") for name in NAMES] == [SIZE, SIZE, SIZE, 0]


def test_fetching_ahead_leaves_half_of_the_room(server: HttpServer, cache: ShardCache) -> None:
    cache.limit_bytes = 4 * SIZE + 100
    urls = [f"{server.url}/{name}" for name in NAMES]
    cache.ahead([(url, None) for url in urls])
    until(lambda: not any(thread.name == "mm-shards-ahead" for thread in threading.enumerate()))
    assert [server.sent(f"/{name}") for name in NAMES] == [SIZE, SIZE, 0, 0]


def test_a_hung_fetch_ahead_does_not_keep_the_interpreter(server: HttpServer, cache: ShardCache, root: Path) -> None:
    server.faults["/a.tar"] = Fault(silent=True)
    code = "import sys, time; from mm.data.shard_cache import ShardCache\n"
    code += "ShardCache(sys.argv[1], 10**9).ahead([(sys.argv[2], None)]); time.sleep(1.5); print('end')"
    command = [sys.executable, "-c", code, cache.folder, f"{server.url}/a.tar"]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=15, check=False)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("end\n", "", 0)
    assert server.gets("/a.tar")


def test_s3_objects_are_kept_too(cache: ShardCache, tmp_path: Path) -> None:
    (tmp_path / "put").mkdir()
    (tmp_path / "put" / "a.tar").write_bytes(content("a.tar"))
    with s3_server():
        url = f"{s3_upload('bucket', tmp_path / 'put')}/a.tar"
        known = remote.facts(url)
        assert read(cache.path(url, known)) == content("a.tar")
        remote.write_small(url, content("new"))
        assert read(cache.path(url)) == content("new")
    assert read(cache.path(url, known)) == content("a.tar")  # from here, with the store gone
