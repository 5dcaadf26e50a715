"""Bodies of requests, which are untrusted: limited in size, time, and number of parts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message, Receive

from tfimm_lora.serving.errors import RequestError, shown
from tfimm_lora.serving.schemas import PredictRequest

#: The media types of requests.
FORM, JSON = "multipart/form-data", "application/json"

#: The most bytes of a field that is not a file. The longest name has 100.
_FIELD_BYTES = 1000

#: What base64 and the other fields add to the content of a file.
_BASE64, _OTHER_BYTES = 4 / 3, 4000

#: The digits of the largest Content-Length that is read as a number.
_DIGITS = 18

Result = TypeVar("Result")


async def read_predict_request(
    request: Request, most_bytes: int, seconds: float
) -> PredictRequest:
    """Read the body of ``POST /predict``, a form or JSON.

    Args:
        request: The request.
        most_bytes: The most bytes of the picture.
        seconds: The most seconds until the body has arrived.

    Raises:
        RequestError: if the body is too large or too slow, or is something else.
    """
    kind = _media_type(request)
    if kind == JSON:
        limited = _limited(request, int(most_bytes * _BASE64) + _OTHER_BYTES)
        body = await _in_time(limited.body(), seconds)
        return _validated(lambda: PredictRequest.model_validate_json(body))
    if kind == FORM:
        async with read_form(
            request, most_bytes, seconds, files=("file",), fields=("adapter", "top")
        ) as form:
            values = {name: await _content(value) for name, value in form.items()}
        return _validated(lambda: PredictRequest.model_validate(values))
    raise RequestError(415, f"Content-Type {shown(kind)}", f"{FORM}, or {JSON}")


@contextlib.asynccontextmanager
async def read_form(
    request: Request,
    most_bytes: int,
    seconds: float,
    *,
    files: tuple[str, ...],
    fields: tuple[str, ...] = (),
) -> AsyncIterator[Mapping[str, Any]]:
    """Read a form, whose files are deleted after the block.

    Args:
        request: The request.
        most_bytes: The most bytes of the files together.
        seconds: The most seconds until the form has arrived.
        files: The names of the files. One that is an empty text is left out: browsers send it
            for a file that is not chosen.
        fields: The names of the other fields.

    Raises:
        RequestError: if the body is too large or too slow, or is something else.
    """
    kind = _media_type(request)
    if kind != FORM:
        raise RequestError(415, f"Content-Type {shown(kind)}", FORM)
    limited = _limited(request, most_bytes + _OTHER_BYTES)
    try:
        most_fields = len(files) + len(fields)
        reading = limited.form(
            max_files=len(files), max_fields=most_fields, max_part_size=_FIELD_BYTES
        )
        form = await _in_time(reading, seconds)
    except HTTPException as error:
        raise RequestError(
            400,
            f"a form that cannot be read: {error.detail}",
            _expected(files, fields),
        ) from error
    try:
        _check_fields(form, files, fields)
        yield {name: value for name, value in form.items() if value != "" or name in fields}
    finally:
        await form.close()


def _check_fields(form: FormData, files: tuple[str, ...], fields: tuple[str, ...]) -> None:
    names = [name for name, _ in form.multi_items()]
    for name, value in form.items():
        is_file = isinstance(value, UploadFile)
        if names.count(name) > 1:
            problem = f"{shown(name)} more than once"
        elif name not in (*files, *fields):
            problem = f"the field {shown(name)}"
        elif is_file and name in fields:
            problem = f"{shown(name)} as a file"
        elif not is_file and name in files and value != "":
            problem = f"{shown(name)} as text"
        else:
            continue
        raise RequestError(422, problem, _expected(files, fields))


def _expected(files: tuple[str, ...], fields: tuple[str, ...]) -> str:
    texts = f", and {' and '.join(fields)} as text" if fields else ""
    return f"{' and '.join(files)} as files{texts}, each once"


async def _content(value: str | UploadFile) -> str | bytes:
    return await value.read() if isinstance(value, UploadFile) else value


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _limited(request: Request, most_bytes: int) -> Request:
    """The request with an error as soon as its body is larger than allowed."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > _DIGITS or int(declared) > most_bytes):
        raise _too_large(f"a request of {declared[:_DIGITS]} bytes", most_bytes)
    return Request(request.scope, _counted(request.receive, most_bytes))


def _counted(receive: Receive, most_bytes: int) -> Receive:
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > most_bytes:  # also without Content-Length, and with a wrong one
            raise _too_large(f"a request of more than {size} bytes", most_bytes)
        return message

    return counted


def _too_large(received: str, most_bytes: int) -> RequestError:
    # The rest of the body is not read, so the connection cannot be used again.
    return RequestError(
        413, received, f"at most {most_bytes} bytes", headers={"Connection": "close"}
    )


async def _in_time(reading: Awaitable[Result], seconds: float) -> Result:
    """The result of reading a body, or the answer 408 if it takes longer."""
    try:
        return await asyncio.wait_for(reading, seconds)
    except asyncio.TimeoutError:
        raise RequestError(
            408,
            f"a request whose body did not arrive within {seconds:g} s",
            "a faster one",
            headers={"Connection": "close"},
        ) from None


def _validated(values: Callable[[], PredictRequest]) -> PredictRequest:
    try:
        return values()
    except ValidationError as error:
        received, expected = [], []
        for problem in error.errors():
            name = shown(problem["loc"][0]) if problem["loc"] else "a body"
            value = "missing" if problem["type"] == "missing" else shown(problem["input"])
            received.append(f"{name}: {value}")
            expected.append(f"{name}: {problem['msg']}")
        raise RequestError(422, "; ".join(received), "; ".join(expected)) from error
