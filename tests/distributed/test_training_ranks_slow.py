"""The long form of test_training_ranks.py: 50 steps, and every way to share the work.

Differences grow on the way, those of the gradient norm most: with the sigmoid loss, two micro-batches in one process
already move it by 5e-4, the loss by 7e-6 and the weights by 2e-6. Loss and weights
of the default objectives are held to the 1e-5 of the short form.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from test_training_ranks import ALL, FSDP, HYBRID, MUON, follows, held, in_turn

from ranks import Trained, apart, distance, orders
from runs import records, same

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
LONG = ("--run.steps", "50")
WAYS = {
    "ddp-2": (2, ()),
    "ddp-4": (4, ()),
    "fsdp-2": (2, FSDP),
    "fsdp-4": (4, FSDP),
    "hybrid-2x2": (4, HYBRID),
    "fsdp-2 in micro-batches": (2, (*FSDP, "--optim.accumulate", "2")),
    "ddp-4 in micro-batches": (4, ("--optim.accumulate", "2")),
    "fsdp-4 without resharding": (4, (*FSDP, "--parallel.no-reshard")),
}


@pytest.mark.parametrize("objectives", [(), ALL], ids=["both objectives", "all objectives"])
@pytest.mark.parametrize("way", WAYS)
def test_fifty_steps_follow_one_process(trained: Trained, way: str, objectives: tuple[str, ...]) -> None:
    processes, flags = WAYS[way]
    run, one = trained(processes, *LONG, *objectives, *flags), trained(1, *LONG, *objectives)
    if objectives == ALL:
        follows(run, one, tolerance=5e-5, norms=5e-3)
    else:
        follows(run, one, norms=1e-4)
    shared = 2 if flags == HYBRID else processes if FSDP[1] in flags else 1
    assert held(run) == pytest.approx([1 / shared] * processes, rel=1e-4)
    assert sum(held(run)) == processes / shared


@pytest.mark.parametrize("flags", [(), FSDP], ids=["ddp", "fsdp"])
def test_fifty_steps_of_muon_stay_close(trained: Trained, flags: tuple[str, ...]) -> None:
    run, one = trained(2, *LONG, *MUON, *flags), trained(1, *LONG, *MUON)
    assert orders(run) == orders(one)
    assert apart(one, run, "loss") < 4e-3 and distance(one, run) < 4e-3
    assert records(run)[-1]["helpers"] == (1 if flags == FSDP else 2), "sharded matrices take all processes anyway"


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_of_shards_changes_no_bit(trained: Trained, how: str) -> None:
    assert same(trained(2, *FSDP, "--parallel.activation_checkpointing", how), trained(2, *FSDP))


@pytest.mark.parametrize("processes, flags", [(2, FSDP), (4, HYBRID), (4, ())], ids=["fsdp-2", "hybrid-2x2", "ddp-4"])
def test_stopped_shards_end_with_the_same_bits(
    trained: Trained, tmp_path: Path, processes: int, flags: tuple[str, ...]
) -> None:
    run = in_turn(trained, tmp_path / "run", (processes, flags), (processes, flags))
    assert same(run, trained(processes, *flags))


def test_every_strategy_goes_on_from_every_other(trained: Trained, tmp_path: Path) -> None:
    follows(in_turn(trained, tmp_path / "one", (2, FSDP), (4, HYBRID), (1, ())), trained(1))
    follows(in_turn(trained, tmp_path / "two", (4, HYBRID), (1, ()), (2, FSDP)), trained(1))
    follows(in_turn(trained, tmp_path / "three", (4, ()), (4, FSDP), (2, ())), trained(1))
