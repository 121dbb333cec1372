"""Pictures from captions, from other pictures, or from both, with any of diffusers' schedulers for flow matching."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchHeunDiscreteScheduler, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from mm.adapters.latents import PixelSpace
from mm.diffusion.guidance import guided
from mm.diffusion.noise import normal
from mm.diffusion.schedule import Schedule
from mm.interop.diffusers_parts.checks import FLOW, check, moves_along_velocity, paired
from mm.interop.diffusers_parts.saving import save
from mm.models.denoiser import gather_condition
from mm.types import Encoded, Tokens

NOISE = 0  # the stream of `mm.evaluation.inference`


class MMPipeline(DiffusionPipeline):
    """`noise_scale`: standard deviation of the noise at sigma = 1; `shift`: of the noise levels, applied once.

    With a `vae` the transformer draws its latents, less `latent_shift` and times `latent_scale`.
    """

    config: Any
    components: Any
    transformer: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    image_encoder: Any
    vae: Any
    _execution_device: Any
    progress_bar: Any
    maybe_free_model_hooks: Any

    model_cpu_offload_seq = "text_encoder->image_encoder->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["image_encoder", "vae"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "pooled_projections"]

    def __init__(  # type: ignore[no-untyped-def]  # diffusers would take annotations for the types of components
        self,
        transformer,
        text_encoder,
        tokenizer,
        scheduler,
        image_encoder=None,
        vae=None,
        noise_scale=1.0,
        shift=1.0,
        latent_scale=1.0,
        latent_shift=0.0,
    ):
        super().__init__()
        if moves_along_velocity(scheduler):  # so that `Other.from_config(pipe.scheduler.config)` fits, too
            scheduler.register_to_config(**{**FLOW, "flow_shift": shift})
        self.register_modules(
            transformer=transformer,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            image_encoder=image_encoder,
            vae=vae,
        )
        self.register_to_config(
            noise_scale=noise_scale, shift=shift, latent_scale=latent_scale, latent_shift=latent_shift
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str | None] | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 2.0,
        image: Image.Image | Sequence[Image.Image | None] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: Sequence[int] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """`ImagePipelineOutput`, or the tuple of its images: PIL images, "np" or "pt" in [0, 1], or "latent".

        A prompt or image of None (or "") hides that condition. The noise comes from `seeds`, one a picture, as
        `mm generate` draws it; or from `generator`, one or one a picture; or it is `latents` `[B, C, H, W]`, standard
        normal. `guidance_scale` 1 is none. Raises ValueError for what cannot work.
        """
        prompts, pictures = paired(prompt, image)
        count = len(prompts) * num_images_per_prompt
        check(self, count, seeds, generator, latents, num_inference_steps, output_type)
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs: {unknown} not among {self._callback_tensor_inputs}")
        device = self._execution_device
        self._guidance_scale, self._interrupt = guidance_scale, False
        tokens, mask, pooled = (
            part.repeat_interleave(num_images_per_prompt, 0)
            for part in self._conditions(prompts, pictures, guidance_scale, device)
        )
        schedule = Schedule(noise_scale=self.config.noise_scale, shift=self.config.shift)
        latents = self._noise(count, seeds, generator, latents, device) * schedule.noise_scale
        self._set_levels(schedule, num_inference_steps, device)
        self._num_timesteps = len(self.scheduler.timesteps)
        extra = {} if isinstance(generator, list) else {"generator": generator}
        extra = {name: extra[name] for name in inspect.signature(self.scheduler.step).parameters if name in extra}
        with self.progress_bar(total=self._num_timesteps) as bar:
            for index, t in enumerate(self.scheduler.timesteps):
                if self._interrupt:
                    continue
                level = self.scheduler.sigmas[index].to(device, torch.float32).expand(count)
                last = float(self.scheduler.sigmas[index + 1]) == 0.0
                x = self._predict(latents, level, tokens, pooled, mask)
                velocity = self._velocity(schedule, latents, x, level, last)
                latents = self.scheduler.step(velocity, t, latents, return_dict=False, **extra)[0]
                if callback_on_step_end is not None:
                    known = {"latents": latents, "prompt_embeds": tokens, "pooled_projections": pooled}
                    given = {name: known[name] for name in callback_on_step_end_tensor_inputs}
                    changed = {**known, **(callback_on_step_end(self, index, t, given) or {})}
                    latents, tokens, pooled = (changed[name] for name in self._callback_tensor_inputs)
                bar.update()
        images = self._images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to stop after that step."""
        return self._interrupt

    def _conditions(
        self,
        prompts: Sequence[str | None],
        pictures: Sequence[Image.Image | None],
        guidance: float,
        device: torch.device,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Text tokens, their mask, and pooled text and image side by side; with guidance the hidden ones after them."""
        given = self.tokenizer([words or "" for words in prompts])
        ids, mask = given["input_ids"].to(device), given["attention_mask"].to(device)
        tokens, text = self.text_encoder(ids, mask)
        vision, shown = torch.zeros_like(text), torch.zeros(len(prompts), device=device)
        there = [place for place, picture in enumerate(pictures) if picture is not None]
        if there:
            if self.image_encoder is None:
                raise ValueError("image: this folder holds no image encoder; give prompts only")
            pixels = self.image_encoder.prepare([picture for picture in pictures if picture is not None])
            vision[there] = self.image_encoder(pixels.to(device)).to(vision)
            shown[there] = 1.0
        encoded = {"text": Encoded(Tokens(tokens, mask.bool()), text), "image": Encoded(Tokens(tokens), vision)}
        keep = {"text": torch.tensor([float(bool(words)) for words in prompts], device=device), "image": shown}
        nothing = {name: torch.zeros_like(rows) for name, rows in keep.items()}
        sides = [keep] if guidance == 1.0 else [keep, nothing]
        told = [gather_condition(encoded, side, len(prompts), text.shape[1], device) for side in sides]
        return (
            torch.cat([side.x for side, _ in told]),
            torch.cat([mask.bool()] * len(sides)),
            torch.cat([pooled for _, pooled in told]),
        )

    def _predict(self, z: Tensor, sigma: Tensor, tokens: Tensor, pooled: Tensor, mask: Tensor) -> Tensor:
        """The clean picture; of twice as many conditions, those in the first half with guidance against the others."""
        if len(tokens) == len(z):
            return self.transformer(z, sigma, tokens, pooled, mask)

        def both(z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            out = self.transformer(torch.cat([z, z]), torch.cat([sigma, sigma]), tokens, pooled, mask)
            shown, hidden = out.chunk(2)
            return shown, hidden

        return guided(both, self._guidance_scale)(z, sigma)

    def _noise(
        self,
        count: int,
        seeds: Sequence[int] | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        if latents is not None:
            return latents.to(device, torch.float32)
        shape = tuple(self.transformer.config.shape)
        if seeds is not None:
            numbers = torch.tensor([int(seed) for seed in seeds], dtype=torch.int64, device=device)
            return torch.cat([normal(number[None], shape, NOISE) for number in numbers])
        return randn_tensor((count, *shape), generator=generator, device=device, dtype=torch.float32)

    def _set_levels(self, schedule: Schedule, steps: int, device: torch.device) -> None:
        """The noise levels of `mm generate`, whichever way the scheduler has of being told; shifted once."""
        scheduler: Any = self.scheduler
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters and moves_along_velocity(self.scheduler):
            sigmas = np.linspace(1.0, 0.0, steps + 1)[:-1]  # the scheduler shifts them, and appends zero
            scheduler.set_timesteps(sigmas=sigmas.tolist(), device=device)
        else:
            scheduler.set_timesteps(steps, device=device)
        if self._is_heun:  # it shifts twice and cannot be given levels
            levels = schedule.sampling_sigmas(steps).to(device)
            middle = levels[1:-1].repeat_interleave(2)
            scheduler.sigmas = torch.cat([levels[:1], middle, levels[-1:]])
            scheduler.timesteps = scheduler.sigmas[:-1] * scheduler.config.num_train_timesteps
        scheduler.set_begin_index(0)  # or it looks a timestep up by its value

    @property
    def _is_heun(self) -> bool:
        return isinstance(self.scheduler, FlowMatchHeunDiscreteScheduler)

    def _velocity(self, schedule: Schedule, z: Tensor, x: Tensor, sigma: Tensor, last: bool) -> Tensor:
        """(z - x) / sigma, the divisor bounded as in training, but exact where x itself is meant by it."""
        if last or not moves_along_velocity(self.scheduler):
            return (z - x) / sigma.view(-1, 1, 1, 1)
        return schedule.velocity(z, x, sigma)

    def _images(self, latents: Tensor, kind: str) -> Any:
        if kind == "latent":
            return latents
        if self.vae is not None:
            latents = latents.float() / self.config.latent_scale + self.config.latent_shift
            with torch.autocast(latents.device.type, enabled=False):
                latents = self.vae.decode(latents.to(self.vae.dtype)).sample
        pixels = PixelSpace(latents.shape[-1]).decode(latents)  # uint8 [B, 3, H, W]
        if kind == "pt":
            return pixels.float() / 255
        array = pixels.permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(picture) for picture in array] if kind == "pil" else array.astype(np.float32) / 255

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Weights, settings and code, in a folder like the one that this pipeline was loaded from.

        diffusers' own would leave the code out, and name modules that only this process has. Arguments are those of
        diffusers' models.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError("push_to_hub: save the folder, then upload it with `hf upload`")
        save(self, Path(save_directory), **kwargs)
