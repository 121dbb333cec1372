"""Between a training step and the disk: host copies that training does not touch, and files hashed while written."""

from __future__ import annotations

import hashlib
import heapq
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor

from mm.training.manifest import Entry

OVERHEAD = 2048  # bytes that a tensor takes on disk beside its content, at most


def disk_bytes(tensors: Mapping[str, Tensor]) -> int:
    """What a checkpoint of these tensors takes on disk, the shards of all processes together."""
    return sum(tensor.numel() * tensor.element_size() + OVERHEAD for tensor in tensors.values())


def shared_out(sizes: Mapping[str, int], rank: int, ranks: int) -> list[str]:
    """The names that process `rank` takes care of: the largest first, each to whoever has the least so far.

    Every process must give the same sizes.
    """
    loads = [(0, other) for other in range(ranks)]
    mine = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, taker = loads[0]
        heapq.heapreplace(loads, (load + sizes[name] + 1, taker))
        if taker == rank:
            mine.append(name)
    return mine


class Staging:
    """Host memory for the copy of one checkpoint, used again for the next."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this process writes: its shard of every DTensor, and its share of the tensors that all have alike.

        The former copy is overwritten. The copies of tensors on a GPU are in page-locked memory.
        """
        alike = {name: tensor.nbytes for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
        taken = {*shared_out(alike, self.rank, self.ranks), *(tensors.keys() - alike.keys())}
        kept, self.buffers = self.buffers, {}
        staged, devices = {}, set()
        for name in sorted(taken):
            tensor = tensors[name].detach()
            local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            buffer = kept.get(name)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            buffer.copy_(local, non_blocking=True)
            self.buffers[name] = buffer
            if local.is_cuda:
                devices.add(local.device)
            # not DTensor.from_local, which would move the copy back to the device of the mesh
            staged[name] = DTensor(buffer, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else buffer
        for device in devices:
            torch.cuda.synchronize(device)
        return staged


class HashedFile(io.BufferedWriter):
    """A new file that knows the sha256 of what was written, from its first byte to its last without a seek."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"), 1 << 20)
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        count = super().write(data)
        self.digest.update(data)
        self.size += count
        return count

    def seek(self, *_: Any) -> int:
        raise io.UnsupportedOperation("a file that is hashed while it is written is written in order")


class HashedFiles(FileSystem):
    """The files of torch.distributed.checkpoint, hashed on the way, so that none is read again."""

    def __init__(self) -> None:
        self.written: dict[str, Entry] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb", mode
        with HashedFile(Path(path)) as file:
            yield file
        self.written[Path(path).name] = Entry(file.size, file.digest.hexdigest())

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)
