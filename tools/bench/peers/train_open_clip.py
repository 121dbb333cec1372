"""One run of open_clip's trainer, which says now and then how it names the held-out pictures.

`python train_open_clip.py REQUEST`: REQUEST is JSON with `model` (a config file), `train`, `val` (shards), `names`
(samples in val), `batch`, `every`, `steps`, `lr`, `warmup`, `seed`, `augment` and `out`. The trainer is the package's
own, from data to schedule; only its evaluation is another one: every `every` steps the embeddings of val's pictures
and names go to `out`/step-N.npz.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip_train import main as trainer


@torch.no_grad()
def embeddings(model: Any, val: Any) -> dict[str, np.ndarray]:
    """Unit-norm `pictures` `[N, E]` and `names` `[L, E]` in fp32, and which name is each picture's, `truth` `[N]`."""
    model.eval()
    pairs = list(val.dataloader)
    pixels, tokens = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
    place: dict[tuple[int, ...], int] = {}
    truth = [place.setdefault(tuple(row), len(place)) for row in tokens.tolist()]
    pictures = F.normalize(model.encode_image(pixels), dim=-1)
    names = F.normalize(model.encode_text(torch.tensor(list(place))), dim=-1)
    return {"pictures": pictures.numpy(), "names": names.numpy(), "truth": np.array(truth)}


def main(request: dict[str, Any]) -> None:
    out, every, model = Path(request["out"]), request["every"], Path(request["model"])
    open_clip.add_model_config(model)

    def evaluate(model: Any, data: Any, epoch: int, *rest: Any, **more: Any) -> None:
        found = embeddings(model, data["val"])
        np.savez(out / f"step-{epoch * every:05d}.npz", **found)

    trainer.evaluate = evaluate
    command = ["--model", model.stem, "--train-data", request["train"], "--val-data", request["val"]]
    command += ["--dataset-type", "webdataset", "--workers", "1", "--precision", "amp_bf16", "--logs", "none"]
    command += ["--train-num-samples", str(request["batch"] * every), "--epochs", str(request["steps"] // every)]
    command += ["--val-num-samples", str(request["names"]), "--batch-size", str(request["batch"])]
    command += ["--lr", str(request["lr"]), "--warmup", str(request["warmup"]), "--seed", str(request["seed"])]
    command += ["--grad-clip-norm", "1.0", "--image-mean", "0.5", "0.5", "0.5", "--image-std", "0.5", "0.5", "0.5"]
    command += ["--log-every-n-steps", str(every), "--aug-cfg", *request["augment"]]
    with tempfile.TemporaryDirectory() as folder:  # where it leaves a list of its settings
        os.chdir(folder)
        trainer.main(command)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
