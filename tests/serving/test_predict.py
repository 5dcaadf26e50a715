"""``POST /predict``: answers, and every kind of request that is refused."""

import asyncio
import base64
import io
import shutil
import struct
import zlib

import numpy as np
import pytest

pytest.importorskip("fastapi", reason='needs the extra "serve"')

from PIL import Image
from starlette.requests import Request

from tests.helpers.served import expected, picture
from tfimm_lora.serving.errors import RequestError
from tfimm_lora.serving.uploads import read_predict_request

pytestmark = pytest.mark.once


def ask(client, content, **fields):
    return client.post("/predict", files={"file": ("x", content)}, data=fields)


def check_error(answer, status, *words):
    """An error has its status and a body that says what was received and expected."""
    body = answer.json()
    assert answer.status_code == status, body
    assert set(body) == {"message", "received", "expected"}
    assert body["message"] == f"Received {body['received']}; expected {body['expected']}."
    for word in words:
        assert word in body["message"], body["message"]


def check_alive(client):
    assert ask(client, picture()[0], adapter="rose").status_code == 200


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "WEBP"])
def test_form_is_answered_with_the_labels_and_probabilities_of_the_adapter(shared, format):
    content, colour = picture(5, format)
    answer = ask(shared, content, adapter="rose", top="2")
    assert answer.status_code == 200, answer.json()
    p = expected(colour, seed=1)
    best = np.argsort(-p)[:2]
    body = answer.json()
    assert (body["adapter"], body["label"], body["classes"]) == ("rose", f"rose-{best[0]}", 4)
    assert [(x["index"], x["label"]) for x in body["top"]] == [(i, f"rose-{i}") for i in best]
    # The mean of 16 numbers in float32.
    np.testing.assert_allclose([x["probability"] for x in body["top"]], p[best], rtol=1e-5)


def test_json_is_answered_like_a_form(shared):
    content = picture(6)[0]
    body = {"file": base64.b64encode(content).decode(), "adapter": "oak", "top": 3}
    answer = shared.post("/predict", json=body)
    assert answer.status_code == 200
    assert answer.json() == ask(shared, content, adapter="oak", top="3").json()
    assert len(answer.json()["top"]) == 3


def test_no_adapter_is_the_base_model(shared):
    content, colour = picture(7)
    body = ask(shared, content).json()
    assert body["adapter"] is None and body["label"] is None and body["classes"] == 3
    assert body["top"][0]["index"] == int(np.argmax(colour))


def test_base_model_with_a_random_classifier_needs_an_adapter(serve, adapters):
    shutil.rmtree(adapters)
    adapters.mkdir()
    client = serve(has_classifier=False)
    check_error(ask(client, picture()[0]), 422, "not trained", "GET /adapters")


def test_adapter_without_labels_has_indices(shared):
    body = ask(shared, picture()[0], adapter="bare").json()
    assert body["label"] is None and len(body["top"]) == 4
    assert sorted(x["index"] for x in body["top"]) == [0, 1, 2, 3]


def test_orientation_of_a_photograph_is_applied_as_in_training(serve, bank):
    """The left half is red. A camera held upright stores it rotated, with the orientation."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4, 0] = 255
    content = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels)).save(content, "PNG", exif=exif)
    seen = []
    bank.predict, predict = lambda x, n: (seen.append(x), predict(x, n))[1], bank.predict
    assert ask(serve(), content.getvalue()).status_code == 200
    ((inputs,),) = seen
    assert inputs[:, 0, 0].min() > 0.9 and inputs[:, -1, 0].max() < 0.1


# -- pictures that are refused ---------------------------------------------------------------


def bomb():
    """A PNG of a few bytes whose header says 60000 x 60000 pixels."""
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        content += struct.pack(">I", len(data)) + kind + data + crc
    return content


def many_scans():
    """A progressive JPEG whose last scan is repeated: each takes the time of all pixels."""
    content = picture(0, "JPEG", (64, 64))[0]
    output = io.BytesIO()
    Image.open(io.BytesIO(content)).save(output, "JPEG", progressive=True)
    content = output.getvalue()
    scan = content[content.rfind(b"\xff\xda") : -2]
    return content[:-2] + 200 * scan + content[-2:]


def saved(format, size=(4, 4), mode="RGB"):
    output = io.BytesIO()
    Image.new(mode, size).save(output, format)
    return output.getvalue()


PICTURES = {
    "empty": (b"", "at least 1"),
    "text": (b"GET / HTTP/1.1", "none of JPEG"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "none of JPEG"),
    "pickle": (b"\x80\x04\x95\x00\x00.", "none of JPEG"),
    "truncated": (picture(0, "JPEG", (200, 200))[0][:-50], "truncated"),
    "only a header": (b"\xff\xd8\xff\xe0", "none of JPEG"),
    "tiff": (saved("TIFF"), "none of JPEG"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of JPEG"),
    "bomb in the header": (bomb(), "3600000000 pixels"),
    "too many pixels": (saved("PNG", (2000, 1000), "1"), "1000000"),
    "many scans": (many_scans(), "scans"),
    "strip": (saved("PNG", (500_000, 1), "1"), "after its shorter side"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_picture_is_refused(shared, kind):
    content, words = PICTURES[kind]
    check_error(ask(shared, content, adapter="rose"), 422, words)
    check_alive(shared)


# -- requests that are refused ---------------------------------------------------------------


NAMES = {
    "parent": "..",
    "path": "../rose",
    "absolute": "/etc/passwd",
    "backslash": "..\\rose",
    "inside": "rose/adapter_config.json",
    "empty": "",
    "hidden": ".lock",
    "end": "rose.",
    "zero": "rose\0",
    "line": "rose\n",
    "space": " rose",
    "fullwidth": "\uff52ose",
    "right-to-left": "rose\u202e",
    "combining": "rose\u0301",
    "long": "r" * 101,
}


@pytest.mark.parametrize("kind", NAMES)
def test_name_is_refused(shared, kind):
    body = {"file": base64.b64encode(picture()[0]).decode(), "adapter": NAMES[kind]}
    check_error(shared.post("/predict", json=body), 422, "A-Z")


def test_unknown_adapter(shared):
    check_error(ask(shared, picture()[0], adapter="tulip"), 404, "tulip", "GET /adapters")
    check_error(ask(shared, picture()[0], adapter="ROSE"), 404, "ROSE")


PNG = picture()[0]
REQUESTS = {
    "no body": ({}, 415, "multipart/form-data"),
    "text": ({"content": PNG, "headers": {"Content-Type": "image/png"}}, 415, "image/png"),
    "no file": ({"data": {"adapter": "rose"}, "files": {"other": PNG}}, 422, "'other'"),
    "two files": ({"files": [("file", PNG), ("file", PNG)]}, 400, "file"),
    "file as text": ({"files": {"file": (None, "x"), "adapter": (None, "y")}}, 422, "text"),
    "adapter as a file": ({"files": {"adapter": ("x", "rose")}}, 422, "'adapter'"),
    "unknown field": (
        {"files": {"file": PNG}, "data": {"model": "x"}},
        422,
        "the field 'model'",
    ),
    "many fields": ({"files": {"file": PNG}, "data": dict.fromkeys("abcd", "x")}, 400, "3"),
    "field twice": ({"files": {"file": PNG}, "data": {"top": ["1", "2"]}}, 422, "'top' more"),
    "long field": ({"files": {"file": PNG}, "data": {"adapter": "x" * 2000}}, 400, "maximum"),
    "no number": ({"files": {"file": PNG}, "data": {"top": "many"}}, 422, "integer"),
    "zero labels": ({"files": {"file": PNG}, "data": {"top": "0"}}, 422, "greater than"),
    "many labels": ({"files": {"file": PNG}, "data": {"top": "9" * 30}}, 422, "1000"),
    "no boundary": (
        {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
        400,
        "form",
    ),
    "broken form": (
        {"content": b"xx", "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
        400,
        "form",
    ),
    "json": ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 422, "JSON"),
    "deep json": (
        {"content": b"[" * 5000, "headers": {"Content-Type": "application/json"}},
        422,
        "JSON",
    ),
    "list": ({"json": []}, 422, "an object"),
    "no base64": ({"json": {"file": "*"}}, 422, "base64"),
    "missing": ({"json": {"adapter": "rose"}}, 422, "'file': missing"),
    "surrogate": (
        {
            "content": b'{"file": "AAAA", "adapter": "\\ud800"}',
            "headers": {"Content-Type": "application/json"},
        },
        422,
        "adapter",
    ),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_request_is_refused(shared, kind):
    options, status, words = REQUESTS[kind]
    check_error(shared.post("/predict", **options), status, words)
    check_alive(shared)


def test_upload_that_is_too_large_is_refused(serve):
    client = serve(max_upload_mb=0.01)
    check_error(ask(client, bytes(20_000)), 413, "at most 14000 bytes")
    content = base64.b64encode(bytes(20_000)).decode()
    check_error(client.post("/predict", json={"file": content}), 413)
    # A length that is wrong, or no number.
    for length in ("9" * 5000, "-1", "1e9"):
        headers = {"Content-Type": "application/json", "Content-Length": length}
        answer = client.post("/predict", content=b"{}", headers=headers)
        assert answer.status_code in (413, 422)
    check_alive(client)


def test_upload_without_a_length_is_refused_while_it_is_read(serve):
    client = serve(max_upload_mb=0.01)
    sent = []

    def endless():
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for i in range(1000):
            sent.append(i)
            yield bytes(1000)

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    check_error(client.post("/predict", content=endless(), headers=headers), 413, "14000")
    check_alive(client)


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=b"])
def test_body_that_does_not_arrive_in_time(kind):
    async def never():
        await asyncio.sleep(60)

    scope = {"type": "http", "headers": [(b"content-type", kind.encode())]}
    with pytest.raises(RequestError, match="did not arrive within 0.01 s") as error:
        asyncio.run(read_predict_request(Request(scope, never), 1000, 0.01))
    assert error.value.status == 408


def test_other_paths_and_methods(shared):
    check_error(shared.get("/nothing"), 404, "/nothing")
    check_error(shared.get("/predict"), 405, "GET")
    check_error(shared.get("/adapters/../../etc/passwd"), 404)
    check_error(shared.get("/adapters/%2e%2e%2fetc%2fpasswd"), 404)
    check_error(shared.get("/static-offline-docs/..%2f..%2fcore.py"), 404)
