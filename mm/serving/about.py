"""GET /v1/models, /v1/models/{id} and /healthz"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from mm.serving.openai_shapes import ModelInfo, ModelList
from mm.serving.route import KeyRoute, refusals
from mm.serving.service import Service

models = APIRouter(route_class=KeyRoute, tags=["OpenAI"])
health = APIRouter(tags=["health"])  # no key: probes have none


class Queue(BaseModel):
    requests: int  # taken and not answered
    limit: int
    waiting: int  # items of them that have not begun
    running: int  # items that run


class Health(BaseModel):
    status: Literal["ok", "stopping", "failed"]
    model: str
    hash: str
    queue: Queue


@models.get("/v1/models", response_model=ModelList, responses=refusals(500))
async def list_models(request: Request) -> JSONResponse:
    """The one model that is served."""
    return JSONResponse({"object": "list", "data": [_info(request.app.state.service)]})


@models.get("/v1/models/{model:path}", response_model=ModelInfo, responses=refusals(404, 500))
async def retrieve_model(
    request: Request, model: Annotated[str, Path(description="The name that /v1/models lists.")]
) -> JSONResponse:
    """What the model can, and the limits of this server."""
    service: Service = request.app.state.service
    service.check_model(model)
    return JSONResponse(_info(service))


@health.get("/healthz", response_model=Health, responses={503: {"model": Health, "description": "Not to be used"}})
async def healthz(request: Request) -> JSONResponse:
    """Whether the server is alive, and how busy."""
    service: Service = request.app.state.service
    batcher = service.batcher
    status = "stopping" if service.closing else "ok" if batcher.alive else "failed"
    queue = {
        "requests": service.taken,
        "limit": service.limits.max_queue,
        "waiting": batcher.waiting,
        "running": batcher.running,
    }
    answer = {"status": status, "model": service.name, "hash": service.hash, "queue": queue}
    return JSONResponse(answer, 200 if status == "ok" else 503)


def _info(service: Service) -> dict[str, Any]:
    engine = service.engine
    abilities = {
        "hash": service.hash,
        "encodes": list(engine.encodes),
        "draws": engine.draws,
        "classifies": engine.classifies,
        "embed_dim": engine.embed_dim,
        "size": f"{engine.side}x{engine.side}",
        "context_length": engine.context_length,
        "limits": dataclasses.asdict(service.limits),
    }
    return {"id": service.name, "object": "model", "created": service.started, "owned_by": "mm", "mm": abilities}
