"""What is frozen stays bit for bit, what is not moves; LoRA comes apart from its base and back together."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import mm
from mm import config as settings
from mm.adaptation import apply, lora
from mm.adaptation.freeze import stack
from mm.adapters.image import PixelAdapter
from mm.adapters.text import tokenizer_from_json, train_tokenizer
from mm.config import AdaptConfig, AlignConfig, ConfigError, OptimConfig, TrainConfig
from mm.models.export import save_export
from mm.models.wrapped import Wrapped
from mm.objectives.step import TrainStep, build_step
from mm.plan.simulate import simulate
from mm.training import loop
from mm.training.optim import Optimizers
from mm.types import Batch, Encoded, Tokens
from runs import same

CAPTIONS = ["red heart", "blue heart", "cat face", "flag of France"]
TOWERS = {
    "image": r"model\.(adapters|encoders)\.image\.",
    "text": r"model\.(adapters|encoders)\.text\.",
    "denoiser": r"model\.denoiser\.",
}
# what moves, by names as a reader of the config would expect it; towers have two blocks
MOVES = {
    "all": r".*",
    "locked": r"(?!)",
    "first:0": r".*(blocks\.|encoders\.\w+\.(norm|proj)|final_modulation|patch_out)",
    "first:1": r".*(blocks\.1\.|encoders\.\w+\.(norm|proj)|final_modulation|patch_out)",
    "first:2": r".*(encoders\.\w+\.(norm|proj)|final_modulation|patch_out)",
    "last": r".*(blocks\.1\.|encoders\.\w+\.(norm|proj)|final_modulation|patch_out)",
    "bias": r".*bias$",
    "lora": r".*blocks\..*\.lora_[AB]\.",
}


def tiny(**adapt: Any) -> TrainConfig:
    config = settings.load("configs/debug.py")
    config.model.text.depth = 2
    config.adapt = AdaptConfig(lora_rank=4, **adapt)
    settings.validate(config)
    return config


def build(config: TrainConfig) -> TrainStep:
    """Adapted, and with nothing left at zero that would keep gradients from what is before it."""
    torch.manual_seed(0)
    step = build_step(config, train_tokenizer(CAPTIONS, 300))
    with torch.no_grad():
        for parameter in step.model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    apply(step, config.adapt)
    return step


def batch(step: TrainStep) -> Batch:
    pixels = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    processor = step.model.processors(train=False)["text"]
    ids, lengths = processor.collate([processor.prepare(text, train=False) for text in CAPTIONS])
    assert lengths is not None
    return Batch({"image": pixels[0], "text": ids, "target": pixels[1]}, {"text": lengths}, torch.arange(4), CAPTIONS)


def train(step: TrainStep, config: TrainConfig, steps: int = 3) -> set[str]:
    """The names of the parameters that moved."""
    before = {name: p.detach().clone() for name, p in step.named_parameters()}
    optimizers = Optimizers(step, config.optim, steps)
    for number in range(steps):
        step.backward(batch(step))
        optimizers.clip()
        optimizers.step(number)
        step.after_step()
    return {name for name, p in step.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("mode", MOVES)
def test_what_is_frozen_stays_bit_for_bit_and_all_else_moves(mode: str) -> None:
    part = "all" if mode == "locked" else mode  # with every part locked nothing would train
    config = tiny(image=mode, text=mode, denoiser=part)
    step = build(config)
    moved = train(step, config)
    for tower, pattern in TOWERS.items():
        names = {name for name, _ in step.named_parameters() if re.match(pattern, name)}
        wanted = MOVES[part if tower == "denoiser" else mode]
        assert moved & names == {name for name in names if re.match(wanted, name)}, tower
    assert "objectives.contrastive.logit_scale" in moved
    assert ("grad/image/contrastive" in step.diagnose(batch(step))) == (mode != "locked")


def test_a_locked_tower_stays_in_evaluation_mode_and_its_batch_norm_does_not_move() -> None:
    for mode, statistics in (("locked", False), ("bias", False), ("all", True)):
        config = tiny(image=mode)
        torch.manual_seed(0)
        step = build_step(config, train_tokenizer(CAPTIONS, 300))
        step.model.encoders["image"].norm = nn.Sequential(Flip(), nn.BatchNorm1d(64), Flip())
        apply(step, config.adapt)
        step.eval()
        step.train()
        assert step.model.encoders["image"].training == (mode != "locked") and step.model.encoders["text"].training
        before = {name: b.clone() for name, b in step.named_buffers() if "running" in name}
        train(step, config, 1)
        changed = [name for name, b in step.named_buffers() if name in before and not torch.equal(b, before[name])]
        assert bool(changed) == statistics and len(before) == 2


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def test_frozen_parts_build_no_graph() -> None:
    step = build(tiny(image="first:1", text="locked"))
    seen = {}
    for index, block in enumerate(step.model.encoders["image"].blocks):  # type: ignore[arg-type, union-attr]
        block.register_forward_hook(lambda _, __, x, index=index: seen.update({index: x.requires_grad}))
    encoded = step.model.encode(batch(step))
    assert seen == {0: False, 1: True}
    assert encoded["image"].pooled.requires_grad and not encoded["text"].pooled.requires_grad


def test_blocks_and_ends_of_other_libraries_towers_are_found() -> None:
    import timm
    from open_clip.transformer import VisionTransformer

    clip = VisionTransformer(32, 16, 64, 3, 2, 4.0, output_dim=8)
    assert stack([clip]) == list(clip.transformer.resblocks)
    convnext = timm.create_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 8, 8, 8), num_classes=0)
    assert len(stack([convnext])) == 5
    step = build_step(tiny(), train_tokenizer(CAPTIONS, 300))
    step.model.encoders["image"] = clip
    apply(step, AdaptConfig(image="last"))
    moving = {name for name, p in clip.named_parameters() if p.requires_grad}
    ends = {"proj", "ln_post.weight", "ln_post.bias"}
    assert moving == ends | {name for name, _ in clip.named_parameters() if ".resblocks.2." in name}
    step.model.encoders["image"] = convnext
    apply(step, AdaptConfig(image="first:4"))
    moving = {name.rpartition(".blocks")[0] for name, p in convnext.named_parameters() if p.requires_grad}
    assert "stages.3" in moving and not any(name.startswith(("stem", "stages.2")) for name in moving)


@pytest.mark.parametrize(
    ("adapt", "expected"),
    [
        ({"image": "frozen"}, "adapt.image = frozen: must be all, locked, first:N, last, bias or lora"),
        ({"text": "first:x"}, "adapt.text = first:x: must be"),
        ({"text": "first:3"}, "only model.text.depth = 2 blocks; set first:2 or less"),
        ({"image": "locked", "text": "locked", "denoiser": "locked"}, "nothing is left to train"),
        ({"lora_alpha": 0.0}, "adapt.lora_alpha = 0.0: must be above 0"),
    ],
)
def test_what_cannot_be_adapted_is_refused(adapt: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)) as error:
        tiny(**adapt)
    assert "\n" not in str(error.value)


def test_refusals_that_only_the_tower_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    step = build(tiny())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(
            ConfigError, match=r"adapt.text = lora: needs the package peft; pip install 'mm\[interop\]'"
        ):
            apply(step, AdaptConfig(text="lora"))
    step.model.encoders["image"] = nn.ModuleDict({"trunk": nn.Conv2d(3, 3, 1, bias=False), "proj": nn.Linear(3, 3)})
    step.model.adapters["image"] = nn.Identity()
    apply(step, AdaptConfig(image="last"))
    assert [name for name, p in step.model.encoders["image"].named_parameters() if p.requires_grad] == [
        "proj.weight",
        "proj.bias",
    ]
    step.model.encoders["image"] = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False))
    for mode, expected in (("first:1", "no stack of blocks"), ("bias", "nothing of it"), ("lora", "no linear layer")):
        with pytest.raises(ConfigError, match=expected):
            apply(step, AdaptConfig(image=mode))


# -- LoRA


def test_muon_leaves_the_factors_to_adamw_and_the_plan_counts_what_trains() -> None:
    config = tiny(image="lora", text="locked")
    config.optim = OptimConfig(name="muon")
    step = build(config)
    muon = {id(p) for p in Optimizers(step, config.optim, 3).all[1].param_groups[0]["params"]}
    assert muon and not muon & {id(p) for name, p in step.named_parameters() if lora.is_factor(name)}
    assert simulate(config).trained == sum(p.numel() for p in step.parameters() if p.requires_grad)


def test_the_teacher_of_alignment_follows_an_adapted_tower() -> None:
    config = tiny(image="lora")
    config.objectives.align = AlignConfig(block=1, warmup=0, decay=0.0)
    step = build(config)
    train(step, config)
    student, teacher = step.model.encoders["image"], step.objectives["align"].teacher[1]  # type: ignore[index, union-attr]
    for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Reader(Wrapped):
    """Takes the weight of one layer and calls the other, as attention in some libraries does."""

    width = 3

    def __init__(self) -> None:
        super().__init__()
        self.read, self.call = nn.Linear(3, 32), nn.Linear(32, 32)

    def forward(self, tokens: Tokens) -> Encoded:
        x = self.call(F.linear(tokens.x, self.read.weight))
        return Encoded(Tokens(x), x.mean(1))


def test_lora_is_only_put_beside_layers_that_are_called() -> None:
    config = tiny()
    step = build_step(config, train_tokenizer(CAPTIONS, 300))
    step.model.adapters["image"] = PixelAdapter(config.model.image, step.model.processors(False)["image"])
    step.model.encoders["image"] = Reader()
    apply(step, AdaptConfig(image="lora"))
    names = {name for name, p in step.model.encoders["image"].named_parameters() if p.requires_grad}
    assert names == {"call.lora_A.default.weight", "call.lora_B.default.weight"}


def test_merging_is_pefts_and_comes_undone() -> None:
    from peft.tuners.lora import LoraLayer

    config = tiny(image="lora", text="lora", denoiser="lora")
    step = build(config)
    train(step, config)
    step.eval()
    state = {name: tensor.clone() for name, tensor in step.state_dict().items()}
    with torch.no_grad():
        apart = step(batch(step)).value
        for layer in [module for module in step.modules() if isinstance(module, LoraLayer)]:
            layer.merge()  # type: ignore[attr-defined]
        theirs, _ = lora.split(step.state_dict())
    base, factors = lora.split(state)
    ours = lora.merge(base, factors, 16.0 / 4)
    plain = build_step(config, step.model.tokenizer).eval()
    plain.load_state_dict(ours)  # plain names, and all of them
    for name, tensor in lora.merge(ours, factors, -16.0 / 4).items():
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(tensor, base[name], rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(plain(batch(step)).value, apart, rtol=1e-6, atol=1e-6)
    assert max((ours[name] - base[name]).abs().max() for name in ours) > 1e-3, "there was something to merge"


def run(config: TrainConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mm.training.prepare.matrix_rate", lambda *_: 1e9)  # measuring it takes seconds
        loop.run(config)


@pytest.fixture(scope="module")
def finished(openmoji_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run: the image tower locked, LoRA in the text tower; and `base`, what it started from."""
    folder = tmp_path_factory.mktemp("adapted")
    config = tiny(image="locked", text="lora")
    config.run.steps, config.checkpoint.every = 4, 2
    config.data.train, config.run.dir = str(openmoji_shards / "train-*.tar"), str(folder / "run")
    run(config)
    torch.manual_seed(config.run.seed)
    tokenizer = (folder / "run/tokenizer.json").read_text()
    start = build_step(config, tokenizer_from_json(tokenizer))
    save_export(folder / "base", start.state_dict(), config, tokenizer, {"step": "0"})
    return folder


def test_a_run_exports_merged_weights_and_beside_them_an_adapter_that_fits_its_base(finished: Path) -> None:
    whole, base = mm.load(finished / "run", device="cpu"), mm.load(finished / "base", device="cpu")
    adapter = finished / "run/export/adapter"
    both = mm.load(finished / "base", adapter=adapter, device="cpu")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    asked = {"image": [picture], "text": ["red heart", "cat"]}
    wanted, found, before = whole.encode(**asked), both.encode(**asked), base.encode(**asked)
    for name in asked:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-6)
    assert torch.equal(wanted["image"], before["image"]) and not torch.equal(wanted["text"], before["text"])
    names = set(load_file(adapter / "adapter_model.safetensors"))
    assert len(names) == 2 * 4 * 2 and all(".text.blocks." in name and ".lora_" in name for name in names)


def test_peft_itself_reads_the_adapter(finished: Path) -> None:
    from peft import PeftModel

    base = mm.load(finished / "base", device="cpu").inference.model
    adapted = PeftModel.from_pretrained(base, str(finished / "run/export/adapter"), torch_device="cpu")
    theirs = adapted.merge_and_unload().state_dict()
    for name, ours in mm.load(finished / "run", device="cpu").inference.model.state_dict().items():
        if "denoiser" not in name:  # which trained as well
            torch.testing.assert_close(theirs[name], ours, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_resumed_lora_run_is_the_uninterrupted_one_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(finished / "run", again)
    shutil.rmtree(again / "checkpoints/step-00000004")
    shutil.rmtree(again / "export")
    (again / "latest").write_text("step-00000002\n")
    config = settings.read(finished / "run/config.json")
    config.run.dir = str(again)
    run(config)
    assert same(again, finished / "run")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        path = f"export/adapter/{name}"
        assert (again / path).read_bytes() == (finished / "run" / path).read_bytes()


def test_an_adapter_that_does_not_fit_is_refused_in_one_line(finished: Path, tmp_path: Path) -> None:
    adapter = finished / "run/export/adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    described = json.loads((adapter / "adapter_config.json").read_text())

    def folder(name: str, tensors: dict[str, Tensor], **changes: Any) -> Path:
        (tmp_path / name).mkdir()
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name / "adapter_model.safetensors"
        )
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(described | changes))
        return tmp_path / name

    deeper = {name.replace("blocks.1", "blocks.7"): tensor for name, tensor in tensors.items()}
    wider = {name: tensor[:, :3] if "lora_A" in name else tensor for name, tensor in tensors.items()}
    alone = {name: tensor for name, tensor in tensors.items() if "blocks.1.fc2.lora_B" not in name}
    base = finished / "base"
    cases = [
        (base, folder("deeper", deeper), r"another architecture: encoders.text.blocks.7.fc1, .* and 2 more"),
        (base, folder("wider", wider), r"another architecture: encoders.text.blocks.0.fc1"),
        (base, folder("alone", alone), r"not pairs of lora_A and lora_B: encoders.text.blocks.1.fc2.lora_A"),
        (base, folder("dora", tensors, use_dora=True), r"use_dora = True: mm composes plain LoRA"),
        (base, folder("ia3", tensors, peft_type="IA3"), r"peft_type = IA3"),
        (base, finished / "run/export", r"not a LoRA adapter: no adapter_config.json, .*; give .*export/adapter"),
        (finished / "run", adapter, r"trained beside other weights .*has it merged already"),
    ]
    for source, given, expected in cases:
        with pytest.raises(ConfigError, match=expected) as error:
            mm.load(source, adapter=given, device="cpu")
        assert "\n" not in str(error.value)
    (tmp_path / "deeper/adapter_model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ConfigError, match="damaged"):
        mm.load(base, adapter=tmp_path / "deeper", device="cpu")


def test_rank_stabilised_lora_has_its_own_scale(tmp_path: Path) -> None:
    from mm.adaptation.lora import _scale

    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 16}
    assert _scale(tmp_path, plain) == 4.0
    assert _scale(tmp_path, plain | {"use_rslora": True}) == 8.0  # alpha / sqrt(rank), arXiv 2312.03732


def test_lora_is_not_put_beside_a_matrix_that_torch_reads_without_calling_it() -> None:
    from mm.adaptation.lora import linears

    attention = torch.nn.MultiheadAttention(8, 2)
    assert linears([attention, torch.nn.Sequential(torch.nn.Linear(2, 3))]) != []
    assert attention.out_proj not in linears([attention])
