"""Health, metrics, the OpenAPI document and its page."""

import re
import socket
import time

import pytest

pytest.importorskip("fastapi", reason='needs the extra "serve"')

from starlette.testclient import TestClient

from tests.helpers.served import make_service, picture, ready
from tests.serving.test_predict import ask, check_error
from tfimm_lora.serving.app import create_app
from tfimm_lora.serving.server import listen

pytestmark = pytest.mark.once


def test_predictions_are_answered_after_the_model_is_compiled(adapters, bank):
    bank.gate.clear()
    with TestClient(create_app(*make_service(adapters, bank))) as client:
        answer = client.get("/health")
        assert answer.status_code == 503
        assert answer.json() == {"status": "starting", "adapters": 3, "in_progress": 0}
        check_error(ask(client, picture()[0], adapter="rose"), 503, "starting")
        bank.gate.set()
        ready(client)
        assert client.get("/health").json()["status"] == "ready"
        assert ask(client, picture()[0], adapter="rose").status_code == 200


def test_a_model_that_does_not_run_is_reported(adapters, bank, caplog):
    def broken(inputs):
        raise RuntimeError("out of memory")

    bank.warm_up = broken
    with TestClient(create_app(*make_service(adapters, bank))) as client:
        for _ in range(1000):
            if client.get("/health").json()["status"] == "failed":
                break
            time.sleep(0.01)
        assert client.get("/health").status_code == 503
        check_error(ask(client, picture()[0]), 503, "failed")
    assert "out of memory" in caplog.text


def test_metrics_count_requests_by_path_and_status(client):
    content = picture()[0]
    for name in ("rose", "oak", "no-such-adapter-1", "no-such-adapter-2"):
        ask(client, content, adapter=name)
        client.get(f"/adapters/{name}")
        client.get(f"/{name}")
    text = client.get("/metrics").text
    for path, method, status, count in [
        ("/predict", "POST", 200, 2),
        ("/predict", "POST", 404, 2),
        ("/adapters/{name}", "GET", 404, 2),
        ("other", "other", 404, 4),
    ]:
        labels = f'{{method="{method}",path="{path}",status="{status}"}}'
        assert f"tfimm_lora_requests_total{labels} {count}.0" in text, text
    assert "no-such-adapter" not in text
    assert "tfimm_lora_adapters 3.0" in text and "tfimm_lora_in_progress 0.0" in text


def test_openapi_document_is_valid_and_complete(client):
    document = client.get("/openapi.json").json()
    validate = pytest.importorskip("openapi_spec_validator").validate
    validate(document)
    paths = {(p, m) for p, methods in document["paths"].items() for m in methods}
    assert paths == {
        ("/predict", "post"),
        ("/adapters", "get"),
        ("/adapters/{name}", "get"),
        ("/adapters/{name}", "put"),
        ("/adapters/{name}", "delete"),
        ("/health", "get"),
        ("/metrics", "get"),
    }
    assert set(document["paths"]["/predict"]["post"]["requestBody"]["content"]) == {
        "multipart/form-data",
        "application/json",
    }
    for method in ("put", "delete"):
        assert document["paths"]["/adapters/{name}"][method]["security"]
    assert document["components"]["schemas"]["PredictAnswer"]["examples"]


def test_page_of_the_documentation_loads_nothing_from_elsewhere(client):
    page = client.get("/docs").text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(sources) == 3 and all(x.startswith("/static") for x in sources)
    for source in sources:
        assert client.get(source).status_code == 200
    assert "http" not in page


def test_port_that_is_used():
    with listen("127.0.0.1", 0) as opened:
        port = opened.getsockname()[1]
        with pytest.raises(OSError, match=f"Received --host 127.0.0.1 --port {port}"):
            listen("127.0.0.1", port)
    with pytest.raises(OSError, match="an address of this machine"):
        listen("no.such.host.invalid", 0)
    assert isinstance(listen("127.0.0.1", 0), socket.socket)
