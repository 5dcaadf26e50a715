"""Runs and adapters on their real base model: what is served, and what is refused."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("fastapi", reason='needs the extra "serve"')

import yaml
from PIL import Image
from scipy.special import softmax
from starlette.testclient import TestClient

import tfimm_lora as lora
from tests.helpers.finished_run import SIDE, finished_run
from tests.helpers.kerases import array
from tests.helpers.picture_folders import photograph
from tests.helpers.served import ready
from tests.serving.test_predict import ask
from tfimm_lora.cli import main
from tfimm_lora.finetuning.base.origin import weights_digest
from tfimm_lora.finetuning.run import Run
from tfimm_lora.finetuning.shared_base import SharedBase
from tfimm_lora.serving.app import create_app
from tfimm_lora.serving.base import open_base
from tfimm_lora.serving.opening import open_service
from tfimm_lora.serving.settings import ServingSettings

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("run"))


def stronger(adapter):
    """An adapter with a larger update, so that its predictions differ clearly."""
    layers = {
        path: lora.LayerUpdate(update.a, update.b + 0.5, update.scale)
        for path, update in adapter.layers.items()
    }
    return lora.Adapter(layers, adapter.weights, adapter.modules)


@pytest.fixture
def folder(finished, tmp_path):
    """A folder with a run, its adapter alone, and another adapter with labels."""
    folder = tmp_path / "adapters"
    shutil.copytree(finished.path, folder / "run")
    shutil.copytree(finished.adapter, folder / "alone")
    stronger(lora.Adapter.load(finished.adapter)).save(folder / "stronger")
    (folder / "stronger" / "labels.txt").write_text("x\ny\nz\n")
    return folder


def change(run, **facts):
    """Change the recorded facts of a run."""
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["facts"].update(facts)
    path.write_text(yaml.safe_dump(config))


def by_class(answer):
    """The probabilities of an answer in the order of the classes."""
    return [x["probability"] for x in sorted(answer["top"], key=lambda x: x["index"])]


def test_every_adapter_predicts_as_it_does_alone(finished, folder, tmp_path, capsys):
    file = tmp_path / "photograph.png"
    Image.fromarray(photograph()).save(file)
    assert main(["predict", str(finished.path), str(file), "--json"]) == 0
    (alone,) = json.loads(capsys.readouterr().out)["predictions"]

    settings = ServingSettings(str(finished.path), str(folder), max_batch=4)
    with TestClient(create_app(open_service(settings), settings)) as client:
        ready(client)
        answers = {
            name: ask(client, file.read_bytes(), **({"adapter": name} if name else {})).json()
            for name in ("run", "alone", "stronger", None)
        }
    assert answers["run"]["label"] == alone["label"]
    labels = [x["label"] for x in alone["top"]]
    assert [x["label"] for x in answers["run"]["top"]] == labels
    # Products in another order round otherwise in float32.
    expected = [x["probability"] for x in alone["top"]]
    assert [x["probability"] for x in answers["run"]["top"]] == pytest.approx(
        expected, rel=1e-5
    )
    assert answers["alone"]["label"] is None
    assert by_class(answers["alone"]) == pytest.approx(by_class(answers["run"]), rel=1e-6)

    base = finished.base()
    x = np.asarray(finished.preprocessing.function(resize=True)(photograph()))[None]
    logits = {None: array(base(x))[0]}
    logits["stronger"] = array(lora.load_adapter(base, folder / "stronger")(x))[0]
    for name, values in logits.items():
        assert by_class(answers[name]) == pytest.approx(list(softmax(values)), rel=1e-5)
    difference = np.subtract(by_class(answers["stronger"]), by_class(answers["run"]))
    assert np.abs(difference).max() > 1e-3
    assert answers["stronger"]["label"] in ("x", "y", "z")


def test_runs_of_other_models_sizes_and_preprocessing_are_listed_at_start(finished, folder):
    other = finished.preprocessing.to_dict()
    for name, facts in {
        "model": {"base_sha256": "0" * 64},
        "named-model": {"base_sha256": None, "base_digest": "1" * 64},
        "size": {"preprocessing": {**other, "input_size": [SIDE, 2 * SIDE]}},
        "order": {"preprocessing": {**other, "channel_order": "bgr", "crop_pct": 0.5}},
    }.items():
        shutil.copytree(finished.path, folder / name)
        change(folder / name, **facts)
    shutil.copytree(finished.path, folder / "early")
    shutil.rmtree(folder / "early" / "adapter")
    with pytest.raises(ValueError) as error:
        open_service(ServingSettings(str(finished.path), str(folder)))
    message = str(error.value)
    assert "5 cannot be served" in message
    problems = dict(line.strip().split(": ", 1) for line in message.splitlines()[1:-1])
    assert set(problems) == {"model", "named-model", "size", "order", "early"}
    assert "0" * 64 in problems["model"] and finished.facts["base_sha256"] in problems["model"]
    assert "None, expected" in problems["named-model"]
    assert f"input_size is [{SIDE}, {2 * SIDE}], expected [{SIDE}, {SIDE}]" in problems["size"]
    assert "channel_order" in problems["order"] and "crop_pct" in problems["order"]
    assert "--resume" in problems["early"]


def test_base_model_of_a_run_and_its_file_are_the_same(finished, folder):
    file = str(finished.path.parent / "model.keras")
    base = open_base(ServingSettings(file, str(folder), normalisation="unit"))
    assert base.differences(Run.open(folder / "run")) == []
    base = open_base(ServingSettings(file, str(folder), normalisation="inception"))
    assert [x.split()[0] for x in base.differences(Run.open(folder / "run"))] == ["mean", "std"]


def test_base_models_by_name_are_compared_by_their_weights(finished):
    """With and without the classifier, as runs record it."""
    model = finished.base()
    base = SharedBase("name", model, finished.preprocessing, None, True)
    for without_classifier in (False, True):
        digest = weights_digest(model, without_classifier=without_classifier)
        facts = {**finished.facts, "base_sha256": None, "base_digest": digest}
        same = Run(finished.path, {**finished.config, "facts": facts})
        assert base.differences(same) == []
        facts["base_digest"] = digest[::-1]
        (difference,) = base.differences(same)
        assert digest[::-1] in difference and base.digests[0] in difference


def test_options_of_a_model_are_refused_with_a_run(finished, folder, capsys):
    arguments = ["serve", str(finished.path), "--adapters", str(folder), "--port", "0"]
    assert main([*arguments, "--input-size", "8", "--normalisation", "unit"]) == 1
    error = capsys.readouterr().err
    assert "--input-size and --normalisation" in error and "expected none" in error


def test_folder_that_does_not_exist(finished, tmp_path, capsys):
    arguments = ["serve", str(finished.path), "--port", "0"]
    assert main([*arguments, "--adapters", str(tmp_path / "none")]) == 1
    assert "not a folder" in capsys.readouterr().err
