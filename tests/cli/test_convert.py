"""``tfimm-lora convert``, and whose names ``tfimm-lora inspect`` shows."""

import dataclasses
import json

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import LEGACY, normal

pytest.importorskip("safetensors")

pytestmark = pytest.mark.once


@pytest.fixture
def theirs(tmp_path):
    """The folder of an adapter with transformers' names."""
    layers = {
        f"vit.encoder.layer.{i}.attention.attention.{name}": lora.LayerUpdate(
            normal(2, 8, seed=i), normal(8, 2, seed=i + 5)
        )
        for i in range(3)
        for name in ("query", "value")
    }
    lora.Adapter(layers, base_model="google/vit-tiny").save(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_convert_there_and_back(theirs, call, tmp_path):
    ours, back = tmp_path / "ours", tmp_path / "back"
    found = json.loads(call("convert", theirs, ours, "--to", "timm", "--json")[0])
    assert found["adapter"] == str(theirs) and found["out"] == str(ours)
    names = {"library": "transformers", "dialect": "v4", "family": "ViT", "prefix": "vit."}
    assert names.items() <= found["before"]["names"].items()
    assert (found["before"]["layers"], found["after"]["layers"]) == (6, 3)
    assert found["after"]["names"]["library"] == "timm"
    assert [*lora.Adapter.load(ours).layers] == [f"blocks.{i}.attn.qkv" for i in range(3)]
    call("convert", ours, back, "--to", "transformers", "--dialect", "v4")
    assert lora.Adapter.load(back) == lora.Adapter.load(theirs)
    call("convert", ours, back, "--to", "transformers", "--prefix", "", "--base-model", "x/y",
         "--overwrite")  # fmt: skip
    assert next(iter(lora.Adapter.load(back).layers)) == "layers.0.attention.q_proj"
    assert lora.Adapter.load(back).base_model == "x/y"


def test_convert_prints_what_it_recognized_and_wrote(theirs, call, tmp_path):
    out, _ = call("convert", theirs, tmp_path / "ours", "--to", "timm")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["recognized"] == "transformers 4's names of ViT behind the prefix 'vit.'"
    assert lines["written"] == "timm's names of ViT"
    assert lines["layers"] == "6 -> 3" and lines["rank"] == "2 -> 4"


def test_convert_replaces_nothing_unasked_and_never_its_input(theirs, call, tmp_path):
    before = {path.name: path.read_bytes() for path in theirs.iterdir()}
    for more in ([], ["--overwrite"]):
        _, err = call("convert", theirs, theirs / ".", "--to", "timm", *more, expect=1)
        assert "the adapter to convert" in err
    run = tmp_path / "run"
    run.mkdir()
    theirs.rename(run / "adapter")
    for output in (run, run / "adapter"):
        call("convert", run, output, "--to", "timm", "--overwrite", expect=1)
    assert {path.name: path.read_bytes() for path in (run / "adapter").iterdir()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    _, err = call("convert", run, tmp_path / "other", "--to", "timm", expect=1)
    assert "--overwrite" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "torch"], "names='torch'; expected one of timm, transformers"),
        (["--to", "transformers", "--dialect", "v3"], "dialect='v3'"),
        (["--to", "timm", "--source-prefix", "x"], "source_prefix='x'"),
    ],
)
def test_convert_refuses_what_cannot_be_done(words, message, theirs, call, tmp_path):
    _, err = call("convert", theirs, tmp_path / "out", *words, expect=1)
    assert message in err and not (tmp_path / "out").exists()


def test_inspect_shows_whose_names_the_layers_have(theirs, call, tmp_path):
    out, _ = call("inspect", theirs)
    assert "transformers 4's names of ViT behind the prefix 'vit.'" in out
    found = json.loads(call("inspect", theirs, "--json")[0])["names"]
    assert found["family"] == "ViT" and found["dialect"] == "v4"
    update = lora.LayerUpdate(normal(2, 8), normal(8, 2))
    lora.Adapter({"fc": update}).save(tmp_path / "other")
    assert "of no known family" in call("inspect", tmp_path / "other")[0]
    assert json.loads(call("inspect", tmp_path / "other", "--json")[0])["names"] is None


@pytest.mark.skipif(LEGACY, reason="the base model is of keras_hub")
def test_convert_takes_the_norms_of_dora_from_the_base_model(theirs, call, tmp_path):
    models = pytest.importorskip("keras_hub").models
    body = models.ViTBackbone((8, 8, 3), 4, 3, 2, 8, 16)
    model = models.ViTImageClassifier(body, num_classes=3)
    model.save(tmp_path / "base.keras")
    plain = lora.Adapter.load(theirs)
    layers = {
        name: dataclasses.replace(update, magnitude=1 + np.abs(normal(8, seed=3)))
        for name, update in plain.layers.items()
    }
    dora = dataclasses.replace(plain, layers=layers)
    dora.save(theirs)
    _, err = call("convert", theirs, tmp_path / "out", "--to", "timm", expect=1)
    assert "--model" in err
    call(
        "convert", theirs, tmp_path / "out", "--to", "timm", "--model", tmp_path / "base.keras"
    )
    assert lora.Adapter.load(tmp_path / "out") == lora.translate_adapter(
        dora, "timm", model=model
    )
