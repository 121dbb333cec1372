"""Zero-shot classification and retrieval against CLIP_benchmark: the same model, the same shards, the same digits?

CLIP_benchmark, from pip in a folder of its own, and `mm evaluate` read the same shards in its webdataset layout and the
same open_clip model from a folder. Both run as their own command lines, in fp32. The shards hold drawings of coloured
shapes on noise: 36 classes, with one template and with seven; and pictures with five captions each, some of which two
pictures share. The model is a CLIP of open_clip's, trained here for some steps with open_clip's loss, so that its
numbers are far from chance and from full marks. Every number that CLIP_benchmark prints is compared digit by digit.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import ROOT, arguments, circumstances, peer_python
from PIL import Image, ImageDraw

PEER = ("clip-benchmark-1.6.2", "clip-benchmark==1.6.2", "numpy<2.3")  # it makes floats of arrays, as numpy 2.4 refuses
COLOURS = {
    "red": (208, 44, 44),
    "green": (48, 150, 60),
    "blue": (50, 80, 200),
    "yellow": (224, 196, 40),
    "purple": (140, 60, 170),
    "orange": (230, 130, 30),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
SIZES, PLACES = ("small", "large"), ("left", "right", "top", "bottom")
ONE = ["a photo of a {c}."]
SEVEN = ["a {c}", "a drawing of a {c}", "a {c} on noise", "one {c}.", "the {c}, painted", "itap of a {c}.", "a big {c}"]
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 2},
}
PER_SHARD = 400
KS = (1, 5, 10)


class Scene:
    """One drawing and what may be said of it."""

    def __init__(self, rng: random.Random) -> None:
        self.colour, self.shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        self.size, self.place = rng.choice(SIZES), rng.choice(PLACES)
        self.seed = rng.random()

    @property
    def label(self) -> str:
        return f"{self.colour} {self.shape}"

    def captions(self) -> list[str]:
        return [
            f"a {self.size} {self.label} at the {self.place}",
            f"{self.label}, {self.place}, {self.size}",
            f"there is a {self.colour} {self.shape} near the {self.place} edge",
            f"a {self.label}",
            f"{self.size} {self.shape} in {self.colour}",
        ]

    def png(self) -> bytes:
        rng, side = random.Random(self.seed), 48
        noise = Image.frombytes("RGB", (12, 12), bytes(rng.randrange(90, 256) for _ in range(3 * 144)))
        picture = noise.resize((side, side), Image.Resampling.BICUBIC)
        pen, r = ImageDraw.Draw(picture), rng.randint(5, 7) if self.size == "small" else rng.randint(10, 13)
        x = {"left": r + 1, "right": side - r - 2}.get(self.place, rng.randint(r, side - r))
        y = {"top": r + 1, "bottom": side - r - 2}.get(self.place, rng.randint(r, side - r))
        colour = tuple(max(0, min(255, c + rng.randint(-40, 40))) for c in COLOURS[self.colour])
        box = (x - r, y - r, x + r, y + r)
        if self.shape == "circle":
            pen.ellipse(box, fill=colour)
        elif self.shape == "square":
            pen.rectangle(box, fill=colour)
        elif self.shape == "triangle":
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
        elif self.shape == "cross":
            pen.line((x - r, y - r, x + r, y + r), fill=colour, width=3)
            pen.line((x - r, y + r, x + r, y - r), fill=colour, width=3)
        elif self.shape == "ring":
            pen.ellipse(box, outline=colour, width=3)
        else:
            pen.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill=colour)
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        return stream.getvalue()


def write_split(folder: Path, scenes: Sequence[Scene], names: Sequence[str] | None) -> None:
    """Shards 0.tar, 1.tar, ... and nshards.txt; with `names` the labels are members `cls`, else captions are `txt`."""
    folder.mkdir(parents=True)
    starts = range(0, len(scenes), PER_SHARD)
    for number, start in enumerate(starts):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for place, scene in enumerate(scenes[start : start + PER_SHARD], start):
                told = ("txt", "\n".join(scene.captions())) if names is None else ("cls", str(names.index(scene.label)))
                for extension, data in (("png", scene.png()), (told[0], told[1].encode())):
                    member = tarfile.TarInfo(f"s{place:07d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (folder / "nshards.txt").write_text(f"{len(starts)}\n")


def write_data(root: Path, test: int) -> dict[str, Path]:
    """The data sets by name, in CLIP_benchmark's layout."""
    rng, names = random.Random(0), [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    scenes = [Scene(rng) for _ in range(test)]
    found = {}
    for name, templates in (("one_template", ONE), ("seven_templates", SEVEN)):
        folder = found[name] = root / f"wds_{name}"
        write_split(folder / "test", scenes, names)
        (folder / "classnames.txt").write_text("\n".join(names) + "\n")
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    folder = found["captions"] = root / "wds_captions"
    write_split(folder / "test", scenes[: test // 2], None)
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return found


def train(folder: Path, steps: int, batch: int = 96) -> float:
    """Writes an open_clip model trained for some steps; returns the last loss."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    whole = {"model_cfg": MODEL, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", load_weights=False)
    tokenizer, loss_of = open_clip.get_tokenizer(f"local-dir:{folder}"), open_clip.ClipLoss()
    rng, optimizer, loss = random.Random(1), torch.optim.AdamW(model.parameters(), lr=1e-3), torch.zeros(())
    for _ in range(steps):
        scenes = [Scene(rng) for _ in range(batch)]
        images = torch.stack([preprocess(Image.open(io.BytesIO(scene.png()))) for scene in scenes])
        texts = tokenizer([rng.choice(scene.captions()) for scene in scenes])
        found = model(images, texts)
        features = (found["image_features"], found["text_features"]) if isinstance(found, dict) else found[:2]
        loss = loss_of(*features, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    return loss.item()


def theirs(python: str, model: Path, name: str, data: Path, out: Path) -> dict[str, float]:
    """The metrics of `clip_benchmark eval`."""
    task = "zeroshot_retrieval" if name == "captions" else "zeroshot_classification"
    run(
        *(python, "-m", "clip_benchmark.cli", "eval", "--dataset", f"wds/{name}", "--dataset_root", str(data)),
        *("--model", f"local-dir:{model}", "--pretrained", "", "--task", task, "--no_amp", "--num_workers", "0"),
        *("--recall_k", *map(str, KS), "--output", str(out), "--quiet"),
    )
    return json.loads(out.read_text())["metrics"]


def ours(model: Path, data: Path, out: Path) -> dict[str, Any]:
    """The row of `mm evaluate`."""
    source = f"open_clip:local-dir:{model}"
    run(
        sys.executable,
        "-m",
        "mm.cli",
        "evaluate",
        source,
        "--data",
        str(data),
        "--precision",
        "fp32",
        "--out",
        str(out),
    )
    return json.loads(out.read_text())["tasks"][0]


def run(*command: str) -> None:
    """Raises RuntimeError with the last of what the command said where it fails."""
    path = os.pathsep.join([ROOT, os.path.join(ROOT, "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{command[2:5]} failed: {' '.join(done.stderr.split())[-600:]}")


def main() -> None:
    args = arguments("zero-shot and retrieval numbers against CLIP_benchmark", steps=300, samples=1200)
    python, cases = peer_python(*PEER), {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data, start = write_data(work, args.samples), time.perf_counter()
        loss = train(work / "model", args.steps)
        print(f"a CLIP trained for {args.steps} steps in {time.perf_counter() - start:.0f} s: loss {loss:.3f}")
        for name, place in data.items():
            peer = theirs(python, work / "model", name, place, work / f"theirs-{name}.json")
            row = ours(work / "model", place, work / f"ours-{name}.json")
            cases[name] = {"theirs": peer, "ours": {metric: row["metrics"].get(metric) for metric in peer}}
            cases[name]["errors"] = {metric: row["errors"].get(metric) for metric in peer}
            for metric, value in peer.items():
                mine = cases[name]["ours"][metric]
                verdict = "the same" if repr(mine) == repr(value) else "DIFFERS"
                print(f"{name:16} {metric:26} {value!r:22} {mine!r:22} {verdict}")
    pairs = [(case["ours"][metric], value) for case in cases.values() for metric, value in case["theirs"].items()]
    same = sum(repr(mine) == repr(value) for mine, value in pairs)
    print(f"{same} of {len(pairs)} numbers are the same to the last digit")
    if args.json:
        result = {
            "name": "clip_benchmark",
            "ours": same,
            "peer": len(pairs),
            "ratio": same / len(pairs),
            "unit": "numbers equal to the last digit, of those that CLIP_benchmark prints",
            "mark": 1.0,
            "better": "higher",
            "rounds": 1,
            "cases": cases,
            "samples": args.samples,
            "steps": args.steps,
            "loss": loss,
            **circumstances(["torch", "open_clip_torch"]),
        }
        result["versions"]["clip-benchmark"] = re.sub(r".*==", "", PEER[1])
        print(json.dumps(result))


if __name__ == "__main__":
    main()
