"""`mm plan`: its figures against what torch itself measures and computes, what it proposes, and what it refuses."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mm.cli import main
from mm.commands_plan import split
from mm.config import ConfigError, ContrastiveConfig, ParallelConfig, TrainConfig
from mm.plan.fit import USABLE
from mm.plan.hardware import GPUS, Gpu
from mm.plan.report import as_dict, as_text, plan
from mm.plan.sharding import layout_of
from mm.plan.simulate import Step, simulate
from mm.plan.traffic import collectives

ROOT = Path(__file__).resolve().parents[2]
DEBUG = str(ROOT / "configs" / "debug.py")
TINY = ("--run.steps", "10", "--model.image.depth", "1", "--model.denoiser.depth", "1")

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """tools/bench/plan_memory.py"""
    sys.path.insert(0, str(ROOT / "tools" / "bench"))
    try:
        import plan_memory

        yield plan_memory
    finally:
        sys.path.remove(str(ROOT / "tools" / "bench"))


def small(
    bench: Any, precision: str = "fp32", checkpointing: str = "none", batch: int = 8, depth: int = 1
) -> TrainConfig:
    return bench.config({"precision": precision, "activation_checkpointing": checkpointing}, batch, 128, depth)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_planned_memory_is_that_of_a_real_step(bench: Any, precision: str) -> None:
    config, threads = small(bench, precision, batch=4), torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine two threads wait for each other
    try:
        planned, real = simulate(config, kernels=False).peak, bench.measure(config)["allocator"]
    finally:
        torch.set_num_threads(threads)
    assert planned == pytest.approx(real, rel=0.05)  # the mark is 10 %


@pytest.mark.parametrize(("checkpointing", "tolerance"), [("none", 0.01), ("full", 0.08)])
def test_sharded_memory_is_what_torchs_tracker_says_of_the_real_fully_shard(
    bench: Any, checkpointing: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDPMemTracker watches neither the average, nor, in a process that is alone, a contrastive loss over all."""
    ranks = 8
    config = small(bench, checkpointing=checkpointing, batch=4 * ranks, depth=2)
    config.objectives.contrastive = None
    config.parallel.strategy = "fsdp"
    ours = simulate(config, ranks, kernels=False)
    theirs = peak_by_torch(config, ranks, monkeypatch)
    assert ours.peak - ours.memory["ema"] == pytest.approx(theirs, rel=tolerance)


def peak_by_torch(config: TrainConfig, ranks: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that torch's tracker counts at most in the second step of the parallelized module, over a fake group."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from mm.distributed import parallelize
    from mm.distributed.device import autocast
    from mm.distributed.world import World
    from mm.objectives.step import build_step
    from mm.plan.simulate import empty_batch

    cpu, world = torch.device("cpu"), World(0, ranks, 0, ranks)
    vocabulary: Any = types.SimpleNamespace(vocab_size=config.model.text.vocab_size)
    with torch.device("meta"):
        step = build_step(config, vocabulary)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        mesh = parallelize.make_mesh(config.parallel, world, cpu)  # which needs tensors with data
        monkeypatch.setattr(parallelize, "make_mesh", lambda *_: mesh)
        with FakeTensorMode(allow_non_fake_inputs=True):
            step.to_empty(device="cpu")
            step.model.encoders["text"].eval()
            parallel = parallelize.parallelize(step, config.parallel, world, cpu, False)
            optimizer = torch.optim.AdamW(step.parameters(), fused=True)
            batch = empty_batch(config, config.data.batch_size // ranks, config.model.text.context_length)

            def one_step() -> None:
                step.backward(batch, 1, lambda: autocast(config.parallel, cpu), parallel.forward, parallel.sync)
                optimizer.step()
                optimizer.zero_grad()

            one_step()  # which makes the optimizer's state
            tracker = FSDPMemTracker(step, optimizer)
            with tracker:
                one_step()
        return tracker.get_tracker_snapshot("peak")[cpu]["Total"]
    finally:
        dist.destroy_process_group()


def test_flops_are_those_that_torch_counts(bench: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from mm.objectives.step import build_step
    from mm.plan.simulate import empty_batch

    config = small(bench)
    ours = simulate(config, kernels=False)
    with torch.device("meta"):
        step = build_step(config, types.SimpleNamespace(vocab_size=config.model.text.vocab_size))  # type: ignore
    step.to_empty(device="cpu")
    step.model.encoders["text"].eval()
    batch = empty_batch(config, 8, config.model.text.context_length)
    batch.lengths["text"].fill_(config.model.text.context_length)
    batch.inputs["text"].zero_()
    with FlopCounterMode(display=False) as counter:
        step.backward(batch)
    assert ours.forward + ours.backward == counter.get_total_flops()
    assert ours.recompute == 0


def test_recomputation_costs_a_forward_of_the_blocks_and_saves_activations(bench: Any) -> None:
    none, selective, full = (
        simulate(small(bench, checkpointing=how, depth=2)) for how in ("none", "selective", "full")
    )
    assert full.memory["activations"] < selective.memory["activations"] < none.memory["activations"]
    assert 0.7 * none.forward < full.recompute <= none.forward
    assert selective.recompute < 0.05 * none.forward
    assert (full.forward, full.backward) == (none.forward, none.backward)


def test_a_sharded_rank_holds_its_share_of_what_lasts(bench: Any) -> None:
    config = small(bench, batch=16, depth=2)
    whole = simulate(config, 8)
    config.parallel.strategy = "fsdp"
    shared = simulate(config, 8)
    for kind in ("parameters", "optimizer", "ema"):
        assert shared.memory[kind] == pytest.approx(whole.memory[kind] / 8, rel=0.02)  # parts are rounded up
    assert shared.traffic["reduce_scatter"] == 4 * whole.trained
    assert whole.traffic == {}


def test_micro_batches_share_out_the_batch_and_keep_gradients(bench: Any) -> None:
    config = small(bench, batch=32)
    once = simulate(config)
    config.optim.accumulate = 8
    parts = simulate(config)
    assert (parts.micro_batch, parts.micro_batches) == (4, 8)
    assert parts.memory["activations"] < 0.3 * once.memory["activations"]
    assert parts.backward == pytest.approx(once.backward, rel=0.01)
    assert 0 < parts.recompute < parts.forward  # the features, which the contrastive loss needs of all first


def test_shorter_captions_cost_the_text_encoder_less_and_the_denoiser_the_same(bench: Any) -> None:
    config = small(bench)
    long, short = simulate(config), simulate(config, caption_tokens=8)
    config.objectives.contrastive = config.model.denoiser = config.objectives.diffusion = None
    config.objectives.contrastive = ContrastiveConfig()
    both, text = simulate(config), simulate(config, caption_tokens=8)
    assert long.forward - short.forward == both.forward - text.forward > 0


def test_rings_send_all_but_one_share(bench: Any) -> None:
    config = small(bench, batch=64)
    config.parallel = ParallelConfig(strategy="hybrid", shard=8)
    step = simulate(config, 32)
    sent = {one.what: one for one in collectives(config, step)}
    assert sent["all-gather parameters"].size == round(step.traffic["all_gather"] * 7 / 8)
    assert sent["all-gather parameters"].machine and not sent["all-reduce gradients"].machine
    assert sent["all-reduce gradients"].size == round(2 * 4 * step.trained / 8 * 3 / 4)
    assert sent["all-gather embeddings"].size == round(2 * 4 * 128 * 64 * 31 / 32)
    assert [one.what for one in collectives(config, simulate(small(bench)))] == []


def test_the_contrastive_loss_over_a_large_batch_counts_what_it_gathers(bench: Any) -> None:
    config = small(bench, batch=65_536)
    config.model.denoiser = config.objectives.diffusion = None
    config.model.image.depth = config.model.text.depth = 1
    step = simulate(config, 8192)
    # gathered embeddings of both modalities and one tile of 8 rows by 8,192 columns, all float32
    assert step.memory["communication"] == 4 * (2 * 65_536 * 128 + 8 * 8192)


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> dict[str, Gpu]:
    """GPUs that may be added to."""
    monkeypatch.setattr("mm.plan.hardware.GPUS", found := dict(GPUS))
    return found


def card(bench: Any, gigabytes: float) -> Gpu:
    return Gpu(bf16=100, fp32=10, memory=gigabytes, bandwidth=1000, link=100, network=10)


def test_what_does_not_fit_gets_the_first_change_that_helps(bench: Any, cards: dict[str, Gpu]) -> None:
    config = small(bench, batch=64)
    need = {how: simulate(small(bench, checkpointing=how, batch=64)).peak for how in ("none", "selective", "full")}
    cards["small"] = card(bench, (need["selective"] + need["none"]) / 2 / USABLE / 1e9)
    found = plan(config, 1, "small")
    assert not found.fits and found.fix is not None and found.fix.fits
    assert found.fix.changes == {"parallel.activation_checkpointing": "selective"}
    assert found.fix.step.peak == need["selective"]
    assert "set --parallel.activation-checkpointing selective ->" in as_text(found)
    assert config.parallel.activation_checkpointing == "none", "the caller's config stays as it is"


def test_weights_that_do_not_fit_are_sharded_without_trying_recomputation(bench: Any, cards: dict[str, Gpu]) -> None:
    config = small(bench, batch=8)
    whole = simulate(config, 8)
    lasting = sum(whole.memory[kind] for kind in ("parameters", "optimizer", "ema"))
    cards["small"] = card(bench, 0.9 * lasting / USABLE / 1e9)
    found = plan(config, 8, "small")
    assert found.fix is not None and next(iter(found.fix.changes)) == "parallel.strategy"


def test_where_nothing_helps_the_plan_says_so(bench: Any, cards: dict[str, Gpu]) -> None:
    cards["small"] = card(bench, 1e-3)
    found = plan(small(bench, batch=1), 1, "small")
    assert not found.fits and "take a larger GPU or a smaller model" in as_text(found)


def test_the_command_prints_a_screen_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", DEBUG, "--gpus", "2", "--samples", "1e6", *TINY]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 40 and max(map(len, text.splitlines())) <= 140
    assert "assumed: --efficiency" in text and "not a measurement" in text
    assert main(["plan", DEBUG, "--gpus", "2", "--samples", "1e6", "--json", *TINY]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 1_000_000 and found["steps"] == 62_500 and found["fits"]
    assert (
        sum(value for name, value in found["memory"].items() if name not in ("peak", "usable"))
        == (found["memory"]["peak"])
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpus", "3"], "data.batch_size = 16: must be a multiple of 3 processes = 3; try 15 or 18"),
        (["--gpu", "h10"], "--gpu h10: known are"),
        (["--gpus", "0"], "must be an int at least 1"),
        (["--efficiency", "1.5"], "must be at most 1"),
        (["--caption-tokens", "99"], "model.text.context_length = 16"),
        (["--effort", "3"], "unknown flag --effort"),
        (["--optim.lrr", "3"], "did you mean"),
        (["--parallel.strategy", "hybrid", "--parallel.shard", "3", "--gpus", "8"], "parallel.shard = 3"),
    ],
)
def test_what_cannot_be_planned_is_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", DEBUG, *words]) == 2
    error = capsys.readouterr().err
    assert told in error and len(error.splitlines()) == 1


def test_own_words_and_overrides_come_in_any_order() -> None:
    own, overrides = split("x.py --data.batch-size 8 --gpus 4 --optim.betas 0.9 0.95 --json --a.b=1".split())
    assert own == "x.py --gpus 4 --json".split()
    assert overrides == "--data.batch-size 8 --optim.betas 0.9 0.95 --a.b=1".split()


def test_groups_are_those_of_the_mesh() -> None:
    assert layout_of(ParallelConfig(strategy="hybrid"), 1024).shard == 8
    assert layout_of(ParallelConfig(strategy="hybrid", shard=16), 1024).copies == 64
    assert layout_of(ParallelConfig(strategy="fsdp"), 1024).copies == 1
    assert layout_of(ParallelConfig(), 1024).copies == 1024
    with pytest.raises(ConfigError, match=r"parallel.shard = 3"):
        layout_of(ParallelConfig(strategy="hybrid", shard=3), 8)


def test_a_plan_is_the_sum_of_its_parts(bench: Any) -> None:
    found = plan(small(bench, batch=64), 16, "a100-80", samples=1e6, efficiency=0.5)
    numbers = as_dict(found)
    flops = 4 * sum(numbers["flops_a_sample"].values())
    assert numbers["seconds"]["compute"] == pytest.approx(flops / (19.5e12 * 0.5))
    assert numbers["gpu_hours"] == pytest.approx(found.steps * numbers["seconds"]["step"] * 16 / 3600)
    assert isinstance(found.step, Step)


@pytest.mark.slow
def test_a_thousand_gpus_are_planned_within_a_minute() -> None:
    import time

    start = time.perf_counter()
    assert main(["plan", str(ROOT / "configs" / "vit_l14_mmdit_600m_datacomp.py"), "--gpus", "1024"]) == 0
    assert time.perf_counter() - start < 60
