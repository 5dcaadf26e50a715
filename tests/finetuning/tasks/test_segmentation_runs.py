"""Whole runs of a segmentation: trained, evaluated, predicted, merged, exported, resumed."""

import dataclasses
import json

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.special import softmax

import tfimm_lora as lora
from tests.finetuning.tasks.test_task_runs import pixels
from tests.helpers.commands import ask, assert_resumes_after_kill
from tests.helpers.kerases import LEGACY, array, keras
from tests.helpers.mask_pictures import CLASSES, SIDE, mask_recipe, write_masks, write_table
from tfimm_lora.finetuning.data.mask_classes import default_palette
from tfimm_lora.finetuning.mask_prediction import upsampled
from tfimm_lora.finetuning.recipe import finetune_pictures
from tfimm_lora.finetuning.run import Run
from tfimm_lora.finetuning.run_report import evaluate_run
from tfimm_lora.finetuning.tiles import tiled_classes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmentation")
    recipe = mask_recipe(folder, epochs=12, monitor="val_mean_iou", balanced=True)
    return finetune_pictures(recipe, folder / "run", verbose="none")


def logits_of(run, paths):
    return array(run.model()(pixels(paths), training=False)).astype("float64")


@pytest.mark.backends
def test_a_run_records_its_task_and_its_model_has_learned_it(run):
    opened = Run.open(run.path)
    assert opened.task.name == "segmentation" and tuple(opened.labels) == CLASSES
    adapter = lora.Adapter.load(opened.adapter)
    assert adapter.task.to_dict() == opened.facts["task"] == opened.task.record().to_dict()
    assert adapter.task.masks == {"values": [0, 1, 2], "ignored": [255]}
    assert adapter.modules == ("pixel_head",) and lora.adapter_of(opened.model()) == adapter
    assert opened.preprocessing.crop_mode == "squash"
    evaluation = evaluate_run(opened)["val"]
    best = opened.history[opened.facts["best_epoch"] - 1]
    assert evaluation.mean_iou == pytest.approx(best["val_mean_iou"], rel=1e-3)
    assert evaluation.mean_iou > 0.5  # 0.22 for the most frequent class everywhere
    # Of the masks on disk, by NumPy.
    paths = [p.path for p in opened.split.val.pictures]
    masks = np.stack([np.array(Image.open(p.label)) for p in opened.split.val.pictures])
    right = logits_of(opened, paths).argmax(-1) == masks
    assert evaluation.accuracy == pytest.approx(right[masks != 255].mean(), abs=2e-3)
    for name in ("report.html", "curves.png", "mistakes.png", "split.csv"):
        assert (run.path / name).stat().st_size > 100
    page = (run.path / "report.html").read_text()
    assert "Worst pictures" in page and "Mean IoU" in page and "rgb(128,0,0)" in page


def test_evaluate_and_predict_say_what_the_model_says(run, capsys, tmp_path):
    paths = [p.path for p in run.split.val.pictures]
    out, _ = ask(capsys, "evaluate", run.path, "--out", tmp_path / "e", "--json")
    told = json.loads(out)
    assert told["pictures"] == len(paths) and told["labels"] == list(CLASSES)
    data = run.recipe["data"]
    words = ("--data", f"{data}/images", "--masks", f"{data}/masks", "--json")
    again, _ = ask(capsys, "evaluate", run.path, *words)
    assert json.loads(again)["pictures"] == 20 and json.loads(again)["trained_on"] == 16
    expected = logits_of(run, paths).argmax(-1)
    words = (
        *paths,
        "--out",
        tmp_path / "m",
        "--overlay",
        "--json",
        "--csv",
        tmp_path / "p.csv",
    )
    out, _ = ask(capsys, "predict", run.path, *words)
    for x, path, classes in zip(json.loads(out)["predictions"], paths, expected):
        image = Image.open(x["mask"])
        assert image.mode == "P" and np.mean(np.array(image) == classes) > 0.998
        colours = np.array(image.convert("RGB"))
        np.testing.assert_array_equal(colours, default_palette(3)[np.array(image)])
        shares = np.bincount(np.array(image).ravel(), minlength=3) / SIDE**2
        np.testing.assert_allclose(list(x["shares"].values()), shares)
        over = np.array(Image.open(x["overlay"]), "float64")
        mixed = 0.45 * np.array(Image.open(path)) + 0.55 * colours
        np.testing.assert_allclose(over, mixed, atol=0.51)
    assert (tmp_path / "p.csv").read_text().startswith("path,mask,0,1,2\n")
    _, err = ask(capsys, "predict", run.path, *words, expect=1)
    assert "already exists" in err
    shown, err = ask(capsys, "predict", run.path, paths[0])
    assert paths[0] in shown and "no masks were written" in err
    for words, message in (
        (("--top", 2), "--top 2 for a segmentation"),
        (("--overlay",), "--overlay without --out"),
        (("--explain", tmp_path / "x"), "--explain"),
    ):
        _, err = ask(capsys, "predict", run.path, paths[0], *words, expect=1)
        assert message in err


def test_a_mask_has_the_size_of_its_picture(run, capsys, tmp_path):
    """A larger picture is resized to the input, and the logits back to it."""
    first = run.split.val.pictures[0].path
    large = tmp_path / "large.png"
    Image.open(first).resize((5 * SIDE, 3 * SIDE), Image.Resampling.NEAREST).save(large)
    out, _ = ask(capsys, "predict", run.path, large, "--out", tmp_path / "m", "--json")
    found = np.array(Image.open(json.loads(out)["predictions"][0]["mask"]))
    assert found.shape == (3 * SIDE, 5 * SIDE)
    small = logits_of(run, [first])[0].argmax(-1)
    expected = np.kron(small, np.ones((3, 5), int))
    assert np.mean(found == expected) > 0.93  # at the borders, between two pixels


@pytest.mark.once
def test_logits_are_resized_before_the_classes_are_chosen():
    logits = np.random.default_rng(0).normal(size=(5, 4, 3)).astype("float32")
    planes = [Image.fromarray(np.ascontiguousarray(logits[..., i])) for i in range(3)]
    large = [np.asarray(x.resize((44, 35), Image.Resampling.BILINEAR)) for x in planes]
    np.testing.assert_array_equal(upsampled(logits, (35, 44)), np.stack(large).argmax(0))


@pytest.mark.once
@pytest.mark.parametrize("size", [(37, 50), (16, 12), (9, 40), (33, 7)])
def test_tiles_of_a_model_of_single_pixels_change_nothing(size):
    """Their logits are the same in each tile, so their mean is that of one."""
    pixels = np.random.default_rng(0).normal(size=(*size, 3)).astype("float32")
    kernel = np.random.default_rng(1).normal(size=(3, 5)).astype("float32")
    seen = []

    def logits_of(tiles):
        seen.append(tiles.shape[1:])
        return tiles @ kernel

    found = tiled_classes(pixels, (16, 12), logits_of)
    np.testing.assert_array_equal(found, (pixels @ kernel).argmax(-1))
    assert set(seen) == {(16, 12, 3)}


@pytest.mark.once
def test_tiles_overlap_and_count_less_at_their_borders():
    """A model whose second class is large at the border of its tiles, which count little."""
    logits = np.zeros((16, 16, 2), "float32")
    logits[..., 0] = 1
    logits[:2, :, 1] = logits[-2:, :, 1] = logits[:, :2, 1] = logits[:, -2:, 1] = 1.5
    found = tiled_classes(
        np.zeros((40, 40, 3)), (16, 16), lambda x: np.repeat(logits[None], len(x), axis=0)
    )
    inside = found[2:-2, 2:-2]
    assert (inside == 0).all() and (found[:2] == 1).all() and (found[:, -2:] == 1).all()


def test_large_pictures_are_cut_into_tiles(run, capsys, tmp_path):
    first, second = (p.path for p in run.split.val.pictures[:2])
    large = np.concatenate([np.array(Image.open(x)) for x in (first, second)], axis=1)
    Image.fromarray(large).save(tmp_path / "large.png")
    words = (tmp_path / "large.png", first, "--tile", "--out", tmp_path / "m", "--json")
    out, _ = ask(capsys, "predict", run.path, *words)
    found, small = (np.array(Image.open(x["mask"])) for x in json.loads(out)["predictions"])
    assert found.shape == (SIDE, 2 * SIDE)
    # At the outer border, only one tile counts much.
    expected = logits_of(run, [first])[0].argmax(-1)
    assert np.mean(small == expected) > 0.998  # it is not larger than the input
    assert np.mean(found[:, :8] == expected[:, :8]) > 0.95


@pytest.mark.long
def test_a_merged_model_returns_logits_of_each_pixel(run, tmp_path, capsys):
    paths = [p.path for p in run.split.val.pictures]
    expected = logits_of(run, paths)
    out, _ = ask(capsys, "merge", run.path, "--out", tmp_path / "m.keras", "--json")
    assert json.loads(out)["returns"] == "logits"
    merged = keras.models.load_model(tmp_path / "m.keras", compile=False)
    np.testing.assert_allclose(array(merged(pixels(paths))), expected, atol=1e-4)
    described = json.loads((tmp_path / "m.keras.json").read_text())
    assert described["task"]["masks"]["values"] == [0, 1, 2]
    assert described["preprocessing"]["crop_mode"] == "squash"
    words = ("export", tmp_path / "m.keras", "--out", tmp_path / "p.keras", "--probabilities")
    out, _ = ask(capsys, *words, "--json")
    assert json.loads(out)["returns"] == "probabilities"
    again = keras.models.load_model(tmp_path / "p.keras", compile=False)
    found = array(again(pixels(paths)))
    np.testing.assert_allclose(found, softmax(expected, axis=-1), atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("format", ["savedmodel", "tflite", "onnx"])
def test_every_format_has_the_same_outputs(run, format, tmp_path):
    paths = [p.path for p in run.split.val.pictures]
    expected = softmax(logits_of(run, paths), axis=-1)
    path = tmp_path / {"savedmodel": "m", "tflite": "m.tflite", "onnx": "m.onnx"}[format]
    exported = lora.export(run.model(), path, format, probabilities=True)
    assert exported.returns == "probabilities"
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(path))
        (found,) = session.run(None, {"inputs": pixels(paths)})
        told = json.loads(session.get_modelmeta().custom_metadata_map["task"])
        assert told["name"] == "segmentation"
    else:
        import tensorflow as tf

        if format == "tflite":
            call = tf.lite.Interpreter(str(path)).get_signature_runner("serving_default")
        else:
            call = tf.saved_model.load(str(path)).signatures["serving_default"]
        found = np.asarray(call(inputs=pixels(paths))["outputs"])
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.long
def test_a_killed_run_is_resumed_to_identical_weights(tmp_path):
    asked = mask_recipe(tmp_path, augmentation="strong", balanced=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(asked.to_dict()))
    words = ("finetune", "--config", tmp_path / "recipe.yaml")
    assert "mean IoU" in assert_resumes_after_kill(tmp_path, words)


@pytest.mark.long
def test_a_table_names_the_classes_and_colours_the_masks(tmp_path, capsys):
    """Masks of colours: the predicted masks have them, too, and can be evaluated on."""
    data = write_masks(tmp_path / "data", n=8)
    palette = np.array([(0, 0, 0), (250, 10, 20), (0, 128, 255), (255, 255, 255)], "uint8")
    for path in (data / "masks").iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray(palette[np.where(mask == 255, 3, mask)]).save(path)
    names = ("ground", "car", "tree", "ignore")
    rows = [{"name": n, **dict(zip("rgb", map(int, c)))} for n, c in zip(names, palette)]
    table = write_table(tmp_path / "classes.csv", rows)
    recipe = mask_recipe(tmp_path, classes=str(table), epochs=1)
    run = finetune_pictures(recipe, tmp_path / "run", verbose="none")
    assert run.labels == ["ground", "car", "tree"]
    table.unlink()  # the run has what it needs
    picture = run.split.val.pictures[0].path
    out, _ = ask(capsys, "predict", run.path, picture, "--out", tmp_path / "m", "--json")
    answer = json.loads(out)["predictions"][0]
    colours = np.array(Image.open(answer["mask"])).reshape(-1, 3)
    assert {tuple(x) for x in np.unique(colours, axis=0)} <= {tuple(x) for x in palette[:3]}
    (tmp_path / "own.csv").write_text(f"path,mask\n{picture},{answer['mask']}\n")
    out, _ = ask(capsys, "evaluate", run.path, "--data", tmp_path / "own.csv", "--json")
    assert json.loads(out)["pixel_accuracy"] > 0.999


@pytest.mark.once
def test_what_a_segmentation_cannot_do_is_said_before_the_training(tmp_path, capsys):
    recipe = mask_recipe(tmp_path)
    with pytest.raises(ValueError, match="masks='m' with the task 'classification'"):
        dataclasses.replace(recipe, task="classification", masks="m")
    with pytest.raises(ValueError, match="column mask"):
        dataclasses.replace(recipe, columns=["a"])
    with pytest.raises(ValueError, match="monitor"):
        dataclasses.replace(recipe, monitor="val_accuracy")
    layers = keras.layers
    flat = [keras.Input((SIDE, SIDE, 3)), layers.Flatten(), layers.Dense(4), layers.Dense(3)]
    keras.Sequential(flat).save(tmp_path / "flat.keras")
    without = dataclasses.replace(recipe, model=str(tmp_path / "flat.keras"))
    with pytest.raises(ValueError, match="no layer returns a map of features"):
        finetune_pictures(without, tmp_path / "run", verbose="none")
    assert not (tmp_path / "run").exists()
    words = ("check", tmp_path / "data", "--task", "segmentation", "--json")
    out, _ = ask(capsys, *words)
    assert json.loads(out)["counts"]["1"] == {"train": 16, "val": 4}
    shown, _ = ask(capsys, *words[:-1])
    assert "of the pixels" in shown and "can use all 20 pictures" in shown


@pytest.mark.skipif(LEGACY, reason="does not depend on Keras")
def test_functions_do_what_the_commands_do(run):
    split = lora.find_pictures(run.recipe["data"], targets=lora.Segmentation.targets())
    task = lora.Segmentation.of(split.train)
    assert task == run.task
    batches = lora.PictureBatches(split.val, run.preprocessing, 4)
    value = lora.evaluate(run.model(), batches.in_order(), task=task)
    np.testing.assert_allclose(value.mean_iou, evaluate_run(run)["val"].mean_iou)
    with pytest.raises(ValueError, match=r"shape \(4, 32, 32, 3\).*\(pictures, classes\)"):
        lora.evaluate(run.model(), batches.in_order(), task=lora.Classification(CLASSES))


@pytest.mark.once
def test_wrong_arguments_of_predict_masks_are_named():
    model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Conv2D(3, 1)])
    plain = lora.Preprocessing((4, 4), (0.0,) * 3, (1.0,) * 3)
    task = lora.Segmentation(("a", "b"))
    with pytest.raises(TypeError, match="paths='a.png'; expected a list"):
        lora.predict_masks(model, "a.png", plain, task=task)
    with pytest.raises(ValueError, match="batch_size=0"):
        lora.predict_masks(model, ["a.png"], plain, task=task, batch_size=0)
    with pytest.raises(ValueError, match="'classification'; expected a segmentation"):
        lora.predict_masks(model, ["a.png"], plain, task=lora.Classification(("a", "b")))


@pytest.mark.once
@pytest.mark.parametrize("tile", [False, True])
def test_a_model_of_other_classes_is_refused(tile, tmp_path):
    model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Conv2D(3, 1)])
    plain = lora.Preprocessing((4, 4), (0.0,) * 3, (1.0,) * 3)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    found = lora.predict_masks(
        model, [tmp_path / "a.png"], plain, task=lora.Segmentation(("a", "b")), tile=tile
    )
    with pytest.raises(ValueError, match="returns 3 logits .* each of the 2 classes"):
        list(found)
