"""A whole training step of mm on the kernels: every one is launched, and loss and gradients are those of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mm import config as settings
from mm.adapters.text import train_tokenizer
from mm.nn.block import Block, JointBlock
from mm.objectives.step import build_step
from mm.types import Batch
from mm_kernels import runtime

CAPTIONS = ["red heart", "cat", "smiling cat face with a very long name indeed", "flag of France"]
PASSES = {
    "attention": ("attention_forward", "attention_delta", "attention_dq", "attention_dkdv"),
    "qk_norm_rope": ("qk_norm_rope", "qk_norm_rope_backward"),
    "adaln_modulate": ("adaln_modulate", "adaln_modulate_backward"),
    "softmax": ("contrastive_statistics", "contrastive_softmax"),
    "sigmoid": ("contrastive_sigmoid",),
}


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_training_step_runs_on_the_kernels(
    kind: str, root: Path, launched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings.load(str(root / "configs" / "debug.py"))
    assert config.objectives.contrastive is not None
    config.objectives.contrastive.kind = kind
    config.model.denoiser.context_depth = 1  # both kinds of joint block
    torch.manual_seed(0)
    step = build_step(config, train_tokenizer(CAPTIONS, 300)).train()
    with torch.no_grad():  # adaLN-zero passes nothing on before its first step
        for parameter in step.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    pictures = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    processor = step.model.processors(train=False)["text"]
    ids, lengths = processor.collate([processor.prepare(text, train=False) for text in CAPTIONS])
    assert lengths is not None
    batch = Batch({"image": pictures[0], "text": ids, "target": pictures[1]}, {"text": lengths}, torch.arange(4))

    def gradients(batch: Batch) -> dict[str, Tensor]:
        step.zero_grad()
        found = {"loss": step.backward(batch, 1)["loss"]}
        found |= {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
        return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}

    used = [name for op in ("attention", "qk_norm_rope", "adaln_modulate", kind) for name in PASSES[op]]
    with launched(*used):
        kernels = gradients(batch)
    before = runtime.launches.copy()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with torch.device("cpu"):
        step.cpu()
        plain = gradients(batch.to("cpu"))
    assert runtime.launches == before, "the torch forms were to run"
    assert kernels.keys() == plain.keys() and len(plain) > 40
    for name, gradient in plain.items():
        torch.testing.assert_close(kernels[name], gradient, rtol=1e-3, atol=2e-6 + 1e-4 * gradient.abs().max().item(),
                                   msg=lambda text, name=name: f"{name}: {text}")  # fmt: skip


def test_blocks_on_the_kernels_can_be_checkpointed() -> None:
    torch.manual_seed(0)
    block, joint = Block(32, 2, causal=True), JointBlock(32, 2, update_context=True)
    x, context = torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 3, 32, requires_grad=True)
    offsets = torch.tensor([0, 4, 10], dtype=torch.int32)
    places = torch.ones(2, 8, dtype=torch.bool), torch.randn(2, 32), (torch.ones(5, 8), torch.zeros(5, 8))

    def both(run: Any) -> list[Tensor]:
        packed = run(block, x.flatten(0, 1), None, offsets, 6)
        ours, theirs = run(joint, x, context, *places)
        total = packed.square().sum() + ours.square().sum() + theirs.square().sum()
        return list(torch.autograd.grad(total, [x, context, block.q_norm, joint.image.q_norm]))

    again = both(lambda module, *inputs: checkpoint(module, *inputs, use_reentrant=False))
    for a, b in zip(again, both(lambda module, *inputs: module(*inputs)), strict=True):
        assert torch.equal(a, b)
