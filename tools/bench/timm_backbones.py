"""timm's backbones as mm's vision encoder: features against timm's own, and one training step beside mm's text encoder.

Every parameter and statistic is made random first, and the weights go through a file, as a user's would.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import ROOT, arguments, circumstances

MARK = 1e-5  # largest difference of a feature
BACKBONES = (
    *("vit_base_patch16_224", "deit3_small_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"),
    *("swin_tiny_patch4_window7_224", "convnext_tiny", "resnet50", "efficientnet_b0", "mobilenetv3_large_100"),
    *("regnety_016", "maxvit_tiny_tf_224", "mixer_b16_224", "densenet121", "vit_small_patch14_dinov2"),
)


def measure(name: str) -> dict[str, Any]:
    """The difference of one backbone's features, and how much of it one step of SGD moves."""
    import timm
    import torch
    from open_clip_models import parameters, pictures, randomise
    from safetensors.torch import save_file

    import mm
    from mm.config import ContrastiveConfig, ObjectivesConfig, TextConfig, TrainConfig
    from mm.objectives.step import build_step
    from mm.types import Batch

    torch.manual_seed(0)
    trunk: Any = timm.create_model(name, pretrained=False).eval()
    randomise(trunk)
    data = timm.data.resolve_model_data_config(trunk)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "weights.safetensors")
        save_file({key: tensor.contiguous() for key, tensor in trunk.state_dict().items()}, file)
        loaded = mm.load(f"timm:{name}@{file}", device="cpu")
    columns = loaded.inference.prepare("image", pictures())
    mean, std = (torch.tensor(data[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        features = trunk.forward_features((columns[0].float() / 255 - mean) / std)
        theirs = torch.nn.functional.normalize(trunk.forward_head(features, pre_logits=True), dim=-1)
    ours = loaded.inference.embed("image", columns, micro_batch=2)
    apart = (theirs[0] - theirs[1]).norm().item()
    assert apart > 10 * MARK, f"{name}: its features say nothing: {apart} apart"
    count = sum(p.numel() for p in loaded.inference.model.parameters())
    trunk.reset_classifier(0)

    config = TrainConfig(model=loaded.config.model)
    config.model.text = TextConfig(width=64, depth=2, heads=2, context_length=8, vocab_size=64)
    config.objectives = ObjectivesConfig(contrastive=ContrastiveConfig(), diffusion=None)
    step = build_step(config, Words())
    step.model.encoders["image"].load_state_dict(loaded.inference.model.encoders["image"].state_dict())
    step.train()
    before = {key: p.detach().clone() for key, p in step.named_parameters()}
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    batch = Batch(
        {"image": columns[0], "text": torch.randint(1, 64, (2, 8))}, {"text": torch.tensor([5, 8])}, torch.arange(2)
    )
    metrics = step.backward(batch, 1)
    optimizer.step()
    still = [key for key, p in step.named_parameters() if torch.equal(p, before[key])]
    stale = [key for key, p in step.named_parameters() if p.grad is None]
    return {
        "backbone": name,
        "difference": (ours - theirs).abs().max().item(),
        "items_apart": apart,
        "parameters": count,
        "timm_parameters": parameters(trunk),
        "loss": float(metrics["loss"]),
        "tensors": len(before),
        "tensors_moved": len(before) - len(still),
        "still": still,
        "without_gradient": stale,
    }


class Words:
    """A vocabulary for token ids that are given."""

    vocab_size = 64


def in_a_process(name: str) -> dict[str, Any]:
    """`measure`, in a fresh interpreter, so that its memory is given back."""
    command = [sys.executable, os.path.abspath(__file__), "--measure", name]
    out = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=1200)
    if out.returncode:
        raise RuntimeError(f"{name}: {out.stderr[-3000:]}")
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2])))
        return
    args: argparse.Namespace = arguments("timm's backbones in mm", backbones=len(BACKBONES))
    rows, failed = [], []
    for name in BACKBONES[: args.backbones]:
        row = in_a_process(name)
        rows.append(row)
        if row["difference"] > MARK or row["parameters"] != row["timm_parameters"] or row["without_gradient"]:
            failed.append(name)
        print(
            f"{name}: {row['difference']:.1e}, {row['parameters'] / 1e6:.2f} M parameters, one step moved "
            f"{row['tensors_moved']} of {row['tensors']} tensors",
            flush=True,
        )
    worst = max(row["difference"] for row in rows)
    print(f"{len(rows)} backbones, furthest off {worst:.1e} (mark {MARK:.0e}); failed: {', '.join(failed) or 'none'}")
    if args.json:
        result = {
            "name": "largest difference of a unit-norm feature from timm's, float32, random weights",
            "ours": worst,
            "peer": MARK,
            "ratio": MARK / worst,
            "unit": "1",
            "mark": 1.0,
            "better": "lower",
            "rounds": 1,
            "backbones": len(rows),
            "failed": failed,
            "cases": rows,
        }
        print(json.dumps(result | circumstances(("mm", "torch", "timm"))))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
