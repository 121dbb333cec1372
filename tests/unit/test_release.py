"""`mm release`: its card, its folder, its refusals; nothing is half-written, and nothing of anybody else's lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from released import Theirs, models_in, pictures, same_bits, source_of
from tiny_clips import randomised, tiny_clip

import mm
from mm.adaptation import lora
from mm.adapters import hub
from mm.adapters.text import ClipTokenizer
from mm.cli import main
from mm.config import (
    AdaptConfig,
    ConfigError,
    DenoiserConfig,
    ImageConfig,
    ModelConfig,
    TextConfig,
    TrainConfig,
)
from mm.interop import card, open_clip_out, transformers_out
from mm.interop.release import release
from mm.interop.sources import read
from mm.models.export import save_export
from mm.models.model import Model


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: False)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    return models_in(tmp_path_factory.mktemp("theirs"))


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
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # who reads one file reads them all
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
    text = card.card(origin, "open_clip", "back", "mit", [], [])
    assert "denoiser" not in text and "draws" not in text and "- diffusion" not in text
    assert "draws pictures" in card.card(origin, "mm", "back", "mit", [], [])
    assert "model.eval()" in text  # open_clip hands models over in training mode: batch norms would move


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
    with pytest.raises(ConfigError, match="source itself"):
        release(out, out, format="transformers")
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


def test_what_its_maker_says_and_what_was_measured_go_along(tmp_path: Path) -> None:
    tiny_run(tmp_path / "demo", tmp_path / "shards")
    measured = json.loads((tmp_path / "demo/evaluation.json").read_text())
    near = {"nearer_than_1pct": 0.125, "pixels_nearer_than_1pct": None}
    row = {"name": "fidelity", "kind": "fidelity", "metrics": near, "errors": {"nearer_than_1pct": 0.02}}
    measured["tasks"] = [row | {"n": {"nearer_than_1pct": 80}}]
    (tmp_path / "demo/evaluation.json").write_text(json.dumps(measured))
    (tmp_path / "about.md").write_text("## Limits\n\nIt knows emoji only.\n")
    out = release(tmp_path / "demo", tmp_path / "out", about=str(tmp_path / "about.md"))
    text = (out / "README.md").read_text(encoding="utf-8")
    assert text.index("## Use") < text.index("It knows emoji only.") < text.index("## Training")
    assert (
        "drawings nearer to a training picture than 99 % of real ones, by features | 12.5 % ± 2.0 | 80" in text
        and "by pixels" not in text
    )
    (one, *_) = json.loads((out / "metrics.json").read_text())
    assert one["metrics"]["zero-shot top-1, held-out names"] == {"value": 0.25, "error": 0.05, "n": 80}
    assert one["data"] == ["val-000000.tar"] and "samples" not in one
    release(tmp_path / "demo", out, bf16=True)  # what it wrote itself is replaced
    kinds = {name: tensor.dtype for name, tensor in read(out).tensors.items()}
    assert kinds.pop("objectives.contrastive.logit_scale") == torch.float32 and set(kinds.values()) == {torch.bfloat16}
    assert "It knows emoji only." not in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "words",
    [
        ["--format", "onnx"],
        ["--licence", "two words"],
        ["--results", "nothing.json"],
        ["--about", "nothing.md"],
        ["--bf16", "--format", "open_clip"],
    ],
)
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


def test_what_was_pushed_is_read_from_the_hub_as_data_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for the hub's client: no hub can be reached here."""
    import huggingface_hub

    clip = tiny_clip(tmp_path / "clip")[1]
    release(clip, tmp_path / "released")
    asked = {}

    def download(repository: str, **options: object) -> str:
        asked.update(options, repository=repository)
        return str(tmp_path / "released")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    found = read("hub:somebody/model")
    assert asked["repository"] == "somebody/model"
    assert asked["allow_patterns"] == ["*.json", "*.safetensors"]
    assert all(torch.equal(tensor, found.tensors[name]) for name, tensor in read(clip).tensors.items())
    monkeypatch.undo()
    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(ConfigError, match="hub:somebody/model: not on this machine"):
        read("hub:somebody/model")
