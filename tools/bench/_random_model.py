"""The model of configs/demo.py with random weights: how long it takes does not depend on what it has learnt."""

from __future__ import annotations

from pathlib import Path

import torch
from _common import ROOT, cache_folder

import mm
from mm.adapters.text import train_tokenizer
from mm.api import LoadedModel
from mm.evaluation.vocabulary import filled, read_labels, read_templates
from mm.models.export import WEIGHTS, save_export
from mm.objectives.step import build_step
from mm.settings import load as load_config


def random_model() -> LoadedModel:
    """On the CPU, read from a folder in the cache; its tokenizer knows ImageNet's names and the 80 templates."""
    folder = cache_folder("bench", "random_model")
    if not (folder / WEIGHTS).is_file():
        config = load_config(Path(ROOT) / "configs" / "demo.py")
        names = [text for name in read_labels("imagenet") for text in filled(name, read_templates("simple"))]
        torch.manual_seed(0)
        corpus = [*names, *read_templates("openai")]
        step = build_step(config, train_tokenizer(corpus, config.model.text.vocab_size))
        folder.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = step.model.tokenizer.to_json()
        save_export(folder, step.state_dict(), config, tokenizer, {"weights": "random"})
    return mm.load(str(folder), device="cpu")
