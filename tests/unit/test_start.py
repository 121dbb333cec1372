"""A run begins from models of other libraries, part by part."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_clips import randomised, tiny_clip

from mm.config import (
    ConfigError,
    DataConfig,
    DenoiserConfig,
    ModelConfig,
    RunConfig,
    StartConfig,
    TrainConfig,
    validate,
)
from mm.interop.origin import Origin
from mm.interop.sources import read
from mm.interop.start import resolve
from mm.models.presets import tiny
from mm.objectives.step import TrainStep, build_step
from mm.settings import save


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_clip(tmp_path_factory.mktemp("clip"))[1]


def config(tmp_path: Path, **start: object) -> TrainConfig:
    model = ModelConfig(denoiser=DenoiserConfig(patch=8, width=64, depth=2, heads=2))
    return TrainConfig(
        run=RunConfig(dir=str(tmp_path / "run")),
        data=DataConfig(batch_size=4),
        model=model,
        start=StartConfig(**start),  # type: ignore[arg-type]
    )


def begun(settings: TrainConfig) -> TrainStep:
    start = resolve(settings)
    validate(settings)
    tokenizer = start.tokenizer or read(settings.start.image, weights=False).tokenizer
    step = build_step(settings, tokenizer)
    start.fill(step)
    return step


def same(step: TrainStep, origin: Origin, prefix: str) -> bool:
    own = step.model.state_dict()
    names = [name for name in origin.tensors if name.startswith(prefix)]
    return bool(names) and all(torch.equal(own[name], origin.tensors[name]) for name in names)


def test_a_whole_clip_is_taken_and_the_denoiser_is_fresh(clip: str, tmp_path: Path) -> None:
    settings = config(tmp_path, model=clip)
    settings.model.image.crop_scale, settings.model.text.word_dropout = 0.35, 0.2
    step, origin = begun(settings), read(clip)
    for prefix in ("adapters.image", "encoders.image", "adapters.text", "encoders.text"):
        assert same(step, origin, prefix), prefix
    assert step.model.denoiser is not None
    assert settings.model.embed_dim == 32
    assert settings.model.image.width == 64
    assert (settings.model.image.crop_scale, settings.model.text.word_dropout) == (0.35, 0.2)  # the run's own
    scale = step.state_dict()["objectives.contrastive.logit_scale"]
    assert torch.equal(scale, origin.tensors["objectives.contrastive.logit_scale"])


def test_a_tower_alone_brings_its_width_to_the_other(clip: str, tmp_path: Path) -> None:
    settings = config(tmp_path, image=clip)
    step, origin = begun(settings), read(clip)
    assert same(step, origin, "encoders.image")
    assert step.model.encoders["text"].proj.out_features == 32
    assert settings.model.text.width == ModelConfig().text.width
    text = begun(config(tmp_path, text=clip))
    assert same(text, origin, "encoders.text")
    assert same(text, origin, "adapters.text")


def test_another_picture_size_stretches_the_positions(clip: str, tmp_path: Path) -> None:
    step, origin = begun(config(tmp_path, model=clip, size=48)), read(clip)
    position, theirs = step.model.adapters["image"].position, origin.tensors["adapters.image.position"]
    assert position.shape == (37, 64)
    assert torch.equal(position[0], theirs[0])  # the class token's stays
    middle = torch.nn.functional.interpolate(
        theirs[1:].T.reshape(1, 64, 4, 4), (6, 6), mode="bicubic", antialias=True
    ).reshape(64, 36)
    assert torch.equal(position[1:], middle.T)


def test_a_timm_backbone_gets_a_projection_of_its_own(tmp_path: Path) -> None:
    import timm

    backbone = randomised(timm.create_model("resnet10t", num_classes=0))
    save_file({k: v.contiguous() for k, v in backbone.state_dict().items()}, tmp_path / "r.safetensors")
    settings = config(tmp_path, image=f"timm:resnet10t@{tmp_path / 'r.safetensors'}", size=32)
    step = begun(settings)
    trunk = step.model.encoders["image"].trunk.state_dict()
    assert all(torch.equal(trunk[name], tensor) for name, tensor in backbone.state_dict().items())
    assert step.model.encoders["image"].proj.weight.shape == (settings.model.embed_dim, 512)


def test_a_denoiser_comes_from_a_run_of_mm(tmp_path: Path) -> None:
    from mm.adapters.text import train_tokenizer
    from mm.models.export import save_export

    source = TrainConfig(model=tiny())
    tokenizer = train_tokenizer(["red heart", "blue car"], 300)
    theirs = randomised(build_step(source, tokenizer))
    save_export(tmp_path / "theirs", theirs.state_dict(), source, tokenizer.to_json(), {})
    settings = config(tmp_path, text=str(tmp_path / "theirs"), denoiser=str(tmp_path / "theirs"))
    step, origin = begun(settings), read(tmp_path / "theirs")
    assert same(step, origin, "denoiser.")
    assert same(step, origin, "encoders.text")
    assert not same(step, origin, "encoders.image")


def test_a_run_with_a_checkpoint_goes_on_without_its_source(tmp_path: Path) -> None:
    source = tiny_clip(tmp_path / "clip")[1]
    settings = config(tmp_path, model=source)
    resolve(settings)
    save(settings, tmp_path / "run" / "config.json")
    shutil.rmtree(tmp_path / "clip")
    again = config(tmp_path, model=source)
    with pytest.raises(ConfigError, match="open_clip_config.json is not there"):
        resolve(again)
    (tmp_path / "run" / "checkpoints" / "step-00000004").mkdir(parents=True)
    (tmp_path / "run" / "latest").write_text("step-00000004\n")
    (tmp_path / "run" / "checkpoints" / "step-00000004" / "manifest.json").write_text("{}")
    assert "is not there" in resolve(again).gone  # and training stops unless that checkpoint is whole
    assert again.model == settings.model


def test_what_does_not_fit_is_refused_by_name(clip: str, tmp_path: Path) -> None:
    wide = tiny_clip(tmp_path / "wide", embed_dim=64)[1]
    for start, words in [
        ({"image": clip, "text": wide}, r"different width: start.image = .* has 32, start.text = .* has 64"),
        ({"denoiser": clip}, "has no denoiser"),
        ({"text": "timm:resnet10t"}, "has no text|could not be fetched"),
        ({"model": "open_clip:ViT-B-33/openai"}, "did you mean ViT-B-32"),
        ({"model": clip, "size": 36}, "model.image.size = 36: must be a multiple"),
    ]:
        with pytest.raises(ConfigError, match=words):
            begun(config(tmp_path, **start))
    lonely = config(tmp_path)
    lonely.start.size = 64
    with pytest.raises(ConfigError, match="start.size = 64"):
        validate(lonely)


def test_a_hugging_face_text_encoder_comes_from_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    import mm

    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words.train_from_iterator(
        ["red heart", "blue car"], trainers.WordPieceTrainer(vocab_size=60, special_tokens=special)
    )
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}
    theirs = randomised(BertModel(BertConfig(vocab_size=60, **shape), add_pooling_layer=False))
    theirs.save_pretrained(tmp_path / "bert")
    fast.save_pretrained(tmp_path / "bert")

    batch = fast(["red heart", "blue"], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = theirs(**batch).last_hidden_state
    real = batch["attention_mask"][..., None].float()
    wanted = torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)
    source = f"hf:{tmp_path / 'bert'}"
    capfd.readouterr()
    assert torch.allclose(mm.load(source).encode(text=["red heart", "blue"])["text"], wanted, atol=1e-6)
    step = begun(config(tmp_path, text=source))
    assert same(step, read(source), "encoders.text")
    assert step.model.encoders["text"].text.proj.weight.shape == (128, 48)  # into the run's own space
    assert capfd.readouterr() == ("", "")  # transformers' bars and reports are not ours


def test_a_trained_scale_above_the_bound_is_not_cut(tmp_path: Path) -> None:
    from mm.adapters.text import train_tokenizer
    from mm.models.export import save_export

    source, tokenizer = TrainConfig(model=tiny()), train_tokenizer(["red heart", "blue car"], 300)
    theirs = build_step(source, tokenizer)
    theirs.objectives["contrastive"].logit_scale.data.fill_(5.0)
    save_export(tmp_path / "theirs", theirs.state_dict(), source, tokenizer.to_json(), {})
    step = begun(config(tmp_path, model=str(tmp_path / "theirs")))
    step.after_step()
    assert float(step.objectives["contrastive"].logit_scale.detach()) == pytest.approx(5.0, abs=1e-6)


def test_a_config_that_is_far_larger_than_its_weights_is_refused_before_it_is_built(tmp_path: Path) -> None:
    import json

    import mm
    from mm.adapters.text import train_tokenizer
    from mm.models.export import save_export

    source, tokenizer = TrainConfig(model=tiny()), train_tokenizer(["red heart", "blue car"], 300)
    save_export(tmp_path, build_step(source, tokenizer).state_dict(), source, tokenizer.to_json(), {})
    whole = json.loads((tmp_path / "config.json").read_text())
    for field, value in [("width", 4 * 10**8), ("depth", 10**6), ("mlp_ratio", 1e300), ("heads", 0), ("patch", 0)]:
        own = json.loads(json.dumps(whole))
        own["model"]["image"][field] = value
        (tmp_path / "config.json").write_text(json.dumps(own))
        with pytest.raises(ConfigError, match="many more than its weights|no model that can be built") as caught:
            mm.load(tmp_path)
        assert "\n" not in str(caught.value)


def test_the_loss_of_a_source_is_taken_with_its_bias(tmp_path: Path) -> None:
    settings = config(tmp_path, model=tiny_clip(tmp_path / "clip", init_logit_bias=-7.0)[1])
    step = begun(settings)
    assert settings.objectives.contrastive is not None
    assert settings.objectives.contrastive.kind == "sigmoid"
    bias = step.state_dict()["objectives.contrastive.logit_bias"]
    assert torch.equal(bias, read(settings.start.model).tensors["objectives.contrastive.logit_bias"])
