"""POST /v1/classify"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from mm.evaluation.zero_shot import Classifier
from mm.serving import images_in
from mm.serving.embeddings import check_text
from mm.serving.engine import IMAGE, Row, labelling
from mm.serving.errors import ApiError, bad, over
from mm.serving.huggingface_shapes import Classified, ClassifyRequest
from mm.serving.route import MODEL_REFUSALS, ModelRoute
from mm.serving.service import Service

router = APIRouter(route_class=ModelRoute, tags=["Hugging Face"])
PICTURE = {"schema": {"type": "string", "format": "binary"}}
MEDIA = ("image/png", "image/jpeg", "image/webp", "application/octet-stream")
EXTRA = {"requestBody": {"content": dict.fromkeys(MEDIA, PICTURE)}}


@router.post("/v1/classify", response_model=Classified, responses=MODEL_REFUSALS, openapi_extra=EXTRA)
async def classify(
    request: Request,
    asked: ClassifyRequest,
    candidate_labels: Annotated[
        list[str] | None, Query(description="Where the body is a picture: repeated, or with commas between them.")
    ] = None,
    hypothesis_template: Annotated[list[str] | None, Query(description="Where the body is a picture.")] = None,
) -> JSONResponse:
    """The labels of a picture with their probabilities, best first; of several, each or what is wrong with it."""
    service: Service = request.app.state.service
    service.check_model(asked.model)
    if not service.engine.classifies:
        raise bad(f"model = {service.name!r}: was trained without objectives.contrastive and cannot classify", "model")
    if isinstance(asked.inputs, bytes):
        given = [label.strip() for part in candidate_labels or () for label in part.split(",")]
        labels, templates = given, hypothesis_template or ["{}"]
    elif candidate_labels is not None or hypothesis_template is not None:
        raise bad("candidate_labels: in the query, but the body is JSON; put them into parameters", "candidate_labels")
    else:
        labels, templates = _parameters(asked)
    classifier = await _classifier(service, labels, templates)
    alone = not isinstance(asked.inputs, list)
    inputs: Sequence[str | bytes] = asked.inputs if isinstance(asked.inputs, list) else [asked.inputs]
    if len(inputs) > service.limits.max_images:
        raise over("inputs", "--max-images", len(inputs), service.limits.max_images, "pictures")
    rows = [await service.apart(_ready, service, item, place, alone) for place, item in enumerate(inputs)]
    right = [row for row in rows if not isinstance(row, ApiError)]
    vectors = await service.run(IMAGE, right)
    scores = iter(await service.apart(_sorted, classifier, torch.stack(vectors)) if vectors else ())
    answers = [row.body() if isinstance(row, ApiError) else next(scores) for row in rows]
    return JSONResponse(answers[0] if alone else answers)


def _parameters(asked: ClassifyRequest) -> tuple[list[str], list[str]]:
    if asked.parameters is None:
        raise bad("parameters.candidate_labels: is required", "parameters.candidate_labels", "missing")
    template = asked.parameters.hypothesis_template
    templates = ["{}"] if template is None else [template] if isinstance(template, str) else template
    return asked.parameters.candidate_labels, templates


async def _classifier(service: Service, labels: list[str], templates: list[str]) -> Classifier:
    """Made now, or kept from before. Raises ApiError 400, for most faults in the model's own words."""
    kind = labelling(labels, templates)
    found = service.engine.classifier(kind)
    if found is None:
        await service.apart(_check_texts, service, labels, templates)
        found = (await service.run(kind, [None]))[0]
    return found


def _check_texts(service: Service, labels: list[str], templates: list[str]) -> None:
    limits = service.limits
    if len(labels) * len(templates) > limits.max_labels:
        count = f"{len(labels)} labels x {len(templates)}"
        raise over("candidate_labels", "--max-labels", count, limits.max_labels, "templates")
    for name, texts in (("candidate_labels", labels), ("hypothesis_template", templates)):
        for place, text in enumerate(texts):
            if len(text) > limits.max_chars:
                raise over(f"{name}[{place}]", "--max-chars", len(text), limits.max_chars, "characters")
    for place, label in enumerate(labels):
        for template in templates:
            check_text(service, template.replace("{}", label), f"candidate_labels[{place}]", truncate=False)


def _ready(service: Service, item: str | bytes, place: int, alone: bool) -> Row | ApiError:
    """The picture for the encoder. What is wrong with one of several is returned, and what is wrong with one raised."""
    param = "inputs" if alone else f"inputs[{place}]"
    try:
        read: Any = images_in.from_bytes if isinstance(item, bytes) else images_in.from_text
        return service.engine.picture(read(item, param, service.limits))
    except ApiError as error:
        if alone:
            raise
        return error


def _sorted(classifier: Classifier, vectors: torch.Tensor) -> list[list[dict[str, Any]]]:
    """For each picture its labels, best first; equal ones in the order that they were given in."""
    answers = []
    for row in classifier.probabilities(vectors).tolist():
        pairs = sorted(zip(classifier.labels, row, strict=True), key=lambda pair: -pair[1])
        answers.append([{"label": label, "score": score} for label, score in pairs])
    return answers
