"""``export`` of a bank: without this package, every adapter gives what it gives on its own."""

import json
import subprocess
import sys

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import BACKEND, keras, normal, run
from tests.helpers.selection import NIGHTLY_ON_LEGACY

pytestmark = NIGHTLY_ON_LEGACY

on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="needs TensorFlow's graphs")
layers = keras.layers
CLOSE = dict(rtol=1e-4, atol=1e-5)


def model(classes=5):
    keras.utils.set_random_seed(0)
    x = entry = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, strides=2, activation="gelu", name="conv")(x)
    x = layers.Conv2D(8, 3, groups=2, padding="same", name="grouped")(x)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.Dense(6, activation="relu", name="dense")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(entry, layers.Dense(classes, name="head")(x), name="cnn")


def tuned(seed, classes=5, **arguments):
    """A model with an adapter of random values, and the adapter."""
    lora_model = lora.inject_lora(
        model(classes), **{"lora_rank": 2, "lora_train_classifier": True, **arguments}
    )
    rng = np.random.default_rng(seed)
    for variable in lora_model.trainable_variables:
        variable.assign(0.3 * rng.normal(size=tuple(variable.shape)).astype("float32"))
    return lora_model, lora.adapter_of(lora_model)


@pytest.fixture(scope="module")
def alone():
    """The models by the name of their adapter."""
    return {
        "plain": tuned(1),
        "dora": tuned(2, lora_rank=3, lora_alpha=4, lora_use_dora=True),
        "bias/../x": tuned(3, lora_train_bias="lora_only", lora_targets=["conv", "dense"]),
        "two": tuned(4, classes=2),
    }


@pytest.fixture
def bank(alone):
    return lora.AdapterBank(model(), {n: a for n, (_, a) in alone.items()}, capacity=5)


def expected(alone, name, x):
    return run(model() if name == "" else alone[name][0], x[None])[0]


RUN_SAVEDMODEL = """
import json, sys
import numpy as np, tensorflow as tf
folder, x, names = sys.argv[1], np.load(sys.argv[2]), json.loads(sys.argv[3])
signatures = tf.saved_model.load(folder).signatures
def predict(names):
    found = signatures["serving_default"](inputs=x, adapter=tf.constant(names))
    rows = zip(found["outputs"].numpy(), found["classes"].numpy())
    return [row[:n].tolist() for row, n in rows]
def fails(signature, /, **given):
    try:
        signatures[signature](**given)
    except Exception as error:
        return str(error)
    return ""
before = predict(names)
slots = {k: v.numpy().tolist() for k, v in signatures["adapters"]().items()}
given = {"values": tf.constant(np.load(sys.argv[4])), "labels": tf.constant("[]")}
one = {**given, "classes": tf.constant(5)}
signatures["load"](name=tf.constant("new"), **one)
full = fails("load", name=tf.constant("another"), **one)
signatures["unload"](name=tf.constant("plain"))
gone = fails("serving_default", inputs=x[:1], adapter=tf.constant(["plain"]))
classes = fails("load", name=tf.constant("more"), **given, classes=tf.constant(6))
signatures["load"](name=tf.constant("more"), **one)
print(json.dumps({
    "before": before, "after": predict(["more"] * len(x)), "full": full, "gone": gone,
    "classes": classes,
    "ours": "tfimm_lora" in sys.modules, "count": len(slots["names"]),
}))
"""


@on_tensorflow
def test_a_savedmodel_predicts_loads_and_unloads_without_this_package(bank, alone, tmp_path):
    exported = lora.export(bank, tmp_path / "bank", "savedmodel")
    assert exported.format == "savedmodel" and exported.difference < 1e-5
    x, names = normal(6, 8, 8, 3, seed=5), [*alone, "", "dora"]
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "slot.npy", bank.packed("dora"))
    arguments = [str(tmp_path / "bank"), str(tmp_path / "x.npy"), json.dumps(names)]
    done = subprocess.run(
        [sys.executable, "-c", RUN_SAVEDMODEL, *arguments, str(tmp_path / "slot.npy")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for row, name, received in zip(x, names, found["before"]):
        np.testing.assert_allclose(received, expected(alone, name, row), **CLOSE)
    for row, received in zip(x, found["after"]):
        np.testing.assert_allclose(received, expected(alone, "dora", row), **CLOSE)
    assert "no slot is free" in found["full"] and "no such adapter" in found["gone"]
    assert "classes" in found["classes"]
    assert not found["ours"] and found["count"] == 6
    described = json.loads((tmp_path / "bank.json").read_text())
    assert described["adapters"]["two"] == {"classes": 2, "labels": None}


@pytest.mark.long
@on_tensorflow
def test_a_savedmodel_without_dora_refuses_an_adapter_with_it(bank, alone, tmp_path):
    import tensorflow as tf

    slot = bank.packed("dora")
    bank.remove("dora")
    lora.export(bank, tmp_path / "bank", "savedmodel")
    loaded = tf.saved_model.load(str(tmp_path / "bank"))
    with pytest.raises(tf.errors.InvalidArgumentError, match="has DoRA or biases"):
        loaded.signatures["load"](
            name=tf.constant("dora"),
            values=tf.constant(slot),
            classes=tf.constant(5),
            labels=tf.constant("[]"),
        )


@on_tensorflow
def test_onnx_has_one_graph_and_a_file_for_each_adapter(bank, alone, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    exported = lora.export(bank, tmp_path / "bank.onnx")
    assert exported.difference < 1e-4
    x = normal(2, 8, 8, 3, seed=6)
    session = onnxruntime.InferenceSession(str(tmp_path / "bank.onnx"))
    folder = tmp_path / "bank.adapters"
    files = {"": None, **{n: f"{n.replace('/', '%2F')}.onnx_adapter" for n in alone}}
    assert {file.name for file in folder.iterdir()} == {f for f in files.values() if f}
    for name, file in files.items():
        adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
        if file is not None:
            adapter.Load(str(folder / file))
            options.add_active_adapter(adapter)
        (outputs,) = session.run(None, {"inputs": x}, options)
        wanted = np.stack([expected(alone, name, row) for row in x])
        np.testing.assert_allclose(outputs[:, : wanted.shape[1]], wanted, rtol=1e-3, atol=1e-4)
        assert np.isneginf(outputs[:, wanted.shape[1] :]).all()


@pytest.mark.long
@on_tensorflow
def test_a_softmax_gives_probabilities(tmp_path):
    import tensorflow as tf

    base = model()
    soft = keras.Model(base.input, layers.Softmax(name="soft")(base.output))
    made = lora.AdapterBank(soft, {"a": tuned(1)[1]}, max_classes=7)
    x = normal(2, 8, 8, 3)
    rows = made.predict(x, ["a", None])
    exported = lora.export(made, tmp_path / "bank", "savedmodel")
    assert exported.returns == "probabilities"
    serve = tf.saved_model.load(str(tmp_path / "bank")).signatures["serving_default"]
    outputs = serve(inputs=x, adapter=tf.constant(["a", ""]))["outputs"].numpy()
    np.testing.assert_array_equal(outputs[:, 5:], 0)
    for row, output in zip(rows, outputs):
        np.testing.assert_allclose(row.probabilities, output[:5], **CLOSE)


@pytest.mark.long
@on_tensorflow
def test_pictures_with_the_preprocessing_in_the_file(bank, alone, tmp_path):
    import tensorflow as tf

    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    preprocessing = lora.Preprocessing((8, 8), mean, std)
    lora.export(
        bank,
        tmp_path / "bank",
        "savedmodel",
        preprocessing=preprocessing,
        include_preprocessing=True,
    )
    pictures = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3)).astype("float32")
    serve = tf.saved_model.load(str(tmp_path / "bank")).signatures["serving_default"]
    found = serve(pictures=pictures, adapter=tf.constant(["plain"]))["outputs"].numpy()
    normalized = (pictures / 255 - np.array(mean, "float32")) / np.array(std, "float32")
    wanted = expected(alone, "plain", normalized[0].astype("float32"))
    np.testing.assert_allclose(found[0], wanted, **CLOSE)


@on_tensorflow
@pytest.mark.parametrize(
    "path, arguments, message",
    [
        ("b.keras", {}, "expected 'savedmodel' or 'onnx'"),
        ("b.tflite", {}, "expected 'savedmodel' or 'onnx'"),
        ("b", {"format": "savedmodel", "labels": ["a"]}, "labels=.* with a bank"),
        ("b", {"format": "savedmodel", "probabilities": True}, "probabilities=True with a"),
        ("b.onnx", {"quantize": "int8"}, "quantize='int8' with a bank"),
    ],
)
def test_what_a_bank_cannot_be_is_an_error(bank, tmp_path, path, arguments, message):
    with pytest.raises(ValueError, match=message):
        lora.export(bank, tmp_path / path, **arguments)
    assert not list(tmp_path.iterdir())


@on_tensorflow
def test_a_file_with_other_outputs_is_not_published(bank, tmp_path):
    predict = bank.predict
    bank.predict = lambda inputs, names: [
        row._replace(logits=row.logits + (row.adapter == "dora"))
        for row in predict(inputs, names)
    ]
    with pytest.raises(ValueError, match="differ from those of the bank"):
        lora.export(bank, tmp_path / "bank", "savedmodel")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow can export it")
def test_other_frameworks_say_what_to_do(bank, tmp_path):
    with pytest.raises(ValueError, match="another process with KERAS_BACKEND=tensorflow"):
        lora.export(bank, tmp_path / "bank", "savedmodel")


def test_the_packed_values_are_those_of_the_slot(bank, alone):
    layout = bank.content().layout
    (update,) = (u for m, u in alone["plain"][1].layers.items() if m == "dense")
    a = layout.unpack(bank.packed("plain"), ("dense", "a"))
    np.testing.assert_array_equal(a[:, :2], update.a.T)
    np.testing.assert_array_equal(a[:, 2:], 0)
    gain = layout.unpack(bank.packed(None), ("dense", "gain"))
    np.testing.assert_array_equal(gain, np.ones(6))
