"""Adding, replacing and removing adapters: over HTTP with the token, and in the folder."""

import errno
import json
import shutil

import numpy as np
import pytest

pytest.importorskip("fastapi", reason='needs the extra "serve"')

from tests.helpers.served import (
    TOKEN,
    authorization,
    expected,
    form_of,
    make_adapter,
    picture,
    write_adapter,
)
from tests.serving.test_predict import NAMES, ask, check_error
from tfimm_lora.cli import main
from tfimm_lora.serving import adapter_folder

pytestmark = pytest.mark.once


@pytest.fixture
def form(tmp_path):
    """A form with an adapter of another seed than those in the folder."""
    write_adapter(tmp_path, "new", seed=9, classes=5)
    return form_of(tmp_path / "new")


def put(client, name, form, token=TOKEN, **options):
    return client.put(f"/adapters/{name}", files=form, headers=authorization(token), **options)


def probabilities(client, content, name):
    top = ask(client, content, adapter=name, top="9").json()["top"]
    return [x["probability"] for x in sorted(top, key=lambda x: x["index"])]


def names(client):
    return [x["name"] for x in client.get("/adapters").json()["adapters"]]


def test_list_and_details(shared):
    body = shared.get("/adapters").json()
    assert body["base"] == "base" and body["base_is_served"]
    assert [(x["name"], x["classes"], x["usable"]) for x in body["adapters"]] == [
        ("bare", None, True),
        ("oak", 7, True),
        ("rose", 4, True),
    ]
    assert shared.get("/adapters/rose").json() == {
        "name": "rose",
        "classes": 4,
        "labels": ["rose-0", "rose-1", "rose-2", "rose-3"],
    }
    assert shared.get("/adapters/bare").json()["labels"] is None
    check_error(shared.get("/adapters/tulip"), 404, "tulip")


def test_put_adds_and_replaces_and_delete_removes(client, adapters, form):
    content, colour = picture(4)
    check_error(ask(client, content, adapter="tulip"), 404)
    answer = put(client, "tulip", form)
    assert (answer.status_code, answer.json()["done"]) == (201, "added")
    np.testing.assert_allclose(
        probabilities(client, content, "tulip"), expected(colour, 9, 5), rtol=1e-5
    )
    assert ask(client, content, adapter="tulip").json()["label"].startswith("new-")

    answer = put(client, "rose", form)
    assert (answer.status_code, answer.json()["done"]) == (200, "replaced")
    np.testing.assert_allclose(
        probabilities(client, content, "rose"), expected(colour, 9, 5), rtol=1e-5
    )
    assert names(client) == ["bare", "oak", "rose", "tulip"]

    answer = client.delete("/adapters/tulip", headers=authorization())
    assert answer.json() == {"name": "tulip", "done": "removed"}
    check_error(ask(client, content, adapter="tulip"), 404)
    assert names(client) == ["bare", "oak", "rose"]
    # Nothing is left over, not even hidden.
    assert sorted(x.name for x in adapters.iterdir()) == [".lock", "bare", "oak", "rose"]


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"Authorization": "Basic eDp5"},
        authorization("x"),
        authorization(TOKEN[:-1]),
        authorization(TOKEN + "x"),
        authorization(""),
        {"Authorization": TOKEN},
        {"Authorization": "Bearer t\xf6ken"},
    ],
)
def test_nothing_changes_without_the_token(shared, form, header):
    encoded = {k: v.encode("latin-1") for k, v in header.items()}
    for answer in (
        shared.put("/adapters/tulip", files=form, headers=encoded),
        shared.put("/adapters/rose", files=form, headers=encoded),
        shared.delete("/adapters/rose", headers=encoded),
    ):
        check_error(answer, 401, "token")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert TOKEN not in answer.text
    assert names(shared) == ["bare", "oak", "rose"]


def test_nothing_changes_on_a_server_without_a_token(serve, form):
    client = serve(token=None)
    check_error(put(client, "tulip", form), 403, "--token-file")
    check_error(client.delete("/adapters/rose", headers=authorization()), 403)
    assert names(client) == ["bare", "oak", "rose"]


#: Others are not below /adapters/, so they are unknown paths.
OWN_PATHS = {*NAMES} - {"empty", "path", "absolute", "inside", "parent"}


@pytest.mark.parametrize("kind", sorted(OWN_PATHS))
def test_names_of_uploads_are_checked(shared, form, kind):
    name = "".join(f"%{byte:02x}" for byte in NAMES[kind].encode())
    check_error(put(shared, name, form), 422, "A-Z")
    check_error(shared.delete(f"/adapters/{name}", headers=authorization()), 422, "A-Z")
    assert names(shared) == ["bare", "oak", "rose"]


def test_file_that_is_not_chosen_in_a_browser_is_left_out(client, form):
    assert put(client, "tulip", {**form, "labels": (None, "")}).status_code == 201
    assert client.get("/adapters/tulip").json()["labels"] is None
    answer = put(client, "tulip", {**form, "weights": (None, "")})
    check_error(answer, 422, "a form without weights")


def changed(form, **files):
    return {k: v for k, v in {**form, **files}.items() if v is not None}


def test_uploads_that_cannot_be_used_change_nothing(client, adapters, form, tmp_path):
    make_adapter(0, 4, inputs=5).save(tmp_path / "wide")
    config = json.loads(form["config"][1])
    config["peft_type"] = "LOKR"
    content, colour = picture(4)
    before = sorted(adapters.rglob("*"))
    for files, words in [
        (changed(form, weights=None), "weights"),
        (changed(form, config=None), "config"),
        (changed(form, weights=("w", b"\x80\x04\x95\x00\x00.pickle")), "header"),
        (changed(form, weights=("w", b"")), "header"),
        (changed(form, weights=("w", form["weights"][1][:-9])), "complete"),
        (changed(form, weights=("w", b"\xff" * 7 + b"\x7f" + b"{}")), "header"),
        (changed(form, config=("c", b"{")), "JSON"),
        (changed(form, config=("c", json.dumps(config).encode())), "LOKR"),
        (changed(form, labels=("l", b"a\nb\n")), "2 labels"),
        (changed(form, labels=("l", b"a\n\nb\n")), "empty or repeated"),
        (changed(form, labels=("l", b"\xff\n")), "UTF-8"),
        (form_of(tmp_path / "wide"), "5 inputs"),
        (changed(form, labels=None, script=("x.py", b"")), "the field 'script'"),
        ({**form, "script": ("x.py", b"")}, "Too many files"),
        (changed(form, labels=None, weights=(None, "text")), "'weights' as text"),
    ]:
        answer = put(client, "rose", files)
        check_error(answer, 400 if len(files) > 3 else 422, words)
        assert str(adapters) not in answer.text
        np.testing.assert_allclose(
            probabilities(client, content, "rose"), expected(colour, 1), rtol=1e-5
        )
    assert sorted(adapters.rglob("*")) == before


def test_folder_that_cannot_be_written(client, adapters, form, monkeypatch, caplog):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", str(adapters))

    content, colour = picture(4)
    monkeypatch.setattr(adapter_folder, "move_into_place", full)
    monkeypatch.setattr(adapter_folder.os, "replace", full)
    for answer in (
        put(client, "rose", form),
        put(client, "tulip", form),
        client.delete("/adapters/rose", headers=authorization()),
    ):
        check_error(answer, 500, "No space left on device")
        assert str(adapters) not in answer.text and str(adapters) in caplog.text
    assert names(client) == ["bare", "oak", "rose"]
    np.testing.assert_allclose(
        probabilities(client, content, "rose"), expected(colour, 1), rtol=1e-5
    )


def test_upload_that_is_too_large(serve, form):
    client = serve(max_adapter_mb=0.001)
    form = changed(form, weights=("w", bytes(9000)))
    check_error(put(client, "tulip", form), 413)


def test_runs_and_other_folders_are_not_removed(client, adapters, form):
    """What a request did not create cannot be restored by one."""
    (adapters / "oak" / "notes.txt").write_text("by hand")
    shutil.move(adapters / "rose", adapters.parent / "elsewhere")
    (adapters / "rose").symlink_to(adapters.parent / "elsewhere")
    for name, reason in (("oak", "notes.txt"), ("rose", "link")):
        check_error(client.delete(f"/adapters/{name}", headers=authorization()), 409, reason)
        check_error(put(client, name, form), 409, reason)
        assert ask(client, picture()[0], adapter=name).status_code == 200
    assert (adapters / "oak" / "notes.txt").exists()


def test_changes_of_the_folder_are_noticed(client, adapters):
    """As another process that serves the folder makes them."""
    content, colour = picture(4)
    write_adapter(adapters, "tulip", seed=5)
    assert ask(client, content, adapter="tulip").status_code == 200
    write_adapter(adapters, "rose", seed=6)
    np.testing.assert_allclose(
        probabilities(client, content, "rose"), expected(colour, 6), rtol=1e-5
    )
    shutil.rmtree(adapters / "oak")
    check_error(ask(client, content, adapter="oak"), 404)
    assert names(client) == ["bare", "rose", "tulip"]


def test_damaged_adapter_is_an_error_until_it_is_repaired(client, adapters):
    weights = adapters / "rose" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4])
    answer = ask(client, picture()[0], adapter="rose")
    check_error(answer, 500, "log of the server")
    assert str(adapters) not in answer.text
    listed = {x["name"]: x["usable"] for x in client.get("/adapters").json()["adapters"]}
    assert listed == {"bare": True, "oak": True, "rose": False}
    weights.write_bytes(content)
    assert ask(client, picture()[0], adapter="rose").status_code == 200


def test_all_adapters_that_cannot_be_served_are_listed_at_start(serve, adapters):
    (adapters / "rose" / "adapter_config.json").write_text("{")
    (adapters / "empty").mkdir()
    (adapters / "with space").mkdir()
    with pytest.raises(ValueError) as error:
        serve()
    message = str(error.value)
    assert "3 cannot be served" in message
    for words in ("rose: ", "JSON", "empty: ", "'with space': "):
        assert words in message
    assert "bare" not in message and "oak" not in message


def test_all_adapters_that_the_bank_refuses_are_listed_at_start(serve, adapters):
    make_adapter(0, 4, inputs=5).save(adapters / "wide")
    make_adapter(0, 4, inputs=6).save(adapters / "wider")
    with pytest.raises(
        ValueError, match=r"2 cannot be served on base:\n  wide: .*5 inputs"
    ) as e:
        serve()
    assert "wider: " in str(e.value)


@pytest.mark.parametrize(
    "file, variable, words",
    [
        ("short", None, "16"),
        ("a token with spaces in it", None, "without spaces"),
        ("", None, "0 characters"),
        (None, "t\xf6ken" * 5, "ASCII"),
        (TOKEN, TOKEN, "one of them"),
    ],
)
def test_tokens_that_cannot_be_used(tmp_path, monkeypatch, capsys, file, variable, words):
    arguments = ["serve", "base", "--adapters", str(tmp_path)]
    if file is not None:
        (tmp_path / "token").write_text(file)
        arguments += ["--token-file", str(tmp_path / "token")]
    if variable is not None:
        monkeypatch.setenv("TFIMM_LORA_TOKEN", variable)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert words in error and TOKEN not in error
