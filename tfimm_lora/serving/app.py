"""``create_app``: the HTTP application of a ``Service``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Annotated, Any, BinaryIO

from fastapi import Depends, FastAPI, Path, Request
from fastapi.responses import JSONResponse, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from tfimm_lora.adapters.file_format import CONFIG, WEIGHTS
from tfimm_lora.finetuning.run import LABELS
from tfimm_lora.serving.adapter_folder import NAME, NAME_IN_WORDS
from tfimm_lora.serving.errors import RequestError, shown
from tfimm_lora.serving.metrics import MeasuredRequests, Metrics
from tfimm_lora.serving.pictures import FORMATS
from tfimm_lora.serving.predictor import READY, Predictor
from tfimm_lora.serving.schemas import (
    AdapterDetails,
    AdapterList,
    AdapterSummary,
    Changed,
    ErrorBody,
    Health,
    PredictAnswer,
    PredictRequest,
)
from tfimm_lora.serving.service import Service, check_name
from tfimm_lora.serving.settings import ServingSettings
from tfimm_lora.serving.tokens import TokenCheck
from tfimm_lora.serving.uploads import FORM, JSON, read_form, read_predict_request
from tfimm_lora.version import __version__

_log = logging.getLogger(__name__)

#: The fields of the form of an adapter -> the file that each becomes.
_ADAPTER_FILES = {"config": CONFIG, "weights": WEIGHTS, "labels": LABELS}
_REQUIRED = ("config", "weights")

_ERRORS = {
    400: "The form cannot be read.",
    401: "The token is missing or wrong.",
    403: "The server has no token, so nobody may change adapters.",
    404: "There is no adapter of this name.",
    408: "The body of the request did not arrive in time.",
    409: "The folder of the adapter contains more than an adapter, such as a run.",
    413: "The request is too large.",
    415: "The request has another media type.",
    422: "The name, the picture, the adapter or another value cannot be used.",
    500: "The model or the adapter failed.",
    503: "The server starts or stops, or has too many requests. Retry later.",
    504: "The prediction was not computed in time.",
}

_Name = Annotated[
    str,
    Path(
        description=f"{NAME_IN_WORDS}.",
        examples=["flowers"],
        json_schema_extra={"pattern": f"^{NAME}$"},
    ),
]


def create_app(service: Service, settings: ServingSettings) -> FastAPI:
    """Create the HTTP application of a service.

    Args:
        service: The model with its adapters, which are loaded already.
        settings: The limits and the token.

    Returns:
        An ASGI application. The model is compiled when it starts; predictions are answered
        from then on.
    """
    metrics = Metrics()
    predictor = Predictor(service, settings, metrics)
    metrics.gauge("adapters", "Adapters that are loaded.", lambda: service.count)
    metrics.gauge("in_progress", "Predictions in progress.", lambda: predictor.in_progress)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with predictor:
            yield

    app = FastAPIOffline(
        redoc_url=None,
        title="tfimm_lora",
        version=__version__,
        summary="One base model, many adapters.",
        description="Predict pictures with any adapter of a folder, and change the adapters.",
        lifespan=lifespan,
    )
    app.add_middleware(MeasuredRequests, metrics=metrics)
    app.add_exception_handler(RequestError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_failure)
    _add_predictions(app, predictor, settings)
    _add_adapters(app, service, settings)
    _add_operation(app, service, predictor, metrics)
    return app


def _add_predictions(app: FastAPI, predictor: Predictor, settings: ServingSettings) -> None:
    @app.post(
        "/predict",
        tags=["predictions"],
        responses=_errors(400, 404, 408, 413, 415, 422, 500, 503, 504),
        openapi_extra={"requestBody": _predict_body()},
    )
    async def predict(request: Request) -> PredictAnswer:
        """Predict the labels of a picture with an adapter, or with the base model.

        Send a form with the picture as a file, or JSON with the picture in base64.
        """
        with predictor.place():
            question = await read_predict_request(
                request, settings.upload_bytes, settings.timeout
            )
            return await predictor.predict(question)


def _add_adapters(app: FastAPI, service: Service, settings: ServingSettings) -> None:
    with_token = [Depends(TokenCheck(settings.token))]

    @app.get("/adapters", tags=["adapters"], responses=_errors(500))
    async def list_adapters() -> AdapterList:
        """List all adapters."""
        states = await asyncio.to_thread(service.refresh)
        return AdapterList(
            adapters=[
                AdapterSummary(
                    name=name,
                    classes=_count(state.labels),
                    usable=not state.problem,
                )
                for name, state in states.items()
            ],
            base=service.base.name,
            base_is_served=service.base.has_classifier,
        )

    @app.get("/adapters/{name}", tags=["adapters"], responses=_errors(404, 422, 500))
    async def get_adapter(name: _Name) -> AdapterDetails:
        """Show an adapter with its labels."""
        state = await asyncio.to_thread(service.require, name)
        labels = None if state.labels is None else list(state.labels)
        return AdapterDetails(name=name, classes=_count(labels), labels=labels)

    @app.put(
        "/adapters/{name}",
        tags=["adapters"],
        dependencies=with_token,
        responses={
            201: {"model": Changed, "description": "The adapter was added."},
            **_errors(400, 401, 403, 408, 409, 413, 415, 422, 500),
        },
        openapi_extra={"requestBody": _adapter_body()},
    )
    async def put_adapter(name: _Name, request: Request, response: Response) -> Changed:
        """Add an adapter, or replace it. It is checked before anything changes."""
        check_name(name)
        fields = tuple(_ADAPTER_FILES)
        most, seconds = settings.adapter_bytes, settings.adapter_timeout
        async with read_form(request, most, seconds, files=fields) as form:
            missing = [field for field in _REQUIRED if field not in form]
            if missing:
                raise RequestError(
                    422,
                    f"a form without {' and '.join(missing)}",
                    f"{CONFIG} as config, {WEIGHTS} as weights, and labels.txt as labels",
                )
            files = {field: file.file for field, file in form.items()}
            with _folder_errors():
                replaced = await asyncio.to_thread(_put, service, name, files)
        if not replaced:
            response.status_code = 201
        return Changed(name=name, done="replaced" if replaced else "added")

    @app.delete(
        "/adapters/{name}",
        tags=["adapters"],
        dependencies=with_token,
        responses=_errors(401, 403, 404, 409, 422, 500),
    )
    async def delete_adapter(name: _Name) -> Changed:
        """Remove an adapter and delete its folder."""
        with _folder_errors():
            await asyncio.to_thread(service.delete, name)
        return Changed(name=name, done="removed")


def _add_operation(
    app: FastAPI, service: Service, predictor: Predictor, metrics: Metrics
) -> None:
    @app.get(
        "/health",
        tags=["operation"],
        responses={503: {"model": Health, "description": "Not ready."}},
    )
    async def health(response: Response) -> Health:
        """Report whether predictions are answered."""
        if predictor.status != READY:
            response.status_code = 503
        return Health(
            status=predictor.status,
            adapters=service.count,
            in_progress=predictor.in_progress,
        )

    @app.get(
        "/metrics",
        tags=["operation"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}, "description": "All metrics."}},
    )
    async def get_metrics() -> Response:
        """Report metrics in the text format of Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _count(labels: Sequence[str] | None) -> int | None:
    return None if labels is None else len(labels)


def _put(service: Service, name: str, files: Mapping[str, BinaryIO]) -> bool:
    """Write uploaded files beside the adapters and let the service check and move them."""
    with service.folder.staging(name) as staged:
        for field, content in files.items():
            with open(staged / _ADAPTER_FILES[field], "wb") as file:
                shutil.copyfileobj(content, file)
        return service.put(name, staged)


# -- errors --------------------------------------------------------------------------------


@contextlib.contextmanager
def _folder_errors() -> Iterator[None]:
    """Answer that the folder cannot be written, without the paths of the server."""
    try:
        yield
    except OSError as error:
        _log.exception("the folder of adapters cannot be written")
        raise RequestError(
            500,
            f"a change of the folder of adapters that failed: {error.strerror}",
            "a folder that the server can write to, with enough space",
        ) from error


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Answer an unknown path or method."""
    assert isinstance(error, HTTPException)
    received = f"{request.method} {shown(request.url.path)}: {error.detail}"
    described = RequestError(
        error.status_code, received, "what GET /openapi.json describes", error.headers
    )
    return await _answer_error(request, described)


async def _answer_failure(request: Request, error: Exception) -> Response:
    """Answer what nobody foresaw. The server logs the traceback."""
    failure = RequestError(
        500, "a request that the server failed on", "none; its log has the reason"
    )
    return await _answer_error(request, failure)


# -- OpenAPI -------------------------------------------------------------------------------


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": _ERRORS[status]} for status in statuses}


def _predict_body() -> dict[str, Any]:
    """The body of ``POST /predict``, which has two media types."""
    described = PredictRequest.model_json_schema()
    fields = described["properties"]
    description = fields["adapter"]["description"]  # but a form has no null
    adapter = {"type": "string", "description": description, "examples": ["flowers"]}
    form = {
        "type": "object",
        "required": ["file"],
        "properties": {
            "file": _file(f"A picture: {', '.join(FORMATS)}."),
            "adapter": adapter,
            "top": fields["top"],
        },
    }
    return {"required": True, "content": {FORM: {"schema": form}, JSON: {"schema": described}}}


def _adapter_body() -> dict[str, Any]:
    described = {
        "config": f"The file {CONFIG}.",
        "weights": f"The file {WEIGHTS}.",
        "labels": "The names of the classes, one on a line, in UTF-8.",
    }
    form = {
        "type": "object",
        "required": list(_REQUIRED),
        "properties": {field: _file(text) for field, text in described.items()},
    }
    return {"required": True, "content": {FORM: {"schema": form}}}


def _file(description: str) -> dict[str, str]:
    return {"type": "string", "format": "binary", "description": description}
