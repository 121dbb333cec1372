"""A folder for diffusers draws what the model draws, with nothing of ours installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm.adapters.hub_tokenizer import HubTokenizer
from mm.adapters.latents import LatentSpace, PixelSpace
from mm.adapters.text import ClipTokenizer, Tokenizer, train_tokenizer
from mm.api import LoadedModel
from mm.config import ConfigError, TrainConfig
from mm.interop.diffusers import export
from mm.models.denoiser import Denoiser
from mm.objectives.step import build_step
from mm.settings import load

WORDS = ["red heart", "a dog that runs", "", "the sun behind 2 small clouds, and Ünïcode 😀"]
PROMPTS = ["red heart", "a dog", None, "a dog that runs and runs and runs past the end of all the context"]
SEEDS = [3, 4, 5, 2**40]
LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
}
ABSENT = ("mm", "mm_kernels", "open_clip", "peft", "timm", "transformers")  # diffusers' peft needs transformers


def random_model(root: Path, seed: int = 0, **diffusion: float) -> LoadedModel:
    """Of the tiniest config; what starts at zero is filled in, or nothing would depend on anything."""
    config = load(root / "configs" / "debug.py")
    assert config.objectives.diffusion is not None
    for name, value in diffusion.items():
        setattr(config.objectives.diffusion, name, value)
    return build(config, seed)


def build(config: TrainConfig, seed: int = 0, tokenizer: Tokenizer | None = None) -> LoadedModel:
    torch.manual_seed(seed)
    text = config.model.text
    if tokenizer is None:
        tokenizer = ClipTokenizer() if text.tokenizer == "clip" else train_tokenizer(WORDS * 4, text.vocab_size)
    model = build_step(config, tokenizer).model
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return LoadedModel(model.eval().requires_grad_(False), config, {}, {})


@pytest.fixture(scope="module", autouse=True)
def modules_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where diffusers copies the code of folders to: not the user's."""
    import diffusers.utils.dynamic_modules_utils as dynamic

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def model(root: Path) -> LoadedModel:
    return random_model(root, shift=0.4, noise_scale=1.5)  # levels below the bound of 0.05, too


@pytest.fixture(scope="module")
def folder(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("released") / "diffusers"
    export(model, out)
    return out


@pytest.fixture
def pipe(folder: Path) -> Any:
    return opened(folder)


def opened(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def levels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def apart(ours: list[Image.Image], theirs: list[Image.Image]) -> int:
    """The largest difference of any channel of any pixel."""
    assert levels(ours).std() > 10  # not all grey
    return int(np.abs(levels(ours) - levels(theirs)).max())


@pytest.mark.parametrize(("steps", "guidance"), [(25, 2.0), (25, 1.0), (1, 2.0), (12, 4.0)])
def test_images_equal_those_of_generate(model: LoadedModel, pipe: Any, steps: int, guidance: float) -> None:
    theirs = pipe(PROMPTS, num_inference_steps=steps, guidance_scale=guidance, seeds=SEEDS).images
    assert apart(model.generate(PROMPTS, seeds=SEEDS, steps=steps, guidance=guidance), theirs) <= 1


def test_images_after_images_equal_those_of_generate(model: LoadedModel, pipe: Any) -> None:
    shown = [None, *(Image.new("RGB", (50, 40), color) for color in ("red", "green", "blue"))]
    theirs = pipe(PROMPTS, image=shown, num_inference_steps=9, seeds=SEEDS).images
    assert apart(model.generate(PROMPTS, seeds=SEEDS, steps=9, images=shown), theirs) <= 1
    assert apart(theirs, pipe(PROMPTS, num_inference_steps=9, seeds=SEEDS).images) > 1


def test_a_fresh_process_without_mm_draws_the_same(model: LoadedModel, folder: Path, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.suffix != ".pth" and not path.name.lower().startswith((*ABSENT, "__editable__")):
            (packages / path.name).symlink_to(path)
    program = f"""
import importlib.util, sys
sys.path.insert(0, {str(packages)!r})
assert not any(importlib.util.find_spec(name) for name in {ABSENT}), "installed here"
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)
for number, image in enumerate(pipe({PROMPTS!r}, num_inference_steps=9, seeds={SEEDS!r}).images):
    image.save(f"{tmp_path}/{{number}}.png")
assert not any(name.split(".")[0] in {ABSENT} for name in sys.modules)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-I", "-S", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "9/9" in done.stderr  # the progress bar
    assert "will be ignored" not in done.stderr and "might require" not in done.stderr
    theirs = [Image.open(tmp_path / f"{number}.png") for number in range(len(PROMPTS))]
    assert apart(model.generate(PROMPTS, seeds=SEEDS, steps=9), theirs) <= 1


def test_heun_of_diffusers_equals_ours(model: LoadedModel, pipe: Any) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
    theirs = pipe(PROMPTS, num_inference_steps=7, seeds=SEEDS).images
    assert apart(model.generate(PROMPTS, seeds=SEEDS, steps=7, solver="heun"), theirs) <= 1


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", pytest.param("UniPCMultistepScheduler", marks=pytest.mark.slow)]
)
def test_other_schedulers_come_to_the_same_images(root: Path, tmp_path: Path, name: str) -> None:
    import diffusers

    model = random_model(root, shift=3.0)
    denoiser = model.inference.model.denoiser
    assert denoiser is not None
    with torch.no_grad():  # a calm field: a random one turns with every thousandth of sigma, and nothing follows it
        denoiser.time_in[2].weight.zero_()
        denoiser.patch_out.weight.mul_(0.3)
        denoiser.patch_out.bias.mul_(6.0)
    export(model, tmp_path / "out", check=False)
    pipe = opened(tmp_path / "out")
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    prompts, seeds = PROMPTS[:2], SEEDS[:2]
    theirs = levels(pipe(prompts, num_inference_steps=40, seeds=seeds).images)
    for solver, bound in (("euler", 1.0), ("heun", 0.5)):  # levels of 255 on average; of the second order as they are
        ours = levels(model.generate(prompts, seeds=seeds, steps=40, solver=solver))
        assert ours.std() > 10 and np.abs(theirs - ours).mean() < bound


def test_noise_levels_are_shifted_once(pipe: Any) -> None:
    pipe("cat", num_inference_steps=4)
    unshifted = np.array([1.0, 0.75, 0.5, 0.25, 0.0])
    assert np.allclose(pipe.scheduler.sigmas, 0.4 * unshifted / (1 - 0.6 * unshifted), atol=1e-6)


def test_a_callback_sees_and_changes_the_latents(pipe: Any) -> None:
    seen = []

    def callback(of: Any, step: int, t: torch.Tensor, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append((step, set(given)))
        if step == 2:
            of._interrupt = True
            return {"latents": torch.zeros_like(given["latents"])}
        return {}

    image = pipe("cat", num_inference_steps=5, callback_on_step_end=callback, output_type="np").images
    assert seen == [(step, {"latents"}) for step in range(3)]
    assert image.shape[0] == 1 and np.allclose(image, 128 / 255)


def test_noise_may_be_given_or_drawn_by_generators(pipe: Any) -> None:
    from diffusers.utils.torch_utils import randn_tensor

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(4)]

    def draw(prompts: list[str], **how: Any) -> torch.Tensor:
        return pipe(prompts, num_inference_steps=3, output_type="pt", return_dict=False, **how)[0]

    drawn = draw(["cat", "dog"], num_images_per_prompt=2, generator=generators())
    noise = randn_tensor((4, *pipe.transformer.config.shape), generator=generators())
    assert torch.allclose(drawn, draw(["cat", "cat", "dog", "dog"], latents=noise))
    assert torch.allclose(drawn[2:3], draw(["dog"], generator=generators()[2]), atol=2 / 255)  # not of its neighbours


def test_half_precision_draws_nearly_the_same(model: LoadedModel, folder: Path) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    theirs = levels(pipe(PROMPTS, seeds=SEEDS).images)
    assert np.abs(theirs - levels(model.generate(PROMPTS, seeds=SEEDS))).mean() < 3


def test_a_saved_pipeline_loads_again_beside_other_models(root: Path, pipe: Any, tmp_path: Path) -> None:
    from diffusers import UniPCMultistepScheduler

    before = pipe(PROMPTS, num_inference_steps=5, seeds=SEEDS).images
    pipe.save_pretrained(tmp_path / "again")
    other = random_model(root, seed=1)
    export(other, tmp_path / "other", check=False)
    second = opened(tmp_path / "other")
    again = opened(tmp_path / "again")
    assert apart(before, again(PROMPTS, num_inference_steps=5, seeds=SEEDS).images) == 0
    assert apart(other.generate(PROMPTS, seeds=SEEDS), second(PROMPTS, seeds=SEEDS).images) <= 1
    again.scheduler = UniPCMultistepScheduler.from_config(again.scheduler.config)
    again.save_pretrained(tmp_path / "again")
    assert type(opened(tmp_path / "again").scheduler) is UniPCMultistepScheduler


def test_an_export_is_whole_and_replaces_only_its_like(model: LoadedModel, folder: Path, tmp_path: Path) -> None:
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert not any("pycache" in name or name.endswith((".pt", ".bin", ".pkl")) for name in files)
    assert set(json.loads((folder / "model_index.json").read_text())) >= {"transformer", "text_encoder", "tokenizer"}
    export(model, folder, check=False)  # the same again
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == files
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not an empty folder"):
        export(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


class Latents(LatentSpace):
    """An autoencoder's latents: half as many a side, four deep."""

    def __init__(self) -> None:
        from diffusers import AutoencoderKL

        super().__init__()
        self.autoencoder = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **LEVELS).eval()
        self.config, self.shape = SimpleNamespace(scale=0.3, shift=0.1), (4, 16, 16)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return PixelSpace(32).decode(self.autoencoder.decode(latents / 0.3 + 0.1).sample)


def test_an_autoencoder_goes_along_as_diffusers_own(root: Path, tmp_path: Path) -> None:
    loaded = random_model(root, seed=2)
    model, config = loaded.inference.model, loaded.config.model
    assert model.denoiser is not None and config.denoiser is not None
    model.latents, config.denoiser.patch = Latents(), 4
    model.denoiser = Denoiser(config.denoiser, model.latents.shape, config.text.width, 2 * config.embed_dim)
    export(loaded, tmp_path / "out")
    pipe = opened(tmp_path / "out")
    assert type(pipe.vae).__name__ == "AutoencoderKL"
    theirs = pipe(PROMPTS, seeds=SEEDS, num_inference_steps=5).images
    assert apart(loaded.generate(PROMPTS, seeds=SEEDS, steps=5), theirs) <= 1


def test_what_cannot_be_exported_is_refused_in_one_line(root: Path, tmp_path: Path) -> None:
    class Foreign(torch.nn.Identity):
        """A tower of another library."""

    model = random_model(root)
    model.inference.model.encoders["text"] = Foreign()
    with pytest.raises(ConfigError, match=r"^model\.text: Foreign cannot be exported to diffusers yet[^\n]*$"):
        export(model, tmp_path / "out")
    model = random_model(root)
    model.config.objectives.diffusion = None
    with pytest.raises(ConfigError, match=r"^objectives\.diffusion = None: this model cannot draw[^\n]*$"):
        export(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps = 0"),
        ({"output_type": "jpeg"}, "output_type = 'jpeg'"),
        ({"seeds": [1, 2]}, "seeds: 2 given for 1 pictures"),
        ({"seeds": [1], "generator": torch.Generator()}, "give one of them"),
        ({"image": [None, None]}, "image: 2 given for 1 prompts"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, "callback_on_step_end_tensor_inputs"),
    ],
)
def test_the_pipeline_refuses_what_cannot_work(pipe: Any, wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pipe("cat", **wrong)


def test_a_scheduler_for_other_noise_is_refused(pipe: Any) -> None:
    from diffusers import DPMSolverMultistepScheduler

    pipe.scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(ValueError, match=r"from_config\(pipe\.scheduler\.config\)"):
        pipe("cat")


@pytest.mark.slow
def test_a_clip_model_exports_its_tokenizer(root: Path, tmp_path: Path) -> None:
    config = load(root / "configs" / "debug.py")
    config.model.text.tokenizer, config.model.text.vocab_size = "clip", ClipTokenizer.vocab_size
    config.model.text.causal, config.model.text.pool, config.model.image.pool = True, "last", "cls"
    assert config.model.denoiser is not None
    config.model.denoiser.bottleneck, config.model.denoiser.context_depth = 16, config.model.denoiser.depth - 1
    model = build(config)
    export(model, tmp_path / "out")  # compares a picture
    theirs = opened(tmp_path / "out")(PROMPTS, seeds=SEEDS, num_inference_steps=5).images
    assert apart(model.generate(PROMPTS, seeds=SEEDS, steps=5), theirs) <= 1


def test_a_model_of_siglips_shape_exports_its_own_tokenizer(root: Path, tmp_path: Path) -> None:
    config = load(root / "configs" / "debug.py")
    text, image = config.model.text, config.model.image
    text.masked, text.pool, text.pad_id, text.activation, text.qk_norm, text.proj = (
        False,
        "end",
        1,
        "gelu",
        False,
        "affine",
    )
    image.pool, image.proj, image.resize, image.eps = "map", "none", "squash", 1e-6
    config.model.embed_dim = image.width
    words = train_tokenizer(WORDS * 4, 300)
    model = build(config, tokenizer=HubTokenizer("words", words.vocab_size, words.to_json(), clean="canonicalize"))
    export(model, tmp_path / "out")  # compares pictures after captions and pictures
    assert opened(tmp_path / "out").tokenizer(["Red_Heart!"])["input_ids"].tolist() == [
        model.inference.prepare("text", ["red heart"])[0][0].tolist()
    ]


def test_without_a_vision_encoder_of_ours_captions_are_drawn(root: Path, tmp_path: Path) -> None:
    model = random_model(root)
    model.inference.model.encoders["image"] = torch.nn.Identity()
    export(model, tmp_path / "out")
    assert not (tmp_path / "out" / "image_encoder").exists()
    pipe = opened(tmp_path / "out")
    pipe.save_pretrained(tmp_path / "again")
    pipe = opened(tmp_path / "again")
    assert apart(model.generate(PROMPTS, seeds=SEEDS, steps=4), pipe(PROMPTS, 4, seeds=SEEDS).images) <= 1
    with pytest.raises(ValueError, match="no image encoder"):
        pipe(image=Image.new("RGB", (9, 9)))
