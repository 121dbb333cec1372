"""Text towers and tokenizers of Hugging Face: as open_clip runs them, and inside the model from then on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from open_clips import TEXT, VISION, write

import mm
from mm.adapters.hub_tokenizer import HubTokenizer
from mm.adapters.text import TextProcessor
from mm.config import ConfigError
from mm.models.export import save_export

TEXTS = ["a cat", "Two  DOGS, on_a mat: it's raining &amp; cold!", "word " * 30, "x"]
VOCABULARY = 300
TINY = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"intermediate_size": 64, "max_position_embeddings": 20}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2}


def tokenizer(folder: Path, specials: list[str], template: str) -> Any:
    """A small byte-level BPE whose special tokens have the ids of their places; pad is the first named *pad*."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    rust = Tokenizer(models.BPE(unk_token=specials[-1]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=specials,
                                                        initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    pairs = [(word, number) for number, word in enumerate(specials)]
    rust.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)  # type: ignore[assignment]
    named = {"pad_token": "<pad>", "sep_token": "</s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=rust, **named)
    fast.save_pretrained(folder)
    return fast


BERT = (["<pad>", "<s>", "</s>", "<unk>"], "<s> $A </s>")
ROBERTA = (["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>")
SENTENCEPIECE = (["<pad>", "</s>", "<unk>"], "$A </s>")


@pytest.mark.parametrize(
    ("clean", "strip", "specials", "template"),
    [
        ("whitespace", False, *BERT),
        ("canonicalize", True, *BERT),
        ("lower", False, *ROBERTA),
        ("canonicalize", False, *SENTENCEPIECE),
        ("whitespace", False, ROBERTA[0], "$A"),
        ("whitespace", False, BERT[0], "$A </s> </s>"),
    ],
)
def test_ids_are_those_of_open_clips_tokenizer(
    tmp_path: Path, clean: str, strip: bool, specials: list[str], template: str
) -> None:
    fast = tokenizer(tmp_path, specials, template)
    theirs = HFTokenizer(str(tmp_path), context_length=9, clean=clean, strip_sep_token=strip)(TEXTS)
    ours = HubTokenizer("x", VOCABULARY, fast.backend_tokenizer.to_str(), clean, fast.sep_token_id if strip else None)
    for made in (ours, HubTokenizer.from_json(ours.to_json())):
        processor = TextProcessor(made, 9, pad_id=fast.pad_token_id)
        ids, _ = processor.collate([processor.prepare(text, train=False) for text in TEXTS])
        assert torch.equal(ids, theirs)


def config_of(kind: str) -> Any:
    import transformers

    if kind == "bert":
        return transformers.BertConfig(**TINY, pad_token_id=0)
    if kind == "xlm-roberta":
        return transformers.XLMRobertaConfig(**TINY, pad_token_id=1)
    return transformers.MT5Config(**T5, pad_token_id=0)


@pytest.mark.parametrize(
    ("kind", "special", "pooler"),
    [("bert", BERT, "cls_pooler"), ("xlm-roberta", ROBERTA, "mean_pooler"), ("mt5", SENTENCEPIECE, "mean_pooler")],
)
def test_a_hub_encoder_is_the_same_and_needs_its_folder_no_more(
    tmp_path: Path, kind: str, special: Any, pooler: str
) -> None:
    hub = tmp_path / "hub"
    config_of(kind).save_pretrained(hub)
    tokenizer(hub, *special)
    text = {"hf_model_name": str(hub), "hf_tokenizer_name": str(hub), "hf_pooler_type": pooler, "context_length": 12}
    theirs, _ = write(tmp_path / "model", (VISION, text, {}))
    ids = HFTokenizer(str(hub), context_length=12)(TEXTS)
    with torch.no_grad():
        expected = theirs.encode_text(ids, normalize=True)
    loaded = mm.load(f"open_clip:local-dir:{tmp_path / 'model'}")
    assert (loaded.encode(text=TEXTS)["text"] - expected).abs().max() <= 1e-5
    assert (loaded.encode(text=ids)["text"] - expected).abs().max() <= 1e-5
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    model = loaded.inference.model
    state = {f"model.{key}": tensor for key, tensor in model.state_dict().items()} | loaded.inference.extras
    save_export(tmp_path / "saved", state, loaded.config, model.tokenizer.to_json(), {})
    shutil.rmtree(hub)
    shutil.rmtree(tmp_path / "model")
    assert torch.equal(mm.load(tmp_path / "saved").encode(text=TEXTS)["text"], loaded.encode(text=TEXTS)["text"])


@pytest.mark.parametrize(("special", "end"), [(SENTENCEPIECE, 1), (ROBERTA, 2)])
def test_own_text_tower_pools_at_the_tokenizers_end(tmp_path: Path, special: Any, end: int) -> None:
    tokenizer(tmp_path, *special)  # in the model's own folder, where open_clip looks first
    text = TEXT | {"hf_tokenizer_name": "nowhere/else", "vocab_size": VOCABULARY, "pool_type": "eos", "eos_id": end}
    theirs, _ = write(tmp_path, (VISION, text, {}))
    with torch.no_grad():
        expected = theirs.encode_text(HFTokenizer(str(tmp_path), context_length=16)(TEXTS), normalize=True)
    loaded = mm.load(f"open_clip:local-dir:{tmp_path}")
    assert loaded.config.model.text.tower is None
    assert (loaded.encode(text=TEXTS)["text"] - expected).abs().max() <= 1e-5


def test_a_tokenizer_that_is_missing_or_too_large(tmp_path: Path) -> None:
    text = TEXT | {"hf_tokenizer_name": str(tmp_path / "hub"), "vocab_size": VOCABULARY}
    write(tmp_path, (VISION, text, {}))
    loaded = mm.load(f"open_clip:local-dir:{tmp_path}")
    assert loaded.encode(text=torch.tensor([[5, 6]]))["text"].shape == (1, 32)
    with pytest.raises((ConfigError, ValueError), match="give token ids"):
        loaded.encode(text=["a cat"])
    tokenizer(tmp_path / "hub", *BERT)
    write(tmp_path, (VISION, text | {"vocab_size": 200}, {}))
    with pytest.raises(ConfigError, match=r"has 29\d ids and the text embedding 200 rows"):
        mm.load(f"open_clip:local-dir:{tmp_path}")
