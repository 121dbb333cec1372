"""The application: every endpoint, and the document that describes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi

import mm
from mm.serving import about, classify, drawings, embeddings, errors
from mm.serving.access import AllowedHosts
from mm.serving.route import refusals
from mm.serving.service import Service

DESCRIPTION = (
    "Embeddings and images in the shape of OpenAI's API, zero-shot classification in that of Hugging Face's. "
    "Pictures are sent as base64 or as bytes; URLs are never fetched. docs/serving.md has examples."
)


def create_app(service: Service, *, cors: Sequence[str] = (), hosts: Sequence[str] = ()) -> FastAPI:
    """`cors`: origins whose pages may call; `hosts`: the only Hosts to be called by, any where there are none."""
    app = FastAPI(title="mm", version=mm.__version__, description=DESCRIPTION, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    errors.install(app)
    for router in (embeddings.router, drawings.router, classify.router, about.models, about.health):
        app.include_router(router)
    if cors:
        headers = ["Authorization", "Content-Type"]
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors), allow_methods=["GET", "POST"], allow_headers=headers
        )
    if hosts:
        app.add_middleware(AllowedHosts, hosts=hosts)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's, without the 422 that is never answered here, and with the key where one is asked for."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for name in ("HTTPValidationError", "ValidationError"):
            found["components"]["schemas"].pop(name, None)
        for path, operations in found["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if app.state.service.api_key is not None and path != "/healthz":
                    operation["security"] = [{"key": []}]
                    operation["responses"]["401"] = _refusal(401)
        if app.state.service.api_key is not None:
            found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = found
    return app.openapi_schema


def _refusal(status: int) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/ErrorBody"}
    description = refusals(status)[status]["description"]
    return {"description": description, "content": {"application/json": {"schema": schema}}}
