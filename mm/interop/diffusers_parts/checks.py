"""What a pipeline can be asked for."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}  # of other schedulers
OUTPUTS = ("pil", "np", "pt", "latent")


def moves_along_velocity(scheduler: Any) -> bool:
    """Whether it takes the velocity as it is; others make a prediction of x of it."""
    return type(scheduler).__name__.startswith("FlowMatch")


def paired(prompt: Any, image: Any) -> tuple[list[str | None], list[Image.Image | None]]:
    """Prompts and pictures as lists of one length."""
    prompts = [prompt] if prompt is None or isinstance(prompt, str) else list(prompt)
    pictures = [image] if image is None or isinstance(image, Image.Image) else list(image)
    if prompt is None:
        prompts = [None] * len(pictures)
    if image is None or isinstance(image, Image.Image):
        pictures = pictures * len(prompts)
    if len(prompts) != len(pictures) or not prompts:
        raise ValueError(f"image: {len(pictures)} given for {len(prompts)} prompts; give one for each, at least one")
    return prompts, pictures


def check(pipe: Any, count: int, seeds: Any, generator: Any, latents: Any, steps: int, output_type: str) -> None:
    if steps < 1:
        raise ValueError(f"num_inference_steps = {steps}: must be at least 1")
    if output_type not in OUTPUTS:
        raise ValueError(f"output_type = {output_type!r}: must be one of {', '.join(OUTPUTS)}")
    if sum(given is not None for given in (seeds, generator, latents)) > 1:
        raise ValueError("seeds, generator and latents: each says where the noise comes from; give one of them")
    for name, given in (("seeds", seeds), ("generator", generator), ("latents", latents)):
        if given is not None and not isinstance(given, torch.Generator) and len(given) != count:
            raise ValueError(f"{name}: {len(given)} given for {count} pictures; give one for each")
    if not moves_along_velocity(pipe.scheduler) and not pipe.scheduler.config.get("use_flow_sigmas", False):
        kind = type(pipe.scheduler).__name__
        raise ValueError(f"scheduler = {kind}: made for other noise; use {kind}.from_config(pipe.scheduler.config)")
