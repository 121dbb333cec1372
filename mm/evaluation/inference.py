"""Encoding and drawing with a trained model, item by item alike whatever else is in the call.

Letters: B items, E embedding, C H W picture, L text tokens.

On a CPU an element's last bit may depend on where it lies in a tensor: torch cuts an elementwise operation into one
chunk a thread, and the odd end of a chunk runs through scalar code. Micro-batches of a fixed size, filled up with
copies of the first item, cut evenly for one or two threads; with more, each item goes alone, always in the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mm.diffusion.sampler import Solver
from mm.evaluation.packed import Packed
from mm.fields import suggestion
from mm.types import Batch, Encoded

if TYPE_CHECKING:
    from mm.adapters.base import Adapter, Processor
    from mm.config import ImageConfig, TextConfig, TrainConfig
    from mm.evaluation.prepared import Prepared
    from mm.models.model import Model

MICRO_BATCH = {"image": 32, "text": 64, "draw": 8}
EVEN_THREADS = 2
_SMALL_SIDE = 32  # pixels: larger pictures go in smaller micro-batches on a CPU, of about as many pixels
_FULL = 128  # image tokens of a micro-batch that draws on a CPU, twice as many with guidance: products are fast then
_WORK = 5e9  # multiply-adds of a micro-batch on a CPU: it is always full, and one item must not cost as much as many
TEXT_STEP = 4  # tokens: what a text is padded to is a multiple of it

Items = tuple[Tensor, ...]  # columns of equal length: row i of each belongs to item i


def cut_padding(ids: Tensor, lengths: Tensor) -> Iterator[tuple[Tensor, Items]]:
    """Texts that fit into 4 tokens, into 8, into 12 and so on up to L: their rows, ids and lengths.

    What an item is padded to follows from its own length, so it stays alike whatever else is in the call.
    """
    widths = (-(-lengths // TEXT_STEP) * TEXT_STEP).clamp(min=TEXT_STEP, max=ids.shape[1])
    for width in widths.unique().tolist():
        rows = (widths == width).nonzero()[:, 0]
        yield rows, (ids[rows, :width], lengths[rows])


class Inference:
    """A model with the tensors of its objectives (`extras`, by `objectives.*` name), float32 and without gradients."""

    def __init__(self, model: Model, config: TrainConfig, extras: dict[str, Tensor]) -> None:
        self.model, self.config, self.extras = model, config, extras
        self.fingerprint = ""  # set by mm.models.fingerprint once it was asked for
        self._packed = Packed(model)
        self.bf16 = False  # matrix products in bf16, as in training: faster, and what evaluation uses
        self.compiled = False  # compile the blocks that draw in bf16 on a CPU: worth it for hundreds of pictures
        self._prepared: tuple[object, Prepared] | None = None

    def processor(self, name: str) -> Processor:
        """Of one modality. Raises ValueError where the model has no such modality."""
        if name not in self.model.adapters:
            known = list(self.model.adapters)
            raise ValueError(
                f"{name}: not a modality of this model{suggestion(name, known)}; it has {', '.join(known)}"
            )
        return cast("Adapter", self.model.adapters[name]).processor

    def prepare(self, name: str, raw: Sequence[Any]) -> Items:
        """Raw items as columns: image uint8 `[B, 3, H, W]`, text ids `[B, L]` and lengths `[B]`.

        Text may already be ids, an int tensor `[B, L]` padded with `model.text.pad_id`, 0 for most models. Raises
        ValueError naming a wrong item.
        """
        processor = self.processor(name)
        if isinstance(raw, Tensor) and name == "text":
            return self._check_ids(raw)
        if isinstance(raw, (str, bytes, dict)) or not hasattr(raw, "__len__") or isinstance(raw, Tensor):
            raise ValueError(f"{name}: must be a list of items, not one {type(raw).__name__}; put it in [ ]")
        items = []
        for place, item in enumerate(raw):
            try:
                items.append(processor.prepare(item, train=False))
            except ValueError as error:
                raise ValueError(f"{name}[{place}]: {error}") from error
        if not items:
            return ()
        inputs, lengths = processor.collate(items)
        return (inputs,) if lengths is None else (inputs, lengths)

    def _check_ids(self, ids: Tensor) -> Items:
        text = self.config.model.text
        if ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] > text.context_length:
            raise ValueError(
                f"text: token ids are {ids.dtype} of shape {list(ids.shape)}; "
                f"must be integers [B, L] with L at most {text.context_length}"
            )
        ids = torch.nn.functional.pad(ids.long().cpu(), (0, text.context_length - ids.shape[1]), value=text.pad_id)
        size = self.model.tokenizer.vocab_size
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise ValueError(f"text: token ids from {ids.min()} to {ids.max()}; must be from 0 to {size - 1}")
        places = torch.arange(1, text.context_length + 1)
        lengths = (places * (ids != text.pad_id)).amax(1)  # up to the last id that is not padding
        if ids.numel() and int(lengths.min()) == 0:
            raise ValueError(f"text[{int(lengths.argmin())}]: only padding ({text.pad_id}); give at least one token")
        # CLIP's end token is the highest id, and CLIP pools there, whatever follows
        return ids, ids.argmax(1) + 1 if text.tokenizer == "clip" and ids.numel() else lengths

    @property
    def _ignores_padding(self) -> bool:
        text = self.config.model.text
        return text.masked and text.tower is None

    def encode(
        self, name: str, raw: Sequence[Any], *, micro_batch: int | None = None, progress: bool = False
    ) -> Tensor:
        """Unit-norm embeddings `[B, E]` float32 of raw items, on the CPU. Raises ValueError as `prepare`."""
        return self.embed(name, self.prepare(name, raw), micro_batch=micro_batch, progress=progress)

    def embed(self, name: str, columns: Items, *, micro_batch: int | None = None, progress: bool = False) -> Tensor:
        """`encode` for columns that `prepare` or a loader has made."""
        if not columns or not len(columns[0]):
            return torch.zeros(0, self.config.model.embed_dim)
        label = f"encoding {name}" if progress else ""
        out = torch.empty(len(columns[0]), self.config.model.embed_dim)
        whole = len(columns) == 1 or (name == "text" and not self._ignores_padding)
        for rows, part in [(slice(None), columns)] if whole else cut_padding(*columns):
            size = micro_batch or self.size(name, part[0].shape[1])
            vectors = self.run(lambda *part: (self._encoded(name, part, True).pooled,), part, size, label)[0]
            out[rows] = vectors.cpu().float()
        return out

    def generate(
        self,
        prompts: Sequence[str | None],
        *,
        seeds: Sequence[int] | None = None,
        steps: int = 25,
        guidance: float = 2.0,
        solver: Solver = "euler",
        interval: tuple[float, float] = (0.0, 1.0),
        strength: float = 0.7,
        **options: Any,
    ) -> Tensor:
        """uint8 `[B, 3, H, W]`, picture i from prompt i; see `mm.evaluation.drawing.draw` for all options."""
        from mm.evaluation.drawing import draw
        from mm.evaluation.sampling import Settings

        settings = Settings(steps, guidance, solver, interval, strength)
        return draw(self, prompts, seeds=seeds, settings=settings, **options)

    def text_condition(self, texts: Sequence[str]) -> Items:
        """What the denoiser is told of texts: tokens `[B, L, D]`, their mask `[B, L]`, pooled vectors `[B, E]`."""
        return self.run(self._text_condition, self.prepare("text", texts), self.size("text"))

    def _text_condition(self, *part: Tensor) -> Items:
        encoded = self._encoded("text", part)
        assert encoded.tokens.mask is not None
        return encoded.tokens.x, encoded.tokens.mask, encoded.pooled

    def _encoded(self, name: str, columns: Items, pooled_only: bool = False) -> Encoded:
        lengths = {name: columns[1]} if len(columns) > 1 else {}
        batch = Batch({name: columns[0]}, lengths).to(self.model.device)
        packed = self._packed.encode(name, batch, pooled_only) if self.bf16 else None
        return self.model.encode(batch, [name] if pooled_only else [])[name] if packed is None else packed

    def prepared(self) -> Prepared | None:
        """The denoiser made ready to draw in bf16, made anew when its weights change; None where it cannot be.

        Changes through `parameter.data` are not seen; give a fresh Inference after them.
        """
        from mm.evaluation.prepared import Prepared, can_prepare

        denoiser = self.model.denoiser
        if not self.bf16 or denoiser is None or not can_prepare(denoiser):
            return None
        weights = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in denoiser.parameters()]
        key = (id(denoiser), self.compiled, weights)
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = key, Prepared(denoiser, 2 * self.size("draw"), compiled=self.compiled)
        return self._prepared[1]

    def size(self, kind: str, tokens: int = 0) -> int:
        """Items of a micro-batch of "image", "draw" or "text", of which each is padded to `tokens`."""
        cpu = self.model.device.type == "cpu"
        if cpu and torch.get_num_threads() > EVEN_THREADS:
            return 1
        usual = MICRO_BATCH.get(kind, 16)
        if not cpu:
            return usual
        image, text = self.config.model.image, self.config.model.text
        denoiser = self.config.model.denoiser
        if kind == "draw" and denoiser is not None:
            patches = self.model.latents.shape[1] * self.model.latents.shape[2] // denoiser.patch**2
            return min(usual, max(1, _FULL // patches))
        if kind == "text":
            work = (tokens or text.context_length) * _token(text)
            return 8 if text.tower is not None else min(usual, _power_of_two(_WORK / work))
        pictures = max(1, usual * _SMALL_SIDE**2 // max(image.size, _SMALL_SIDE) ** 2)
        if kind != "image" or image.tower is not None:
            return pictures
        return max(pictures, min(usual, _power_of_two(_WORK / ((image.size // image.patch) ** 2 * _token(image)))))

    def run(self, function: Callable[..., Items], columns: Items, size: int, label: str = "") -> Items:
        """`function` over micro-batches of exactly `size` items; its columns for the real ones, joined."""
        from tqdm import tqdm

        total, parts = len(columns[0]), []
        quiet = torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16)
        bar = tqdm(total=total, desc=label, unit="item", disable=None if label else True, leave=False)
        with torch.inference_mode(), quiet, bar:
            for start in range(0, total, size):
                part = [column[start : start + size] for column in columns]
                real = len(part[0])
                # a fresh tensor each: a view's place in memory must not choose the kernel
                whole = [torch.cat([rows, rows[:1].expand(size - real, *rows.shape[1:])]) for rows in part]
                parts.append(tuple(column[:real] for column in function(*whole)))
                bar.update(real)
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))  # out here: usable under autograd


def _token(part: ImageConfig | TextConfig) -> float:
    """Multiply-adds of a token in the matrices of an encoder."""
    return part.depth * part.width**2 * (4 + 2 * part.mlp_ratio)


def _power_of_two(most: float) -> int:
    """The largest one that is at most `most`, and at least 1: an odd micro-batch is not cut evenly for two threads."""
    return 1 << max(0, int(most).bit_length() - 1)
