"""open_clip's models in mm: the same features, from the same pictures and texts, with the same numbers beside them."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clips import OWN, WRAPPED, made, picture
from safetensors.torch import save_file
from torch import Tensor

import mm
from mm.adapters import open_clip_files
from mm.adapters.image import ImageProcessor
from mm.adapters.resample import Fit
from mm.interop.open_clip import PREPROCESS
from mm.interop.sources import read
from mm.models.export import load_export, save_export
from mm.types import Batch

Run = Callable[..., subprocess.CompletedProcess[str]]
TEXTS = ["a cat", "Two  DOGS on a mat, it's raining &amp; cold", " ".join(["elephants"] * 40), "ok"]
PICTURES = [picture(61, 43), picture(33, 90), picture(20, 17), picture(160, 160), picture(50, 31, "L")]


@torch.no_grad()
def features(theirs: Any, preprocess: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    pixels = torch.stack([preprocess(one) for one in PICTURES])
    return theirs.encode_image(pixels, normalize=True), theirs.encode_text(ids, normalize=True)


@pytest.mark.parametrize("name", [*OWN, *WRAPPED])
def test_features_are_those_of_open_clip(name: str) -> None:
    _, theirs, preprocess, loaded = made(name)
    ids = open_clip.tokenize(TEXTS, context_length=16)
    images, texts = features(theirs, preprocess, ids)
    ours = loaded.encode(image=PICTURES, text=TEXTS)
    assert (ours["image"] - images).abs().max() <= 1e-5 and (ours["text"] - texts).abs().max() <= 1e-5
    assert (ours["image"][0] - ours["image"][1]).abs().max() > 1e-3  # they say something
    for given, rows in ((ids, slice(None)), (ids[3:, :3], slice(3, None))):  # padded with zeros, or not
        assert torch.equal(loaded.encode(text=given)["text"], ours["text"][rows])
    counted = sum(p.numel() for part, p in theirs.named_parameters() if not part.startswith("text_decoder."))
    extras = sum(tensor.numel() for tensor in loaded.inference.extras.values())
    assert sum(p.numel() for p in loaded.inference.model.parameters()) + extras == counted
    foreign = [m for m in loaded.inference.model.modules() if m.__module__.split(".")[0] in ("open_clip", "timm")]
    assert bool(foreign) == (name in WRAPPED)


@pytest.mark.parametrize("name", ["clip", "siglip", "resnet", "coca"])
def test_what_belongs_to_a_model_comes_along_and_is_saved_with_it(name: str, tmp_path: Path) -> None:
    _, theirs, _, loaded = made(name)
    config, extras = loaded.config, loaded.inference.extras
    assert config.model.image.mean == (0.4, 0.5, 0.6) and config.model.image.std == (0.2, 0.3, 0.25)
    assert config.model.text.context_length == 16 and config.model.image.resize == "squash"
    contrastive = config.objectives.contrastive
    assert contrastive is not None and contrastive.kind == ("sigmoid" if name == "siglip" else "softmax")
    assert contrastive.max_scale == pytest.approx(112.33) and contrastive.init_scale == pytest.approx(112.33)
    assert torch.equal(extras["objectives.contrastive.logit_scale"], theirs.logit_scale.detach().reshape(1))
    if name == "siglip":
        assert torch.equal(extras["objectives.contrastive.logit_bias"], theirs.logit_bias.detach().reshape(1))
    model = loaded.inference.model
    state = {f"model.{key}": tensor for key, tensor in model.state_dict().items()} | extras
    save_export(tmp_path / "saved", state, config, model.tokenizer.to_json(), {})
    again, kept, read_config, _ = load_export(tmp_path / "saved")
    assert read_config == config and kept.keys() == extras.keys()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    one, other = (
        loaded.encode(image=PICTURES, text=TEXTS),
        mm.load(tmp_path / "saved").encode(image=PICTURES, text=TEXTS),
    )
    assert all(torch.equal(one[part], other[part]) for part in one)


def test_single_files_of_open_clip_say_what_the_package_says() -> None:
    default = PreprocessCfg()
    assert {key: getattr(default, key) for key in PREPROCESS} == PREPROCESS
    for name in ("ViT-B-32", "ViT-S-32-alt", "coca_ViT-B-32", "ViT-B-16-SigLIP"):
        file = open_clip_files._folder() / "model_configs" / f"{name}.json"
        assert json.loads(file.read_text()) == open_clip.get_model_config(name) == open_clip_files.model_config(name)


def test_a_clip_is_loaded_and_asked_without_importing_open_clip_or_a_compiler(run_python: Run, tmp_path: Path) -> None:
    state = open_clip.create_model("ViT-S-32-alt").state_dict()
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "clip.safetensors")
    code = """
import sys, mm
classify = mm.load("open_clip:ViT-S-32-alt@clip.safetensors").classifier(["cat", "dog"], templates="simple")
from PIL import Image
assert len(classify.top(Image.new("RGB", (9, 9)))) == 2
heavy = ("open_clip", "torch._dynamo", "torchvision", "transformers", "timm", "sympy")
print([name for name in heavy if name in sys.modules])
"""
    done = run_python("-c", code)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", ["clip", "siglip", "resnet", "layer scale"])
def test_an_item_is_the_same_alone_and_in_a_batch(name: str) -> None:
    loaded = made(name).loaded
    together = loaded.encode(image=PICTURES, text=TEXTS)
    for row in (0, 2):
        alone = loaded.encode(image=[PICTURES[row]], text=[TEXTS[row]])
        assert all(torch.equal(alone[part][0], together[part][row]) for part in alone)


@pytest.mark.parametrize("name", [*OWN, *WRAPPED])
def test_a_training_step_reaches_every_parameter(name: str) -> None:
    origin = read(f"open_clip:local-dir:{made(name).folder}")
    model = origin.build().train().requires_grad_(True)
    prepared = {part: made(name).loaded.inference.prepare(part, raw[:3]) for part, raw in
                (("image", PICTURES), ("text", TEXTS))}  # fmt: skip
    batch = Batch({"image": prepared["image"][0], "text": prepared["text"][0]}, {"text": prepared["text"][1]})
    encoded = model.encode(batch)
    if name in OWN:  # no dropout, and packing is exact
        expected = made(name).loaded.encode(image=PICTURES[:3], text=TEXTS[:3])
        assert all((encoded[part].pooled - expected[part]).abs().max() <= 1e-5 for part in expected)
    assert origin.contrastive is not None
    logits = 5 * encoded["image"].pooled @ encoded["text"].pooled.T
    torch.nn.functional.cross_entropy(logits, torch.arange(3)).backward()
    assert [part for part, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_pixels_are_those_of_open_clips_transform_to_the_bit(mode: Any) -> None:
    sizes = [(61, 43), (43, 61), (20, 17), (24, 24), (24, 90), (91, 24), (23, 23), (7, 200), (333, 251)]
    for interpolation, fill in itertools.product(("bicubic", "bilinear"), (0, 77)):
        settings = PreprocessCfg(24, "RGB", (0.0,) * 3, (1.0,) * 3, interpolation, mode, fill)
        theirs = image_transform_v2(settings, is_train=False)
        ours = ImageProcessor(24, resize=Fit(mode, interpolation, fill))  # type: ignore[arg-type]
        for size, colours in itertools.product(sizes, ("RGB", "L")):
            given = picture(*size, colours)
            expected = (theirs(given) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            assert np.array_equal(ours.prepare(given, train=False)["pixels"], expected), (size, colours, interpolation)


def test_a_picture_thinner_than_a_pixel_of_the_result_is_still_one() -> None:
    found = ImageProcessor(24, resize=Fit("longest"))
    assert found.prepare(picture(1000, 1), train=False)["pixels"].shape == (24, 24, 3)


def test_a_text_that_spells_the_end_token_ends_there_as_in_open_clip() -> None:
    loaded, theirs = made("clip").loaded, made("clip").theirs
    texts = ["red <end_of_text> blue heart"]
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(theirs.encode_text(open_clip.tokenize(texts, context_length=16)), dim=-1)
    assert torch.allclose(loaded.encode(text=texts)["text"], wanted, atol=1e-5)
