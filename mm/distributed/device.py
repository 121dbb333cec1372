"""Where and how a step runs: device, threads, precision, compilation of blocks."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch._functorch.config
import torch._inductor.config
from torch import nn

from mm.config import ConfigError

if TYPE_CHECKING:
    from mm.config import ParallelConfig


def pick_device(config: ParallelConfig) -> torch.device:
    """The device of this process; also sets its share of CPU threads. Raises ConfigError for a missing GPU."""
    cores, local = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.threads or max(1, cores // local))
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("parallel.device = cuda: torch sees no GPU; use --parallel.device cpu")
    if config.device == "cpu" or not available:
        keep_memory()
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_memory() -> None:
    """Have malloc keep what tensors give back, up to 2 GiB: else each step's memory is cleared by the kernel again.

    Does nothing where the C library is not glibc.
    """
    with contextlib.suppress(AttributeError, OSError):
        malloc_option = ctypes.CDLL(None).mallopt
        malloc_option(_MMAP_THRESHOLD, 1 << 30)
        malloc_option(_TRIM_THRESHOLD, 2**31 - 1)


def autocast(config: ParallelConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 for matrix products where the config asks for it, float32 for everything else."""
    if config.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


_GRAPHS = 256  # of one block's code: towers, shapes, with and without gradients


def compile_blocks(module: nn.Module, device: torch.device) -> str:
    """Compile every block of every stack (`blocks`), each kind once, and say what was done.

    Block by block keeps the warm-up short: a stack of equal blocks is one small graph, not one large one.
    """
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    found = compiler()
    if device.type == "cpu" and (found is None or not headers.is_file()):
        return "no C++ compiler found (g++ or clang++, and Python's headers): running eager, which is slower"
    if device.type == "cpu" and found is not None:
        # the processor's own flags already say which vector instructions it has: skip compiling a test for each
        torch._inductor.config.cpp.vec_isa_ok = True
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns that there is no CUDA
        torch._inductor.config.cpp.cxx = (None, found)
        # activations are made again in the backward, which takes no longer than to read them back
        torch._functorch.config.ban_recompute_materialized_backward = False
    # blocks share their code: past the limit later ones would run eager, and in a resumed process perhaps other ones
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    count = 0
    for owner in module.modules():
        for block in getattr(owner, "blocks", []):
            block.compile(dynamic=False)
            count += 1
    return f"compiling {count} blocks"


def compiler() -> str | None:
    """The C++ compiler that torch would use on a CPU."""
    names = [os.environ.get("CXX", ""), "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)
