"""The contrastive loss over gloo processes: averaged over them, value and gradients are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mm_kernels import contrastive_loss

WIDTH = 24
COUNTS = {2: (23, 23), 4: (11, 11, 11, 11)}
UNEVEN = {2: (30, 7), 4: (5, 0, 19, 13)}
CASES = [
    (kind, ring, uneven, chunk)
    for kind, ring in (("softmax", False), ("sigmoid", False), ("sigmoid", True))
    for uneven in (False, True)
    for chunk in (None, 8)
]


def batch(n: int) -> tuple[Tensor, ...]:
    """image, text, scale, bias of the whole batch."""
    torch.manual_seed(n)
    image = F.normalize(torch.randn(n, WIDTH), dim=-1)
    text = F.normalize(image + torch.randn(n, WIDTH) * 2 / WIDTH**0.5, dim=-1)
    return image, text, torch.tensor([10.0]), torch.tensor([-10.0])


def value_and_gradients(inputs: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    bias = leaves[3] if options["kind"] == "sigmoid" else None
    value = contrastive_loss(*leaves[:3], bias, **options)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))]


class Process:
    """One rank: every case on its own rows, and the means over ranks of what a trainer averages."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world, self.folder = world, folder

    def __call__(self, rank: int) -> None:
        torch.set_num_threads(1)
        store = f"file://{self.folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=self.world)
        results = {}
        for case in CASES:
            kind, ring, uneven, chunk = case
            counts = (UNEVEN if uneven else COUNTS)[self.world]
            image, text, scale, bias = batch(sum(counts))
            first = sum(counts[:rank])
            rows = slice(first, first + counts[rank])
            group = dist.group.WORLD
            found = value_and_gradients(
                [image[rows], text[rows], scale, bias], kind=kind, group=group, chunk=chunk, ring=ring
            )
            for number in (0, 3, 4):
                dist.all_reduce(found[number])
                found[number] /= self.world
            results[case] = found
        torch.save(results, self.folder / f"{rank}.pt")
        dist.destroy_process_group()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_together_equal_one(world: int, tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(Process(world, tmp_path), nprocs=world, start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for case in CASES:
        kind, _, uneven, chunk = case
        whole = batch(sum((UNEVEN if uneven else COUNTS)[world]))
        value, image, text, scale, bias = value_and_gradients(list(whole), kind=kind, chunk=chunk)
        for number, wanted in ((0, value), (3, scale), (4, bias)):  # what every rank has after the means
            for rank in ranks:
                torch.testing.assert_close(rank[case][number], wanted, atol=1e-6, rtol=1e-6, msg=f"{case}, {number}")
        for number, wanted in ((1, image), (2, text)):  # the mean over ranks of each row's, which one rank has
            found = torch.cat([rank[case][number] for rank in ranks]) / world
            torch.testing.assert_close(found, wanted, atol=1e-6 * wanted.abs().max().item(), rtol=1e-6, msg=f"{case}")


class Towers:
    """One rank with a linear tower for each side in DistributedDataParallel: its parameters' gradients."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world, self.folder = world, folder

    def __call__(self, rank: int) -> None:
        torch.set_num_threads(1)
        store = f"file://{self.folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=self.world)
        rows = slice(rank * 9, rank * 9 + 9)
        model = torch.nn.parallel.DistributedDataParallel(towers())
        image, text, _, _ = batch(9 * self.world)
        contrastive_loss(*model(image[rows], text[rows]), group=dist.group.WORLD).backward()
        torch.save([parameter.grad for parameter in model.parameters()], self.folder / f"{rank}.pt")
        dist.destroy_process_group()


class Pair(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = torch.nn.Linear(WIDTH, 7), torch.nn.Linear(WIDTH, 7)
        self.log_scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        return F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1), self.log_scale.exp()


def towers() -> Pair:
    torch.manual_seed(1)
    return Pair()


@pytest.mark.timeout(60)
def test_a_data_parallel_model_gets_the_gradients_of_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(Towers(2, tmp_path), nprocs=2, start_method="spawn")
    model = towers()
    image, text, _, _ = batch(18)
    contrastive_loss(*model(image, text)).backward()
    for rank in range(2):
        for found, parameter in zip(torch.load(tmp_path / f"{rank}.pt"), model.parameters(), strict=True):
            torch.testing.assert_close(found, parameter.grad, atol=1e-6, rtol=1e-5)
