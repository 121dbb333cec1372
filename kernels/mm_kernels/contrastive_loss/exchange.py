"""What processes tell each other: embeddings and statistics, never gradients of rows that another one owns as well."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """A process group: this process' place in it and the rows that each process has."""

    group: dist.ProcessGroup
    rank: int
    counts: list[int]

    @classmethod
    def of(cls, group: dist.ProcessGroup, rows: int, device: torch.device) -> Ranks:
        """Every process of the group must call it; `rows`: its own."""
        own = torch.tensor([rows], device=device)
        counts = own.new_empty(group.size())
        dist.all_gather_into_tensor(counts, own, group=group)
        return cls(group=group, rank=group.rank(), counts=counts.tolist())

    @property
    def first(self) -> int:
        """Where this process' rows begin in those of all."""
        return sum(self.counts[: self.rank])

    def gather(self, own: Tensor) -> Tensor:
        """The rows of all processes `[N, ...]` by rank, from this process' `[n, ...]`, in their own type."""
        most = max(self.counts)
        if len(own) < most:
            own = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])])
        out = own.new_empty(len(self.counts) * most, *own.shape[1:])
        dist.all_gather_into_tensor(out, own.contiguous(), group=self.group)
        if min(self.counts) == most:
            return out
        return torch.cat([out[i * most : i * most + count] for i, count in enumerate(self.counts)])

    def logsumexp(self, own: Tensor) -> Tensor:
        """The log-sum-exp over processes of one number each; `own` `[N]`."""
        high = own.clamp(min=torch.finfo(own.dtype).min)
        dist.all_reduce(high, dist.ReduceOp.MAX, group=self.group)
        total = (own - high).exp_()
        dist.all_reduce(total, group=self.group)
        return total.log_().add_(high)


@dataclass(frozen=True, slots=True)
class Coming:
    """A block on its way."""

    block: Tensor
    works: list[dist.Work]
    leaving: Tensor  # kept until it has been sent

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.block


@dataclass(frozen=True, slots=True)
class Ring:
    """Blocks of rows going round: at step k a process holds those of the rank k before it."""

    ranks: Ranks

    def owner(self, step: int) -> int:
        return (self.ranks.rank - step) % len(self.ranks.counts)

    def first(self, step: int) -> int:
        """Where the rows held at this step begin in those of all."""
        return sum(self.ranks.counts[: self.owner(step)])

    def start(self, block: Tensor, step: int) -> Coming:
        """Pass the block held at this step on, and take what the process before held."""
        ranks, world = self.ranks, len(self.ranks.counts)
        taken = block.new_empty(ranks.counts[self.owner(step + 1)], *block.shape[1:])
        operations = [
            dist.P2POp(operation, tensor, dist.get_global_rank(ranks.group, peer % world), ranks.group)
            for operation, tensor, peer in ((dist.isend, block, ranks.rank + 1), (dist.irecv, taken, ranks.rank - 1))
            if tensor.numel()
        ]
        return Coming(taken, dist.batch_isend_irecv(operations) if operations else [], block)
