"""What `mm release` writes loads in open_clip and transformers: weights to the bit, features to 1e-5."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.factory import _MODEL_CONFIGS, get_model_config
from PIL import Image
from released import CAPTIONS, PREPROCESS, TINY, Theirs, ids, models_in, pictures, same_bits, source_of
from safetensors.torch import load_file
from tiny_clips import randomised

import mm
from mm.adapters import hub
from mm.adapters.hub_tokenizer import HubTokenizer
from mm.adapters.text import ClipTokenizer
from mm.cli import main
from mm.config import (
    ContrastiveConfig,
    ImageConfig,
    ModelConfig,
    TextConfig,
    TowerConfig,
)
from mm.interop import architecture, describe, open_clip_out
from mm.interop.open_clip import _tokenizer
from mm.interop.origin import Origin
from mm.interop.release import release
from mm.interop.sources import read
from mm.models.export import save_export
from mm.models.model import Model
from mm.types import Batch


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: False)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    return models_in(tmp_path_factory.mktemp("theirs"))


@pytest.mark.parametrize("kind", TINY)
def test_open_clip_to_mm_to_open_clip_is_bitwise_and_open_clip_loads_it(
    kind: str, tmp_path: Path, theirs: Theirs
) -> None:
    source = source_of(theirs(kind))
    ours = release(source, tmp_path / "ours")
    release(ours, tmp_path / "back", format="open_clip")  # by way of mm's own format
    files = [folder / "open_clip_model.safetensors" for folder in (theirs(kind), tmp_path / "back")]
    same_bits(*map(load_file, files))
    same_bits(read(source_of(tmp_path / "back")).tensors, read(ours).tensors)
    model_there, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'back'}")
    model, tokens = mm.load(ours, device="cpu"), ids(kind)
    encoded = model.encode(image=pictures(), text=tokens)
    with torch.no_grad():
        image = model_there.eval().encode_image(torch.stack([preprocess(one) for one in pictures()]), normalize=True)
        text = model_there.encode_text(tokens, normalize=True)
    torch.testing.assert_close(encoded["image"], image, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoded["text"], text, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "quick", "siglip", "clipa"])
def test_what_training_left_without_a_note_is_described_from_the_config_alone(
    kind: str, tmp_path: Path, theirs: Theirs
) -> None:
    origin = read(source_of(theirs(kind)))
    origin.note = {}
    origin.model.image.crop_scale, origin.model.denoiser = 0.5, None
    (tmp_path / "back").mkdir()
    open_clip_out.write(origin, tmp_path / "back", tmp_path / "back")
    same_bits(load_file(theirs(kind) / open_clip_out.WEIGHTS), load_file(tmp_path / "back" / open_clip_out.WEIGHTS))
    open_clip.create_model(f"local-dir:{tmp_path / 'back'}")


@pytest.mark.parametrize("proj", ["linear", "affine"])
def test_a_timm_backbone_with_mms_text_encoder_goes_to_open_clip(proj: Any, tmp_path: Path) -> None:
    image = ImageConfig(size=160, proj=proj, tower=TowerConfig(library="timm", name="test_convnext"))
    text = TextConfig(tokenizer="clip", vocab_size=49408, width=32, depth=1, heads=2, causal=True, pool="last")
    text.qk_norm, tokenizer = False, ClipTokenizer()
    config = ModelConfig(embed_dim=32, image=image, text=text, denoiser=None)
    model = randomised(Model(config, tokenizer))
    tensors = {**model.state_dict(), "objectives.contrastive.logit_scale": torch.ones(1)}
    origin = Origin("run", config, tokenizer, tensors, ContrastiveConfig())
    open_clip_out.write(origin, tmp_path, tmp_path)
    there = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    pixels = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    with torch.no_grad():
        ours = model.encode(Batch({"image": pixels}, {}))["image"].pooled
        theirs = there.encode_image((pixels / 255 - 0.5) / 0.5, normalize=True)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def own_names() -> Iterator[Any]:
    """Registered configs whose image tower is mm's own; those of timm take a second each to look at."""
    for name, cfg in sorted(_MODEL_CONFIGS.items()):
        vision = cfg["vision_cfg"]
        plain = not cfg["text_cfg"].get("hf_model_name") and "multimodal_cfg" not in cfg
        if plain and vision.get("timm_pool") == "map":
            yield pytest.param(name, marks=[] if name == "ViT-B-32-SigLIP2-256" else pytest.mark.slow)
        elif plain and "timm_model_name" not in vision and not isinstance(vision.get("layers"), list):
            yield name


@pytest.mark.parametrize("name", list(own_names()))
def test_describe_is_the_inverse_of_reading_for_every_registered_config(name: str) -> None:
    cfg = get_model_config(name)
    asked = {**describe.PREPROCESS, "size": None}
    model = architecture.model_config(name, cfg, asked)
    tokenizer, contrastive = _tokenizer(cfg, model.text), architecture.contrastive_config(cfg)
    assert describe.registered(model, contrastive, tokenizer, name)[0] == name
    if cfg["text_cfg"].get("pool_type") == "eos":  # its end token is the tokenizer's to say, which is not here
        return
    again = architecture.model_config(name, describe.describe(model, contrastive, tokenizer), asked)
    assert describe.same_architecture(again, model)


def test_a_registered_name_is_found_and_loads_the_weights(
    tmp_path: Path, theirs: Theirs, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny-clip.json").write_text(json.dumps(TINY["clip"]))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    try:
        source = source_of(theirs("clip"))
        assert main(["release", source, str(tmp_path / "out"), "--format", "open_clip"]) == 0
        said = capsys.readouterr().out
        call = next(line for line in said.splitlines() if '"tiny-clip"' in line).removeprefix("load it: ")
        model, _, preprocess = eval(call, {"open_clip": open_clip})
    finally:
        _MODEL_CONFIGS.pop("tiny-clip")
        open_clip.factory._rescan_model_configs()
    same_bits(model.state_dict(), load_file(theirs("clip") / open_clip_out.WEIGHTS))
    ours = mm.load(source, device="cpu").inference.prepare("image", pictures())[0]
    mean, std = (torch.tensor(PREPROCESS[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(preprocess(pictures()[0]), (ours[0] / 255 - mean) / std, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "quick", "siglip"])
def test_transformers_gives_the_same_features(kind: str, tmp_path: Path, theirs: Theirs) -> None:
    from transformers import AutoModel

    source = source_of(theirs(kind))
    out = release(source, tmp_path / "out", format="transformers")
    model, tokens = mm.load(source, device="cpu"), ids(kind)
    there = AutoModel.from_pretrained(out).eval()
    mean, std = (torch.tensor(PREPROCESS[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = (model.inference.prepare("image", pictures())[0] / 255 - mean) / std
    with torch.no_grad():
        image, text = there.get_image_features(pixels), there.get_text_features(tokens)
    wanted = model.encode(image=pictures(), text=tokens)
    for name, found in (("image", image), ("text", text)):
        vector = torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1)
        torch.testing.assert_close(vector, wanted[name], atol=1e-5, rtol=0)


def test_transformers_reads_words_and_pictures_alike(tmp_path: Path, theirs: Theirs) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer

    source = source_of(theirs("clip"))
    out = release(source, tmp_path / "out", format="transformers")
    model = mm.load(source, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert [tokenizer(text).input_ids for text in CAPTIONS] == list(map(read(source).tokenizer.encode, CAPTIONS))
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 80, 3), dtype=np.uint8))
    pixels = AutoImageProcessor.from_pretrained(out)(picture, return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(PREPROCESS[key]).view(3, 1, 1) for key in ("mean", "std"))
    ours = model.inference.prepare("image", [picture])[0][0]
    assert ((pixels * std + mean) * 255 - ours).abs().max() < 1.5  # a level: torchvision's rounding


def test_a_tokenizer_that_is_there_travels_inside(tmp_path: Path, theirs: Theirs) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoTokenizer

    words = {word: place for place, word in enumerate(["<pad>", "</s>", "<unk>", "cat", "a", "dog"])}
    rust = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    origin = read(source_of(theirs("siglip")))
    origin.tokenizer = HubTokenizer("none/SigLIP", 500, rust.to_str(), "canonicalize")
    origin.model.text.pad_id = 0
    state = {n if n.startswith("objectives.") else f"model.{n}": t for n, t in origin.tensors.items()}
    save_export(tmp_path / "run", state, origin.config(), origin.tokenizer.to_json(), origin.note)
    first, again = tmp_path / "first", release(tmp_path / "run", tmp_path / "first")
    assert read(again).tokenizer.encode("A cat, DOG!") == [4, 3, 5, 1] and first == again
    out = release(first, tmp_path / "hf", format="transformers")
    assert AutoTokenizer.from_pretrained(out)("A cat, DOG!").input_ids == [4, 3, 5, 1]
    release(first, tmp_path / "oc", format="open_clip")
    assert open_clip.get_tokenizer(f"local-dir:{tmp_path / 'oc'}")("A cat, DOG!")[0, :5].tolist() == [4, 3, 5, 1, 0]
