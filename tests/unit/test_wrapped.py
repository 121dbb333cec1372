"""Encoders of other libraries: nothing that describes one reads a file or runs code, and none draws random numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mm.adapters.text import tokenizer_from_json, train_tokenizer
from mm.config import ConfigError, ImageConfig, ParallelConfig, TextConfig, TowerConfig, TrainConfig
from mm.distributed.parallelize import recompute
from mm.interop.files import read_weights
from mm.models.encoder import image_encoder, text_encoder
from mm.models.presets import tiny
from mm.objectives.step import TrainStep, build_step, watched
from mm.settings import read
from mm.types import Batch, Tokens

BERT: dict[str, Any] = {"model_type": "bert", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1}
BERT |= {"num_attention_heads": 2, "intermediate_size": 32}
POOLED = {"hf_model_name": "x", "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
SWIN = {"img_size": 32, "embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 2}


def timm(name: str, **options: Any) -> nn.Module:
    return image_encoder(ImageConfig(tower=TowerConfig(library="timm", name=name, options=json.dumps(options))), 32)


def clip(**options: Any) -> nn.Module:
    return image_encoder(ImageConfig(tower=TowerConfig(library="open_clip", name="x", options=json.dumps(options))), 32)


def words(**options: Any) -> nn.Module:
    return text_encoder(TextConfig(tower=TowerConfig(library="open_clip", name="x", options=json.dumps(options))), 32)


def test_a_description_names_no_file_no_hub_and_nothing_that_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    for build, message in [
        (lambda: timm("resnet10t", checkpoint_path="weights.pth"), "checkpoint_path: a tower is built without files"),
        (lambda: timm("resnet10t", pretrained=True), "pretrained: a tower is built without files"),
        (lambda: timm("hf-hub:nobody/nothing"), "'hf-hub:nobody/nothing': timm has no such model"),
        (lambda: timm("local-dir:/nowhere"), "timm has no such model"),
        (lambda: timm("resnet10tt"), "did you mean resnet10t"),
        (lambda: timm("resnet10t", width="x"), "timm builds no resnet10t .*width"),
        (lambda: clip(vision_cfg={"timm_model_name": "hf-hub:nobody/nothing"}), "timm has no such model"),
        (lambda: clip(), "vision_cfg = None: must be a JSON object"),
        (lambda: clip(vision_cfg={"nonsense": 1}), "open_clip builds no x .*nonsense"),
        (lambda: words(text_cfg=POOLED), "hf_model_name without hf_config"),
        (
            lambda: words(text_cfg=POOLED, hf_config=BERT | {"model_type": "evil", "auto_map": {}}),
            "model_type = 'evil'",
        ),
        (lambda: words(text_cfg=POOLED, hf_config=[1]), "hf_config = .*: must be a JSON object"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            build()
        assert "\n" not in str(caught.value)


def test_a_hugging_face_config_brings_no_code_and_no_kernels() -> None:
    evil = {"auto_map": {"AutoConfig": "evil/it--x.C", "AutoModel": "evil/it--x.M"}, "attn_implementation": "evil/it"}
    encoder: Any = words(text_cfg=POOLED, hf_config=BERT | evil | {"_attn_implementation_internal": "evil/it"})
    inner = encoder.text.transformer
    assert type(inner).__module__ == "transformers.models.bert.modeling_bert"
    assert inner.config._attn_implementation == "sdpa"
    assert not hasattr(inner.config, "auto_map")


def test_no_encoder_draws_random_numbers_in_training() -> None:
    m2m = {"model_type": "m2m_100", "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "vocab_size": 50}
    m2m |= {"encoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_attention_heads": 2, "encoder_layerdrop": 0.9}
    pixels = Tokens(torch.rand(4, 32 * 32, 3))
    ids = Tokens(torch.randint(2, 50, (4, 8, 1)), torch.ones(4, 8, dtype=torch.bool))
    for encoder, given in [
        (timm("swin_tiny_patch4_window7_224", **SWIN), pixels),  # drops paths unless told otherwise
        (clip(vision_cfg={"timm_model_name": "test_vit", "image_size": 32, "timm_drop": 0.5}), pixels),
        (timm("test_efficientnet", drop_rate=0.5, drop_path_rate=0.5), pixels),
        (words(text_cfg=POOLED, hf_config=m2m), ids),
        (words(text_cfg=POOLED, hf_config=BERT | {"hidden_dropout_prob": 0.5}), ids),
    ]:
        encoder.train()
        assert torch.equal(encoder(given).pooled, encoder(given).pooled), type(encoder)


def with_norms() -> tuple[TrainStep, Batch]:
    """A train step whose vision encoder has batch norms."""
    model = tiny()
    model.image.tower = TowerConfig(library="timm", name="test_efficientnet")
    step = build_step(TrainConfig(model=model), train_tokenizer(["red heart", "blue car"], 300))
    text = step.model.processors(train=False)["text"]
    ids, lengths = text.collate([text.prepare(words, train=False) for words in ["red", "blue car"] * 4])
    assert lengths is not None
    pictures = torch.randint(0, 256, (8, 3, model.image.size, model.image.size), dtype=torch.uint8)
    inputs = {"image": pictures, "text": ids, "target": pictures}
    return step.train(), Batch(inputs, {"text": lengths}, torch.arange(8), [str(i) for i in range(8)])


def test_a_step_moves_batch_norms_once_and_looking_does_not() -> None:
    step, batch = with_norms()
    counts = [buffer for name, buffer in step.named_buffers() if name.endswith("num_batches_tracked")]
    before = {name: buffer.clone() for name, buffer in step.named_buffers()}
    step.diagnose(batch)
    step.features(batch)
    with watched(step):
        step.backward(batch)
    assert all(torch.equal(buffer, before[name]) for name, buffer in step.named_buffers())
    step.backward(batch, accumulate=2)
    assert {int(count) for count in counts} == {2}  # one a micro-batch
    recompute(step, ParallelConfig(activation_checkpointing="full").activation_checkpointing)
    step.backward(batch)
    assert {int(count) for count in counts} == {3}


def test_damaged_files_are_refused_whatever_is_raised_of_them(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3), "b": torch.ones(2, 2)}, tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    place = good.index(b"h\x00") if b"h\x00" in good else good.index(b"q\x01")
    for index in range(place, place + 120):
        (tmp_path / "bad.pt").write_bytes(good[:index] + bytes([good[index] ^ 0x17]) + good[index + 1 :])
        try:
            read_weights(tmp_path / "bad.pt")
        except ConfigError as error:
            assert "\n" not in str(error)
    (tmp_path / "deep.json").write_text('{"model":' + "[" * 100_000)
    with pytest.raises(ConfigError, match="not JSON"):
        read(tmp_path / "deep.json")
    hub = {"name": "x", "vocab_size": 5, "clean": "lower", "blank": None, "tokenizer": ""}
    for text in ("garbage", "[" * 100_000, *(json.dumps({"hub": hub | bad}) for bad in (
        {"tokenizer": "{nope"}, {"vocab_size": "5"}, {"clean": "evil"}
    ))):  # fmt: skip
        with pytest.raises(ConfigError, match="^tokenizer.json: "):
            tokenizer_from_json(text)


def test_where_a_first_token_stands_for_all_the_mask_loses_its_place() -> None:
    first = POOLED | {"hf_pooler_type": "cls_pooler"}
    mask = torch.arange(8)[None] < torch.tensor([[3], [8]])
    tokens = words(text_cfg=first, hf_config=BERT).eval()(Tokens(torch.ones(2, 8, 1, dtype=torch.long), mask)).tokens
    assert tokens.x.shape[:2] == (2, 7)
    assert tokens.mask is not None and tokens.mask.sum(1).tolist() == [2, 7]
