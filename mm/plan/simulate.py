"""One training step of a config on tensors without data, as one rank of many runs it."""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mm.adaptation import apply
from mm.config import ConfigError
from mm.distributed.parallelize import blocks, recompute
from mm.distributed.world import World
from mm.objectives.diffusion import drawn
from mm.objectives.step import TrainStep, build_step
from mm.plan.sharding import FullyShard, Layout, Shards, layout_of
from mm.plan.tracker import KINDS, Hidden, Tracker
from mm.rules import divides
from mm.training.ema import Ema
from mm.training.optim import Optimizers
from mm.types import Batch, Encoded

if TYPE_CHECKING:
    from mm.config import TrainConfig

TILE = 8192  # edge of the contrastive loss' tiles on a GPU (kernels/mm_kernels/contrastive_loss/triton_tiles.py)
PARTS = ("vision", "text", "denoiser", "objectives")


@dataclass(frozen=True)
class Step:
    """What one step of one rank takes. Bytes, and FLOPs; `memory` is by kind at the moment of the highest sum."""

    layout: Layout
    micro_batch: int  # samples
    micro_batches: int
    caption_tokens: int
    parameters: dict[str, int]  # by part
    trained: int  # parameters that are updated
    local: int  # ... of which this rank holds so many
    forward: int
    backward: int
    recompute: int  # activation checkpointing, and with accumulation the features that are computed first
    memory: dict[str, int]
    traffic: dict[str, int]  # bytes of the whole tensors that a collective is about

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


def simulate(config: TrainConfig, gpus: int = 1, caption_tokens: int | None = None, kernels: bool = True) -> Step:
    """One step of `config` on rank 0 of `gpus`, the first steps' allocations being made.

    `kernels`: with the operators of `mm_kernels`, as on a GPU; without, torch's forms for a CPU. Nothing is compiled:
    torch.compile keeps fewer activations. The text encoder is given `caption_tokens` tokens a caption, all of the
    context by default: training packs real captions, whose lengths a plan cannot know. Raises ConfigError for a batch
    or a sharding that does not come out even.
    """
    if config.model.modalities:
        raise ConfigError(
            f"model.modalities: {config.model.modalities[0].name}: mm plan cannot know what its loader yields; "
            "plan without it"
        )
    layout = layout_of(config.parallel, gpus)
    divides(config, gpus)
    accumulate = config.optim.accumulate
    micro_batch = config.data.batch_size // (gpus * accumulate)
    if config.objectives.diffusion is not None:
        drawn(micro_batch, config.objectives.diffusion.share)  # cached, while tensors still have data
    simulated = min(accumulate, 2)  # a third micro-batch allocates what the second did
    tokens = _tokens(config, caption_tokens)
    with torch.device("meta"):
        step = build_step(config, cast("Any", types.SimpleNamespace(vocab_size=config.model.text.vocab_size)))
        apply(step, config.adapt)
    if layout.shard > 1 and config.parallel.precision == "bf16_params":
        for block in blocks(step):
            for p in block.parameters():
                p.data = p.data.bfloat16()  # as they are gathered
    tracker = Tracker(_hidden(gpus))
    with _operators(kernels), FakeTensorMode(allow_non_fake_inputs=True), tracker:
        step.to_empty(device="cpu")
        if config.parallel.activation_checkpointing != "none":
            recompute(step, config.parallel.activation_checkpointing)
        _with_captions_of(step, tokens, config.model.text.context_length)
        owner: nn.Module = step
        sharded = None
        if layout.shard > 1:
            tracker.count(step.parameters(), None)
            owner = shards = Shards(step, layout.shard)
            sharded = FullyShard(step, shards, tracker, config.parallel.reshard, simulated)
        else:
            for p in step.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(lambda p: tracker.count([p.grad], "gradients"))
        optimizers, ema = _state(owner, config, tracker, World(0, gpus if layout.shard == 1 else 1))
        tracker.kind = "activations"
        batch = empty_batch(config, micro_batch * simulated, tokens)
        tracker.forget_peak()

        @contextlib.contextmanager
        def forward() -> Iterator[None]:
            tracker.kind, tracker.phase = "activations", "forward"
            with _autocast(config):
                yield
            tracker.kind, tracker.phase = "temporary", "backward"

        def features(micro_batch: Batch) -> dict[str, Tensor]:
            tracker.phase = "recompute"
            try:
                return TrainStep.features(step, micro_batch)
            finally:
                tracker.phase = "forward"

        step.features = features  # type: ignore[method-assign, assignment]
        metrics = step.backward(batch, simulated, forward)
        if sharded:
            sharded.finish()
        tracker.phase = "update"
        del batch
        optimizers.clip()
        optimizers.step(1)
        ema.update(1)
        del metrics
    parameters = parts_of(step)
    scale = accumulate / simulated
    traffic = {name: round(size * scale) for name, size in (sharded.traffic if sharded else {}).items()}
    own = sum(p.numel() for p in owner.parameters() if p.requires_grad)
    return Step(
        layout=layout,
        micro_batch=micro_batch,
        micro_batches=accumulate,
        caption_tokens=tokens,
        parameters=parameters,
        trained=sum(p.numel() for p in step.parameters() if p.requires_grad),
        local=own,
        **{phase: round(tracker.flops[phase] * scale) for phase in ("forward", "backward", "recompute")},
        memory={kind: tracker.at_peak.get(kind, 0) for kind in KINDS},
        traffic=traffic,
    )


def _tokens(config: TrainConfig, wanted: int | None) -> int:
    longest = config.model.text.context_length
    if wanted is not None and not 1 <= wanted <= longest:
        raise ConfigError(f"--caption-tokens {wanted}: must be from 1 to model.text.context_length = {longest}")
    return longest if wanted is None else wanted


@contextlib.contextmanager
def _operators(kernels: bool) -> Iterator[None]:
    """With `kernels`, tensors of a CPU take the kernels' operators, of which only the shapes are asked here."""
    name = "TRITON_INTERPRET"
    before = os.environ.get(name)
    os.environ[name] = "1" if kernels else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _autocast(config: TrainConfig) -> contextlib.AbstractContextManager:
    if config.parallel.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", torch.bfloat16)


def _state(owner: nn.Module, config: TrainConfig, tracker: Tracker, world: World) -> tuple[Optimizers, Ema]:
    """The optimizer and the average, with the state that they have from the first step on."""
    tracker.kind = "optimizer"
    optimizers = Optimizers(owner, config.optim, config.run.steps, world)
    for p in owner.parameters():
        p.grad = torch.empty_like(p) if p.requires_grad else None
    optimizers.step(0)
    tracker.kind = "ema"
    return optimizers, Ema(owner, config.optim.ema)


def empty_batch(config: TrainConfig, size: int, tokens: int) -> Batch:
    """What the loader yields, without data; buckets by aspect have no shape of more pixels than the square."""
    pixels = (size, 3, config.model.image.size, config.model.image.size)
    inputs = {"image": torch.empty(pixels, dtype=torch.uint8)}
    inputs["text"] = torch.empty(size, tokens, dtype=torch.int64)
    if config.model.denoiser is not None and config.model.image.clean_target:
        inputs["target"] = torch.empty(pixels, dtype=torch.uint8)
        latents = config.model.latents
        if latents is not None and latents.cached:
            side = config.model.image.size // latents.factor
            inputs["latents"] = torch.empty(size, latents.channels, side, side, dtype=torch.float16)
    return Batch(inputs, {"text": torch.empty(size, dtype=torch.int64)}, torch.empty(size, dtype=torch.int64))


def _with_captions_of(step: TrainStep, tokens: int, context: int) -> None:
    """Texts of `tokens` tokens and no padding go through the encoder; what it returns is as long as the context."""
    encoder = step.model.encoders["text"]
    encoder.eval()  # dense: packing asks for the data. Nothing else in an encoder depends on the mode

    def padded(_: nn.Module, __: Any, encoded: Encoded) -> Encoded:
        more, found = context - tokens, encoded.tokens
        mask = None if found.mask is None else F.pad(found.mask, (0, more))
        return encoded._replace(tokens=found._replace(x=F.pad(found.x, (0, 0, 0, more)), mask=mask))

    if tokens < context:
        encoder.register_forward_hook(padded)


def _hidden(gpus: int) -> dict[Any, Hidden]:
    """The contrastive loss: what it gathers, and the tile of logits that it holds at a time (Inf-CL, 2410.17243)."""

    def loss(image: Tensor, text: Tensor, _: Tensor, __: Any, kind: str, *___: Any) -> tuple[int, int]:
        rows, width = image.shape
        columns, size = rows * gpus, image.dtype.itemsize
        gathered = 2 * columns * width * size if gpus > 1 else 0
        tile = min(rows, TILE) * min(columns, TILE) * size
        # products of rows x columns x width: statistics (softmax), logits and gradient, of images and of texts; in one
        # process both gradients are made from one tile
        products = (2 if gpus > 1 else 1) + 2 + (kind == "softmax")
        return gathered + tile, products * 2 * rows * columns * width

    return {torch.ops.mm.contrastive_loss: loss}


def parts_of(step: TrainStep) -> dict[str, int]:
    """Parameters of both encoders with their adapters, of the denoiser, and of the objectives."""
    model = step.model
    modules: list[list[nn.Module]] = [
        [model.adapters["image"], model.encoders["image"]],
        [model.adapters["text"], model.encoders["text"]],
        [model.denoiser] if model.denoiser is not None else [],
        [step.objectives],
    ]
    counts = [sum(p.numel() for module in some for p in module.parameters()) for some in modules]
    return dict(zip(PARTS, counts, strict=True))
