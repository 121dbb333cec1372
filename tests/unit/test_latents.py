"""Drawing in the latents of an autoencoder: exact, frozen, carried inside the model, and the same from shards."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mm import config as settings
from mm.adapters.autoencoder import AutoencoderSpace
from mm.adapters.latents import LatentsProcessor
from mm.adapters.text import train_tokenizer
from mm.api import load
from mm.cli import main
from mm.config import AlignConfig, ConfigError, TrainConfig
from mm.data.latents import add_latents
from mm.data.loader import Loader
from mm.distributed.world import World
from mm.interop.diffusers import export
from mm.interop.latents import encoder, latents_config, latents_weights
from mm.interop.start import resolve
from mm.models.export import save_export
from mm.objectives.step import TrainStep, build_step
from mm.training.ema import Ema
from mm.training.latents import start_latents
from mm.training.loop import run
from mm.training.optim import Optimizers
from mm.types import Batch

SIZE = 32  # pixels; 2 a latent
CAPTIONS = ["red heart", "blue heart", "cat face", "flag of France", "dog", "smiling cat face", "book", "green book"]


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny autoencoders as diffusers saves them, and one more of the first kind."""
    import diffusers

    out = tmp_path_factory.mktemp("vaes")
    torch.manual_seed(0)
    levels: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    levels |= {"down_block_types": 2 * ("DownEncoderBlock2D",), "up_block_types": 2 * ("UpDecoderBlock2D",)}
    for name in ("AutoencoderKL", "other"):
        diffusers.AutoencoderKL(scaling_factor=1.7, shift_factor=0.1, **levels).save_pretrained(out / name / "vae")
    both: dict[str, Any] = {"block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 16)}
    both |= {"layers_per_block": (1, 1), "qkv_multiscales": ((), (5,))}
    levels = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in both.items()}
    deep = diffusers.AutoencoderDC(latent_channels=8, attention_head_dim=8, scaling_factor=0.6, **levels)
    deep.save_pretrained(out / "AutoencoderDC")
    return out


def tiny(vae: Path, **latents: Any) -> TrainConfig:
    config = settings.load("configs/debug.py")
    config.model.latents = dataclasses.replace(latents_config(vae), **latents)
    assert config.model.denoiser is not None
    config.model.denoiser.patch = 4
    settings.validate(config)
    return config


def build(config: TrainConfig) -> TrainStep:
    torch.manual_seed(0)
    step = build_step(config, train_tokenizer(CAPTIONS, 400))
    start_latents(step.model, config, World())
    return step


def batch_of(step: TrainStep, count: int = 8) -> Batch:
    pictures = torch.randint(
        0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    processor = step.model.processors(train=False)["text"]
    ids, lengths = processor.collate([processor.prepare(text, train=False) for text in CAPTIONS[:count]])
    assert lengths is not None
    inputs = {"image": pictures, "text": ids, "target": pictures}
    return Batch(inputs, {"text": lengths}, torch.arange(count), [str(i) for i in range(count)])


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderDC"])
def test_encoding_and_decoding_are_diffusers_own(vaes: Path, kind: str) -> None:
    import diffusers

    config = latents_config(vaes / kind)
    assert (config.kind, config.factor, config.scale) == (kind, 2, {"AutoencoderKL": 1.7, "AutoencoderDC": 0.6}[kind])
    space = AutoencoderSpace(config, SIZE)
    space.load(latents_weights(vaes / kind), config.source)
    folder = vaes / kind / "vae" if kind == "AutoencoderKL" else vaes / kind
    theirs = getattr(diffusers, kind).from_pretrained(folder).eval()
    pixels = torch.randint(0, 256, (3, 3, 20, 28), dtype=torch.uint8)  # any multiple of the factor
    with torch.no_grad():
        found = theirs.encode(pixels / 127.5 - 1)
        wanted = found.latent_dist.mode() if kind == "AutoencoderKL" else found.latent
        wanted = (wanted - (0.1 if kind == "AutoencoderKL" else 0.0)) * config.scale
        shown = theirs.decode(wanted / config.scale + config.shift).sample
    with torch.autocast("cpu", torch.bfloat16):  # a run's precision is not the autoencoder's
        torch.testing.assert_close(space.encode(pixels), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(space.decode(wanted), space.pixels.decode(shown), atol=1, rtol=0)  # levels


def test_training_in_latents_lowers_the_loss_and_never_touches_the_autoencoder(vaes: Path) -> None:
    config = tiny(vaes / "AutoencoderKL")
    config.objectives.contrastive = None
    config.objectives.align = AlignConfig(block=1)
    step = build(config)
    before = {name: tensor.clone() for name, tensor in step.model.latents.state_dict().items()}
    given = latents_weights(vaes / "AutoencoderKL")
    assert all(torch.equal(before[f"autoencoder.{name}"], tensor) for name, tensor in given.items())
    assert not [name for name, _ in step.named_parameters() if "latents" in name]
    optimizers, ema, batch, losses = Optimizers(step, config.optim, 25), Ema(step, 0.9), batch_of(step), []
    for number in range(25):
        losses.append(float(step.backward(batch)["loss/diffusion"]))
        optimizers.step(number)
        ema.update(number)
    assert losses[-1] < 0.7 * losses[0]
    assert not step.train().model.latents.autoencoder.training
    exported = dict(ema.export())
    assert all(torch.equal(exported[f"model.latents.{name}"], tensor) for name, tensor in before.items())


def test_a_released_model_holds_the_autoencoder_and_draws_each_picture_alike(vaes: Path, tmp_path: Path) -> None:
    config = tiny(vaes / "AutoencoderDC")
    step = build(config)
    for module in (step.model.denoiser.patch_out, step.model.denoiser.final_modulation):  # these start at zero
        torch.nn.init.normal_(module.weight, std=0.1)
    assert config.model.latents is not None
    config.model.latents.source = "a folder that is gone"
    save_export(tmp_path / "out", step.state_dict(), config, step.model.tokenizer.to_json(), {})
    model = load(tmp_path / "out")
    batch = batch_of(step)
    assert torch.equal(
        model.inference.model.latents.encode(batch.inputs["image"]), step.model.latents.encode(batch.inputs["image"])
    )
    together = model.inference.generate(["red heart", "cat face", "dog"], seeds=[5, 6, 7], steps=2)
    assert together.shape == (3, 3, SIZE, SIZE) and together.dtype == torch.uint8
    assert together.float().std() > 1 and not torch.equal(together[0], together[1])
    assert torch.equal(model.inference.generate(["cat face"], seeds=[6], steps=2)[0], together[1])
    assert model.inference.generate([]).shape == (0, 3, SIZE, SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderDC"])
def test_an_exported_latent_model_draws_the_same_in_diffusers(
    vaes: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers
    import diffusers.utils.dynamic_modules_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = tiny(vaes / kind)
    step = build(config)
    for module in (step.model.denoiser.patch_out, step.model.denoiser.final_modulation):  # these start at zero
        torch.nn.init.normal_(module.weight, std=0.1)
    save_export(tmp_path / "out", step.state_dict(), config, step.model.tokenizer.to_json(), {})
    model = load(tmp_path / "out")
    export(model, tmp_path / "theirs", check=False)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "theirs", trust_remote_code=True)
    assert type(pipe.vae).__name__ == kind
    ours = model.generate(["red heart", "dog"], seeds=[3, 4], steps=6)
    theirs = pipe(["red heart", "dog"], seeds=[3, 4], num_inference_steps=6).images
    for one, other in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


def test_a_run_begins_with_another_ones_denoiser_and_its_autoencoder(vaes: Path, tmp_path: Path) -> None:
    theirs = tiny(vaes / "AutoencoderKL")
    given = build(theirs)
    save_export(tmp_path / "out", given.state_dict(), theirs, given.model.tokenizer.to_json(), {})
    config = settings.load("configs/debug.py")
    config.start.model, config.run.dir = str(tmp_path / "out"), str(tmp_path / "run")
    start = resolve(config)
    settings.validate(config)
    step = build_step(config, given.model.tokenizer)
    start.fill(step)
    start_latents(step.model, config, World())  # which finds them there
    assert config.model.latents == dataclasses.replace(theirs.model.latents, source="")
    own = step.model.latents.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in given.model.latents.state_dict().items())


@pytest.fixture(scope="module")
def cached(vaes: Path, openmoji_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of real emoji with latents."""
    out = tmp_path_factory.mktemp("cached") / "out"
    spec = str(openmoji_shards / "train-{000000..000001}.tar")
    assert main(["shards", "latents", spec, str(out), "--vae", str(vaes / "AutoencoderKL"), "--size", str(SIZE)]) == 0
    return out


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def test_shards_latents_keeps_every_byte_and_goes_on_where_it_was(
    vaes: Path, cached: Path, openmoji_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = members(openmoji_shards / "train-000000.tar"), members(cached / "train-000000.tar")
    added = {name: new.pop(name) for name in list(new) if name.endswith(".latents.npy")}
    assert new == old and {name.split(".")[0] for name in added} == {name.split(".")[0] for name in old}
    name = next(iter(added))
    array = np.load(io.BytesIO(added[name]), allow_pickle=False)
    encode, about = encoder(vaes / "AutoencoderKL", SIZE)
    from PIL import Image

    from mm.adapters.image import ImageProcessor

    picture = Image.open(io.BytesIO(old[name.split(".")[0] + ".png"]))
    pixels = ImageProcessor(SIZE).collate([ImageProcessor(SIZE).prepare(picture, train=False)])[0]
    np.testing.assert_allclose(array, encode(pixels.numpy())[0], atol=2e-3)  # float16, and another batch
    manifest = json.loads((cached / "shards.json").read_text())
    assert manifest["latents"] == about and manifest["samples"]["train"] == len(added) + 64
    (cached / "train-000001.tar").unlink()  # as if it had been interrupted there
    stamp = (cached / "train-000000.tar").stat().st_mtime_ns
    spec = str(openmoji_shards / "train-{000000..000001}.tar")
    command = ["shards", "latents", spec, str(cached), "--vae", str(vaes / "AutoencoderKL"), "--size", str(SIZE)]
    assert main(command) == 0
    assert (cached / "train-000000.tar").stat().st_mtime_ns == stamp and (cached / "train-000001.tar").exists()
    assert "encoded 1 shards, 64 samples" in (said := capsys.readouterr().out) and "1 were up to date" in said
    assert main([*command[:5], str(vaes / "other"), *command[6:]]) == 2
    assert "holds other latents: sha256" in capsys.readouterr().err


def test_a_damaged_sample_is_kept_without_latents_and_reported(tmp_path: Path, openmoji_shards: Path) -> None:
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "train-000000.tar"
    whole = members(openmoji_shards / "train-000000.tar")
    broken, bare = [name for name in whole if name.endswith(".png")][3:5]
    with tarfile.open(source, "w") as tar:
        for name, data in whole.items():
            data = b"\x89PNG\r\n\x1a\n" + bytes(9) if name == broken else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name != bare:
                tar.addfile(info, io.BytesIO(data))
    source.write_bytes(source.read_bytes()[:-15000])  # and it was cut

    def encode(pixels: np.ndarray) -> np.ndarray:
        return np.zeros((len(pixels), 4, 2, 2), np.float16)

    (report,) = add_latents(
        str(source), tmp_path / "out", encode, {"shape": [4, 2, 2]}, size=4, batch=5, progress=False
    )
    kept = members(tmp_path / "out" / "train-000000.tar")  # which is whole: what was cut is gone
    assert broken in kept and f"{broken[:-4]}.latents.npy" not in kept and report.lost >= 2
    assert "cut at byte" in report.problem and f"{broken[:-4]}: " in report.problem
    assert f"{bare[:-4]}: no image" in report.problem and report.samples == sum("latents" in name for name in kept)


def first_batch(step: TrainStep, shards: Path) -> Batch:
    spec = str(shards / "train-{000000..000001}.tar")
    loader = Loader(spec, step.model.processors(train=True), batch_size=8, train=True, ahead=False)
    return next(iter(loader))


def test_cached_latents_are_those_that_a_step_would_encode(vaes: Path, cached: Path, openmoji_shards: Path) -> None:
    step, other = build(tiny(vaes / "AutoencoderKL")), tiny(vaes / "AutoencoderKL", cached=True)
    other.data.train = str(cached / "train-*.tar")
    fresh, kept = first_batch(step, openmoji_shards), first_batch(build(other), cached)
    assert kept.keys == fresh.keys and kept.inputs["latents"].dtype == torch.float16
    wanted = step.model.latents.encode(fresh.inputs["target"])
    torch.testing.assert_close(kept.inputs["latents"].float(), wanted, atol=1e-3, rtol=1e-3)  # float16
    found = [float(step.backward(batch)["loss/diffusion"]) for batch in (fresh, kept)]
    assert found[0] == pytest.approx(found[1], rel=2e-3) and found[0] != found[1]


def test_cached_latents_of_another_autoencoder_or_size_are_refused(
    vaes: Path, cached: Path, openmoji_shards: Path
) -> None:
    config = tiny(vaes / "other", cached=True)
    config.data.train = str(cached / "train-*.tar")
    with pytest.raises(ConfigError, match=r"latents in .* are not of model.latents: sha256 .*cached = False$"):
        build(config)
    config = tiny(vaes / "AutoencoderKL", cached=True)
    config.data.train, config.model.image.size = str(cached / "train-*.tar"), 48
    with pytest.raises(ConfigError, match=r"shape \[4, 16, 16\], not \[4, 24, 24\]"):
        build(config)
    config.data.train = str(openmoji_shards / "train-*.tar")  # whose maker says nothing of latents
    with pytest.raises(ConfigError, match="no latents.npy"):
        first_batch(build(config), openmoji_shards)


@pytest.mark.slow
def test_a_run_on_cached_latents_is_the_run_on_pictures(
    vaes: Path, cached: Path, openmoji_shards: Path, tmp_path: Path
) -> None:
    lines = {}
    for name, shards in (("fresh", openmoji_shards), ("cached", cached), ("cached", cached)):
        config = tiny(vaes / "AutoencoderKL", cached=name == "cached")
        assert config.model.latents is not None
        config.model.latents.source = "gone" if name in lines else config.model.latents.source  # it resumes
        config.data.train, config.run.dir = str(shards / "train-{000000..000001}.tar"), str(tmp_path / name)
        config.run.steps, config.checkpoint.every, config.data.batch_size = 4 + 2 * len(lines), 2, 8
        run(config)
        lines[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    assert len(lines["cached"]) == 8 and lines["cached"][3]["order"] == lines["fresh"][3]["order"]
    pairs = [(one["loss/diffusion"], other["loss/diffusion"]) for one, other in zip(*lines.values(), strict=False)]
    np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=2e-2)  # Adam's first steps make much of float16
    assert load(tmp_path / "cached").generate(["red heart"], steps=2)[0].size == (SIZE, SIZE)


def test_an_autoencoder_of_the_hub_is_read_through_diffusers(
    vaes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it lies in the hub's cache, in a pipeline's `vae`."""
    import shutil

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("mm.adapters.hub.reachable", lambda: False)
    repository, commit = tmp_path / "models--owner--pipeline", 40 * "0"
    shutil.copytree(vaes / "AutoencoderKL", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    here = latents_config(vaes / "AutoencoderKL")
    assert latents_config("owner/pipeline") == dataclasses.replace(here, source="owner/pipeline")
    found, wanted = latents_weights("owner/pipeline"), latents_weights(vaes / "AutoencoderKL")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(ConfigError, match="owner/other: no such folder, and not to be had from the hub"):
        latents_config("owner/other")


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (npy(np.zeros((4, 3, 3), np.float16)), r"float16 \[4, 3, 3\], but .* \[4, 2, 2\]; write them again"),
        (npy(np.zeros((4, 2, 2), np.float32)), "float32"),
        (npy(np.array([[[{}] * 2] * 2] * 4, object)), "object"),
        (npy(np.zeros((4, 2, 2), np.float16))[:-1], "instead of 160: it was cut"),
        (npy(np.full((4, 2, 2), np.nan, np.float16)), "no finite number"),
        (b"\x80\x04 pickle", "no .npy file"),
        (b"", "no .npy file"),
        (torch.zeros(1), "bytes of an .npy file"),
    ],
)
def test_latents_that_cannot_be_used_are_refused(raw: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        LatentsProcessor((4, 2, 2)).prepare(raw)


def test_what_a_user_gets_wrong_is_said_in_one_line(vaes: Path, tmp_path: Path) -> None:
    good = latents_config(vaes / "AutoencoderKL")

    def refused(problem: str, function: Any, *arguments: Any) -> None:
        with pytest.raises(ConfigError, match=problem) as caught:
            function(*arguments)
        assert "\n" not in str(caught.value)

    (tmp_path / "empty").mkdir()
    refused("holds no config.json", latents_config, tmp_path / "empty")
    refused("no such folder, and no hub name", latents_config, "nowhere")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    refused("of 'UNet2DModel'; model.latents takes AutoencoderKL or", latents_config, tmp_path / "unet")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text((vaes / "AutoencoderKL" / "vae" / "config.json").read_text())
    (tmp_path / "pickled" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    refused("model.bin is a pickle, which may run code; .* convert it", latents_weights, tmp_path / "pickled")
    refused("channels = 5: the autoencoder .* has 4", AutoencoderSpace, dataclasses.replace(good, channels=5), SIZE)
    refused("factor = 4: the autoencoder .* has 2", AutoencoderSpace, dataclasses.replace(good, factor=4), SIZE)
    refused("options: no JSON", AutoencoderSpace, dataclasses.replace(good, options="x"), SIZE)
    space = AutoencoderSpace(good, SIZE)
    refused("is missing .*latents_config", space.load, latents_weights(vaes / "AutoencoderDC"), "dc")
    refused("^model.latents.source = gone: no such folder", build, tiny(vaes / "AutoencoderKL", source="gone"))
    refused("^model.latents.source = '': names no weights", build, tiny(vaes / "AutoencoderKL", source=""))
    config = tiny(vaes / "AutoencoderKL")
    config.model.image.size = 20
    config.model.image.patch = 4
    refused(
        "size = 20: must be a multiple of model.latents.factor x model.denoiser.patch = 8", settings.validate, config
    )
    refused(
        "options = '': .*latents_config",
        settings.validate,
        settings.override(settings.TrainConfig(), ["--model.latents", "default"]),
    )
