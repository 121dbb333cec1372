"""Training in 1, 2 and 4 gloo processes is one and the same run; test_training_ranks_slow.py has the long form.

Float32 sums in another order are what differs. Adam divides each gradient by its own size, so that entries that are
almost zero move by noise: single small tensors differ more than all weights together, which TOLERANCE is about.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mm import config as settings
from mm.adapters.text import train_tokenizer
from mm.distributed.parallelize import parallelize
from mm.distributed.world import World
from mm.objectives.step import build_step
from mm.types import Batch
from ranks import STEPS, Trained, apart, distance, orders
from runs import latest, records, same

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
TOLERANCE = 1e-5  # relative, of the loss and gradient norm of every step and of all weights at the end
FSDP = ("--parallel.strategy", "fsdp")
HYBRID = ("--parallel.strategy", "hybrid", "--parallel.shard", "2")
ALL = (  # every objective, over two levels of noise each for half of the samples
    *"--objectives.contrastive.kind sigmoid --objectives.diffusion.share 0.5 --objectives.diffusion.copies 2".split(),
    *"--objectives.align default --objectives.align.warmup 2".split(),
)
MUON = ("--optim.name", "muon")


def follows(run: Path, one: Path, tolerance: float = TOLERANCE, norms: float = TOLERANCE) -> None:
    """AdamW does not feel the scale of gradients, so that their norm is compared as well."""
    assert orders(run) == orders(one)
    assert apart(one, run, "loss") < tolerance and distance(one, run) < tolerance
    assert apart(one, run, "grad_norm") < norms


def held(run: Path) -> list[float]:
    """The share of all parameters, averages and moments that lies in each process."""
    last = records(run)[-1]
    return [own / last["all"] for name, own in sorted(last.items()) if name.startswith("own/")]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_with_whole_copies_follow_one(trained: Trained, processes: int) -> None:
    run = trained(processes)
    follows(run, trained(1))
    assert held(run) == [1.0] * processes


@pytest.mark.parametrize("processes, flags", [(2, FSDP), (4, HYBRID)], ids=["fsdp-2", "hybrid-2x2"])
def test_processes_with_shards_follow_one(trained: Trained, processes: int, flags: tuple[str, ...]) -> None:
    run = trained(processes, *flags)
    follows(run, trained(1))
    assert held(run) == pytest.approx([0.5] * processes, rel=1e-4)  # sides that two do not divide are not shared evenly
    assert sum(held(run)) == processes / 2, "nothing is left out, nothing is held twice"


@pytest.mark.parametrize("flags", [(), FSDP], ids=["ddp", "fsdp"])
def test_every_objective_in_micro_batches_follows_one_process_without(trained: Trained, flags: tuple[str, ...]) -> None:
    follows(trained(2, *ALL, "--optim.accumulate", "2", *flags), trained(1, *ALL))


@pytest.mark.slow
def test_muon_follows_one_process(trained: Trained) -> None:
    """Its updates are made in bfloat16, where a sum in another order may round to the next number, 0.4 % away."""
    run, one = trained(2, *MUON), trained(1, *MUON)
    assert orders(run) == orders(one)
    assert apart(one, run, "loss") < 4e-4 and distance(one, run) < 1e-3
    assert (records(run)[-1]["helpers"], records(one)[-1]["helpers"]) == (2, 1)
    assert distance(one, trained(1)) > 5e-3, "AdamW does something else"


@pytest.mark.parametrize(("processes", "helpers"), [(2, 16), (4, 16), (4, 3)])
def test_processes_share_muons_work_and_get_the_same_bits(trained: Trained, processes: int, helpers: int) -> None:
    found = trained.team(processes)(muon_alone_and_together, helpers)
    assert [same_bits for same_bits, _ in found] == [True] * processes
    helpers, work = min(processes, helpers), [done for _, done in found]
    assert sum(work) == MATRICES and max(work) == -(-MATRICES // helpers) and not any(work[helpers:])


MATRICES = 7  # more than there are processes, and no multiple of them


def muon_alone_and_together(world: World, helpers: int) -> tuple[bool, int]:
    """Whether three steps come to the same with and without the others' help; matrices orthogonalised here in one."""
    from mm.training import muon

    done, orthogonal, most = [], muon.orthogonal, muon.HELPERS
    muon.HELPERS = helpers
    muon.orthogonal = lambda *given: done.append(1) or orthogonal(*given)  # type: ignore[assignment,func-returns-value]
    try:
        ended, counts = [], []
        for together in (world, None):
            generator = torch.Generator().manual_seed(0)
            shapes = [(8 + index % 2, 8) for index in range(MATRICES)]
            matrices = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
            optimizer = muon.Muon(matrices, lr=0.1, momentum=0.9, weight_decay=0.1, steps=3, world=together)
            for _ in range(3):
                done.clear()
                for matrix in matrices:
                    matrix.grad = torch.randn(matrix.shape, generator=generator)
                optimizer.step()
            ended.append(matrices + [optimizer.state[matrix]["momentum_buffer"] for matrix in matrices])
            counts.append(len(done))
        return all(torch.equal(a, b) for a, b in zip(*ended, strict=True)), counts[0]
    finally:
        muon.orthogonal, muon.HELPERS = orthogonal, most


def test_weights_gathered_in_bfloat16_stay_close(trained: Trained) -> None:
    """As close as bfloat16 allows, whose numbers are 0.4 % to 0.8 % apart; the shards themselves are float32."""
    run, one = trained(2, *FSDP, "--parallel.precision", "bf16_params"), trained(1)
    assert orders(run) == orders(one)
    assert 1e-5 < apart(one, run, "loss") < 8e-3 and distance(one, run) < 4e-3


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_changes_no_bit(trained: Trained, how: str) -> None:
    assert same(trained(1, "--parallel.activation_checkpointing", how), trained(1))


@pytest.mark.parametrize("flags", [(), FSDP], ids=["ddp", "fsdp"])
def test_evaluation_over_processes_finds_and_draws_the_same(
    trained: Trained, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    val = ("--data.val", f"{trained.shards}/train-000000.tar")  # more than val has: top1 can differ in its second digit
    one, run = trained(1, *val), tmp_path / "run"
    shutil.copytree(one, run)
    shutil.rmtree(run / "samples")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")  # as a kill before the evaluation leaves it
    assert trained.start(2, run, *val, *flags) == [f"finished {STEPS}"] * 2
    assert records(run)[-1]["val/top1"] == records(one)[-1]["val/top1"] > 0
    picture = f"samples/step-{STEPS:08d}.png"
    assert (run / picture).read_bytes() == (one / picture).read_bytes()


def in_turn(trained: Trained, run: Path, *turns: tuple[int, tuple[str, ...]]) -> Path:
    """A run that is stopped after each second step, to go on with other processes or flags."""
    for number, (processes, flags) in enumerate(turns, 1):
        step = STEPS if number == len(turns) else 2 * number
        variables = {} if step == STEPS else {"MM_FAULT": f"term:step@step={step},rank={processes - 1}"}
        ended = trained.start(processes, run, *flags, **variables)
        stopped = f"Stopped: stopped by signal 15 after step {step}; start again to go on"
        assert ended == [f"finished {STEPS}" if step == STEPS else stopped] * processes
        assert latest(run) == step
    return run


def test_the_number_of_processes_may_change(trained: Trained, tmp_path: Path) -> None:
    follows(in_turn(trained, tmp_path / "run", (1, ()), (2, ()), (1, ())), trained(1))


@pytest.mark.slow
def test_the_strategy_may_change(trained: Trained, tmp_path: Path) -> None:
    follows(in_turn(trained, tmp_path / "run", (2, ()), (2, FSDP), (2, ())), trained(1))


def test_a_stopped_run_ends_with_the_same_bits(trained: Trained, tmp_path: Path) -> None:
    run = in_turn(trained, tmp_path / "run", (2, ()), (2, ()))
    assert same(run, trained(2)) and orders(run) == orders(trained(2))


@pytest.mark.slow
def test_looking_at_shards_on_the_way_changes_nothing(trained: Trained, tmp_path: Path) -> None:
    """Evaluation gathers all weights, diagnosis walks the graph several times: afterwards all is as before."""
    looks = ("--run.eval_every", "2", "--run.sample_every", "3", "--run.diagnose_every", "2")
    run = trained(2, *FSDP, *looks, "--data.val", f"{trained.shards}/val-*.tar")
    assert ["val/top1" in line for line in records(run)] == [False, True] * 3
    assert ["cosine/image/contrastive-diffusion" in line for line in records(run)] == [True, False] * 3
    assert same(run, trained(2, *FSDP))


class Counted(TorchDispatchMode):
    """How often each collective is called inside, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if operation.namespace == "c10d":
            self.calls[operation.overloadpacket.__name__] += 1
        return operation(*arguments, **(named or {}))


def exchanged(world: World, flags: tuple[str, ...], accumulate: int) -> Counter[str]:
    """The collectives of one step's forward and backward."""
    config = settings.override(settings.load("configs/debug.py"), flags)
    torch.manual_seed(0)
    step = build_step(config, train_tokenizer(["red heart", "cat"], 300))
    parallel = parallelize(step, config.parallel, world, torch.device("cpu"), False)
    pictures, text = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.randint(3, 200, (8, 6))
    keys = [str(number) for number in range(8)]
    batch = Batch({"image": pictures, "text": text}, {"text": torch.full((8,), 6)}, torch.arange(8), keys)
    for _ in range(2):  # DDP lays out its buckets after the first
        with Counted() as counted:
            step.backward(batch, accumulate, call=parallel.forward, sync=parallel.sync)
    return counted.calls


@pytest.mark.parametrize("flags, sums", [((), "allreduce_"), (FSDP, "_reduce_scatter_base_")], ids=["ddp", "fsdp"])
def test_micro_batches_exchange_gradients_once(trained: Trained, flags: tuple[str, ...], sums: str) -> None:
    once, often = (trained.team(2)(exchanged, flags, accumulate)[0] for accumulate in (1, 4))
    assert once[sums] == often[sums] > 0
    assert set(once) == set(often), "nothing is summed by another name"
