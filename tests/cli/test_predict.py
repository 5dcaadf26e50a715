"""``predict`` on patterns, URLs, standard input and lists; thresholds; what it leaves out."""

import contextlib
import csv
import io
import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

import tfimm_lora as lora
from tests.helpers.finished_run import finished_run
from tests.helpers.picture_folders import digit_pictures, touch
from tfimm_lora.cli import main, picture_sources
from tfimm_lora.cli.picture_sources import Problem, find_pictures
from tfimm_lora.explanations.overlay import overlay

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with pictures in a folder, in one inside it, and other files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pics" / "more").mkdir(parents=True)
    for i, pixels in enumerate(digit_pictures(0)[:3]):
        Image.fromarray(pixels).save(tmp_path / "pics" / f"{i}.png")
    Image.fromarray(digit_pictures(1)[0]).save(tmp_path / "pics" / "more" / "3.jpg")
    touch(tmp_path / "pics", "notes.txt")
    return tmp_path


@pytest.fixture
def ask(capsys, run):
    """Run predict: the exit code, stdout and stderr."""

    def ask(*arguments, of=None):
        capsys.readouterr()
        code = main(["predict", str((of or run).path), *map(str, arguments)])
        return code, *capsys.readouterr()

    return ask


@pytest.fixture
def document(ask):
    """Run predict --json: the exit code and the document."""

    def document(*arguments, **options):
        code, out, err = ask(*arguments, "--json", **options)
        assert out, err
        return code, json.loads(out)

    return document


def paths(document):
    return [x["path"] for x in document["predictions"]]


def stdin(monkeypatch, content):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


# -- patterns and folders -------------------------------------------------------------------


def test_a_quoted_pattern_is_expanded(folder, document):
    code, data = document("pics/*.png")
    assert code == 0 and paths(data) == ["pics/0.png", "pics/1.png", "pics/2.png"]
    code, data = document("pics/**/*.[jp]*g")
    assert paths(data) == ["pics/0.png", "pics/1.png", "pics/2.png", "pics/more/3.jpg"]
    assert data["left_out"] == data["unreadable"] == []


def test_what_a_pattern_matches_besides_pictures_is_reported(folder, ask):
    found = find_pictures(["pics/*"])  # as the shell would expand it: a folder is opened
    assert found.names == ["pics/0.png", "pics/1.png", "pics/2.png", "pics/more/3.jpg"]
    assert found.left_out == [Problem("pics/notes.txt", "without the suffix of a picture")]
    assert find_pictures(["pics/**"]).names == found.names
    assert find_pictures(["pics/**"]).left_out == found.left_out


def test_a_pattern_or_folder_without_pictures_is_an_error_but_the_others_are_predicted(
    folder, ask, document
):
    (folder / "empty").mkdir()
    code, data = document("pics/0.png", "pics/*.webp", "empty", "pics/0.pgn")
    assert code == 1 and paths(data) == ["pics/0.png"]
    reasons = {x["path"]: x["reason"] for x in data["unreadable"]}
    assert reasons["pics/*.webp"].startswith("it matches no pictures; expected files with")
    assert reasons["empty"].startswith("it contains no pictures; expected files with")
    assert reasons["pics/0.pgn"] == "it does not exist; most similar: 0.png, 2.png, 1.png"
    code, out, err = ask("pics/*.webp")
    assert code == 1 and not out and "pics/*.webp" in err and "1 of 1 files" in err
    assert "there is no folder nowhere" in ask("nowhere/a.jpg")[2]


def test_a_name_with_the_characters_of_a_pattern_is_a_file(folder, document):
    shutil.copy("pics/0.png", "a[1]*.png")
    assert paths(document("a[1]*.png")[1]) == ["a[1]*.png"]


def test_all_that_is_left_out_in_a_folder_is_reported(folder, ask, document):
    shutil.copy("pics/0.png", "pics/.hidden.png")
    shutil.copy("pics/0.png", "pics/more/IMG_1")  # without a suffix, the content decides
    (folder / "pics" / "README").write_text("not a picture")
    (folder / "pics" / ".cache").mkdir()
    (folder / "pics" / "more" / "loop").symlink_to(folder / "pics")
    code, data = document("pics", "pics/1.png", "pics/../pics/2.png")
    assert code == 0 and len(data["predictions"]) == 5
    assert paths(data)[-1] == "pics/more/IMG_1"
    assert sorted((x["path"], x["reason"]) for x in data["left_out"]) == [
        ("pics/../pics/2.png", "given more than once"),
        ("pics/.cache", "hidden"),
        ("pics/.hidden.png", "hidden"),
        ("pics/1.png", "given more than once"),
        ("pics/README", "not a picture"),
        ("pics/more/loop", "a link to a folder listed already"),
        ("pics/notes.txt", "without the suffix of a picture"),
    ]
    _, _, err = ask("pics", "pics/1.png")
    assert "left out 1 file (without the suffix of a picture): pics/notes.txt" in err
    assert "left out 2 files (hidden): pics/.cache, pics/.hidden.png" in err
    assert "left out 1 file (given more than once): pics/1.png" in err


def test_the_pictures_are_required(ask):
    code, out, err = ask()
    assert code == 2 and not out and "expected a picture, folder, pattern, URL or -" in err


# -- standard input and lists ---------------------------------------------------------------


def test_a_picture_from_standard_input(folder, ask, document, monkeypatch):
    content = (folder / "pics" / "0.png").read_bytes()
    stdin(monkeypatch, content)
    code, data = document("-", "pics/0.png")
    one, other = data["predictions"]
    assert code == 0 and (one["path"], other["path"]) == ("-", "pics/0.png")
    assert one["label"] == other["label"]
    np.testing.assert_allclose(one["probability"], other["probability"], rtol=1e-6)
    stdin(monkeypatch, content)
    assert "standard input  " in ask("-")[1]
    for bad, words in ((b"", "standard input is empty"), (b"text", "damaged, or none of JPEG")):
        stdin(monkeypatch, bad)
        code, out, err = ask("-")
        assert code == 1 and not out and f"cannot read standard input: {words}" in err


def test_a_terminal_is_not_a_picture(folder, ask, monkeypatch):
    stdin(monkeypatch, b"")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    code, _, err = ask("-")
    assert code == 1 and "which is the terminal; expected a pipe or file" in err


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\0"])
def test_names_from_a_file(folder, document, separator, monkeypatch):
    names = ["pics/0.png", "pics/more", "pics/gone.png", ""]
    (folder / "list.txt").write_bytes(separator.join(names).encode())
    code, data = document("pics/2.png", "--files-from", "list.txt")
    assert code == 1 and paths(data) == ["pics/2.png", "pics/0.png", "pics/more/3.jpg"]
    assert [x["path"] for x in data["unreadable"]] == ["pics/gone.png"]
    stdin(monkeypatch, b"pics/1.png\n")
    assert paths(document("--files-from", "-")[1]) == ["pics/1.png"]


def test_lists_that_cannot_be_used(folder, ask):
    (folder / "empty.txt").write_text("\n")
    assert "which is empty; expected a path on each line" in ask("--files-from", "empty.txt")[2]
    assert "No such file" in ask("--files-from", "gone.txt")[2]
    assert "one standard input" in ask("-", "--files-from", "-")[2]


# -- URLs -----------------------------------------------------------------------------------


class Pages(BaseHTTPRequestHandler):
    """A server with a picture, and with all that can go wrong."""

    picture = b""

    def do_GET(self):
        content, kind, length = self.picture, "image/png", None
        if self.path == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "/a%20b.png")
            self.end_headers()
            return
        if self.path == "/gone.png":
            self.send_error(404)
            return
        if self.path == "/page":
            content, kind = b"<html>", "text/html; charset=utf-8"
        elif self.path == "/damaged.png":
            content = content[: len(content) // 2]
        elif self.path == "/large.png":
            length = 10**9
        elif self.path == "/cut.png":
            length = len(content) + 10
        elif self.path == "/endless.png":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 1000)
            except OSError:
                return
        elif self.path == "/slow.png":
            time.sleep(1)
        elif self.path != "/a%20b.png":
            self.send_error(500)
            return
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client has given up
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(folder, monkeypatch):
    """The address of a server on this machine."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(Pages, "picture", (folder / "pics" / "0.png").read_bytes())
    running = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()
    thread.join()


def test_pictures_from_urls(server, document):
    code, data = document(f"{server}/a b.png", f"{server}/moved.png", "pics/0.png")
    assert code == 0
    assert paths(data) == [f"{server}/a b.png", f"{server}/moved.png", "pics/0.png"]
    for one in data["predictions"]:
        np.testing.assert_allclose(
            one["probability"], data["predictions"][2]["probability"], rtol=1e-6
        )


def test_each_failure_of_a_url_has_its_reason(server, document, ask, monkeypatch):
    monkeypatch.setattr(picture_sources, "TIMEOUT", 0.3)
    monkeypatch.setattr(picture_sources, "MOST_BYTES", 100_000)
    expected = {
        "gone.png": "the server answered 404 Not Found",
        "page": "it is a web page; expected the address of the picture itself",
        "large.png": "it has at least 1.0 GB; expected at most 100.0 kB",
        "endless.png": "it has at least 1",
        "cut.png": "the connection ended after",
        "slow.png": "no answer within 0.3 s",
        "damaged.png": "",
    }
    code, data = document("pics/0.png", *(f"{server}/{name}" for name in expected))
    assert code == 1 and paths(data) == ["pics/0.png"]
    reasons = {x["path"].rpartition("/")[2]: x["reason"] for x in data["unreadable"]}
    assert set(reasons) == set(expected)
    for name, words in expected.items():
        assert reasons[name].startswith(words) and reasons[name], (name, reasons[name])
    server_of_none = "http://127.0.0.1:9/x.png"
    code, out, err = ask(server_of_none)
    assert code == 1 and not out and f"cannot read {server_of_none}: the server cannot" in err
    assert "expected an address with http:// or https://" in ask("ftp://a.test/x.png")[2]


# -- threshold ------------------------------------------------------------------------------


def test_below_the_threshold_the_answer_is_unsure(folder, run, ask, document, tmp_path):
    _, plain = document("pics")
    assert not {"answer", "unsure"} & set(plain["predictions"][0])
    p = sorted(x["probability"] for x in plain["predictions"])
    between = (p[1] + p[2]) / 2
    table = tmp_path / "p.csv"
    code, data = document("pics", "--threshold", between, "--csv", table)
    assert code == 0 and data["threshold"] == between
    rows = list(csv.DictReader(table.read_text("utf-8").splitlines()))
    assert list(rows[0])[:4] == ["path", "answer", "label", "probability"]
    unsure = 0
    for one, row, before in zip(data["predictions"], rows, plain["predictions"], strict=True):
        is_unsure = before["probability"] < between
        unsure += is_unsure
        assert one["unsure"] is is_unsure
        assert one["answer"] == row["answer"] == ("unsure" if is_unsure else before["label"])
        assert (one["label"], one["top"]) == (before["label"], before["top"])
    assert unsure == 2
    _, out, err = ask("pics", "--threshold", between)
    assert sum("  unsure " in line for line in out.splitlines()) == 2
    assert f"2 of 4 pictures are below the threshold {between:g}" in err
    line = next(x for x in out.splitlines() if "unsure" in x)
    best = next(x for x in data["predictions"] if x["unsure"] and x["path"] in line)
    assert line.split("%", 1)[1].strip().startswith(best["label"])  # all labels come last


def test_a_threshold_is_a_probability(folder, ask):
    code, _, err = ask("pics", "--threshold", "80")
    assert code == 2 and "less than or equal to 1" in err
    assert ask("pics", "--threshold", "0", "--json")[0] == 0


# -- unfinished runs ------------------------------------------------------------------------


def test_an_unfinished_run_says_so(folder, run, ask, document, tmp_path):
    from tfimm_lora.finetuning.run import Run

    shutil.copytree(run.path, tmp_path / "run")
    other = Run.open(tmp_path / "run")
    other.recipe["epochs"] = 12
    other.save()
    _, _, err = ask("pics/0.png", of=other)
    assert "is unfinished: 2 of 12 epochs are complete" in err
    assert f"tfimm-lora finetune --out {tmp_path / 'run'} --resume" in err
    assert document("pics/0.png", of=other)[1]["unfinished"] == {"epochs": 2, "requested": 12}
    other.add_facts(stopped_early=True)
    assert "unfinished" not in ask("pics/0.png", of=other)[2]
    _, data = document("pics/0.png")
    assert data["unfinished"] is None
    assert "unfinished" not in ask("pics/0.png")[2]


def test_the_numbers_are_those_of_a_softmax_in_numpy(folder, run, document):
    _, data = document("pics/*.png", "--top", 3)
    model = run.model()
    for one in data["predictions"]:
        x = np.array(Image.open(one["path"]).convert("RGB"))[None] / 255
        p = softmax(model.predict(x.astype("float32"), verbose=0).astype("float64")[0])
        expected = sorted(p, reverse=True)[:3]
        np.testing.assert_allclose([y["probability"] for y in one["top"]], expected, rtol=1e-4)


# -- explanations ---------------------------------------------------------------------------


def test_explanations_are_written_and_named(folder, ask, document):
    (folder / "again").mkdir()
    shutil.copy(folder / "pics" / "0.png", folder / "again" / "0.png")
    pictures = "pics/0.png", "pics/1.png", "again/0.png"
    code, data = document(*pictures, "--explain", "why/here")
    assert code == 0
    assert data["explanation"] == {"method": "grad_cam", "layer": "conv", "grid": [3, 3]}
    files = []
    for prediction in data["predictions"]:
        [found] = prediction["explanations"]
        assert found["label"] == prediction["label"]
        files.append(found["file"])
        with Image.open(found["file"]) as image:
            assert image.size == (224, 224) and image.format == "PNG"
    assert len(set(files)) == 3  # also for the two pictures of one name
    assert {Path(x).name for x in files} == {x.name for x in Path("why/here").iterdir()}

    code, out, err = ask("pics/0.png", "--explain", "why/here")
    assert code != 0 and "already exists" in err and "--overwrite" in err
    code, out, err = ask(
        "pics/0.png", "--explain", "why/here", "--overwrite", "--csv", "all.csv"
    )
    assert code == 0 and files[0] in out
    assert "written: 1 explanations in why/here: Grad-CAM on layer 'conv' (3 x 3" in err
    assert "does not show how much there is" in err.replace("\n", " ")
    with open("all.csv", newline="", encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert row["explanation"] == files[0]
    _, data = document("pics/0.png")
    assert data["explanation"] is None and "explanations" not in data["predictions"][0]


def test_the_drawn_map_is_that_of_explain(folder, document, run):
    _, data = document("pics/0.png", "--explain", "why")
    [prediction] = data["predictions"]
    drawn = np.asarray(Image.open(prediction["explanations"][0]["file"]))[::28, ::28]
    prepare = run.preprocessing.function(resize=True)
    x = np.asarray(prepare(np.asarray(Image.open("pics/0.png").convert("RGB"))))[None]
    target = run.labels.index(prediction["label"])
    found = lora.explain(run.model(), x, target)
    expected = overlay(run.preprocessing.pixels(x), found.maps)[0]
    np.testing.assert_allclose(drawn.astype(int), expected, atol=1)
