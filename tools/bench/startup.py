"""How long a user waits: `mm --help` against `import open_clip`, `mm classify` to the answer against a short script.

Whole processes in alternation. Cold is a fresh process whose files lie in the page cache. Both classify the same
picture with the same weights, float32, and must say the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from _clip import NAME, clip_weights
from _common import ROOT, alternate, arguments, cache_folder, python, report
from _photographs import photographs

ROUNDS = 5
LABELS = "cat,dog,house,tree,red heart,bicycle"
PEER = """\
import json, sys
import torch, open_clip
from PIL import Image

name, weights, image, labels = sys.argv[1:]
labels = labels.split(",")
model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
model.eval()
with torch.inference_mode():
    picture = model.encode_image(preprocess(Image.open(image))[None], normalize=True)
    texts = model.encode_text(open_clip.get_tokenizer(name)(labels), normalize=True)
    found = (model.logit_scale.exp() * picture @ texts.T).softmax(-1)[0].tolist()
print(json.dumps(sorted(zip(labels, found), key=lambda pair: -pair[1])))
"""


def answer(*arguments: str) -> list[tuple[str, float]]:
    """The labels with their probabilities, best first, that a fresh interpreter prints as JSON."""
    done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True, cwd=ROOT)
    found = json.loads(done.stdout)
    if isinstance(found[0], dict):
        found = [(one["label"], one["probability"]) for one in found[0]["top"]]
    return [(label, float(share)) for label, share in found]


def cold(image: Path) -> tuple[list[str], list[str]]:
    """The two commands. Raises SystemExit unless they give the same answer."""
    weights = str(clip_weights())
    ours = ["-m", "mm.cli", "classify", f"open_clip:{NAME}@{weights}", str(image), "--labels", LABELS, "--json"]
    ours += ["--top", str(LABELS.count(",") + 1)]
    peer = ["-c", PEER, NAME, weights, str(image), LABELS]
    mine, its = answer(*ours), answer(*peer)
    apart = max(abs(dict(mine)[label] - share) for label, share in its)
    print(f"mm says {mine[0][0]} {mine[0][1]:.5f}, open_clip {its[0][0]} {its[0][1]:.5f}; at most {apart:.1e} apart")
    if mine[0][0] != its[0][0] or apart > 1e-4:
        raise SystemExit("mm classify and open_clip do not say the same")
    return ours, peer


def main() -> None:
    args = arguments("start-up: mm --help, and mm classify to the answer")
    image = cache_folder("bench", "photograph.jpg")
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(next(photographs(1)))
    ours, peer = cold(image)
    empty = alternate(lambda: python("-c", "import mm"), lambda: python("-c", "pass"), ROUNDS)
    rows: list[tuple[str, str, list[str], list[str], float]] = [
        ("mm --help", "import open_clip", ["-m", "mm.cli", "--help"], ["-c", "import open_clip"], 4.0),
        ("mm classify, cold to answer", "a script with open_clip, the same weights and labels", ours, peer, 1.3),
    ]
    for name, against, mine, its, mark in rows:
        taken = alternate(lambda mine=mine: python(*mine), lambda its=its: python(*its), ROUNDS)  # type: ignore[misc]
        report(
            f"{name} against {against}",
            *taken,
            unit="s",
            mark=mark,
            better="lower",
            packages=("mm", "open_clip_torch", "torch"),
            args=args,
            what=name,
            against=against,
            import_mm=sorted(empty[0])[ROUNDS // 2],
            empty_interpreter=sorted(empty[1])[ROUNDS // 2],
        )


if __name__ == "__main__":
    main()
