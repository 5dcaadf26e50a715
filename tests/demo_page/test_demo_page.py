"""``tfimm-lora demo``: the answers behind the page, its functions, and the page in Chromium."""

import importlib.util
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import tfimm_lora as lora
from tests.helpers.chromium import CHROMIUM, Browser
from tests.helpers.finished_run import LABELS, finished_run
from tests.helpers.kerases import randomise
from tests.helpers.mask_pictures import mask_recipe
from tests.helpers.picture_folders import digit_pictures
from tfimm_lora.cli import main
from tfimm_lora.demo_page.runs import DemoRuns
from tfimm_lora.finetuning.data.pictures import UnreadablePicture
from tfimm_lora.finetuning.evaluation import predict_pictures
from tfimm_lora.finetuning.explained_pictures import LIMITS
from tfimm_lora.finetuning.mask_prediction import predict_masks
from tfimm_lora.finetuning.recipe import finetune_pictures
from tfimm_lora.finetuning.report.formatting import percent
from tfimm_lora.finetuning.report.overlays import overlay
from tfimm_lora.finetuning.run import Run
from tfimm_lora.model.task_record import TaskRecord

pytestmark = pytest.mark.once

NUMBERS = ("brightness", "angle", "size")

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="needs gradio (the extra demo)"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two runs of one base, whose adapters have other layers and ranks, and one of another task
    whose preprocessing is another."""
    folder = tmp_path_factory.mktemp("runs")
    first = finished_run(folder)
    shutil.copytree(first.path, folder / "second")
    other = lora.inject_lora(first.base(), lora_rank=3, lora_targets=["conv"])
    randomise(other)
    lora.save_adapter(other, folder / "second" / "adapter")
    shutil.copytree(first.path, folder / "third")
    third = Run.open(folder / "third")
    record = TaskRecord("regression", NUMBERS, None, (5.0, 0.0, 9.0), (2.0, 1.0, 3.0))
    preprocessing = {**third.facts["preprocessing"], "mean": [0.5, 0.4, 0.3]}
    third.add_facts(task=record.to_dict(), preprocessing=preprocessing)
    (third.path / "labels.txt").write_text("\n".join(NUMBERS))
    return [folder / name for name in ("run", "second", "third")]


@pytest.fixture(scope="module")
def runs(folders):
    return DemoRuns(folders)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "one.png"
    Image.fromarray(digit_pictures(1)[-1]).save(path)
    return str(path)


def answer_of(folder, picture):
    """The answer table of a model that was opened for this run alone."""
    run = Run.open(folder)
    [(_, values)] = predict_pictures(run.model(), [picture], run.preprocessing, task=run.task)
    return run.task.views.answer_table([run.task.views.answer(picture, values, None, None)])


# -- answers --------------------------------------------------------------------------------


def test_runs_of_one_base_share_a_model_and_answer_as_alone(runs, folders, picture):
    assert runs.names == ("run", "second", "third") and runs.models == 2
    alone = {name: answer_of(path, picture) for name, path in zip(runs.names, folders)}
    assert alone["run"] != alone["second"]
    for name in ("run", "second", "run", "third", "second"):  # adapters are switched
        found = runs.answer(name, picture)
        assert found.table == alone[name]
        assert found.method == "Grad-CAM on layer 'conv' (3 x 3 places)"
        count = 3 if name == "third" else 1
        assert len(found.pictures) == len(found.labels) == count
        assert found.pictures[0].seen.shape == (8, 8, 3)
    assert runs.about("third").endswith("3 targets")
    without = runs.answer("run", picture, explain=False)
    assert without.table == alone["run"] and without.pictures == [] and without.method == ""


def test_explanations_are_those_of_the_chosen_run(runs, picture):
    one, two = (runs.answer(name, picture).pictures[0].drawn for name in ("run", "second"))
    again = runs.answer("run", picture).pictures[0].drawn
    np.testing.assert_array_equal(one, again)
    assert (one != two).any()


def test_a_segmentation_shows_the_mask_over_the_picture(tmp_path):
    recipe = mask_recipe(tmp_path, epochs=8, balanced=True)
    trained = finetune_pictures(recipe, tmp_path / "run", verbose="none")
    picture = trained.split.val.pictures[0].path
    runs = DemoRuns([tmp_path / "run"])
    found = runs.answer("run", picture)
    [(_, mask)] = predict_masks(
        trained.model(), [picture], trained.preprocessing, task=trained.task
    )
    expected = overlay(np.asarray(Image.open(picture)), mask, trained.task.mask_classes.palette)
    np.testing.assert_array_equal(found.masked, expected)
    assert found.table.header == ["classes of the pixels"]
    assert len(np.unique(mask)) > 1 and percent(np.mean(mask == 0)) in found.table.rows[0][0]
    assert found.pictures == [] and found.method == "" and found.notes == []


def test_what_cannot_be_opened_is_refused(folders, runs, tmp_path):
    with pytest.raises(ValueError, match="expected each of them once"):
        DemoRuns([folders[0], folders[0]])
    with pytest.raises(FileNotFoundError, match="is not a finetune run"):
        DemoRuns([folders[0], tmp_path])
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(UnreadablePicture, match="damaged, or none of"):
        runs.answer("run", str(tmp_path / "no.png"))


def test_without_gradio_the_command_says_what_to_install(folders, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", str(folders[0])]) != 0
    message = capsys.readouterr().err
    assert "tfimm-lora demo needs gradio" in message and "tfimm_lora[demo]" in message


# -- the page -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(runs):
    from tfimm_lora.demo_page.page import create_page, launch

    page = create_page(runs)
    yield launch(page, "127.0.0.1", 0, browser=False, block=False)
    page.close()


@needs_gradio
def test_the_function_of_the_page(address, runs, picture, tmp_path):
    from gradio_client import Client, exceptions, handle_file

    client = Client(address, verbose=False)
    try:
        ask = {"picture": handle_file(picture), "explain": True, "api_name": "/answer"}
        table, shown, method = client.predict(name="second", **ask)
        header, [row], _ = runs.answer("second", picture).table
        assert all(name in table for name in header) and row[1] in table
        assert "<script>" not in table and "<img" not in table  # labels are escaped
        assert shown[0]["caption"] == "what the model sees"
        assert shown[1]["caption"] in LABELS and len(shown) == 2
        assert "Grad-CAM on layer" in method and LIMITS in method
        drawn = np.asarray(Image.open(shown[1]["image"]).convert("RGB"))
        expected = runs.answer("second", picture).pictures[0].drawn
        np.testing.assert_array_equal(drawn, expected)
        table, shown, method = client.predict(name="third", **{**ask, "explain": False})
        assert "brightness" in table and shown == [] and method == ""
        (tmp_path / "no.png").write_bytes(b"no picture")
        with pytest.raises(exceptions.AppError):
            client.predict(name="run", **{**ask, "picture": handle_file(tmp_path / "no.png")})
    finally:
        client.close()


@pytest.mark.long
@needs_gradio
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_answers_and_asks_only_this_server(address, runs, picture, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        browser.do("Page.navigate", url=address)
        file = "#picture input[type=file]"
        browser.wait_for(f"document.querySelector('{file}') !== null")
        browser.choose_file(file, picture)
        answer = "document.querySelector('#answer table')?.innerText"
        maps = "document.querySelectorAll('#maps img').length"
        first = browser.wait_for(answer)
        assert runs.answer("run", picture).table.rows[0][1] in first
        browser.wait_for(f"{maps} == 2")
        assert "Grad-CAM" in browser.wait_for("document.querySelector('#method').innerText")
        browser.click("#run input")  # another run, whose answer replaces the first
        browser.wait_for("document.querySelectorAll('[role=option]').length == 3")
        browser.click("[role=option][aria-label=third]")
        browser.wait_for(f"{answer}?.includes('brightness') && {maps} == 4")
        browser.wait_for("document.querySelector('#about').innerText.includes('3 targets')")
        assert browser.evaluate("window.pwned") is None and browser.console == []
        assert browser.asked
        assert not [x for x in browser.asked if not x.startswith((address, "data:", "blob:"))]
