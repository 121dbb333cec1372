"""What schemathesis makes up from the OpenAPI document, well-formed and not: no 5xx, and answers are as described."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served import NAME, tiny_model

from mm.serving.app import create_app
from mm.serving.limits import Limits
from mm.serving.service import Service

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    draw = tiny_model().generate

    def quick(prompts: Any, *, seeds: Any, steps: int, guidance: float, solver: Any, negative: Any = None) -> Any:
        return draw(prompts, seeds=seeds, steps=1, guidance=guidance, solver=solver)

    with pytest.MonkeyPatch.context() as patch:  # how well it is drawn is not the point here
        patch.setattr(tiny_model(), "generate", quick)
        found = Service(tiny_model(), Limits(max_wait_ms=0), name=NAME)
        yield found
        found.close()
        assert found.batcher.join(10)


def run(operation: Any, mode: GenerationMode, checks: list[Any], examples: int, found: Counter[str]) -> None:
    """Always the same cases for one version of the document and of schemathesis."""

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        answer = case.call(timeout=60)
        found[f"{operation.path} {answer.status_code}"] += 1
        case.validate_response(answer, checks=checks)

    check()


def explore(service: Service, examples: int) -> Counter[str]:
    """Runs so many cases of either mode for each operation that runs the model, and a few for the others."""
    schema: Any = schemathesis.openapi.from_asgi("/openapi.json", create_app(service))
    found: Counter[str] = Counter()
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 6
    for operation in operations:
        for mode in MODES if operation.method == "post" else MODES[:1]:
            checks = CHECKS if mode is GenerationMode.POSITIVE else [*CHECKS, negative_data_rejection]

            run(operation, mode, checks, examples if operation.method == "post" else 5, found)
    assert service.taken == 0 and service.batcher.alive
    return found


def test_a_hundred_made_up_requests_are_answered_as_described(service: Service) -> None:
    found = explore(service, 17)
    print(found)
    assert found.total() >= 100


@pytest.mark.slow
def test_a_thousand_made_up_requests_are_answered_as_described(service: Service) -> None:
    found = explore(service, 250)
    print(found)
    assert found.total() >= 1000
    for path in ("/v1/embeddings", "/v1/images/generations"):
        assert found[f"{path} 200"] >= 10, "nothing that was made up is right"
