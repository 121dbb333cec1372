"""The presets are valid, and as large as the models they are named after."""

from __future__ import annotations

import pytest
import torch

from mm.adapters.text import ClipTokenizer
from mm.config import DataConfig, TrainConfig, validate
from mm.models.model import Model
from mm.models.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_config_that_can_be_trained(name: str) -> None:
    validate(TrainConfig(model=PRESETS[name](), data=DataConfig(train="x")))


# millions of parameters (image, text) that open_clip's model profile lists
@pytest.mark.parametrize(
    ("name", "image", "text"), [("vit_b32", 87.85, 63.43), ("vit_b16", 86.19, 63.43), ("vit_l14", 303.97, 123.65)]
)
def test_encoders_have_the_size_of_clips(name: str, image: float, text: float) -> None:
    with torch.device("meta"):
        model = Model(PRESETS[name](), ClipTokenizer())
    for modality, wanted in (("image", image), ("text", text)):
        modules = (model.adapters[modality], model.encoders[modality])
        count = sum(p.numel() for module in modules for p in module.parameters())
        assert count / 1e6 == pytest.approx(wanted, rel=0.01)
