"""POST /v1/embeddings"""

from __future__ import annotations

import base64
from typing import Any

import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from torch import Tensor

from mm.serving import images_in
from mm.serving.engine import IMAGE, TEXT, Row
from mm.serving.errors import bad, over
from mm.serving.openai_shapes import Embeddings, EmbeddingsRequest, Item, Picture
from mm.serving.route import MODEL_REFUSALS, ModelRoute
from mm.serving.service import Service

router = APIRouter(route_class=ModelRoute, tags=["OpenAI"])


@router.post("/v1/embeddings", response_model=Embeddings, responses=MODEL_REFUSALS)
async def create_embeddings(request: Request, asked: EmbeddingsRequest) -> JSONResponse:
    """Vectors of length 1 for texts and pictures, in one space: their products are cosine similarities."""
    service: Service = request.app.state.service
    service.check_model(asked.model)
    width = service.engine.embed_dim
    if asked.dimensions not in (None, width):
        raise bad(f"dimensions = {asked.dimensions}: this model has {width}; leave it out", "dimensions")
    items: list[Item] = asked.input
    texts, pictures, tokens = await service.apart(_ready, service, items, asked.truncate)
    vectors = dict(zip(texts, await service.run(TEXT, list(texts.values())), strict=True))
    vectors |= dict(zip(pictures, await service.run(IMAGE, list(pictures.values())), strict=True))
    ordered = torch.stack([vectors[place] for place in range(len(items))])
    data = await service.apart(_written, ordered, asked.encoding_format or "float")
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": service.name, "usage": usage})


def _ready(service: Service, items: list[Item], truncate: bool) -> tuple[dict[int, Row], dict[int, Row], int]:
    """Texts and pictures by their places, ready for the encoders, and the number of tokens."""
    limits, engine = service.limits, service.engine
    pictures = {place: item for place, item in enumerate(items) if isinstance(item, Picture)}
    if len(pictures) > limits.max_images:
        raise over("input", "--max-images", len(pictures), limits.max_images, "pictures")
    if len(items) > limits.max_texts:
        raise over("input", "--max-texts", len(items), limits.max_texts, "items")
    words = {place: item for place, item in enumerate(items) if isinstance(item, str) and place not in pictures}
    ids = {place: item for place, item in enumerate(items) if isinstance(item, list)}
    tokens = sum(check_text(service, text, f"input[{place}]", truncate) for place, text in words.items())
    tokens += sum(_check_ids(service, given, f"input[{place}]") for place, given in ids.items())
    texts = dict(zip(words, engine.texts(list(words.values())), strict=True)) if words else {}
    texts |= dict(zip(ids, engine.ids(list(ids.values())), strict=True)) if ids else {}
    rows = {
        place: engine.picture(images_in.from_text(url, f"input[{place}]", limits)) for place, url in pictures.items()
    }
    return texts, rows, tokens


def check_text(service: Service, text: str, param: str, truncate: bool) -> int:
    """How many of its tokens the model reads. Raises ApiError 400 where the text is too long."""
    limits, most = service.limits, service.engine.context_length
    if len(text) > limits.max_chars:
        raise over(param, "--max-chars", len(text), limits.max_chars, "characters")
    count = service.engine.tokens(text)
    if count > most and not truncate:
        raise bad(
            f"{param}: {count} tokens, and this model reads {most}; shorten it, or send truncate: true",
            param.split("[")[0],
            "context_length_exceeded",
        )
    return min(count, most)


def _check_ids(service: Service, ids: list[int], param: str) -> int:
    most, size = service.engine.context_length, service.engine.vocab_size
    if len(ids) > most:
        raise bad(f"{param}: {len(ids)} token ids, and this model reads {most}", "input", "context_length_exceeded")
    if max(ids) >= size:
        raise bad(f"{param}: token id {max(ids)}; must be from 0 to {size - 1}", "input")
    if not any(id != service.engine.pad_id for id in ids):
        raise bad(f"{param}: only padding ({service.engine.pad_id}); give at least one token", "input")
    return len(ids)


def _written(vectors: Tensor, form: str) -> list[dict[str, Any]]:
    if form == "float":
        values: list[Any] = vectors.tolist()
    else:
        values = [base64.b64encode(row.tobytes()).decode() for row in vectors.numpy().astype("<f4")]
    return [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(values)]
