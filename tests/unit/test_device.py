"""What a CPU process does with the memory that tensors give back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_RESIDENT = """
import sys
import torch
from mm.config import ParallelConfig
from mm.distributed.device import pick_device

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024

if sys.argv[1] == "kept":
    pick_device(ParallelConfig(device="cpu"))
torch.ones(1000)
before = resident()
large = torch.ones(64 << 18)  # 64 MB
del large
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_memory_of_a_step_is_kept_for_the_next() -> None:
    grown = {}
    for how in ("returned", "kept"):
        done = subprocess.run([sys.executable, "-c", _RESIDENT, how], capture_output=True, text=True, check=True)
        grown[how] = float(done.stdout)
    assert grown["kept"] > 60, "MB that torch gave back and the process still has"
    assert grown["returned"] < 8, "without it the kernel has it back: the setting is what keeps it"
