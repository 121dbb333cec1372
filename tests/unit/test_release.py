"""`mm release`: what is written loads where it should, to the bit or to 1e-5, and nothing half-written stays."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.factory import _MODEL_CONFIGS, get_model_config
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clips import randomised

import mm
from mm.adaptation import lora
from mm.adapters import hub
from mm.adapters.hub_tokenizer import HubTokenizer
from mm.adapters.text import ClipTokenizer
from mm.cli import main
from mm.config import (
    AdaptConfig,
    ConfigError,
    ContrastiveConfig,
    DenoiserConfig,
    ImageConfig,
    ModelConfig,
    TextConfig,
    TowerConfig,
    TrainConfig,
)
from mm.interop import architecture, describe, open_clip_out, transformers_out
from mm.interop.open_clip import _tokenizer
from mm.interop.origin import Origin
from mm.interop.release import release
from mm.interop.sources import read
from mm.models.export import save_export
from mm.models.model import Model
from mm.types import Batch

VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
WORDS = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
HUB_WORDS = {**WORDS, "width": 64, "vocab_size": 500, "no_causal_mask": True, "pool_type": "last"}
CLIPA_WORDS = {**HUB_WORDS, "hf_tokenizer_name": "bert-none", "tokenizer_kwargs": {"strip_sep_token": True}}
SIGLIP_WORDS = {**HUB_WORDS, "hf_tokenizer_name": "none/SigLIP", "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
SIGLIP_WORDS |= {"act_kwargs": {"approximate": "tanh"}, "tokenizer_kwargs": {"clean": "canonicalize"}}
TIMM = {"image_size": 32, "timm_pool": "", "timm_proj": "linear", "timm_model_pretrained": False}
SIGLIP = {"timm_model_name": "vit_mini_patch8_siglip_32", "timm_pool": "map", "timm_proj": "none"}
TINY: dict[str, dict[str, Any]] = {
    "clip": {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": WORDS},
    "quick": {"embed_dim": 32, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": WORDS},
    "custom": {"embed_dim": 32, "custom_text": True, "vision_cfg": VISION, "text_cfg": CLIPA_WORDS},
    "clipa": {
        "embed_dim": 32,
        "vision_cfg": {**VISION, "no_ln_pre": True, "final_ln_after_pool": True, "pool_type": "avg"},
        "text_cfg": CLIPA_WORDS,
    },
    "siglip": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {**TIMM, **SIGLIP},
        "text_cfg": SIGLIP_WORDS,
    },
    "resnet": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
        "text_cfg": CLIPA_WORDS,
    },
    "convnext": {"embed_dim": 32, "vision_cfg": {**TIMM, "timm_model_name": "test_convnext"}, "text_cfg": CLIPA_WORDS},
}
PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear", "resize_mode": "squash"}
Theirs = Callable[[str], Path]
CAPTIONS = ["a photo of a cat", "Don't PANIC!! it's 42 -- déjà vu"]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: False)


@pytest.fixture(scope="module", autouse=True)
def mini_siglip() -> None:
    """A timm model small enough for a test, under a name as SigLIP's are."""
    from timm.models import vision_transformer

    def vit_mini_patch8_siglip_32(pretrained: bool = False, **options: Any) -> Any:
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "class_token": False}
        shape |= {"global_pool": "map", "act_layer": "gelu_tanh"}
        return vision_transformer._create_vision_transformer(
            "vit_mini_patch8_siglip_32", pretrained=False, **{**shape, **options}
        )

    vit_mini_patch8_siglip_32.__module__ = vision_transformer.__name__
    cfg = vision_transformer._cfg(input_size=(3, 32, 32), num_classes=0)
    vision_transformer.default_cfgs["vit_mini_patch8_siglip_32"] = _known(cfg)
    vision_transformer.register_model(vit_mini_patch8_siglip_32)


def _known(cfg: dict[str, Any]) -> Any:
    from timm.models._pretrained import DefaultCfg, PretrainedCfg

    return DefaultCfg(tags=__import__("collections").deque([""]), cfgs={"": PretrainedCfg(**cfg)}, is_pretrained=False)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    """The folder of a randomised open_clip model in open_clip's own format, by its kind."""
    base = tmp_path_factory.mktemp("theirs")

    @functools.cache
    def made(kind: str) -> Path:
        original(kind, base / kind)
        return base / kind

    return made


def original(kind: str, folder: Path) -> None:
    cfg = json.loads(json.dumps(TINY[kind]))
    folder.mkdir()
    whole = {"model_cfg": cfg, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    model = open_clip.create_model(f"local-dir:{folder}", pretrained_image=False)
    randomised(model, len(kind))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def source_of(folder: Path) -> str:
    return f"open_clip:local-dir:{folder}"


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in noise]


def ids(origin_kind: str) -> torch.Tensor:
    size = TINY[origin_kind]["text_cfg"]["vocab_size"]
    found = torch.randint(2, min(size, 400), (2, 16), generator=torch.Generator().manual_seed(1))
    if size == 49408:
        found[0, 5], found[1, -1] = 49407, 49407
        found[0, 6:] = 0
    return found


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


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


def tiny_run(folder: Path, shards: Path) -> None:
    """A run folder of mm's own shape, with a denoiser, an evaluation, and the manifest of its shards."""
    shape: dict[str, Any] = {"width": 32, "depth": 1, "heads": 2}
    image, text = ImageConfig(size=16, **shape), TextConfig(tokenizer="clip", vocab_size=49408, **shape)
    config = TrainConfig(model=ModelConfig(embed_dim=16, image=image, text=text, denoiser=DenoiserConfig(**shape)))
    config.data.train, config.run.dir = str(shards / "train-*.tar"), str(folder)
    shards.mkdir()
    manifest = {"source": "openmoji", "source_version": "OpenMoji 16", "samples": {"train": 3500, "val": 200}}
    manifest |= {"license": "CC BY-SA 4.0", "attribution": "All emojis designed by OpenMoji"}
    (shards / "shards.json").write_text(json.dumps(manifest))
    state = {f"model.{name}": tensor for name, tensor in Model(config.model, ClipTokenizer()).state_dict().items()}
    state["objectives.contrastive.logit_scale"] = torch.ones(1)
    folder.mkdir()
    save_export(folder / "export", state, config, ClipTokenizer().to_json(), {"step": "40"})
    share = {"value": 0.25, "error": 0.05, "n": 80}
    result = {"run": "demo", "step": 40, "seed": 0, "data": ["val-000000.tar"], "commit": "abc123"}
    result["zero_shot"] = {"held_out_names": {"labels": 9, "top1": share, "top5": share}}
    (folder / "evaluation.json").write_text(json.dumps(result))
    (folder / "results.json").write_text(json.dumps({"mean": {}, "results": [result, {**result, "seed": 1}]}))


def test_the_card_says_what_its_files_say_and_no_folder_of_the_machine(tmp_path: Path) -> None:
    import yaml

    tiny_run(tmp_path / "demo", tmp_path / "shards")
    out = release(tmp_path / "demo", tmp_path / "out")
    text = (out / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "cc-by-sa-4.0" and front["datasets"] == ["openmoji"]
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.25
    assert text.count("zero-shot top-1, held-out names | 25.0 % ± 5.0 | 80") == 1  # once, and not of another seed
    for words in (
        "`evaluation.json`, written 20",
        "3500 training samples",
        "OpenMoji",
        "steps | 40",
        "contrastive x 1",
    ):
        assert words in text
    for path in out.iterdir():
        assert str(tmp_path) not in path.read_bytes().decode("utf-8", "ignore"), path.name
    assert json.loads((out / "preprocessor_config.json").read_text())["image_mean"] == [0.5, 0.5, 0.5]
    same_bits(read(out).tensors, read(tmp_path / "demo").tensors)
    for path in (tmp_path / "demo").glob("*.json"):  # of an earlier step
        path.write_text(path.read_text().replace('"step": 40', '"step": 30'))
    said: list[str] = []
    release(tmp_path / "demo", out, say=said.append)
    assert "## Evaluation" not in (out / "README.md").read_text(encoding="utf-8")
    assert any("evaluation.json is of step 30, the model of 40" in line for line in said)


@pytest.mark.parametrize(
    ("format", "field"),
    [("open_clip", "model.image.qk_norm"), ("transformers", "model.image.pool")],
)
def test_a_model_of_mms_own_shape_is_refused_by_its_first_field(format: str, field: str, tmp_path: Path) -> None:
    tiny_run(tmp_path / "demo", tmp_path / "shards")
    with pytest.raises(ConfigError, match=rf"{field} = .* has no counterpart .*--format mm") as refused:
        release(tmp_path / "demo", tmp_path / "out", format=format)
    assert "\n" not in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "shards"]


def test_a_denoiser_is_left_out_and_said(tmp_path: Path, theirs: Theirs) -> None:
    origin = read(source_of(theirs("clip")))
    origin.model.denoiser = DenoiserConfig(width=32, depth=1, heads=2)
    (tmp_path / "back").mkdir()
    told = open_clip_out.write(origin, tmp_path / "back", tmp_path / "back")
    assert any("denoiser is left out" in line for line in told)


def test_an_adapter_is_merged_into_what_is_released(tmp_path: Path, theirs: Theirs) -> None:
    source, config = source_of(theirs("clip")), AdaptConfig(image="lora", lora_rank=2)
    model = read(source).build()
    lora.inject(model, {"image": lora.linears([model.encoders["image"]])}, config)
    lora.save(tmp_path / "lora", randomised(model).state_dict(), config, {})
    with pytest.raises(ConfigError, match="other weights"):  # the base is not the one that was just moved
        release(source, tmp_path / "out", adapter=str(tmp_path / "lora"))
    for name, parameter in model.named_parameters():
        if not lora.is_factor(name):
            parameter.data = read(source).tensors[name.replace(".base_layer", "")]
    lora.save(tmp_path / "lora", model.state_dict(), config, {})
    out = release(source, tmp_path / "out", adapter=str(tmp_path / "lora"))
    merged = mm.load(source, adapter=tmp_path / "lora", device="cpu").inference.model.state_dict()
    found = read(out).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in merged.items())
    assert any(not torch.equal(found[name], tensor) for name, tensor in read(source).tensors.items())


def test_coca_is_not_written_back(tmp_path: Path) -> None:
    origin = read("open_clip:coca_base", weights=False)
    with pytest.raises(ConfigError, match="CoCa"):
        open_clip_out.write(origin, tmp_path, tmp_path)


def test_diffusers_is_handed_the_loaded_model(tmp_path: Path, theirs: Theirs, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    def export(model: Any, out: Path) -> None:
        (out / "model_index.json").write_text(str(model.config.model.embed_dim))

    monkeypatch.setitem(sys.modules, "mm.interop.diffusers", types.SimpleNamespace(export=export))
    tiny_run(tmp_path / "demo", tmp_path / "shards")
    out = release(str(tmp_path / "demo"), tmp_path / "out", format="diffusers", load=mm.load)
    assert (out / "model_index.json").read_text() == "16" and (out / "README.md").is_file()
    with pytest.raises(ConfigError, match="cannot draw"):
        release(source_of(theirs("clip")), tmp_path / "none", format="diffusers", load=mm.load)


def test_only_an_earlier_release_is_replaced_and_as_a_whole(
    tmp_path: Path, theirs: Theirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = source_of(theirs("clip")), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        release(source, out)
    (out / "thesis.txt").unlink()
    release(source, out)
    release(source, out, format="open_clip")
    before = sorted(path.name for path in out.iterdir())
    assert "config.json" not in before and "open_clip_config.json" in before
    monkeypatch.setattr(transformers_out, "convert", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        release(source, out, format="transformers")
    assert sorted(path.name for path in out.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        release(source, out)


def _interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_push_uploads_the_folder_or_says_how_to(
    tmp_path: Path, theirs: Theirs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    calls: list[Any] = []

    class FakeApi:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options["private"]))

        def upload_folder(self, *, repo_id: str, folder_path: str, **_: Any) -> None:
            assert (Path(folder_path) / "model.safetensors").is_file()
            calls.append(repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    source, out = source_of(theirs("clip")), tmp_path / "out"
    assert main(["release", source, str(out), "--push", "lab/clip", "--private"]) == 0
    assert calls == [("lab/clip", True), "lab/clip"] and "https://huggingface.co/lab/clip" in capsys.readouterr().out
    monkeypatch.setattr(FakeApi, "create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError("401\nno token")))
    assert main(["release", source, str(out), "--push", "lab/clip"]) == 2
    error = capsys.readouterr().err.strip()
    assert "is written" in error and "hf auth login" in error and "\n" not in error
    assert main(["release", source, str(out), "--push", "clip"]) == 2 and "ORG/NAME" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--format", "onnx"], ["--licence", "two words"], ["--results", "nothing.json"]])
def test_wrong_words_are_one_line(
    words: list[str], tmp_path: Path, theirs: Theirs, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_of(theirs("clip"))
    assert main(["release", source, str(tmp_path / "out"), *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_commands_take_any_source(tmp_path: Path, theirs: Theirs, capsys: pytest.CaptureFixture[str]) -> None:
    source = source_of(theirs("clip"))
    pictures()[0].save(tmp_path / "cat.png")
    assert main(["classify", source, str(tmp_path / "cat.png"), "--labels", "cat,dog"]) == 0
    assert "cat" in capsys.readouterr().out
