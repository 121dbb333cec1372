"""Added modalities: in the config, in the loss, and in gradients that do not depend on how a batch is cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from modality_line import CAPTIONS, LINE, build, make_batch, tiny

from mm import config as settings
from mm.adapters.text import train_tokenizer
from mm.config import ConfigError, ModalityConfig
from mm.models.model import Model


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_loss_is_the_mean_over_the_pairs(kind: str) -> None:
    found = {}
    for pairs in ("all", "image-text", "line-image", "text-line", "text-line,image-text"):
        config = tiny("all", LINE, kind=kind)
        step = build(config)
        objective = build(tiny(pairs, LINE, kind=kind)).objectives["contrastive"]
        batch = make_batch(step)
        found[pairs] = objective(step.model, batch, step.model.encode(batch)).metrics
    one = [found[name]["loss/contrastive"] for name in ("image-text", "line-image", "text-line")]
    torch.testing.assert_close(found["all"]["loss/contrastive"], torch.stack(one).mean())
    torch.testing.assert_close(found["text-line,image-text"]["loss/contrastive"], (one[0] + one[2]) / 2)
    assert [name for name in found["all"] if name.count("/") == 2] == [
        "loss/contrastive/image-text", "loss/contrastive/image-line", "loss/contrastive/text-line",
    ]  # fmt: skip
    assert found["all"]["loss/contrastive/image-line"] == one[1]
    assert not [name for name in found["line-image"] if name.count("/") == 2]  # one pair is the whole


def test_image_and_text_alone_are_what_they_were() -> None:
    """Bitwise: a pair more or less must not change a run that has none."""
    from mm_kernels import contrastive_loss

    step = build(tiny())
    batch = make_batch(step)
    encoded = step.model.encode(batch)
    assert list(encoded) == ["image", "text"]
    objective = step.objectives["contrastive"]
    plain = contrastive_loss(encoded["image"].pooled, encoded["text"].pooled, objective.logit_scale.exp())  # type: ignore[union-attr, operator]
    loss = objective(step.model, batch, encoded)
    assert torch.equal(loss.value, plain) and set(loss.metrics) == {"loss/contrastive", "logit_scale"}


@pytest.mark.parametrize("pairs", ["all", "image-text,image-line"])
def test_accumulated_gradients_equal_those_of_the_full_batch(pairs: str) -> None:
    step = build(tiny(pairs, LINE))
    batch, found = make_batch(step), {}
    for accumulate in (1, 4):
        step.zero_grad()
        metrics = step.backward(batch, accumulate)
        found[accumulate] = {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}
        found[accumulate]["metric"] = metrics["loss/contrastive/image-line"]
    assert found[1].keys() == found[4].keys() and found[1]["model.adapters.line.proj.weight"].abs().max() > 0
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[4][name], gradient, atol=2e-6, rtol=2e-4, msg=name)


def test_a_config_with_modalities_survives_the_disk_and_the_command_line(tmp_path: Path) -> None:
    config = tiny("all", LINE, replace(LINE, name="second", options='{"a": 1}'))
    settings.save(config, tmp_path / "config.json")
    assert settings.read(tmp_path / "config.json") == config
    changed = settings.override(config, ["--optim.lr", "0.5"])
    assert changed.model == config.model and changed.optim.lr == 0.5
    other = tiny("all", LINE)
    assert settings.difference(config, config) == []
    assert [line.partition(":")[0] for line in settings.difference(config, other)] == ["model.modalities"]
    for flag in ("--model.modalities", "--model.modalities.0.width"):
        with pytest.raises(ConfigError, match=r"set in the config file only|no such field"):
            settings.override(config, [flag, "3"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"name": "line"}], r"model.modalities\[0\].adapter: is missing"),
        ([{"name": "line", "adapter": "a:B", "wide": 3}], r"model.modalities\[0\].wide: no such field"),
        ([{"name": "line", "adapter": "a:B", "width": "3"}], r"model.modalities\[0\].width = '3': must be an int"),
        ([3], r"model.modalities\[0\] = 3: must be an object"),
        ({}, r"model.modalities = {}: must be a list of ModalityConfig"),
    ],
)
def test_a_damaged_config_names_the_field(data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.from_dict({"model": {"modalities": data}})


@pytest.mark.parametrize(
    ("pairs", "modalities", "message"),
    [
        ("image-lime", (LINE,), "pairs = 'image-lime': no modality 'lime'; did you mean line"),
        ("image-text-line", (LINE,), "a pair is two names"),
        ("image-text,text-image,text-line", (LINE,), "text-image is there twice"),
        ("image-text", (LINE,), "no objective trains it"),
        ("all", (LINE, LINE), "two of that name"),
        ("all", (replace(LINE, name="text"),), "name = 'text': must be"),
        ("all", (replace(LINE, name="Big-name"),), "name = 'Big-name': must be"),
        ("all", (replace(LINE, adapter="os.system"),), "must be 'package.module:Class'"),
        ("all", (replace(LINE, heads=3),), r"width = 32: must be a multiple of model.modalities\[0\].heads = 3"),
        ("all", (replace(LINE, depth=0),), "depth = 0: must be at least 1"),
        ("all", (replace(LINE, options="[]"),), "must be a JSON object"),
        ("all", (replace(LINE, options="{"),), "not JSON"),
    ],
)
def test_an_impossible_modality_is_refused_in_one_line(pairs: str, modalities: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        settings.validate(tiny(pairs, *modalities))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("modality", "message"),
    [
        (replace(LINE, adapter="subprocess:Popen"), "subprocess has no subclass of mm.adapters.base.Adapter"),
        (replace(LINE, adapter="modality_line:tiny"), "has no subclass of"),
        (replace(LINE, adapter="this:Zen"), "module this is not imported"),
        (replace(LINE, adapter="mm.adapters.nowhere:X"), "cannot be imported"),
        (replace(LINE, name="keys"), "torch's modules have an attribute of that name"),
    ],
)
def test_a_config_that_was_read_names_no_code_to_run(modality: ModalityConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Model(tiny("all", modality).model, train_tokenizer(CAPTIONS, 400))


def test_an_adapter_of_another_width_is_named() -> None:
    step = build(tiny("all", replace(LINE, options='{"width": 24}')))
    with pytest.raises(ValueError, match=r"'line': its adapter embeds tokens of shape \[8, 4, 24\].* width = 32"):
        step.model.encode(make_batch(step))


def test_mm_plan_says_that_it_cannot_count_it() -> None:
    from mm.plan.simulate import simulate

    with pytest.raises(ConfigError, match=r"model.modalities: line: mm plan cannot know"):
        simulate(tiny("all", LINE))
