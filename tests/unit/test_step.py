"""The train step: who is reached by what, and what stays the same however a batch is cut."""

from __future__ import annotations

import pytest
import torch

from mm import config as settings
from mm.adapters.text import train_tokenizer
from mm.config import AlignConfig, TrainConfig
from mm.objectives.step import TrainStep, build_step
from mm.types import Batch

CAPTIONS = ["red heart", "blue heart", "cat face", "flag of France", "dog", "smiling cat face", "book", "green book"]


def tiny(**objectives: object) -> TrainConfig:
    config = settings.load("configs/debug.py")
    for name, value in objectives.items():
        setattr(config.objectives, name, value)
    return config


def build(config: TrainConfig) -> TrainStep:
    torch.manual_seed(0)
    step = build_step(config, train_tokenizer(CAPTIONS, 400))
    for module in step.model.modules():  # adaLN-zero passes nothing on before its first step
        if hasattr(module, "modulation"):
            torch.nn.init.normal_(module.modulation.weight, std=0.1)
    if step.model.denoiser is not None:
        torch.nn.init.normal_(step.model.denoiser.patch_out.weight, std=0.1)
    return step


def make_batch(step: TrainStep, count: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(0, 256, (2, count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    processor = step.model.processors(train=False)["text"]
    ids, lengths = processor.collate([processor.prepare(text, train=False) for text in CAPTIONS[:count]])
    assert lengths is not None
    return Batch(
        {"image": pictures[0], "text": ids, "target": pictures[1]},
        {"text": lengths},
        torch.arange(count) + 100,
        [str(i) for i in range(count)],
    )


def gradients(step: TrainStep, batch: Batch, accumulate: int = 1) -> dict[str, torch.Tensor]:
    step.zero_grad()
    step.backward(batch, accumulate)
    return {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}


def reached(step: TrainStep, prefix: str) -> bool:
    found = gradients(step, make_batch(step))
    return any(name.startswith(prefix) and gradient.abs().max() > 0 for name, gradient in found.items())


def test_both_objectives_reach_both_encoders() -> None:
    for only in ("contrastive", "diffusion"):
        config = tiny(**{name: None for name in ("contrastive", "diffusion") if name != only})
        if config.objectives.diffusion:
            config.objectives.diffusion.drop_image = 0.0
        step = build(config)
        assert reached(step, "model.encoders.image"), only
        assert reached(step, "model.encoders.text"), only


@pytest.mark.parametrize("switch", ["text", "image"])
def test_the_gradient_switch_of_diffusion_stops_at_one_encoder(switch: str) -> None:
    config = tiny(contrastive=None)
    assert config.objectives.diffusion
    config.objectives.diffusion.drop_image = 0.0
    setattr(config.objectives.diffusion, f"{switch}_grad", 0.0)
    step = build(config)
    assert not reached(step, f"model.encoders.{switch}")
    assert reached(step, "model.encoders.image" if switch == "text" else "model.encoders.text")


def test_a_gradient_scale_scales() -> None:
    config = tiny(contrastive=None)
    assert config.objectives.diffusion
    full = gradients(build(config), make_batch(build(config)))
    config.objectives.diffusion.text_grad = 0.5
    half = gradients(build(config), make_batch(build(config)))
    name = "model.encoders.text.blocks.0.qkv.weight"
    torch.testing.assert_close(half[name], full[name] / 2, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_gradients_equal_those_of_the_full_batch(accumulate: int) -> None:
    step = build(tiny(align=AlignConfig(warmup=0, block=1)))
    batch = make_batch(step)
    whole, parts = gradients(step, batch), gradients(step, batch, accumulate)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=2e-6, rtol=2e-4, msg=name)


def test_the_loss_of_a_sample_does_not_depend_on_its_neighbours() -> None:
    step = build(tiny(contrastive=None))
    batch = make_batch(step)
    whole = step(batch).value
    apart = torch.stack([step(one).value for one in batch.split(1)]).mean()
    torch.testing.assert_close(whole, apart, atol=1e-6, rtol=1e-5)


def test_noise_copies_share_one_encoding_and_read_their_own_caption() -> None:
    config = tiny(contrastive=None)
    assert config.objectives.diffusion and config.model.denoiser
    config.objectives.diffusion.copies = 3
    for depth in (0, 2):  # a context that is only read is projected once for all copies
        config.model.denoiser.context_depth = depth
        step = build(config)
        batch = make_batch(step)
        apart = torch.stack([step(one).value for one in batch.split(1)]).mean()
        torch.testing.assert_close(step(batch).value, apart, atol=1e-6, rtol=1e-5)


def test_alignment_trains_the_denoiser_and_leaves_its_teacher_alone() -> None:
    step = build(tiny(contrastive=None, align=AlignConfig(warmup=0, block=2, weight=1000.0)))
    before = gradients(step, make_batch(step))
    assert not any("teacher" in name for name in before)
    assert before["objectives.align.project.weight"].abs().max() > 0
    teacher = step.objectives["align"].teacher[1].proj.weight  # type: ignore[index, union-attr]
    old = teacher.clone()
    with torch.no_grad():
        step.model.encoders["image"].proj.weight.add_(1.0)
    step.after_step()
    torch.testing.assert_close(teacher, old + 0.01)


def test_diagnosis_finds_the_gradients_of_each_objective() -> None:
    step = build(tiny())
    batch = make_batch(step)
    found = step.diagnose(batch)
    assert set(found) == {
        "grad/image/contrastive", "grad/image/diffusion", "cosine/image/contrastive-diffusion",
        "grad/text/contrastive", "grad/text/diffusion", "cosine/text/contrastive-diffusion",
    }  # fmt: skip
    assert found["grad/text/contrastive"] > 0 and found["grad/text/diffusion"] > 0
    assert -1 <= found["cosine/text/contrastive-diffusion"] <= 1
    assert all(p.grad is None for p in step.parameters())


def test_padding_changes_nothing() -> None:
    step = build(tiny())
    batch = make_batch(step)
    longest = int(batch.lengths["text"].max())
    cut = Batch({**batch.inputs, "text": batch.inputs["text"][:, :longest]}, batch.lengths, batch.seeds, batch.keys)
    torch.testing.assert_close(step(cut).value, step(batch).value, atol=1e-6, rtol=1e-6)


def test_tokens_that_no_objective_reads_are_not_made() -> None:
    step, batch = build(tiny()), make_batch(build(tiny()))
    assert step.pooled_only == {"image"}  # the denoiser reads the text's
    step.objectives["contrastive"].reads = None  # what may read anything
    assert step.pooled_only == set()
    lean = build(tiny(diffusion=None))
    assert lean.pooled_only == {"image", "text"}
    seen = {}
    lean.objectives["contrastive"].register_forward_pre_hook(lambda _, inputs: seen.update(inputs[2]))
    lean(batch)
    assert {name for name, encoded in seen.items() if encoded.tokens.x.shape[1] == 0} <= lean.pooled_only


def test_the_image_goes_back_first() -> None:
    """What it keeps for the backward is the most: it is gone before the text tower's gradients come."""
    step, order = build(tiny()), list[str]()
    for name in ("image", "text"):
        last = step.get_parameter(f"model.encoders.{name}.blocks.0.fc1.weight")
        last.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    batch = make_batch(step)
    assert list(step.model.encode(batch)) == list(step.model.adapters)
    step.backward(batch)
    assert order == ["image", "text"]
