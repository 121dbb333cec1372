"""open_clip's registered models through `mm.load`: features, parameter counts and GFLOPs against open_clip's own.

Each model is a process of its own: open_clip builds it, every parameter and statistic is made random (what starts at 0
or 1 would hide a mistake), it encodes two pictures of odd sizes and three texts, and its checkpoint goes through a file
to mm. GFLOPs are torch's count for one picture and one text, and where open_clip has published a count
(docs/model_profile.csv in its repository) mm's is held against that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import ROOT, arguments, circumstances

if TYPE_CHECKING:
    from torch import Tensor, nn

MARK = 1e-5  # largest difference of a feature
FLOPS_MARK = 0.01  # largest difference from a published count, as a share of it
MODELS = (
    *("ViT-S-16", "ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16", "ViT-B-16-SigLIP"),
    *("convnext_tiny", "RN50", "EVA02-B-16", "MobileCLIP-S1", "MobileCLIP-B", "MobileCLIP2-S0", "coca_ViT-B-32"),
    *("ViTamin-S", "PE-Core-T-16-384", "ViT-L-14", "ViT-H-14", "ViT-B-32-SigLIP2-256", "ViT-L-14-CLIPA", "ViT-S-32"),
    *("RN101-quickgelu", "vit_relpos_medium_patch16_cls_224", "vit_medium_patch16_gap_256", "convnext_base_w"),
    *("swin_base_patch4_window7_224", "ViT-B-16-plus-240", "ViT-L-14-worldwide", "ViT-B-16-SigLIP2"),
    *("ViT-SO400M-14-SigLIP", "ViT-B-16-SigLIP-384"),
)
# GFLOPs of the image tower and of the text tower, as published, of those that are mm's own here
PUBLISHED = {
    "ViT-S-32": (2.29, 3.38),
    "ViT-S-16": (9.20, 3.38),
    "ViT-B-32": (8.82, 5.96),
    "ViT-B-32-quickgelu": (8.82, 5.96),
    "ViT-B-16": (35.13, 5.96),
    "ViT-B-16-plus-240": (54.76, 9.27),
    "ViT-L-14": (162.03, 13.30),
    "ViT-L-14-CLIPA": (162.03, 5.47),
    "ViT-H-14": (334.59, 47.09),
    "ViT-B-16-SigLIP": (35.42, 11.02),
    "ViT-B-16-SigLIP-384": (112.13, 11.02),
    "ViT-SO400M-14-SigLIP": (220.35, 13.19),
}
ELSEWHERE = ("open_clip", "timm", "transformers")  # where modules of a wrapped tower come from


def randomise(model: nn.Module) -> None:
    """Moves every parameter and every running statistic off its initial value."""
    import torch

    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor), alpha=0.1 if tensor.ndim < 2 else 0.02)
        for name, tensor in model.named_buffers():
            if name.endswith("running_mean"):
                tensor.normal_(std=0.1)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)


def token_ids(text: Any, vocabulary: int) -> Tensor:
    """int64 `[3, context_length]` as the model's tokenizer would give them: an end token, then padding."""
    import torch

    length = text.context_length
    clip = text.tokenizer == "clip"
    lengths = (3, length // 2, length)
    ids = torch.full((3, length), text.pad_id)
    for row, count in enumerate(lengths):
        ids[row, :count] = torch.randint(5, min(vocabulary, 49000), (count,))
        ids[row, count - 1] = 49407 if clip else 1
    return ids


def pictures() -> list[Any]:
    """Two pictures of odd sizes, smooth as photographs are."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)) for _ in range(2)]
    return [coarse[0].resize((301, 417), Image.Resampling.BICUBIC), coarse[1].resize((640, 233))]


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def measure(name: str) -> dict[str, Any]:
    """Differences, counts and GFLOPs of one model."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    import mm
    from mm.interop.open_clip import read

    torch.manual_seed(0)
    raw, config = pictures(), read(f"open_clip:{name}", weights=False).model
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "weights.safetensors")
        theirs, _, preprocess = open_clip.create_model_and_transforms(name, pretrained_hf=False)
        randomise(theirs.eval())
        decoder = theirs.text_decoder if hasattr(theirs, "text_decoder") else None
        counted = parameters(theirs) - (parameters(decoder) if decoder is not None else 0)
        ids = token_ids(config.text, config.text.vocab_size)
        with torch.no_grad():
            images = theirs.encode_image(torch.stack([preprocess(picture) for picture in raw]), normalize=True)
            texts = theirs.encode_text(ids, normalize=True)
        save_file({key: tensor.contiguous() for key, tensor in theirs.state_dict().items()}, file)
        del theirs, decoder
        loaded = mm.load(f"open_clip:{name}@{file}", device="cpu")
    model = loaded.inference.model
    seen = loaded.inference.encode("image", raw, micro_batch=2)
    said = loaded.inference.encode("text", ids, micro_batch=3)
    foreign = {part.__module__.split(".")[0] for part in model.encoders.modules()} & set(ELSEWHERE)
    extras = sum(tensor.numel() for tensor in loaded.inference.extras.values())
    apart = min((vectors[0] - vectors[1]).norm().item() for vectors in (images, texts))
    assert apart > 10 * MARK, f"{name}: its features say nothing: {apart} apart"
    found = {
        "model": name,
        "image": "own" if config.image.tower is None else "wrapped",
        "text": "own" if config.text.tower is None else "wrapped",
        "image_difference": (seen - images).abs().max().item(),
        "text_difference": (said - texts).abs().max().item(),
        "parameters": parameters(model) + extras,
        "open_clip_parameters": counted,
        "items_apart": apart,
        "foreign_modules": sorted(foreign),
        "gflops": gflops(model, config),
    }
    assert ("own" in (found["image"], found["text"])) or foreign
    if config.image.tower is None and config.text.tower is None:
        assert not foreign, f"{name}: modules of {foreign} in mm's own encoders"
    return found


def gflops(model: Any, config: Any) -> list[float]:
    """Of one picture and of one text that fills the context, 10^9 floating-point operations."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    from mm.types import Batch

    def fused(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: fused}  # of which torch has no formula
    side, length = config.image.size, config.text.context_length
    counts = []
    for batch in (
        Batch({"image": torch.zeros(1, 3, side, side, dtype=torch.uint8)}),
        Batch({"text": torch.full((1, length), 5)}, {"text": torch.tensor([length])}),
    ):
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            model.encode(batch)
        counts.append(counter.get_total_flops() / 1e9)
    return counts


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
    args: argparse.Namespace = arguments("open_clip's models in mm", models=len(MODELS), minutes=240)
    rows, failed = [], []
    start = time.monotonic()
    for name in MODELS[: args.models]:
        if time.monotonic() - start > 60 * args.minutes:
            print(f"{args.minutes} minutes are over before {name}")
            break
        row = in_a_process(name)
        difference = max(row["image_difference"], row["text_difference"])
        counts = row["parameters"] == row["open_clip_parameters"]
        if name in PUBLISHED:
            row["published_gflops"] = PUBLISHED[name]
            row["gflops_off"] = [a / b - 1 for a, b in zip(row["gflops"], PUBLISHED[name], strict=True)]
        near = all(abs(off) <= FLOPS_MARK for off in row.get("gflops_off", []))
        if difference > MARK or not counts or not near:
            failed.append(name)
        rows.append(row)
        off = ", ".join(f"{100 * share:+.2f} %" for share in row.get("gflops_off", [])) or "none published"
        print(
            f"{name}: image {row['image']} {row['image_difference']:.1e}, text {row['text']} "
            f"{row['text_difference']:.1e}, {row['parameters'] / 1e6:.2f} M parameters"
            f"{'' if counts else ' (open_clip ' + str(row['open_clip_parameters']) + ')'}, GFLOPs off: {off}",
            flush=True,
        )
    worst = max(max(row["image_difference"], row["text_difference"]) for row in rows)
    print(
        f"{len(rows)} models, largest difference {worst:.1e} (mark {MARK:.0e}); failed: {', '.join(failed) or 'none'}"
    )
    if args.json:
        own = [row for row in rows if row["image"] == row["text"] == "own"]
        result = {
            "name": "largest difference of a unit-norm feature from open_clip's, float32, random weights",
            "ours": worst,
            "peer": MARK,
            "ratio": MARK / worst,
            "unit": "1",
            "mark": 1.0,
            "better": "lower",
            "rounds": 1,
            "models": len(rows),
            "own_models": len(own),
            "largest_gflops_off": max(abs(off) for row in own for off in row.get("gflops_off", [0.0])),
            "failed": failed,
            "cases": rows,
        }
        print(json.dumps(result | circumstances(("mm", "torch", "open_clip_torch", "timm"))))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
