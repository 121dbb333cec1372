"""A trained model in use: encode, classify, draw.

import mm
model = mm.load("runs/demo")
classify = model.classifier(["cat", "dog"], templates=["an emoji of {}"])
classify.top(picture)                              # [("cat", 0.93), ("dog", 0.07)]
model.generate(["red heart"], seeds=[0])           # [PIL.Image]
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mm.adaptation.lora import compose
from mm.config import ConfigError, TrainConfig
from mm.diffusion.sampler import Solver
from mm.evaluation.inference import Inference
from mm.evaluation.label_weights import LabelWeights
from mm.evaluation.vocabulary import read_labels, read_templates
from mm.evaluation.zero_shot import Classifier, classifier
from mm.fields import suggestion
from mm.interop.sources import read
from mm.models.model import Model

if TYPE_CHECKING:
    from PIL import Image

    from mm.evaluation.by_drawing import ByDrawing
    from mm.evaluation.drawing import Callback

EXPORT = "export"  # in a run folder
MODES = ("contrastive", "diffusion", "hybrid")


class LoadedModel:
    """What `load` returns. Item i of any call is the same whatever else is in the call, on a CPU to the last bit."""

    def __init__(self, model: Model, config: TrainConfig, extras: dict[str, Tensor], note: dict[str, Any]) -> None:
        self.inference, self.note = Inference(model, config, extras), note
        self._label_weights = LabelWeights(self.inference)

    @property
    def config(self) -> TrainConfig:
        return self.inference.config

    @property
    def device(self) -> torch.device:
        return self.inference.model.device

    def encode(self, *, progress: bool = False, **modalities: Any) -> dict[str, Tensor]:
        """Unit-norm embeddings `[B, E]` float32 (on the CPU) of each modality's list of raw items.

        `image=[PIL.Image, ...]`, `text=["...", ...]` or token ids, an int tensor `[B, L]` padded with zeros. Raises
        ValueError for a modality that the model does not have, or naming the item that cannot be read.
        """
        ready = {name: self.inference.prepare(name, raw) for name, raw in modalities.items()}  # all, before any work
        return {name: self.inference.embed(name, columns, progress=progress) for name, columns in ready.items()}

    def classifier(
        self,
        labels: str | Sequence[str],
        templates: str | Sequence[str] = ("{}",),
        *,
        mode: Literal["contrastive", "diffusion", "hybrid"] = "contrastive",
        temperature: float | None = None,
        cache: bool | str | os.PathLike[str] | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Classifier | ByDrawing:
        """A zero-shot classifier whose labels are encoded here, once; asked for again, not even that.

        `labels`: a list, or "imagenet"; `templates`: a list with `{}` where the label goes, or "openai" (80) or
        "simple" (7). `temperature` divides the logits; `Classifier.calibrate` finds one. `cache`: True keeps label
        embeddings on disk, in `$MM_CACHE`/labels, a path in that folder.
        `mode`: "contrastive" compares embeddings; "diffusion" asks which label the denoiser explains an image with
        best; "hybrid" asks that of the likeliest contrastive ones. `options` are those of the latter two, see
        `mm.evaluation.by_drawing`. Raises ValueError for what cannot be meant, ConfigError where the model was trained
        without the objective.
        """
        if mode not in MODES:
            raise ValueError(f"mode = {mode!r}: must be {', '.join(MODES)}{suggestion(str(mode), MODES)}")
        if mode == "contrastive" and options:
            name = next(iter(options))
            raise ValueError(f"{name} = {options[name]!r}: no option of mode contrastive; see model.classifier")
        plain: Classifier | None = None
        if mode != "diffusion" or self.config.objectives.contrastive is not None:
            plain = classifier(
                self.inference,
                labels,
                templates,
                temperature=temperature,
                cache=cache,
                weights=self._label_weights,
                progress=progress,
            )
        if mode == "contrastive":
            assert plain is not None
            return plain
        from mm.evaluation.by_drawing import classifier as drawn  # the denoiser as a classifier

        named = {"labels": read_labels(labels), "templates": read_templates(templates)} if plain is None else {}
        return drawn(plain, self.inference, mode=mode, progress=progress, **named, **options)

    def generate(
        self,
        prompts: Sequence[str | None],
        *,
        seeds: Sequence[int] | None = None,
        steps: int = 25,
        guidance: float = 2.0,
        images: Sequence[Image.Image | None] | None = None,
        solver: Solver = "euler",
        negative: str | Sequence[str | None] | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        autoguide: LoadedModel | None = None,
        start: Sequence[Image.Image | None] | None = None,
        strength: float = 0.7,
        masks: Sequence[Image.Image | None] | None = None,
        best_of: int = 1,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> list[Image.Image]:
        """A picture for each prompt; the same prompt, image and seed give the same picture.

        `seeds` are 0 ... n - 1 by default. `images` condition on what the vision encoder sees in them; a prompt or
        image of None hides that condition. `steps` levels of noise, each one network evaluation ("euler", "dpmpp_2m";
        two with "heun"). `guidance` 1 is none; it leads away from a picture without a prompt, from a `negative` prompt
        (one, or one each), or from what the weaker model `autoguide` draws, at noise levels within `interval` (1 is
        pure noise). `start[i]` is the picture that i begins at, noised to the level `strength`; only what is white in
        `masks[i]` of it is drawn anew. Of `best_of` candidates the one nearest to its prompt is kept.
        `callback(step, steps, preview)` is called after each step; `preview()` gives the pictures as they are.
        `picture.info["mm"]` says how each was drawn. Raises ValueError where lengths differ or a number cannot work.
        """
        from mm.evaluation.generation import generate
        from mm.evaluation.sampling import Settings

        if autoguide is not None and not isinstance(autoguide, LoadedModel):
            raise ValueError(f"autoguide: must be a loaded model, not {type(autoguide).__name__}; give mm.load(...)")
        return generate(
            self.inference,
            prompts,
            seeds=seeds,
            settings=Settings(steps, guidance, solver, interval, strength),
            images=images,
            negative=negative,
            autoguide=None if autoguide is None else autoguide.inference,
            start=start,
            masks=masks,
            best_of=best_of,
            callback=callback,
            progress=progress,
        )


def load(
    source: str | os.PathLike[str], *, adapter: str | os.PathLike[str] | None = None, device: str = "auto"
) -> LoadedModel:
    """The model of a run folder (its `export/`), of a released folder, or of another library, in float32.

    `"openmoji"` is the one in `mm/shipped`, in a copy that has it; `open_clip:NAME/TAG`,
    `open_clip:NAME@FILE.safetensors` and the other forms of `mm.interop.sources.read` are those of others.
    `adapter`: a folder with LoRA matrices trained beside it (a run's `export/adapter`), which are merged into it.
    `device`: "auto" is a CUDA device where there is one, else the CPU. Raises ConfigError naming what is wrong.
    """
    name = os.fspath(source)
    where = _device(device)
    origin = read(name)
    model = origin.build().float()
    if adapter is not None:
        compose(model, adapter)
    return LoadedModel(model.to(where), origin.config(), origin.extras(), origin.note)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device = {name!r}: not a device; give auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device = {name!r}: torch sees no CUDA device here; give auto or cpu")
    return device
