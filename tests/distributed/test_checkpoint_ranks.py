"""Checkpoints of two gloo processes: what they write together, what others read, and that they fail together."""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mm.config import ConfigError
from mm.distributed.world import World
from mm.training import staging
from mm.training.checkpoint import SaveFailed
from saves import BEFORE, checkpoints, content, names, same, save, state, whole

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
WAIT = timedelta(seconds=60)


@contextmanager
def joined(rank: int, folder: Path) -> Iterator[World]:
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=WAIT)
    control, saving = (dist.new_group(backend="gloo", timeout=WAIT) for _ in range(2))
    yield World(rank, 2, rank, 2, control, saving)
    dist.destroy_process_group()


def sharded(seed: int) -> nn.Module:
    """A module in shards, with sides that two processes cannot share evenly, and one that only one of them has."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.LayerNorm(1))
    mesh = init_device_mesh("cpu", (2,))
    for layer in module:
        fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def plain(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.LayerNorm(1)).state_dict()


# -- every check is called by both processes, with a folder of their own


def alike(run: Path, world: World) -> None:
    """Tensors that all have alike are written once, half by each, and read by one process and by two."""
    calls: list[int] = []
    tensors = {f"model/{number}": torch.full((1000,), float(number)) for number in range(20)}
    checkpoints(run, world).save(1, tensors, {"order": "o"}, lambda: calls.append(1), wait=True)
    assert len(calls) == world.main
    sizes = [(run / f"checkpoints/step-00000001/__{rank}_0.distcp").stat().st_size for rank in range(2)]
    assert all(10 * 4000 < size < 10 * 4000 + 30_000 for size in sizes), sizes
    assert same(state(run)[1], tensors) and same(state(run, world)[1], tensors)


def of_one(run: Path, world: World) -> None:
    """What one process wrote, two read, and go on from."""
    if world.main:
        save(run, 1)
    dist.barrier()
    assert whole(run, 1, world)
    save(run, 2, world)
    assert whole(run, 2) and whole(run, 2, world)
    dist.barrier()
    if world.main:
        save(run, 3)
    dist.barrier()
    assert whole(run, 3, world)


def in_shards(run: Path, world: World) -> None:
    """Shards are saved as shards; one process reads them as plain tensors, and shards are read from plain ones."""
    module = sharded(world.rank)  # each process its own: only shards can tell
    local = module.state_dict()
    assert all(isinstance(tensor, DTensor) for tensor in local.values())
    wanted = {name: tensor.full_tensor() for name, tensor in local.items()}
    saved = checkpoints(run, world)
    saved.save(1, local, {})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    saved.finish()
    assert same(state(run)[1], wanted) and same(state(run, world)[1], wanted)
    found = saved.newest()
    assert found is not None and found.names["0.weight"] == ((7, 5), torch.float32)
    saved.read(found, local)
    assert same({name: parameter.full_tensor() for name, parameter in module.named_parameters()}, wanted)
    dist.barrier()
    if world.main:
        checkpoints(run).save(2, plain(3), {}, wait=True)
    dist.barrier()
    found = saved.newest()
    assert found is not None and found.step == 2
    saved.read(found, local)
    assert same({name: parameter.full_tensor() for name, parameter in module.named_parameters()}, plain(3))


def walk_back(run: Path, world: World) -> None:
    """All walk back together, whichever file is damaged; all refuse where nothing is whole."""
    for step in (1, 2, 3):
        save(run, step, world, keep=3)
    for step, name in ((3, "__1_0.distcp"), (2, "__0_0.distcp")):
        dist.barrier()
        if not world.main:
            path = run / f"checkpoints/step-{step:08d}/{name}"
            shutil.copy(run / f"checkpoints/step-00000001/{name}", path)
        dist.barrier()
        assert whole(run, step - 1, world)
    dist.barrier()
    if world.main:
        (run / "checkpoints/step-00000001/.metadata").unlink()
    dist.barrier()
    with pytest.raises(ConfigError, match="all 3 checkpoints are damaged"):
        checkpoints(run, world).newest()


def fail_together(run: Path, world: World) -> None:
    """An error on one process fails the save on both, with the same line, and the next one works."""
    save(run, 1, world)
    for point in (*BEFORE[:-1], "write"):
        for rank in range(2):
            os.environ["MM_FAULT"] = f"full:save.{point}@step=2,rank={rank}"
            saved = checkpoints(run, world)
            with pytest.MonkeyPatch.context() as patch:
                if point == "write" and world.rank == rank:
                    patch.setattr(staging.HashedFile, "write", no_room)
                saved.save(2, content(2), {"order": "o2"})
                with pytest.raises(SaveFailed) as caught:
                    saved.finish()
            lines = world.gather(str(caught.value))
            assert lines[0] == lines[1] and f"rank {rank}: " in lines[0], lines
            assert "No space left on device; step-00000001" in lines[0].replace(")", ""), lines
            dist.barrier()
            assert names(run) == ["step-00000001"] and whole(run, 1, world)
    del os.environ["MM_FAULT"]
    save(run, 2, world)
    assert whole(run, 2, world)


def no_room(self: Any, data: Any) -> int:
    raise OSError(28, "No space left on device")


def nothing_forgotten(run: Path, world: World) -> None:
    """A tensor that one process alone gives is a mistake; it is not left out in silence."""
    tensors = content(1)
    if not world.main:
        del tensors["model/weight"]
    with pytest.raises(SaveFailed, match="model/weight"):
        checkpoints(run, world).save(1, tensors, {}, wait=True)
    assert checkpoints(run, world).newest() is None


CHECKS = [alike, of_one, in_shards, walk_back, fail_together, nothing_forgotten]


def killed(run: Path, world: World) -> None:
    """Process 1 is gone in the middle of a save; the other one notes what it is told."""
    save(run, 1, world)
    os.environ["MM_FAULT"] = "kill:save.hashed@rank=1"
    saved = checkpoints(run, world)
    saved.save(2, content(2), {"order": "o2"})
    try:
        saved.finish()
    except SaveFailed as error:
        (run / "told").write_text(str(error))


def all_checks(rank: int, folder: Path) -> None:
    with joined(rank, folder) as world:
        for check in CHECKS:
            try:
                check(folder / check.__name__, world)
            except BaseException:
                (folder / f"{check.__name__}-{rank}.txt").write_text(traceback.format_exc())
                raise
            (folder / f"{check.__name__}-{rank}.txt").write_text("")
        killed(folder / "killed", world)
        os._exit(0)  # the interpreter's own end may wait for the process that is gone


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what came of each check, after one start of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    for check in (*CHECKS, killed):
        (folder / check.__name__).mkdir()
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=all_checks, args=(rank, folder), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    return folder


@pytest.mark.timeout(120)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_processes(outcomes: Path, check: Callable[..., None]) -> None:
    for rank in range(2):
        assert (outcomes / f"{check.__name__}-{rank}.txt").read_text() == ""


@pytest.mark.timeout(120)
def test_a_process_that_is_killed_fails_the_save_of_the_other(outcomes: Path) -> None:
    assert "step-00000001 is still whole" in (outcomes / "killed/told").read_text()
    assert whole(outcomes / "killed", 1)
