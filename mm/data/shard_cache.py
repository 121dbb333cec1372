"""Local copies of remote shards: one fetch a machine, whole files only, the least recently used ones make room.

The folder may be shared by threads, worker processes and ranks. A fetch holds `flock` on the partial file that it
writes, so that others wait for it, a killed process lets go of it, and who comes next continues where it ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import stat
import threading
import time
from collections.abc import Iterator, Sequence

from mm.config import ConfigError
from mm.data.remote import DEFAULTS, Facts, Options, Unavailable, check, chunks
from mm.data.remote import facts as look_up

_OURS = re.compile(r"[0-9a-f]{40}\.(tar|part|failed)")
_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC


class ShardCache:
    """Files of remote objects in `folder`, together at most about `limit_bytes`.

    The limit is passed by one object that is larger than it, and by fetches that run at the same time.
    Picklable; copies share the folder and nothing else.
    """

    def __init__(self, folder: str, limit_bytes: int, options: Options = DEFAULTS) -> None:
        self.folder, self.limit_bytes, self.options = os.path.abspath(folder), limit_bytes, options
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._wanted: list[tuple[str, Facts | None]] = []
        self._thread: threading.Thread | None = None

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._start()

    def path(self, url: str, facts: Facts | None = None) -> str:
        """A complete local file of the object, fetched where it is not there yet.

        Open it at once, or use `open`: a later fetch may remove it. With `facts` of an object that is here, no request
        is made. Raises Unavailable; also where the object is no longer what `facts` say.
        """
        check(url)
        known = facts or look_up(url, self.options)
        name = hashlib.blake2b(f"{url}\n{known.version}".encode(), digest_size=20).hexdigest()
        stem = os.path.join(self.folder, name)
        try:
            if not _have(f"{stem}.tar", known.size):
                os.makedirs(self.folder, mode=0o700, exist_ok=True)
                with _locked(f"{stem}.part") as (fd, waited):
                    if not _have(f"{stem}.tar", known.size):  # else it was fetched while we waited
                        self._fetch(url, known, stem, fd, waited)
        except Unavailable:
            raise
        except OSError as error:
            what = f"cannot be kept in {self.folder}: {error.strerror or error}"
            raise Unavailable(f"{url}: {what}; set another folder for shards", "refused") from error
        return f"{stem}.tar"

    def open(self, url: str, facts: Facts | None = None) -> int:
        """A file descriptor of the object, which stays readable whatever happens to the file. Raises Unavailable."""
        while True:
            path = self.path(url, facts)
            with contextlib.suppress(FileNotFoundError):  # removed since, to make room for another one
                return os.open(path, os.O_RDONLY | _FLAGS)

    def ahead(self, urls: Sequence[tuple[str, Facts | None]]) -> None:
        """A hint: fetch these in the background, in this order, up to half of the limit. Replaces the earlier hint."""
        with self._lock:
            self._wanted = list(urls)
            if self._wanted and self._thread is None:
                self._thread = threading.Thread(target=self._fetch_ahead, name="mm-shards-ahead", daemon=True)
                self._thread.start()

    def _fetch_ahead(self) -> None:
        done: dict[str, int] = {}  # bytes of what of the hint is here
        while True:
            with self._lock:
                done = {url: done[url] for url, _ in self._wanted if url in done}
                waiting = [item for item in self._wanted if item[0] not in done]
                if not waiting or sum(done.values()) > self.limit_bytes // 2:
                    self._thread = None
                    return
            url, known = waiting[0]
            done[url] = 0
            # whoever needs the shard meets the same error, and says so
            with contextlib.suppress(OSError, ConfigError):
                known = known or look_up(url, self.options)
                done[url] = known.size
                if sum(done.values()) <= self.limit_bytes // 2:
                    self.path(url, known)

    def _fetch(self, url: str, known: Facts, stem: str, fd: int, waited: float) -> None:
        """Completes the partial file `fd`, which is locked by us, and gives it its name."""
        note = f"{stem}.failed"
        with contextlib.suppress(FileNotFoundError):
            # those that we waited for tried for long enough; a file's time is up to some ms behind the clock
            if waited and os.lstat(note).st_mtime > waited - 0.1:
                raise Unavailable(_text(note))
            os.unlink(note)
        try:
            now = look_up(url, self.options)
            if now != known:
                what = f"was {known.size} bytes, version {known.version}; is {now.size} bytes, version {now.version}"
                raise Unavailable(f"{url}: changed since it was indexed: {what}; run mm shards index", "changed")
            have = os.fstat(fd).st_size
            if have > known.size:
                os.ftruncate(fd, have := 0)
            self._make_room(url, known.size - have)
            for piece in chunks(url, have, self.options, known):
                have += _write(fd, piece, have)
        except Unavailable as error:
            if error.kind == "changed":
                os.ftruncate(fd, 0)
            with contextlib.suppress(OSError), open(note, "x", encoding="utf-8") as file:
                file.write(str(error))
            raise
        os.rename(f"{stem}.part", f"{stem}.tar")

    def _make_room(self, url: str, need: int) -> None:
        """Removes the files used least recently until `need` bytes fit into the limit and onto the disk."""
        files = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                if _OURS.fullmatch(entry.name) and stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                    files.append((found.st_mtime_ns, entry.path, found.st_size))
        total = sum(size for _, _, size in files)
        for _, path, size in sorted(files):
            if total + need <= self.limit_bytes and _free(self.folder) >= need:
                return
            if _removed(path):
                total -= size
        if (free := _free(self.folder)) < need:
            what = f"{need} bytes more do not fit in {self.folder}, where {free} are free"
            raise Unavailable(f"{url}: {what}; make room, or set another folder for shards", "refused")


def _have(whole: str, size: int) -> bool:
    """Whether the file is there and whole; marks it as used. Raises Unavailable where it is not ours."""
    try:
        found = os.lstat(whole)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise Unavailable(f"{whole}: is no file of this user; set another folder for shards", "refused")
        if found.st_size != size:
            os.unlink(whole)
            return False
        now = time.time_ns()  # the kernel's own stamp moves in steps of some ms
        os.utime(whole, ns=(now, now), follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def _locked(part: str) -> Iterator[tuple[int, float]]:
    """Descriptor of the partial file, locked by us alone, and when we began to wait for that (0: we did not)."""
    waited = 0.0
    while True:
        fd = os.open(part, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600)
        try:
            if os.fstat(fd).st_uid != os.geteuid():
                raise Unavailable(f"{part}: is no file of this user; set another folder for shards", "refused")
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waited = waited or time.time()
                fcntl.flock(fd, fcntl.LOCK_EX)
            if not _is(fd, part):  # renamed or removed by whom we waited for
                continue
            try:
                yield fd, waited
            finally:
                if not os.fstat(fd).st_size and _is(fd, part):
                    os.unlink(part)
            return
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough where a forked process has the descriptor too
            os.close(fd)


def _is(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _removed(path: str) -> bool:
    """Removes one of our files, save a partial one that somebody is writing."""
    try:
        if not path.endswith(".part"):
            os.unlink(path)
            return True
        fd = os.open(path, os.O_RDWR | _FLAGS)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(fd, path):
                os.unlink(path)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def _write(fd: int, data: bytes, place: int) -> int:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, memoryview(data)[done:], place + done)
    return done


def _free(folder: str) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def _text(path: str) -> str:
    with open(os.open(path, os.O_RDONLY | _FLAGS), encoding="utf-8") as file:
        return file.read()
