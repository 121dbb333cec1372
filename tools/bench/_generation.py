"""Both sides of tools/bench/generation.py: a denoiser of DiT-B's size in mm, and diffusers' own of that size."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from _common import ROOT
from torch import Tensor

from mm.adapters.text import train_tokenizer
from mm.api import LoadedModel
from mm.config import DenoiserConfig
from mm.diffusion.guidance import guided
from mm.diffusion.noise import normal
from mm.diffusion.sampler import sample
from mm.diffusion.schedule import Schedule
from mm.evaluation.inference import Inference
from mm.objectives.step import build_step
from mm.settings import load
from mm.types import Tokens

WORDS = (
    "red heart,a dog that runs,the sun behind 2 small clouds,flag: Åland,a blue cat face,7 keys,a green tree,x".split(
        ","
    )
)
WIDTH, DEPTH, HEADS = 768, 12, 12  # DiT-B (arXiv 2212.09748)
SIDE, PATCH = 32, 2  # 256 tokens, as of a picture of 256 pixels in a VAE's latents
GUIDANCE = 2.0


def big_model() -> LoadedModel:
    """A text encoder of the demo's size and a joint-attention denoiser (MMDiT) of DiT-B's, with random weights."""
    config = load(os.path.join(ROOT, "configs/demo.py"))
    config.model.image = dataclasses.replace(config.model.image, size=SIDE)
    config.model.denoiser = DenoiserConfig(patch=PATCH, width=WIDTH, depth=DEPTH, heads=HEADS, context_depth=DEPTH - 1)
    torch.manual_seed(0)
    model = build_step(config, train_tokenizer(WORDS * 4, config.model.text.vocab_size)).model
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return LoadedModel(model.eval().requires_grad_(False), config, {}, {})


class Peer:
    """diffusers' StableDiffusion3Pipeline with its transformer at the size of `inference`'s denoiser, in bf16.

    It is given the text as the model encodes it, in each call. Its `fuse_qkv_projections` would save products, but
    leaves the norms of q and k out, up to diffusers 0.42 at least.
    """

    def __init__(self, inference: Inference):
        from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

        denoiser = inference.model.denoiser
        assert denoiser is not None
        torch.manual_seed(0)
        self.inference = inference
        transformer = SD3Transformer2DModel(
            sample_size=SIDE,
            patch_size=PATCH,
            in_channels=denoiser.shape[0],
            out_channels=denoiser.shape[0],
            num_layers=DEPTH,
            attention_head_dim=WIDTH // HEADS,
            num_attention_heads=HEADS,
            joint_attention_dim=denoiser.context_in.in_features,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=denoiser.pooled_in.in_features,
            pos_embed_max_size=SIDE // PATCH,
            qk_norm="rms_norm",
        )
        nothing: dict[str, Any] = dict.fromkeys(
            ["vae", *(f"{kind}{n}" for kind in ("tokenizer", "text_encoder") for n in ("", "_2", "_3"))]
        )
        self.pipe = StableDiffusion3Pipeline(
            transformer=transformer.eval().to(torch.bfloat16), scheduler=FlowMatchEulerDiscreteScheduler(), **nothing
        )
        self.pipe.set_progress_bar_config(disable=True)

    def compile(self) -> None:
        """Block by block, as diffusers advises; the list of its block classes is empty for this transformer."""
        transformer = self.pipe.transformer
        transformer._repeated_blocks = ["JointTransformerBlock"]
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)

    def told(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The text's tokens and pooled vectors, and those of nothing, in the transformer's type."""
        tokens, _, text = self.inference.text_condition(prompts)
        pooled = torch.cat([text, torch.zeros_like(text)], 1)  # no picture to go by
        return {
            "prompt_embeds": tokens.to(self.pipe.transformer.dtype),
            "negative_prompt_embeds": torch.zeros_like(tokens).to(self.pipe.transformer.dtype),
            "pooled_prompt_embeds": pooled.to(self.pipe.transformer.dtype),
            "negative_pooled_prompt_embeds": torch.zeros_like(pooled).to(self.pipe.transformer.dtype),
        }

    def draw(self, prompts: Sequence[str], latents: Tensor, steps: int) -> Tensor:
        """Latents `[B, C, H, W]` from standard normal ones, by the sampler's noise levels."""
        with torch.inference_mode():
            found: Tensor = self.pipe(
                **self.told(prompts),
                latents=latents.to(self.pipe.transformer.dtype),
                sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1].tolist(),
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
                output_type="latent",
            ).images
        return found


def noise(count: int) -> Tensor:
    """`[count, 3, SIDE, SIDE]`."""
    return normal(torch.arange(count), (3, SIDE, SIDE), 0)


def same_sampler(peer: Peer, steps: int) -> float:
    """The largest difference of what both samplers make of one stand-in for the network, in float32."""
    start, transformer = noise(2), peer.pipe.transformer

    def x_of(z: Tensor, sigma: Tensor, told: Tensor) -> Tensor:
        return torch.tanh(z * (1.5 - sigma) + told)

    def velocity(hidden_states: Tensor, timestep: Tensor, pooled_projections: Tensor, **_: Any) -> tuple[Tensor]:
        sigma = timestep.float().view(-1, 1, 1, 1) / 1000
        z = hidden_states.float()
        return ((z - x_of(z, sigma, pooled_projections.float().norm(dim=1).view(-1, 1, 1, 1))) / sigma,)

    def both(z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        level = sigma.view(-1, 1, 1, 1)
        return x_of(z, level, torch.ones_like(level)), x_of(z, level, torch.zeros_like(level))

    own, kind = transformer.forward, transformer.dtype
    transformer.float().forward = velocity
    theirs = peer.draw(WORDS[:2], start, steps)
    transformer.to(kind).forward = own
    ours = sample(guided(both, GUIDANCE), start, Schedule(), steps)
    return (ours - theirs).abs().max().item()


def flops(peer: Peer) -> tuple[int, int]:
    """Of one guided evaluation (two rows) of mm's denoiser as it trains, and of the peer's transformer."""
    from torch.utils.flop_counter import FlopCounterMode

    inference, told = peer.inference, peer.told(WORDS[:2])
    denoiser, z, kind = inference.model.denoiser, noise(2), peer.pipe.transformer.dtype
    tokens, mask, text = inference.text_condition(WORDS[:2])
    with FlopCounterMode(display=False) as counted, torch.inference_mode():
        denoiser(z, torch.full((2,), 0.5), Tokens(tokens, mask), torch.cat([text, text], 1))
    ours = counted.get_total_flops()
    with FlopCounterMode(display=False) as counted, torch.inference_mode():
        peer.pipe.transformer(
            hidden_states=z.to(kind),
            timestep=torch.full((2,), 500.0),
            encoder_hidden_states=told["prompt_embeds"],
            pooled_projections=told["pooled_prompt_embeds"],
        )
    return ours, counted.get_total_flops()


def closeness(inference: Inference) -> dict[str, float]:
    """Relative error against the float32 denoiser, of one guided evaluation under autocast and as it is drawn with."""
    denoiser, z, sigma = inference.model.denoiser, noise(2), torch.full((2,), 0.5)
    tokens, mask, text = inference.text_condition(WORDS[:2])
    given = Tokens(tokens.float(), mask), torch.cat([text.float(), torch.zeros_like(text).float()], 1)
    prepared = inference.prepared()
    assert denoiser is not None and prepared is not None
    with torch.inference_mode():
        exact = denoiser(z, sigma, *given)
        with torch.autocast("cpu", torch.bfloat16):
            found = {"autocast": denoiser(z, sigma, *given), "prepared": prepared.tell(*given, sigma[:1])(z, sigma)}
    return {name: ((x.float() - exact).norm() / exact.norm()).item() for name, x in found.items()}
