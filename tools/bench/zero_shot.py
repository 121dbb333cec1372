"""Zero-shot with 100 labels in CLIP's 80 templates against open_clip: building the classifier, then images a second.

The same random weights of ViT-S-32-alt on both sides, matrices in bf16. Three rows: labels a second of
`build_zero_shot_classifier` (a tenth of the labels a round); images a second from preprocessed images in memory to
probabilities, which is the strict row; and from JPEG bytes, each side with its own decoding and resizing. The peer runs
in autocast or with bf16 weights, eager or compiled, and its texts some labels at a time: whichever is fastest in a try.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import open_clip
import torch
from _clip import NAME, clip_weights
from _common import alternate, arguments, report
from _photographs import photographs
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from torch import Tensor

import mm
from mm.api import LoadedModel
from mm.data import decode
from mm.evaluation.vocabulary import read_labels
from mm.evaluation.zero_shot import Classifier, classifier

ROUNDS, BATCH = 5, 32
FEW = 4  # labels of a check or a try
PACKAGES = ("mm", "open_clip_torch", "torch")


class Peer:
    """open_clip in one precision, its towers eager or compiled."""

    def __init__(self, precision: str, compiled: bool = False) -> None:
        exact = "pure_bf16" if precision == "bf16 weights" else "fp32"
        self.name = f"{precision}, {'compiled' if compiled else 'eager'}"
        made: Any = open_clip.create_model_and_transforms(NAME, pretrained=str(clip_weights()), precision=exact)
        self.model, _, self.preprocess = made
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(NAME)
        self.kind = torch.bfloat16 if exact == "pure_bf16" else torch.float32
        self.autocast = precision == "autocast"
        if compiled:
            self.model.visual.compile()
            self.model.transformer.compile()

    def context(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()

    def build(self, labels: Sequence[str], at_once: int) -> Tensor:
        with self.context():
            return open_clip.build_zero_shot_classifier(
                self.model, self.tokenizer, labels, OPENAI_IMAGENET_TEMPLATES, num_classes_per_batch=at_once
            )

    def probabilities(self, pictures: Tensor, weights: Tensor) -> Tensor:
        """Of normalised pictures `[B, 3, H, W]`, class weights `[E, L]`."""
        parts = []
        with torch.no_grad(), self.context():
            for part in pictures.split(BATCH):
                features = self.model.encode_image(part.to(self.kind), normalize=True)
                logits = self.model.logit_scale.exp() * features @ weights.to(features.dtype)
                parts.append(logits.float().softmax(-1))
        return torch.cat(parts)

    def label(self, files: Sequence[bytes], weights: Tensor) -> Tensor:
        """Pictures are opened a batch at a time."""
        parts = []
        for start in range(0, len(files), BATCH):
            opened = [self.preprocess(Image.open(io.BytesIO(data))) for data in files[start : start + BATCH]]
            parts.append(self.probabilities(torch.stack(opened), weights))
        return torch.cat(parts)


def seconds(function: Callable[[], object]) -> float:
    """Of the second of two calls."""
    function()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def fastest(tries: dict[tuple[Peer, int], float]) -> tuple[Peer, int]:
    best = min(tries, key=tries.__getitem__)
    print("peer: " + "; ".join(f"{peer.name}, {size} a batch {took:.2f} s" for (peer, size), took in tries.items()))
    return best


def choose(peers: Sequence[Peer], run: Callable[[Peer, int], object], sizes: Sequence[int]) -> tuple[Peer, int]:
    """The fastest eager form, or the same one compiled where that is faster still."""
    eager = {(peer, size): seconds(lambda p=peer, n=size: run(p, n)) for peer in peers for size in sizes}  # type: ignore[misc]
    peer, size = fastest(eager)
    compiled = Peer(peer.name.split(",")[0], compiled=True)
    return fastest({(peer, size): eager[peer, size], (compiled, size): seconds(lambda: run(compiled, size))})


def check(model: LoadedModel, labels: Sequence[str], files: Sequence[bytes], pixels: Tensor, floats: Tensor) -> None:
    """Raises SystemExit unless both sides give the same class weights and predictions, float32 and bf16."""
    exact, half = Peer("float32"), Peer("autocast")
    for peer, weights_apart, chances_apart in ((exact, 1e-5, 1e-5), (half, 4e-2, 1e-2)):
        model.inference.bf16 = peer is half
        ours, theirs = classifier(model.inference, labels, "openai"), peer.build(labels, 1).float()
        apart = (ours.weights.T - theirs).abs().max().item()
        cosine = torch.cosine_similarity(ours.weights.T, theirs, dim=0).min().item()
        mine, its = ours.probabilities(model.inference.embed("image", (pixels,))), peer.probabilities(floats, theirs)
        opened = ours([decode.picture(data) for data in files])  # type: ignore[misc]
        chance = max((mine - its).abs().max().item(), (opened - peer.label(files, theirs)).abs().max().item())
        top = its.topk(2).values
        clear = top[:, 0] - top[:, 1] > 2 * chances_apart  # where rounding cannot decide
        same = bool((mine.argmax(1) == its.argmax(1))[clear].all())
        print(
            f"{peer.name.split(',')[0]}: class weights at most {apart:.1e} apart, cosine {cosine:.5f}; probabilities "
            f"{chance:.1e} apart; {int(clear.sum())} of {len(clear)} pictures clear, same label: {same}"
        )
        if apart > weights_apart or cosine < 0.999 or chance > chances_apart or not same:
            raise SystemExit("both sides do not compute the same thing")


def main() -> None:
    args = arguments("zero-shot: building a classifier, and images a second", labels=100, images=64)
    labels = list(dict.fromkeys(read_labels("imagenet")))[: args.labels + args.labels // 10]
    files = list(photographs(args.images))
    model = mm.load(f"open_clip:{NAME}@{clip_weights()}", device="cpu")
    peers = [Peer("autocast"), Peer("bf16 weights")]
    (pixels,) = model.inference.prepare("image", [decode.picture(data) for data in files])
    floats = torch.stack([peers[0].preprocess(Image.open(io.BytesIO(data))) for data in files])
    check(model, labels[:FEW], files[:8], pixels[:8], floats[:8])
    model.inference.bf16 = True

    peer, at_once = choose(peers, lambda peer, size: peer.build(labels[:FEW], size), (1, FEW))
    part = args.labels // 10
    mine, its = (itertools.cycle([labels[start : start + part] for start in range(0, len(labels), part)]) for _ in "ab")
    taken = alternate(
        lambda: classifier(model.inference, next(mine), "openai"), lambda: peer.build(next(its), at_once), ROUNDS
    )
    ours, theirs = ([part / took for took in side] for side in taken)
    report(
        "zero-shot: classifier built",
        ours,
        theirs,
        unit="labels/s",
        mark=3.0,
        better="higher",
        packages=PACKAGES,
        args=args,
        what=f"zero-shot classifier, {args.labels} labels x 80 templates, {NAME}, bf16",
        against=f"open_clip build_zero_shot_classifier, {peer.name}, {at_once} labels a batch",
        seconds_in_all={"ours": sum(taken[0]), "peer": sum(taken[1])},
    )
    classify = classifier(model.inference, labels[: args.labels], "openai")
    images(args, model, classify, peers, pixels, floats, files)


def images(
    args: Any,
    model: LoadedModel,
    classify: Classifier,
    peers: Sequence[Peer],
    pixels: Tensor,
    floats: Tensor,
    files: Sequence[bytes],
) -> None:
    """The two rows of images a second."""
    weights = classify.weights.T.contiguous()  # both compare with the same ones
    peer, _ = choose(peers, lambda peer, _: peer.probabilities(floats, weights), (BATCH,))
    rows: dict[str, tuple[Callable[[], object], Callable[[], object], str]] = {
        "images in memory": (
            lambda: classify.probabilities(model.inference.embed("image", (pixels,))),
            lambda: peer.probabilities(floats, weights),
            "preprocessed images in memory (strict)",
        ),
        "JPEG bytes": (
            lambda: classify([decode.picture(data) for data in files]),  # type: ignore[misc]
            lambda: peer.label(files, weights),
            "JPEG bytes of 500x375, own preprocessing",
        ),
    }
    for name, (ours, its, what) in rows.items():
        mine, theirs = ([args.images / took for took in side] for side in alternate(ours, its, ROUNDS))
        report(
            f"zero-shot: {name} to labels",
            mine,
            theirs,
            unit="images/s",
            mark=1.5,
            better="higher",
            packages=PACKAGES,
            args=args,
            what=f"zero-shot, {args.labels} labels, from {what}, {NAME}, bf16",
            against=f"open_clip encode_image and logits, {peer.name}, batch {BATCH}",
        )


if __name__ == "__main__":
    main()
