"""What cannot be read from open_clip is refused in one line that names it and says what to do."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clips import TEXT, VISION, made, write
from safetensors.torch import load_file, save_file

import mm
from mm.config import ConfigError
from mm.interop.files import CONVERT, read_weights
from mm.interop.open_clip import read


def refusal(source: str) -> str:
    with pytest.raises(ConfigError) as caught:
        mm.load(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_file(file: Path) -> str:
    """The small CLIP with other weights."""
    return f"open_clip:local-dir:{made('clip').folder}@{file}"


def described(folder: Path, vision: dict[str, Any], text: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    cfg = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
    return f"open_clip:local-dir:{folder}"


def test_names_and_tags_that_open_clip_does_not_know() -> None:
    assert "did you mean ViT-B-32" in refusal("open_clip:VitB-32/openai")
    assert "did you mean laion2b_s34b_b79k" in refusal("open_clip:ViT-B-32/laion2b_s34b_b79")
    assert "laion400m_e31" in refusal("open_clip:ViT-B-32") and "@FILE" in refusal("open_clip:ViT-B-32")
    assert "no such source" in refusal("openclip:ViT-B-32")


def test_weights_that_only_the_hub_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mm.interop.open_clip.reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "hub does not answer; give local-dir" in refusal("open_clip:hf-hub:nobody/nothing")
    assert "hub does not answer; give a file: @FILE" in refusal("open_clip:ViT-B-32/laion2b_s34b_b79k")


def test_weights_of_another_architecture_are_told_by_what_differs(tmp_path: Path) -> None:
    message = refusal(with_file(made("resnet").folder / "open_clip_model.safetensors"))
    assert "lacks visual.class_embedding" in message and "has visual.attnpool" in message and " more" in message
    folder = tmp_path / "narrow"
    write(folder, (VISION | {"width": 32}, TEXT, {}))
    assert "is 32x192, not 64x192" in refusal(with_file(folder / "open_clip_model.safetensors"))
    folder = tmp_path / "large"
    write(folder, (VISION | {"image_size": 48}, TEXT, {}))
    message = refusal(with_file(folder / "open_clip_model.safetensors"))
    assert "for pictures of 48 pixels a side and model.image.size = 32" in message
    weights = load_file(made("clip").folder / "open_clip_model.safetensors")
    save_file(weights | {"logit_scale": torch.ones(3)}, tmp_path / "scale.safetensors")
    assert "logit_scale is 3" in refusal(with_file(tmp_path / "scale.safetensors"))


class Code:
    """What pickle would run."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "it ran")


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran.txt"
    torch.save({"state_dict": {"logit_scale": torch.ones(())}, "more": Code(ran)}, tmp_path / "code.pt")
    (tmp_path / "bare.bin").write_bytes(pickle.dumps(Code(ran)))
    for name in ("code.pt", "bare.bin"):
        message = refusal(with_file(tmp_path / name))
        assert "may run code" in message and "save_file" in message and name in message
    assert not ran.exists()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    assert "TorchScript" in refusal(with_file(tmp_path / "script.pt"))


def test_the_line_that_converts_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, line = torch.nn.Linear(2, 2), CONVERT.split('"')[1]
    torch.save(model, tmp_path / "module.pt")
    torch.save({"state_dict": dict(model.state_dict()), "more": Code(tmp_path / "ran.txt")}, tmp_path / "code.pt")
    torch.jit.save(torch.jit.script(model), tmp_path / "script.pt")
    for name in ("module.pt", "code.pt", "script.pt"):
        monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / name), str(tmp_path / "out.safetensors")])
        exec(line, {})
        assert torch.equal(read_weights(tmp_path / "out.safetensors")["weight"], model.weight)


def test_a_folder_with_an_at_sign_in_its_name_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a@b c é").symlink_to(made("clip").folder, target_is_directory=True)
    assert mm.load(f"open_clip:local-dir:{tmp_path / 'a@b c é'}").config.model == made("clip").loaded.config.model


def test_a_checkpoint_of_plain_tensors_is_read(tmp_path: Path) -> None:
    weights = load_file(made("clip").folder / "open_clip_model.safetensors")
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": t for name, t in weights.items()}}, tmp_path / "epoch.pt")
    one, other = mm.load(with_file(tmp_path / "epoch.pt")), made("clip").loaded
    assert torch.equal(one.encode(text=["a cat"])["text"], other.encode(text=["a cat"])["text"])


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    whole = (made("clip").folder / "open_clip_model.safetensors").read_bytes()
    for name, content in (("cut.safetensors", whole[:-1000]), ("empty.safetensors", b""), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(content)
        assert name in refusal(with_file(tmp_path / name))
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    assert "page.pt" in refusal(with_file(tmp_path / "page.pt"))
    assert "no such file" in refusal(with_file(tmp_path / "nowhere.safetensors"))
    assert "is a folder" in refusal(with_file(tmp_path))
    (tmp_path / "weights.h5").write_bytes(b"1")
    assert "give .safetensors" in refusal(with_file(tmp_path / "weights.h5"))
    torch.save([1, 2], tmp_path / "list.pt")
    assert "list.pt: holds a list" in refusal(with_file(tmp_path / "list.pt"))


def test_descriptions_that_mm_cannot_follow(tmp_path: Path) -> None:
    assert "no weights in" in refusal(described(tmp_path, VISION, TEXT))
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    small = TEXT | {"vocab_size": 1000}
    assert "49408 ids and its text embedding 1000 rows" in refusal(described(tmp_path, VISION, small))
    assert "32x64 pixels; mm takes square" in refusal(described(tmp_path, VISION | {"image_size": [32, 64]}, TEXT))
    text = TEXT | {"tokenizer_kwargs": {"reduction_mask": "simple"}}
    assert "tokenizer has no {'reduction_mask'" in refusal(described(tmp_path, VISION, text))
    (tmp_path / "open_clip_config.json").write_text("{")
    assert "is no open_clip config" in refusal(f"open_clip:local-dir:{tmp_path}")
    assert "is not there" in refusal(f"open_clip:local-dir:{tmp_path / 'nowhere'}")


def test_a_tag_that_was_trained_with_quick_gelu_has_it() -> None:
    """open_clip warns, and goes on with activations that the weights were not trained with."""
    openai, laion = (read(f"open_clip:ViT-B-32/{tag}", weights=False).model for tag in ("openai", "laion2b_s34b_b79k"))
    assert {openai.image.activation, openai.text.activation} == {"quick_gelu"}
    assert {laion.image.activation, laion.text.activation} == {"gelu"}
