"""What draws in bf16 on a CPU predicts what the denoiser predicts, of any shape, and follows its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from mm.adapters.text import train_tokenizer
from mm.diffusion.schedule import Schedule
from mm.evaluation.inference import Inference
from mm.evaluation.prepared import LEVELS, can_prepare
from mm.objectives.step import build_step
from mm.settings import load as load_config
from mm.types import Tokens
from mm_kernels import packed_linear

pytestmark = pytest.mark.skipif(not packed_linear.available(), reason="no bf16 products here")
PROMPTS = ["red heart", "a blue cat that runs", None, "x"]


def inference(root: Path, context_depth: int, patch: int = 4) -> Inference:
    """Random weights, none of which is zero, or nothing would depend on anything; 16 or 256 image tokens."""
    config = load_config(root / "configs" / "debug.py")
    config.model.image = dataclasses.replace(config.model.image, size=16 if patch == 4 else 32, width=32, depth=1)
    assert config.model.denoiser is not None
    config.model.denoiser = dataclasses.replace(
        config.model.denoiser, patch=patch, width=64, heads=2, depth=3, context_depth=context_depth
    )
    torch.manual_seed(0)
    words = ["red heart", "a blue cat that runs", "x y z"]
    model = build_step(config, train_tokenizer(words * 4, config.model.text.vocab_size)).model
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    found = Inference(model.eval().requires_grad_(False), config, {})
    found.bf16 = True
    return found


@pytest.mark.parametrize("context_depth", [0, 1, 3])
@pytest.mark.parametrize("patch", [4, 2])
def test_it_is_as_close_to_float32_as_autocast_at_every_level(root: Path, context_depth: int, patch: int) -> None:
    drawing = inference(root, context_depth, patch)
    denoiser, prepared = drawing.model.denoiser, drawing.prepared()
    assert denoiser is not None and prepared is not None
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, *denoiser.shape, generator=generator)
    tokens = torch.randn(3, 7, denoiser.context_in.in_features, generator=generator)
    mask = torch.arange(7) < torch.tensor([7, 1, 4])[:, None]
    given = Tokens(tokens, mask), torch.randn(3, denoiser.pooled_in.in_features, generator=generator)
    levels = Schedule(shift=2.0).sampling_sigmas(2 * LEVELS + 3)
    with torch.inference_mode():
        told = prepared.tell(*given, levels)
        for level in (levels[0], levels[LEVELS - 1], levels[LEVELS], levels[-2], levels[3]):
            sigma = level.expand(3)
            exact = denoiser(z, sigma, *given)
            with torch.autocast("cpu", torch.bfloat16):
                usual, ours = denoiser(z, sigma, *given).float(), told(z, sigma)
            assert (ours - exact).norm() <= 1.3 * (usual - exact).norm() + 1e-3 * exact.norm()
            assert (ours - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize("options", [{}, {"solver": "heun"}, {"interval": (0.3, 0.9)}, {"negative": "x"}])
def test_a_picture_is_alike_alone_and_in_a_batch(root: Path, options: dict) -> None:
    drawing = inference(root, 1)
    told = {"steps": 3, "guidance": 3.0, **options}
    together = drawing.generate(PROMPTS, seeds=[5, 6, 7, 8], **told)
    for place, prompt in enumerate(PROMPTS):
        alone = drawing.generate([prompt], seeds=[5 + place], **told)[0]
        assert torch.equal(alone, together[place])
    assert len({picture.numpy().tobytes() for picture in together}) == len(PROMPTS)


def test_it_draws_what_autocast_draws(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing = inference(root, 1)
    ours = drawing.generate(PROMPTS, steps=3).float()
    monkeypatch.setattr(drawing, "prepared", lambda: None)
    assert (ours - drawing.generate(PROMPTS, steps=3).float()).abs().mean() < 2.0  # levels of 255


def test_changed_weights_are_seen_and_equal_ones_are_prepared_once(root: Path) -> None:
    drawing = inference(root, 0)
    first = drawing.prepared()
    assert drawing.prepared() is first
    before = drawing.generate(["x"], steps=2)
    assert drawing.model.denoiser is not None
    with torch.no_grad():
        drawing.model.denoiser.patch_out.weight.mul_(-1.0)
    assert drawing.prepared() is not first
    assert not torch.equal(drawing.generate(["x"], steps=2), before)


def test_float32_and_wrapped_denoisers_run_as_they_are(root: Path) -> None:
    drawing = inference(root, 0)
    assert drawing.model.denoiser is not None

    class Sharded(type(drawing.model.denoiser.blocks[0])):  # type: ignore[misc]
        pass

    drawing.bf16 = False
    assert drawing.prepared() is None
    drawing.bf16 = True
    assert can_prepare(drawing.model.denoiser)
    drawing.model.denoiser.blocks[0].__class__ = Sharded
    assert drawing.prepared() is None


def test_a_packed_layer_is_the_layer_and_gives_its_weight_back() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 72).requires_grad_(False)
    packed = packed_linear.PackedLinear(linear, 32)
    x = torch.randn(3, 5, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(packed(x).float(), linear(x).float(), rtol=1e-2, atol=1e-2)
    number = int(packed.number)
    assert number in packed_linear._weights
    del packed
    assert number not in packed_linear._weights
