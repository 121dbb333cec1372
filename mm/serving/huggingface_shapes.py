"""What is asked and answered in the shape of Hugging Face's zero-shot image classification."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, RootModel, model_validator
from pydantic.json_schema import SkipJsonSchema

from mm.serving.errors import ErrorBody
from mm.serving.openai_shapes import Asked


class Parameters(Asked):
    candidate_labels: list[str] = Field(min_length=1)
    hypothesis_template: str | list[str] | None = Field(
        None, description='Such as "a photo of {}"; "{}" by default. Several are averaged: not in Hugging Face\'s API.'
    )


class ClassifyRequest(Asked):
    inputs: str | list[str] | SkipJsonSchema[bytes] = Field(
        description="A picture as base64 or as a data URL, or a list of them.", min_length=1
    )
    parameters: Parameters | SkipJsonSchema[None] = None
    model: str | None = Field(None, description="The name that /v1/models lists, or nothing.")

    @model_validator(mode="before")
    @classmethod
    def _raw(cls, value: Any) -> Any:
        """A body that is not JSON is the picture itself; its labels are in the query."""
        return {"inputs": value} if isinstance(value, bytes) else value


class LabelScore(BaseModel):
    label: str
    score: float = Field(description="Probability: over all labels, or of each by itself where it was trained so.")


class Classified(RootModel[list[LabelScore] | list[list[LabelScore] | ErrorBody]]):
    """The labels of one picture, best first; of several pictures a list of those, with an error where one is wrong."""
