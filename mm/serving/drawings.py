"""POST /v1/images/generations"""

from __future__ import annotations

import base64
import time

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from PIL import Image

from mm.evaluation.drawn_files import png
from mm.evaluation.record import Sheet, records_of, text_chunks
from mm.serving.embeddings import check_text
from mm.serving.engine import drawing
from mm.serving.errors import bad, over
from mm.serving.openai_shapes import Images, ImagesRequest
from mm.serving.route import MODEL_REFUSALS, ModelRoute
from mm.serving.service import Service

router = APIRouter(route_class=ModelRoute, tags=["OpenAI"])


@router.post("/v1/images/generations", response_model=Images, responses=MODEL_REFUSALS)
async def create_images(request: Request, asked: ImagesRequest) -> JSONResponse:
    """Pictures from words. The same request gives the same pictures, whatever else the server is doing."""
    service: Service = request.app.state.service
    service.check_model(asked.model)
    n = _check(service, asked)
    await service.apart(_check_words, service, asked)
    kind = drawing(asked.steps, asked.guidance, asked.solver, asked.negative_prompt)
    seeds = [asked.seed + place for place in range(n)]
    pictures = await service.run(kind, [(asked.prompt, seed) for seed in seeds])
    files = await service.apart(_files, service, pictures)
    data = [{"b64_json": file, "seed": seed} for file, seed in zip(files, seeds, strict=True)]
    side = service.engine.side
    answer = {"created": int(time.time()), "data": data, "size": f"{side}x{side}", "output_format": "png"}
    return JSONResponse(answer)


def _check(service: Service, asked: ImagesRequest) -> int:
    """How many pictures to draw. Raises ApiError 400."""
    limits, side, n = service.limits, service.engine.side, asked.n or 1
    if not service.engine.draws:
        raise bad(f"model = {service.name!r}: was trained without objectives.diffusion and cannot draw", "model")
    if asked.size not in (None, "auto", f"{side}x{side}"):
        raise bad(f"size = {asked.size[:40]!r}: this model draws {side}x{side}; give that, or auto", "size")
    if n > limits.max_n:
        raise over("n", "--max-n", n, limits.max_n, "pictures")
    if asked.steps > limits.max_steps:
        raise over("steps", "--max-steps", asked.steps, limits.max_steps, "steps")
    work = n * side * side * asked.steps
    if work > limits.max_work:
        words = f"n x width x height x steps = {n} x {side} x {side} x {asked.steps}"
        raise over(words, "--max-work", f"{work:g}", f"{limits.max_work:g}", "pixel steps")
    if asked.seed + n > 2**63:
        raise bad(f"seed = {asked.seed}: seed + n is over 63 bits; use a smaller one", "seed")
    return n


def _check_words(service: Service, asked: ImagesRequest) -> None:
    check_text(service, asked.prompt, "prompt", asked.truncate)
    if asked.negative_prompt is not None:
        check_text(service, asked.negative_prompt, "negative_prompt", asked.truncate)


def _files(service: Service, pictures: list[Image.Image]) -> list[str]:
    """PNG files in base64, each of which says how it was drawn: `mm generate RUN --again` draws it again."""
    sheets = [Sheet(service.name, service.hash, 1, records_of([picture])) for picture in pictures]
    files = [png(picture, text_chunks(sheet)) for picture, sheet in zip(pictures, sheets, strict=True)]
    return [base64.b64encode(file).decode() for file in files]
