"""What `mm release` hands back: open_clip's models read, written and read again, at random weights.

Of each configuration, a model of open_clip's is written as open_clip writes it, read by mm, released for open_clip, and
read again. Tensors are compared bit by bit both ways, and open_clip loads what was written, strictly. Of those that
transformers has a class for, the features of that class are compared with mm's.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, arguments, circumstances

sys.path.insert(0, os.path.join(ROOT, "tests"))
from tiny_clips import randomised

from mm.adapters import hub
from mm.interop.open_clip_out import WEIGHTS
from mm.interop.release import release
from mm.interop.sources import read
from mm.types import Batch

NAMES = (
    "ViT-S-32-alt ViT-S-16 ViT-M-32 ViT-M-16-alt ViT-B-32 ViT-B-32-quickgelu ViT-B-32-256 ViT-B-16 ViT-B-16-plus-240 "
    "ViT-L-14 ViT-L-14-CLIPA ViT-B-32-SigLIP2-256 ViT-B-16-SigLIP ViT-B-16-SigLIP-384 RN50 RN50-quickgelu RN101 "
    "convnext_base convnext_tiny EVA02-B-16 MobileCLIP-S1 MobileCLIP2-S0 vit_medium_patch16_gap_256 "
    "vit_relpos_medium_patch16_cls_224 swin_base_patch4_window7_224"
).split()
TRANSFORMERS = ("ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16-SigLIP")
TOLERANCE = 1e-5


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> int:
    """Tensors that are not the same to the bit, or only on one side."""
    return sum(
        name not in one or name not in other or not torch.equal(one[name], other[name]) for name in one.keys() | other
    )


def round_trip(name: str, folder: Path) -> dict[str, Any]:
    """Of one configuration: tensors, those that differ, and seconds of the release."""
    import open_clip
    from safetensors.torch import load_file, save_file

    model = randomised(open_clip.create_model(name, pretrained_image=False))
    theirs = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(theirs, folder / "theirs.safetensors")
    source = f"open_clip:{name}@{folder / 'theirs.safetensors'}"
    lines: list[str] = []
    start = time.perf_counter()
    out = release(source, folder / "out", format="open_clip", say=lines.append)
    seconds = time.perf_counter() - start
    written = load_file(out / WEIGHTS)
    named = any(f'"{name}"' in line for line in lines)
    loaded = open_clip.create_model(name, pretrained=str(out / WEIGHTS)) if named else None
    again = read(f"open_clip:local-dir:{out}").tensors
    return {
        "tensors": len(theirs),
        "theirs_differ": differing(theirs, written),
        "ours_differ": differing(read(source).tensors, again),
        "loaded_by_name_differ": differing(theirs, loaded.state_dict()) if loaded is not None else None,
        "seconds": round(seconds, 2),
    }


def features(name: str, folder: Path) -> float:
    """The largest difference of transformers' features from mm's, of what the round trip left."""
    from transformers import AutoModel

    source = f"open_clip:{name}@{folder / 'theirs.safetensors'}"
    out = release(source, folder / "transformers", format="transformers")
    origin = read(source)
    image, text, ours, theirs = origin.model.image, origin.model.text, origin.build(), AutoModel.from_pretrained(out)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 3, image.size, image.size), dtype=torch.uint8, generator=generator)
    ids = torch.randint(2, 30000, (4, text.context_length), generator=generator)
    if text.tokenizer == "clip":
        ids[:, -1] = text.vocab_size - 1
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (image.mean, image.std))
    with torch.no_grad():
        found = ours.encode(Batch({"image": pixels, "text": ids}, {"text": torch.full((4,), ids.shape[1])}))
        seen = theirs.eval().get_image_features((pixels / 255 - mean) / std)
        told = theirs.get_text_features(ids)
    pairs = ((found["image"].pooled, seen), (found["text"].pooled, told))
    unit = [(one, torch.nn.functional.normalize(getattr(two, "pooler_output", two), dim=-1)) for one, two in pairs]
    return max((one - two).abs().max().item() for one, two in unit)


def main() -> None:
    args = arguments("mm release, there and back")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    hub.reachable = lambda seconds=0.0: False  # type: ignore[assignment]  # nothing here needs a hub
    found, like = {}, {}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as place:
            found[name] = round_trip(name, Path(place))
            print(name, found[name], flush=True)
            if name in TRANSFORMERS:
                like[name] = features(name, Path(place))
                print(name, "transformers", like[name], flush=True)
    wrong = sum(
        one["theirs_differ"] + one["ours_differ"] + (one["loaded_by_name_differ"] or 0) for one in found.values()
    )
    worst = max(like.values())
    print(f"{len(found)} configurations: {wrong} tensors differ; transformers' features differ by {worst:.2g} at most")
    if args.json:
        result = {
            "name": "open_clip to mm to open_clip to mm: tensors that differ",
            "ours": wrong,
            "peer": 0,
            "ratio": None,
            "unit": "tensors",
            "mark": 0,
            "better": "lower",
            "rounds": len(found),
            "configurations": found,
            "transformers": {"largest_difference": like, "mark": TOLERANCE},
            **circumstances(("torch", "open_clip_torch", "timm", "transformers", "safetensors")),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
