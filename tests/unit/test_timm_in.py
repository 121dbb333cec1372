"""timm's backbones as the vision encoder: the same features, the same pictures, trainable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from open_clips import picture
from safetensors.torch import save_file
from tiny_clips import randomised

import mm
from mm.config import ConfigError
from mm.interop.timm import read
from mm.models.export import load_export, save_export
from mm.types import Batch

PICTURES = [picture(200, 170), picture(90, 260)]
BACKBONES = ("test_vit", "test_convnext", "test_efficientnet", "swin_for_mm")  # tokens, maps [C, H, W], maps [H, W, C]


@timm.models.register_model
def swin_for_mm(pretrained: bool = False, **options: Any) -> Any:
    from timm.models.swin_transformer import SwinTransformer

    options = {key: value for key, value in options.items() if not key.startswith(("pretrained", "cache"))}
    shape: dict[str, Any] = {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
    model = SwinTransformer(**shape | options)
    model.pretrained_cfg = {"input_size": (3, 64, 64), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.4, 0.3)}
    return model


def written(name: str, folder: Path, **options: Any) -> tuple[Any, str]:
    """A backbone of timm's with its classifier, nothing at its initial value, and what mm is asked for."""
    torch.manual_seed(0)
    trunk: Any = timm.create_model(name, num_classes=7, **options).eval()
    randomised(trunk, amount=0.1)
    file = folder / "weights.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in trunk.state_dict().items()}, file)
    return trunk, f"timm:{name}@{file}"


@pytest.mark.parametrize("name", BACKBONES)
def test_features_and_pictures_are_those_of_timm(name: str, tmp_path: Path) -> None:
    trunk, source = written(name, tmp_path)
    loaded = mm.load(source)
    data = timm.data.resolve_model_data_config(trunk)
    image = loaded.config.model.image
    assert (image.size, image.mean, image.std) == (data["input_size"][1], tuple(data["mean"]), tuple(data["std"]))
    pixels = loaded.inference.prepare("image", PICTURES)[0].float() / 255
    mean, std = (torch.tensor(data[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = trunk.forward_head(trunk.forward_features((pixels - mean) / std), pre_logits=True)
    ours = loaded.encode(image=PICTURES)["image"]
    assert (ours - torch.nn.functional.normalize(expected, dim=-1)).abs().max() <= 1e-5
    assert (ours[0] - ours[1]).abs().max() > 1e-3
    tokens = loaded.inference.model.encode(Batch({"image": loaded.inference.prepare("image", PICTURES)[0]}))["image"]
    assert tokens.tokens.x.ndim == 3 and tokens.tokens.x.shape[2] == loaded.inference.model.width("image")


@pytest.mark.parametrize("name", BACKBONES)
def test_a_training_step_reaches_the_whole_backbone(name: str, tmp_path: Path) -> None:
    model = read(written(name, tmp_path)[1]).build().train().requires_grad_(True)
    side = model.config.image.size
    pixels = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8)
    vectors = model.encode(Batch({"image": pixels}))["image"].pooled
    torch.nn.functional.cross_entropy(5 * vectors @ vectors.detach().T, torch.tensor([1, 2, 3, 0])).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize(("name", "size"), [("test_vit", 96), ("test_convnext", 96)])
def test_another_picture_size_stretches_positions_as_timm_does(name: str, size: int, tmp_path: Path) -> None:
    trunk, source = written(name, tmp_path)
    model = read(source, size=size).build()
    if hasattr(trunk, "set_input_size"):
        trunk.set_input_size((size, size))
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    adapter: Any = model.adapters["image"]
    with torch.no_grad():
        normal = (pixels.float() - adapter.mean) / adapter.std
        expected = trunk.forward_head(trunk.forward_features(normal), pre_logits=True)
        ours = model.encode(Batch({"image": pixels}))["image"].pooled
    assert (ours - torch.nn.functional.normalize(expected, dim=-1)).abs().max() <= 1e-5


def test_a_backbone_is_saved_and_has_no_text(tmp_path: Path) -> None:
    loaded = mm.load(written("test_convnext", tmp_path)[1])
    with pytest.raises(ValueError, match="text: not a modality of this model"):
        loaded.encode(text=["a cat"])
    model = loaded.inference.model
    state = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    save_export(tmp_path / "saved", state, loaded.config, model.tokenizer.to_json(), {})
    one = loaded.encode(image=PICTURES)["image"]
    again, _, _, _ = load_export(tmp_path / "saved")
    assert list(again.encoders) == ["image"]
    assert torch.equal(mm.load(tmp_path / "saved").encode(image=PICTURES)["image"], one)


def test_what_timm_does_not_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean test_vit"):
        mm.load("timm:test_vitt")
    other = written("test_convnext", tmp_path)[1].partition("@")[2]
    with pytest.raises(ConfigError, match=r"weights of another architecture: lacks blocks.0.*; has stages.0"):
        mm.load(f"timm:test_vit@{other}")
    monkeypatch.setattr("mm.interop.timm.reachable", lambda: False)
    with pytest.raises(ConfigError, match="give a file: @FILE"):
        mm.load("timm:test_vit")
