"""The tests of the Triton kernels in Triton's interpreter, which wants a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SECONDS = 280  # what a file may take on two busy cores; all of them take under four minutes on two idle ones


@pytest.mark.timeout(2 * SECONDS)
def test_triton_kernels_agree_with_float64_in_the_interpreter(root: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

    def run(file: Path) -> str:
        """What pytest says in the end where a file's tests fail; nothing where they pass."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
        try:
            done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired as late:
            return f"{file.name} takes more than {SECONDS} s:\n{(late.stdout or b'').decode()[-2000:]}\n"
        tail = (done.stdout + done.stderr)[-6000:]
        return f"{file.name}, exit status {done.returncode}:\n{tail}\n" if done.returncode else ""

    files = sorted((root / "tests" / "kernels" / "interpreted").glob("test_*.py"))
    assert files, "no tests of the Triton kernels"
    with ThreadPoolExecutor(2) as pool:  # the interpreter keeps one core busy
        failures = "".join(pool.map(run, files))
    assert not failures, failures
