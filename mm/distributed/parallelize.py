"""Many processes as one: recomputation, compilation and sharding, applied to a train step from outside, in this order.

The step itself knows only `Objective.group`. Gradients are means over processes of the gradients that each has from its
own rows, which the contrastive loss allows for (mm_kernels.contrastive_loss), so every strategy follows one process.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mm.config import ConfigError
from mm.distributed.device import compile_blocks
from mm.distributed.world import World
from mm.objectives.base import Objective
from mm.types import Loss

# torch's own calls of what it means to rename, once a call site and process; and views, which nothing here changes
warnings.filterwarnings("ignore", "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)`", FutureWarning)
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # its new name is newer than 2.9
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)

if TYPE_CHECKING:
    from mm.config import ParallelConfig
    from mm.objectives.step import TrainStep


@dataclass
class Parallel:
    """A train step as all processes run it: what to call forward, and when they exchange gradients."""

    step: TrainStep
    forward: Callable[..., Loss]
    said: list[str]  # what was done, a line each
    wrapper: DistributedDataParallel | None = None
    reshard: bool = True

    def sync(self, now: bool) -> AbstractContextManager:
        """Surrounds a micro-batch: only the last one's backward exchanges gradients, of all of them."""
        if isinstance(self.step, FSDPModule):
            self.step.set_requires_gradient_sync(now)
        elif self.wrapper is not None and not now:
            return self.wrapper.no_sync()
        return nullcontext()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, every process holds all weights and may run forwards on its own: no process waits for another."""
        shards = [module for module in self.step.modules() if isinstance(module, FSDPModule)]
        for module in shards:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in shards:
                module.reshard()
                module.set_reshard_after_forward(self.reshard or module is self.step, recurse=False)


def parallelize(step: TrainStep, config: ParallelConfig, world: World, device: torch.device, unused: bool) -> Parallel:
    """Apply what `config` asks for. `unused`: some parameters get no gradient, which DDP must be told.

    Raises ConfigError where the processes cannot be grouped as asked.
    """
    said = []
    if config.activation_checkpointing != "none":
        said.append(f"recomputing {recompute(step, config.activation_checkpointing)} blocks in the backward")
    if config.compile:
        said.append(compile_blocks(step, device))
    if world.size == 1:
        return Parallel(step, step, said)
    for name, module in step.named_modules():
        if isinstance(module, Objective):
            module.group = dist.group.WORLD
        elif _moves(module):
            raise ConfigError(
                f"{name.removeprefix('model.')}: a batch norm that trains: each of {world.size} processes would have "
                "statistics of its own; lock that tower (adapt.image = locked), or train in one process"
            )
    if config.strategy == "ddp":
        wrapper = DistributedDataParallel(
            step, broadcast_buffers=False, find_unused_parameters=unused, gradient_as_bucket_view=True
        )
        return Parallel(step, wrapper, [*said, f"{world.size} processes, each with all weights"], wrapper)
    mesh = make_mesh(config, world, device)
    half = config.precision == "bf16_params"
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in blocks(step):
        policy: dict[str, Any] = {"mp_policy": precision} if half else {}
        fully_shard(block, mesh=mesh, reshard_after_forward=config.reshard, **policy)
    # the rest, few weights, stays float32; and it must not outlive an evaluation, which has no backward
    fully_shard(step, mesh=mesh, reshard_after_forward=True)
    for method in ("features", "pairs", "diagnose"):
        register_fsdp_forward_method(step, method)
    groups = " x ".join(str(size) for size in mesh.shape)
    said.append(f"{world.size} processes, weights sharded over {groups}")
    return Parallel(step, step, said, reshard=config.reshard)


def make_mesh(config: ParallelConfig, world: World, device: torch.device) -> DeviceMesh:
    """All processes in one line, or for `hybrid` [copies, shards]. Raises ConfigError where they do not divide."""
    if config.strategy == "fsdp":
        return init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))
    shard = config.shard or world.local_size
    if world.size % shard:
        raise ConfigError(f"parallel.shard = {shard}: {world.size} processes are no multiple of it; choose a divisor")
    return init_device_mesh(device.type, (world.size // shard, shard), mesh_dim_names=("copy", "shard"))


def blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of every stack, in order: the unit of recomputation, compilation and sharding."""
    return [block for owner in module.modules() for block in getattr(owner, "blocks", [])]


def _moves(module: nn.Module) -> bool:
    """Whether a forward changes it: a batch norm in training."""
    return isinstance(module, _BatchNorm) and module.training and module.track_running_stats


def recompute(module: nn.Module, how: str) -> int:
    """Keep only each block's input for the backward; `selective`: matrix products and attention too.

    Not of blocks with a batch norm that trains: its statistics would move a second time.
    """
    keep = functools.partial(create_selective_checkpoint_contexts, _policy) if how == "selective" else None
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # no block draws random numbers
    if keep is not None:
        options["context_fn"] = keep
    found = [block for block in blocks(module) if not any(_moves(part) for part in block.modules())]
    for block in found:
        block.forward = _checkpointed(block.forward, options)
    return len(found)


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """No functools.partial: torch.compile passes over a module that has one for its forward, and says nothing."""

    def call(*arguments: Any, **named: Any) -> Any:
        return checkpoint(forward, *arguments, **options, **named)

    return call


def _policy(_context: Any, operation: Any, *_args: Any, **_options: Any) -> CheckpointPolicy:
    """Products and attention are what costs to make again; norms, activations and copies are what takes the memory."""
    name = str(operation)
    expensive = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten._scaled_dot_product", "mm.")
    return CheckpointPolicy.MUST_SAVE if name.startswith(expensive) else CheckpointPolicy.PREFER_RECOMPUTE
