"""What parallelisation does to a step in one process, and which groupings of processes are refused."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mm import config as settings
from mm.adapters.text import train_tokenizer
from mm.config import ConfigError, ParallelConfig
from mm.distributed.parallelize import blocks, make_mesh, parallelize, recompute
from mm.distributed.world import World, joined
from mm.objectives.step import TrainStep, build_step
from mm.types import Batch

CPU = torch.device("cpu")


def build(*flags: str) -> TrainStep:
    config = settings.override(settings.load("configs/debug.py"), flags)
    torch.manual_seed(0)
    step = build_step(config, train_tokenizer(["red heart", "cat"], 300))
    for parameter in step.parameters():  # what starts at zero would hide much
        torch.nn.init.normal_(parameter, std=0.1) if not parameter.any() else None
    return step


def batch(count: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    text = torch.randint(3, 200, (count, 6), generator=generator)
    lengths = {"text": torch.full((count,), 6)}
    return Batch({"image": pictures, "text": text}, lengths, torch.arange(count), [str(n) for n in range(count)])


def gradients(step: TrainStep) -> dict[str, Tensor]:
    step.zero_grad()
    step.backward(batch())
    return {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations made inside and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        out = operation(*arguments, **(named or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        return out


def kept(step: TrainStep) -> int:
    """Bytes that the forward leaves for the backward."""
    gc.collect()
    with Alive() as alive:
        loss = step(batch(64))
        gc.collect()
        size = sum(alive.sizes.values())
    del loss
    return size


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputed_gradients_are_the_same_bits(how: str) -> None:
    plain, again = build(), build()
    assert recompute(again, how) == len(blocks(again)) == 5
    wanted, found = gradients(plain), gradients(again)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_recomputation_keeps_less_for_the_backward() -> None:
    size = {"none": kept(build())}
    for how in ("selective", "full"):
        step = build()
        recompute(step, how)
        size[how] = kept(step)
    assert size["full"] < 0.5 * size["none"]
    assert size["full"] < 0.8 * size["selective"] and size["selective"] < 0.8 * size["none"]


@pytest.mark.parametrize("how", ["selective", "full"])
def test_blocks_are_compiled_with_recomputation_too(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind once, of image and text. torch.compile says nothing of what it passes over."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile(self, backend="eager", **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    only = ("--objectives.diffusion", "None", "--model.denoiser", "None")
    step = build(*only)
    config = ParallelConfig(device="cpu", activation_checkpointing=how, compile=True)  # type: ignore[arg-type]
    said = parallelize(step, config, World(), CPU, False).said
    found, wanted = gradients(step), gradients(build(*only))
    assert "compiling 3 blocks" in said
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-5)


def test_one_process_is_left_as_it_is() -> None:
    step = build()
    for strategy in ("ddp", "fsdp", "hybrid"):
        config = ParallelConfig(device="cpu", strategy=strategy, compile=False)  # type: ignore[arg-type]
        parallel = parallelize(step, config, World(), CPU, False)
        assert parallel.forward is step and parallel.said == [] and type(step) is TrainStep
        with parallel.gathered(), parallel.sync(False):
            pass


def test_groups_that_do_not_divide_are_refused() -> None:
    config = ParallelConfig(strategy="hybrid", shard=4)
    with pytest.raises(ConfigError, match="parallel.shard = 4: 6 processes are no multiple of it"):
        make_mesh(config, World(size=6, local_size=2), CPU)
    with pytest.raises(ConfigError, match="parallel.shard = 3: 8 processes"):
        make_mesh(ParallelConfig(strategy="hybrid"), World(size=8, local_size=3), CPU)


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="WORLD_SIZE = 2, but MASTER_ADDR, MASTER_PORT is not set; start with torch"):
        joined(CPU, 1).__enter__()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE = 'two': must be a number"):
        joined(CPU, 1).__enter__()


def test_no_environment_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(CPU, 1) as world:
        assert (world.rank, world.size, world.control) == (0, 1, None)
