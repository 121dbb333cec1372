"""1,000 labels in 80 templates: seconds to encode them, and to find them again in another process's cache.

Prints the calls of the text encoder too: the second answer makes none, or the script fails. Takes about as long as
80,000 texts take the model; --labels 20 is a try. There is no peer: open_clip keeps nothing, and would encode again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time

import torch
from _common import arguments, circumstances
from _random_model import random_model

from mm.evaluation.label_weights import LabelWeights
from mm.evaluation.vocabulary import read_labels, read_templates

ROUNDS = 5


def main() -> None:
    args = arguments("label weights: encoded, and found again", labels=1000)
    labels = list(dict.fromkeys(read_labels("imagenet")))
    labels += [f"thing {number}" for number in range(args.labels - len(labels))]  # two of ImageNet's names stand twice
    labels, templates = labels[: args.labels], read_templates("openai")
    model = random_model()
    calls: list[int] = []
    model.inference.model.encoders["text"].register_forward_pre_hook(lambda module, given: calls.append(1))
    folder = tempfile.mkdtemp()
    try:
        start = time.perf_counter()
        first = model.classifier(labels, templates, cache=folder, progress=True).weights
        encoded, first_calls = time.perf_counter() - start, len(calls)
        calls.clear()
        found, again = [], []
        for _ in range(ROUNDS):
            fresh = LabelWeights(model.inference)  # as in another process: nothing in memory, the model hashed anew
            start = time.perf_counter()
            weights = fresh.get(labels, templates, cache=folder)
            found.append(time.perf_counter() - start)
            start = time.perf_counter()
            model.classifier(labels, templates, cache=folder)
            again.append(time.perf_counter() - start)
            if calls or not torch.equal(weights, first):
                raise SystemExit(f"the second answer made {len(calls)} calls of the text encoder, or is another one")
    finally:
        shutil.rmtree(folder)
    ours = sorted(found)[ROUNDS // 2]
    print(
        f"{len(labels)} labels x {len(templates)} templates: encoded in {encoded:.1f} s ({first_calls} calls of the "
        f"text encoder), found on disk in {1000 * ours:.1f} ms, in memory in {1000 * min(again):.2f} ms (no call)"
    )
    if args.json:
        result = {
            "name": "labels x templates found in the cache",
            "ours": ours,
            "peer": None,
            "ratio": None,
            "unit": "s",
            "mark": 1.0,
            "better": "lower",
            "rounds": ROUNDS,
            "labels": len(labels),
            "templates": len(templates),
            "seconds_first": encoded,
            "seconds_in_memory": min(again),
            "text_encoder_calls_first": first_calls,
            "text_encoder_calls_second": len(calls),
            **circumstances(("mm", "torch", "open_clip_torch")),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
