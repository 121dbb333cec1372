"""What is asked and answered in OpenAI's shape: embeddings, images, models. Fields of our own are marked so."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from mm.diffusion.sampler import Solver
from mm.fields import suggestion
from mm.serving.errors import bad, short

PICTURE = {
    "type": "object",
    "description": "A picture: not in OpenAI's API. Data URLs only.",
    "properties": {
        "type": {"enum": ["image_url", "image"]},
        "image_url": {
            "type": "object",
            "properties": {"url": {"type": "string", "minLength": 1}},
            "required": ["url"],
            "additionalProperties": False,
        },
    },
    "required": ["type", "image_url"],
    "additionalProperties": False,
}
WORDS = {"type": "string", "minLength": 1}
IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
INPUT = {
    "description": "A text, its token ids, or a list of texts, of token ids, or of texts and pictures.",
    "anyOf": [
        WORDS,
        IDS,
        {"type": "array", "minItems": 1, "items": IDS},
        {"type": "array", "minItems": 1, "items": {"anyOf": [WORDS, PICTURE]}},
    ],
}


class Asked(BaseModel):
    """A request: no value is bent into another type, and no field that is not known is passed over."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name in value:
                if name not in cls.model_fields:
                    known = list(cls.model_fields)
                    hint = suggestion(name, known) or f"; it has {', '.join(known)}"
                    raise bad(f"{short(name)}: not a field of this request{hint}", name[:80], "unknown_field")
        return value


class Picture(str):
    """The URL of a picture among the inputs."""


Item = str | list[int] | Picture


def read_input(value: Any) -> list[Item]:
    """The items of `input`. Raises ApiError 400 naming the first that is none."""
    if isinstance(value, str):
        return [_item(value, "input")]
    if not isinstance(value, list):
        raise bad(
            f"input = {short(value)}: must be a text, token ids, or a list of texts, token ids or pictures", "input"
        )
    if not value:
        raise bad("input = []: is empty; give at least one text", "input")
    if type(value[0]) is int:
        return [_item(value, "input")]
    return [_item(item, f"input[{place}]") for place, item in enumerate(value)]


def _item(value: Any, param: str) -> Item:
    if isinstance(value, str):
        if not value:
            raise bad(f"{param} = '': is empty; give a text", param)
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise bad(f"{param}: holds half of a surrogate pair, which is no text; send UTF-8", param)
        return value
    if isinstance(value, list):
        if not value:
            raise bad(f"{param} = []: is empty; give at least one token id", param)
        wrong = next((id for id in value if type(id) is not int or id < 0), None)
        if wrong is not None or None in value:
            raise bad(f"{param} holds {short(wrong)}: token ids must be integers from 0", param)
        return value
    if isinstance(value, dict):
        kind, inner = value.get("type"), value.get("image_url")
        well_formed = kind in ("image_url", "image") and set(value) == {"type", "image_url"}
        url = inner["url"] if isinstance(inner, dict) and set(inner) == {"url"} else None
        if not well_formed or not isinstance(url, str) or not url:
            form = '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
            raise bad(f"{param}: not a picture; write {form}", param)
        return Picture(url)
    raise bad(f"{param} = {short(value)}: must be a text, token ids or a picture", param)


class EmbeddingsRequest(Asked):
    input: Annotated[Any, BeforeValidator(read_input), WithJsonSchema(INPUT)]
    model: str | None = Field(None, description="The name that /v1/models lists, or nothing.")
    encoding_format: Literal["float", "base64"] | None = Field(
        "float", description="base64: of the little-endian float32 values."
    )
    dimensions: int | None = Field(None, ge=1, description="The model's own only.")
    user: str | None = Field(None, description="Not used.")
    truncate: bool = Field(False, description="Not in OpenAI's API: cut texts that are too long instead of refusing.")


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Of length 1. A string in base64 where that was asked for.")


class Usage(BaseModel):
    prompt_tokens: int = Field(description="Of all texts, the tokens at their ends included; pictures count 0.")
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


def _no_links(value: Any) -> Any:
    if value == "url":
        raise bad("response_format = 'url': pictures are not kept to be linked to; use b64_json", "response_format")
    return value


class ImagesRequest(Asked):
    prompt: str = Field(min_length=1)
    n: int | None = Field(1, ge=1, description="How many pictures.")
    size: str | None = Field("auto", description='"auto", or the model\'s own, such as "32x32".')
    response_format: Annotated[Literal["b64_json"] | None, BeforeValidator(_no_links)] = "b64_json"
    output_format: Literal["png"] | None = "png"
    model: str | None = Field(None, description="The name that /v1/models lists, or nothing.")
    user: str | None = Field(None, description="Not used.")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Not in OpenAI's API. Picture i is drawn from seed + i.")
    steps: int = Field(25, ge=1, description="Not in OpenAI's API. Of the sampler.")
    guidance: float = Field(2.0, ge=0, le=100, description="Not in OpenAI's API. 1 is none.")
    negative_prompt: str | None = Field(None, min_length=1, description="Not in OpenAI's API. What to move away from.")
    solver: Solver = Field("euler", description="Not in OpenAI's API.")
    truncate: bool = Field(False, description="Not in OpenAI's API: cut prompts that are too long instead of refusing.")


class ImageData(BaseModel):
    b64_json: str = Field(description="A PNG file in base64.")
    seed: int = Field(description="Not in OpenAI's API. Draws this picture again, alone.")


class Images(BaseModel):
    created: int = Field(description="Seconds since 1970.")
    data: list[ImageData]
    size: str
    output_format: Literal["png"]


class Abilities(BaseModel):
    """Not in OpenAI's API: what the model can, and the limits of this server."""

    hash: str = Field(description="SHA-256 of its weights, tokenizer and config.")
    encodes: list[str]
    draws: bool
    classifies: bool
    embed_dim: int
    size: str = Field(description="Of the pictures that it sees and draws.")
    context_length: int = Field(description="Tokens of a text, those at its ends included.")
    limits: dict[str, float]


class ModelInfo(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    mm: Abilities


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelInfo]
