"""Two runs of 50 steps on OpenMoji that begin with open_clip's ViT-S-32-alt, random weights, stretched to 64 px.

One locks the image tower (LiT, arXiv 2111.07991), one trains all of it; both with the contrastive objective and
diffusion. Then: what moved and what did not, bit for bit; the losses at both ends; and whether the result classifies,
draws, and is released in every format and read back.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import open_clip
import torch
from _common import arguments, cache_folder, circumstances
from safetensors.torch import save_file

import mm
from mm.config import (
    AdaptConfig,
    DataConfig,
    DenoiserConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    StartConfig,
    TrainConfig,
    validate,
)
from mm.data.build import openmoji
from mm.interop.release import release
from mm.interop.sources import read
from mm.interop.start import resolve
from mm.training.loop import run

NAME, STEPS, BATCH, SIZE = "ViT-S-32-alt", 50, 32, 64
LABELS = ["red heart", "pizza", "cat face", "flag of France", "soccer ball"]


def shards() -> str:
    folder = cache_folder("bench", f"openmoji-{SIZE}")
    if not (folder / "done").exists():
        openmoji(folder, size=SIZE, progress=False)
        (folder / "done").touch()
    return str(folder / "train-*.tar")


def imported(folder: Path) -> str:
    torch.manual_seed(0)
    model = open_clip.create_model(NAME)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "clip.safetensors")
    return f"open_clip:{NAME}@{folder / 'clip.safetensors'}"


def trained(folder: Path, source: str, adapt: AdaptConfig) -> list[dict[str, Any]]:
    config = TrainConfig(
        run=RunConfig(dir=str(folder), steps=STEPS, log_every=1),
        data=DataConfig(train=shards(), batch_size=BATCH),
        model=ModelConfig(denoiser=DenoiserConfig(patch=8, width=192, depth=4, heads=3)),
        start=StartConfig(model=source, size=SIZE),
        adapt=adapt,
        optim=OptimConfig(lr=5e-4, warmup=5),
        parallel=ParallelConfig(precision="fp32", compile=False, device="cpu"),
    )
    begin = resolve(config)
    validate(config)
    run(config, start=begin)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def released(folder: Path, out: Path) -> dict[str, Any]:
    """The largest difference of what each released form gives, from what the run's model gives."""
    from diffusers import DiffusionPipeline

    model = mm.load(folder)
    pictures = model.generate(LABELS, seeds=list(range(len(LABELS))), steps=5)
    ours = model.encode(image=pictures, text=LABELS)
    found: dict[str, Any] = {}
    for kind in ("mm", "open_clip", "diffusers", "transformers"):
        release(str(folder), out / kind, format=kind, load=mm.load)
    for kind, source in (("mm", str(out / "mm")), ("open_clip", f"open_clip:local-dir:{out / 'open_clip'}")):
        theirs = mm.load(source).encode(image=pictures, text=LABELS)
        found[kind] = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    theirs, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{out / 'open_clip'}")
    theirs.eval()
    with torch.no_grad():
        image = theirs.encode_image(torch.stack([prepare(p) for p in pictures]), normalize=True)
        text = theirs.encode_text(open_clip.tokenize(LABELS), normalize=True)
    found["open_clip, by open_clip"] = max(
        float((ours["image"] - image).abs().max()), float((ours["text"] - text).abs().max())
    )
    pipe = DiffusionPipeline.from_pretrained(out / "diffusers", trust_remote_code=True)
    drawn = pipe(LABELS, seeds=list(range(len(LABELS))), num_inference_steps=5).images
    found["diffusers, levels of 255"] = max(
        int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()) for a, b in zip(pictures, drawn, strict=True)
    )
    found["transformers"] = by_transformers(out / "transformers", pictures, ours)
    return found


def by_transformers(folder: Path, pictures: list[Any], ours: dict[str, torch.Tensor]) -> float:
    from transformers import CLIPModel, CLIPTokenizerFast

    model = CLIPModel.from_pretrained(folder).eval()
    words = CLIPTokenizerFast.from_pretrained(folder)(LABELS, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        text = model.get_text_features(**words)
        text = getattr(text, "pooler_output", text)
    return float((torch.nn.functional.normalize(text, dim=-1) - ours["text"]).abs().max())


def measured(name: str, adapt: AdaptConfig, folder: Path, source: str) -> dict[str, Any]:
    lines = trained(folder / name, source, adapt)
    before, after = read(source).tensors, read(folder / name).tensors
    same: dict[str, list[bool]] = {"image": [], "text": []}
    for tensor in before:
        part = "image" if ".image." in tensor else "text" if ".text." in tensor else ""
        if part and before[tensor].shape == after[tensor].shape:  # all but the stretched positions
            same[part].append(torch.equal(before[tensor], after[tensor]))
    model = mm.load(folder / name)
    shares = model.classifier(LABELS)(model.generate(LABELS, seeds=[0] * len(LABELS), steps=5))
    ends = {
        loss: [mean(line[loss] for line in part) for part in (lines[:5], lines[-5:])]
        for loss in ("loss/contrastive", "loss/diffusion")
    }
    return {
        "tensors_unmoved": {part: sum(equal) for part, equal in same.items()},
        "tensors": {part: len(equal) for part, equal in same.items()},
        "losses_first_and_last_5_steps": ends,
        "classifies": bool(torch.isfinite(shares).all()) and list(shares.shape) == [len(LABELS)] * 2,
        "released": released(folder / name, folder / f"{name}-out"),
    }


def main() -> None:
    args = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        source = imported(folder)
        runs = {
            "locked image tower": measured("locked", AdaptConfig(image="locked"), folder, source),
            "both objectives go on": measured("all", AdaptConfig(), folder, source),
        }
    locked, whole = runs.values()
    unmoved, of = locked["tensors_unmoved"]["image"], locked["tensors"]["image"]
    print(f"locked: {unmoved} of {of} tensors of the image tower unmoved")
    for name, found in runs.items():
        print(f"{name}: {found['losses_first_and_last_5_steps']}; released: {found['released']}")
    moved = sum(whole["tensors_unmoved"].values()) == 0 and locked["tensors_unmoved"]["text"] == 0
    if args.json:
        result = {
            "name": "50 steps from an imported CLIP: tensors of a locked image tower that did not move",
            "ours": unmoved,
            "peer": of,
            "ratio": unmoved / of,
            "unit": "tensors",
            "mark": 1.0,
            "better": "higher",
            "rounds": 1,
            "all_else_moved": moved,
            "runs": runs,
            "settings": {"model": NAME, "steps": STEPS, "batch": BATCH, "pixels": SIZE},
            **circumstances(("mm", "torch", "open_clip_torch", "diffusers", "transformers")),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
