"""The bodies of requests and answers, as OpenAPI describes them."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

#: The number of labels in an answer unless the request has another.
_TOP = 5
_MOST_TOP = 1000


def _decoded(text: object) -> object:
    """The bytes of base64; anything else unchanged, for the validation to refuse."""
    if not isinstance(text, str):
        return text
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"it is not base64: {error}") from error


class PredictRequest(BaseModel):
    """A picture to predict, as JSON."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"file": "/9j/4AAQSkZJRg...", "adapter": "flowers"}]},
    )

    file: Annotated[
        bytes,
        BeforeValidator(_decoded, json_schema_input_type=str),
        Field(description="The content of a picture file, in base64.", min_length=1),
    ]
    adapter: Annotated[
        str | None,
        Field(description="The name of an adapter. Leave it out for the base model."),
    ] = None
    top: Annotated[
        int, Field(description="The number of labels in the answer.", ge=1, le=_MOST_TOP)
    ] = _TOP


class Ranked(BaseModel):
    """A class with its probability."""

    label: str | None = Field(description="Its name; null if the adapter has no labels.")
    index: int = Field(description="Its index among the outputs of the model, from 0.")
    probability: float


class PredictAnswer(BaseModel):
    """The prediction for a picture."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "adapter": "flowers",
                    "label": "rose",
                    "classes": 5,
                    "top": [
                        {"label": "rose", "index": 2, "probability": 0.93},
                        {"label": "tulip", "index": 4, "probability": 0.05},
                    ],
                }
            ]
        }
    )

    adapter: str | None = Field(description="The adapter; null for the base model.")
    label: str | None = Field(description="The most probable label; null without labels.")
    classes: int = Field(description="The number of classes.")
    top: list[Ranked] = Field(description="The most probable classes, in order.")


class AdapterSummary(BaseModel):
    """An adapter in a list."""

    name: str
    classes: int | None = Field(description="The number of its labels; null without labels.")
    usable: bool = Field(description="False if it cannot be loaded; the log has the reason.")


class AdapterList(BaseModel):
    """All adapters of the folder."""

    adapters: list[AdapterSummary]
    base: str = Field(description="The name of the base model.")
    base_is_served: bool = Field(
        description="Whether requests without an adapter are answered: the base model has a "
        "trained classifier."
    )


class AdapterDetails(BaseModel):
    """One adapter with its labels."""

    name: str
    classes: int | None
    labels: list[str] | None


class Changed(BaseModel):
    """An adapter that was added, replaced or removed."""

    name: str
    done: str = Field(description='"added", "replaced" or "removed".')


class Health(BaseModel):
    """Whether predictions are answered."""

    status: str = Field(description='"ready", "starting" or "failed".')
    adapters: int = Field(description="The number of adapters that are loaded.")
    in_progress: int = Field(description="The number of predictions in progress.")


class ErrorBody(BaseModel):
    """The body of every answer with an error."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "message": "Received the adapter rose, which does not exist; expected one "
                    "of those that GET /adapters lists.",
                    "received": "the adapter rose, which does not exist",
                    "expected": "one of those that GET /adapters lists",
                }
            ]
        }
    )

    message: str
    received: str
    expected: str
