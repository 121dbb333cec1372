"""A trained model as a folder for diffusers, which needs no `mm` to draw from it.

    export(mm.load("runs/demo"), Path("out"))
    pipe = DiffusionPipeline.from_pretrained("out", trust_remote_code=True)
    pipe("red heart", seeds=[0]).images[0]             # what model.generate(["red heart"], seeds=[0]) draws

The folder's Python is bundled from the sources of `mm` (`mm.interop.bundle`), one file a component; its name carries a
hash of what it holds, because diffusers keeps the code of all folders in one place, by file name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mm.adapters.hub import quiet
from mm.adapters.hub_tokenizer import HubTokenizer
from mm.adapters.image import ImageAdapter
from mm.adapters.latents import PixelSpace
from mm.adapters.text import ClipTokenizer, CorpusTokenizer, TextAdapter, TextProcessor
from mm.config import ConfigError
from mm.interop.bundle import bundle
from mm.interop.portable_clip import portable_clip
from mm.models.encoder import Encoder

if TYPE_CHECKING:
    from torch import nn

    from mm.api import LoadedModel
    from mm.models.model import Model

TOKENIZERS: dict[type, str] = {ClipTokenizer: "clip", CorpusTokenizer: "corpus", HubTokenizer: "hub"}
PARTS = "mm.interop.diffusers_parts"


def export(loaded: LoadedModel, out: Path, *, check: bool = True) -> None:
    """Write `loaded` to the folder `out`, whole or not at all, in place of an older export there.

    With `check` pictures of the folder are compared with the model's. Raises ConfigError where the model cannot
    draw, has parts that cannot be bundled, or `out` holds something else.
    """
    model, config = loaded.inference.model, loaded.config
    _refuse(model, trained=config.objectives.diffusion is not None)
    if out.exists() and not (out.is_dir() and ((out / "model_index.json").is_file() or not any(out.iterdir()))):
        raise ConfigError(f"{out}: is not an empty folder nor an earlier export for diffusers; give a new folder")
    fresh = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        _write(loaded, fresh)
        if check:
            _compare(loaded, fresh)
        shutil.rmtree(out, ignore_errors=True)
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _refuse(model: Model, trained: bool) -> None:
    if model.denoiser is None or not trained:
        what = "model.denoiser" if model.denoiser is None else "objectives.diffusion"
        raise ConfigError(f"{what} = None: this model cannot draw; --format diffusers needs one trained with diffusion")
    theirs: dict[str, object] = {}
    if type(model.encoders["text"]) is not Encoder or type(model.adapters["text"]) is not TextAdapter:
        theirs["model.text"] = model.encoders["text"]
    if type(model.tokenizer) not in TOKENIZERS:
        theirs["model.text.tokenizer"] = model.tokenizer
    if type(model.latents) is not PixelSpace and not hasattr(model.latents, "autoencoder"):
        theirs["model.latents"] = model.latents
    for field, part in theirs.items():
        raise ConfigError(f"{field}: {type(part).__name__} cannot be exported to diffusers yet; use --format mm")


def sees(model: Model) -> bool:
    """Whether the vision encoder is mm's own and goes along; without it the folder draws after captions only."""
    return type(model.encoders["image"]) is Encoder and type(model.adapters["image"]) is ImageAdapter


def _write(loaded: LoadedModel, out: Path) -> None:
    names = ["tokenizer", "text_encoder", "transformer", "pipeline"]
    if sees(loaded.inference.model):
        names.append("image_encoder")
    with tempfile.TemporaryDirectory() as folder:
        code = {name: _code(name, Path(folder)) for name in names}
        _assemble(loaded, code, out)
    for module in code.values():
        del sys.modules[module.__name__]


def _assemble(loaded: LoadedModel, code: dict[str, ModuleType], out: Path) -> None:
    """Write the components, built by `code` and given the weights of `loaded`, to `out`."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    model, config, diffusion = loaded.inference.model, loaded.config.model, loaded.config.objectives.diffusion
    denoiser = model.denoiser
    assert denoiser is not None and config.denoiser is not None and diffusion is not None
    reader = TOKENIZERS[type(model.tokenizer)]
    serialized = portable_clip() if reader == "clip" else model.tokenizer.to_json()
    settings: dict[str, dict[str, Any]] = {
        "text_encoder": {
            "settings": dataclasses.asdict(config.text),
            "encoder_settings": _arguments(Encoder, config.text, embed_dim=config.embed_dim),
            "vocab_size": model.tokenizer.vocab_size,
        },
        "image_encoder": {
            "settings": dataclasses.asdict(config.image),
            "encoder_settings": _arguments(Encoder, config.image, embed_dim=config.embed_dim),
        },
        "transformer": {
            "settings": dataclasses.asdict(config.denoiser),
            "shape": list(denoiser.shape),
            "context_width": denoiser.context_in.in_features,
            "pooled_width": denoiser.pooled_in.in_features,
        },
    }
    classes = {"text_encoder": "MMTextEncoder", "image_encoder": "MMImageEncoder", "transformer": "MMDenoiser"}
    parts: dict[str, Any] = {
        name: getattr(code[name], classes[name])(**settings[name]) for name in classes if name in code
    }
    for name, modality in (("text_encoder", "text"), ("image_encoder", "image")):
        if name in parts:
            _copy(model.adapters[modality], parts[name].adapter)
            _copy(model.encoders[modality], parts[name].encoder)
    _copy(denoiser, parts["transformer"].denoiser)
    numbers = {"noise_scale": diffusion.noise_scale, "shift": diffusion.shift}
    autoencoder: Any = getattr(model.latents, "autoencoder", None)
    if autoencoder is not None:  # one of diffusers' own: any of its users knows it
        space: Any = model.latents
        numbers.update(latent_scale=space.config.scale, latent_shift=space.config.shift)
        parts["vae"] = type(autoencoder).from_config(autoencoder.config)
        _copy(autoencoder, parts["vae"])
    pipe = code["pipeline"].MMPipeline(
        **parts,
        **numbers,
        tokenizer=code["tokenizer"].MMTokenizer(serialized, reader, _arguments(TextProcessor, config.text)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=diffusion.shift),
    )
    pipe.save_pretrained(out)
    readable = (out / "model_index.json").stat().st_mode
    for path in out.rglob("*.safetensors"):  # safetensors makes them for one user only
        path.chmod(readable)


def _code(name: str, folder: Path) -> ModuleType:
    """The module of one component, bundled into a file of `folder` and imported from there."""
    source = bundle(f"{PARTS}.{name}")
    path = folder / f"mm_{name}_{hashlib.sha256(source.encode()).hexdigest()[:12]}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def _arguments(kind: type, config: Any, **more: Any) -> dict[str, Any]:
    """What the model's `kind` was built with: each argument is the field of that name where there is one."""
    fields = {**dataclasses.asdict(config), **more}
    return {name: fields[name] for name in inspect.signature(kind).parameters if name in fields and name != "tokenizer"}


def _copy(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict({name: tensor.detach().cpu().float() for name, tensor in source.state_dict().items()})


def _compare(loaded: LoadedModel, folder: Path) -> None:
    """Raises RuntimeError where the folder does not draw what the model draws: then something was left out."""
    import numpy as np
    from diffusers import DiffusionPipeline
    from PIL import Image

    picture = Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))
    told: dict[str, Any] = {"seeds": [7, 8]}
    pictures = [None, picture if sees(loaded.inference.model) else None]
    prompts, steps = ["a red heart, and 2 cats", None], 2
    with quiet("diffusers"):
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(loaded.device)
    theirs = pipe(prompts, num_inference_steps=steps, image=pictures, **told).images
    ours = loaded.generate(prompts, steps=steps, images=pictures, **told)
    left, right = (np.stack([np.asarray(image, dtype=np.int16) for image in side]) for side in (ours, theirs))
    worst = int(np.abs(left - right).max())
    if worst > 1:
        raise RuntimeError(f"the exported folder draws other pictures, by {worst} of 255; please report this")
