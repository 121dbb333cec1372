"""How far a folder for diffusers draws from the model that it was made from: in a process that cannot import mm.

The demo's model with random weights (no weight is zero), 16 pictures after captions and after pictures, 25 steps, with
and without guidance. Prints the largest difference of any channel in levels of 255, and the seconds of both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import ROOT, arguments, circumstances
from PIL import Image

from mm.adapters.text import train_tokenizer
from mm.api import LoadedModel
from mm.interop.diffusers import export
from mm.objectives.step import build_step
from mm.settings import load

WORDS = "red heart,a dog that runs,the sun behind 2 small clouds,Ünïcode 😀,flag: Åland,x,a blue cat face,7 keys".split(
    ","
)
GUIDANCE = (1.0, 2.0, 5.0)
STEPS = 25

FRESH = """
import importlib.util, json, sys, time
sys.path.insert(0, sys.argv[1])
assert importlib.util.find_spec("mm") is None
import numpy, torch
from PIL import Image
from diffusers import DiffusionPipeline
torch.set_num_threads(int(sys.argv[3]))
pipe = DiffusionPipeline.from_pretrained(sys.argv[2], trust_remote_code=True)
job, drawn, start = json.load(sys.stdin), [], time.perf_counter()
pictures = [None if path is None else Image.open(path) for path in job["images"]]
for guidance in job["guidance"]:
    drawn.append(pipe(job["prompts"], num_inference_steps=job["steps"], guidance_scale=guidance, seeds=job["seeds"],
                      image=pictures).images)
seconds = time.perf_counter() - start
assert not any(name.split(".")[0] in ("mm", "mm_kernels", "open_clip") for name in sys.modules)
numpy.save(sys.argv[4], numpy.array([[numpy.asarray(image) for image in row] for row in drawn]))
print(seconds)
"""


def main() -> None:
    args = arguments("images of an exported folder against model.generate", pictures=16)
    model, half = random_model(), args.pictures // 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = conditions(folder, half, args.pictures - half)
        start = time.perf_counter()
        export(model, folder / "out")
        export_seconds = time.perf_counter() - start
        pictures = [None if path is None else Image.open(path) for path in job["images"]]
        start = time.perf_counter()
        ours = [
            model.generate(job["prompts"], seeds=job["seeds"], steps=STEPS, guidance=guidance, images=pictures)
            for guidance in GUIDANCE
        ]
        seconds = time.perf_counter() - start
        command = [sys.executable, "-I", "-S", "-c", FRESH, sysconfig.get_path("purelib"), str(folder / "out")]
        command += [str(torch.get_num_threads()), str(folder / "drawn.npy")]
        environment = {**os.environ, "HF_HOME": str(folder / "hf")}
        done = subprocess.run(
            command, input=json.dumps(job), stdout=subprocess.PIPE, text=True, env=environment, check=True
        )
        theirs = np.load(folder / "drawn.npy", allow_pickle=False).astype(np.int16)
    left = np.array([[np.asarray(image) for image in row] for row in ours], dtype=np.int16)
    difference = np.abs(left - theirs)
    by_guidance = {str(guidance): int(part.max()) for guidance, part in zip(GUIDANCE, difference, strict=True)}
    unequal = float((difference > 0).mean())
    print(f"{args.pictures} pictures: largest difference by guidance {by_guidance} of 255; {unequal:.2%} not equal")
    print(f"seconds: mm {seconds:.2f}, diffusers {float(done.stdout):.2f}; export {export_seconds:.1f}")
    if args.json:
        result = {
            "name": "export for diffusers: largest difference of a channel",
            "ours": int(difference.max()),
            "peer": 1,  # what rounding may do
            "ratio": None,
            "unit": "levels of 255, of images drawn by the folder and by model.generate",
            "mark": 1,
            "better": "lower",
            "rounds": args.pictures * len(GUIDANCE),
            "by_guidance": by_guidance,
            "share_unequal": unequal,
            "contrast": float(left.std()),
            "steps": STEPS,
            "seconds": {"mm": seconds, "diffusers": float(done.stdout), "export": export_seconds},
            **circumstances(("torch", "diffusers", "tokenizers", "safetensors")),
        }
        print(json.dumps(result))


def random_model() -> LoadedModel:
    """The demo's, untrained; what starts at zero is filled in, or nothing would depend on anything."""
    config = load(os.path.join(ROOT, "configs/demo.py"))
    torch.manual_seed(0)
    model = build_step(config, train_tokenizer(WORDS * 4, config.model.text.vocab_size)).model
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return LoadedModel(model.eval().requires_grad_(False), config, {}, {})


def conditions(folder: Path, captions: int, images: int) -> dict[str, Any]:
    """So many pictures after captions, and after other pictures."""
    rng = np.random.default_rng(0)
    paths: list[str | None] = [None] * captions
    for number in range(images):
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray(rng.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)).save(paths[-1])
    prompts: list[str | None] = [WORDS[place % len(WORDS)] for place in range(captions)]
    seeds = list(range(captions + images))
    return {"prompts": prompts + [None] * images, "images": paths, "seeds": seeds, "guidance": GUIDANCE, "steps": STEPS}


if __name__ == "__main__":
    main()
