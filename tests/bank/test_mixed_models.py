"""Models of tfimm, keras.applications and keras_hub in a bank."""

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.banks import assert_rows, outputs_alone, random_adapter
from tests.helpers.kerases import BACKEND, LEGACY, keras, normal
from tests.helpers.selection import nightly_except

if LEGACY:
    from tests.helpers.tiny_architectures import ARCHITECTURES as MODELS
else:
    from tests.helpers import keras_hub_models

    MODELS = {
        model.name: model
        for model in keras_hub_models.TASKS
        if model.name.endswith("ImageClassifier")
    }

#: Whose convolutions standardise their kernels.
STANDARDISED = ("resnetv2", "vit_hybrid")
#: That does not take one picture alone.
OTHERS = ("segment_anything",)

KINDS = {
    "plain": dict(),
    "classifier": dict(lora_rank=3, lora_train_classifier=True),
    "dora": dict(lora_use_dora=True, lora_train_bias="lora_only"),
}


def check(model, x, others=None, kinds=KINDS):
    """Compare a mixed batch with each adapter alone."""
    adapters = {n: random_adapter(model, i, 0.1, **k) for i, (n, k) in enumerate(kinds.items())}
    expected = {n: outputs_alone(model, adapters.get(n), x) for n in (*adapters, None)}
    for name, (adapter, outputs) in (others or {}).items():
        adapters[name], expected[name] = adapter, outputs
    names = ([*adapters, None] * len(x))[: len(x)]
    with lora.AdapterBank(model, adapters) as bank:
        assert_rows(bank.predict(x, names), names, expected)
        assert_rows(bank.predict(x, names[:1] * len(x)), names[:1] * len(x), expected)


def of_other_classes(model, other, x):
    """An adapter with a classifier of other classes, and its outputs."""
    lora.transfer_weights(model, other, weights_to_ignore=None if LEGACY else ["^logits/"])
    adapter = random_adapter(other, 9, 0.1, lora_train_classifier=True)
    return {"other": (adapter, outputs_alone(other, adapter, x))}


@pytest.mark.parametrize(
    "name",
    nightly_except(
        [n for n in MODELS if n not in (*STANDARDISED, *OTHERS)],
        ("deit_distilled", "swin", "seresnext")
        if LEGACY
        else ("MobileNetImageClassifier", "ViTImageClassifier"),
    ),
)
def test_each_example_is_what_its_adapter_alone_gives(name):
    if not LEGACY:
        return check(MODELS[name].make(), MODELS[name].inputs(count=4))
    tiny = MODELS[name]
    model, x = tiny.make(), normal(5, *tiny.size, 3)
    kinds = dict(KINDS)
    if name in ("vit", "deit_distilled", "swin"):
        kinds["query_and_value"] = dict(lora_qkv="qv")
    others = of_other_classes(model, tiny.make(nb_classes=5), x)
    check(model, x, others, kinds)


@pytest.mark.skipif(not LEGACY, reason="of tfimm models")
@pytest.mark.parametrize("name", nightly_except(STANDARDISED, ("resnetv2",)))
def test_convolutions_that_standardise_their_kernels_are_refused(name):
    model = MODELS[name].make()
    with pytest.raises(ValueError, match=r"targets=.*standardises its kernel.*Leave them out"):
        lora.AdapterBank(model, targets="all")
    adapter = random_adapter(model, lora_targets="all", lora_rank=1)
    with pytest.raises(ValueError, match="Adapter 'a': .*conv.* standardises its kernel"):
        lora.AdapterBank(model, {"a": adapter})
    lora.AdapterBank(model)  # without these layers


@pytest.mark.skipif(not LEGACY, reason="of a tfimm model")
def test_adapters_with_the_names_of_transformers(tmp_path):
    tiny = MODELS["vit"]
    model, x = tiny.make(), normal(4, *tiny.size, 3)
    tuned = random_adapter(model, 1, lora_targets=["qkv", "fc1"], lora_train_classifier=True)
    named = lora.translate_adapter(tuned, "transformers", dialect="v4")
    assert any("encoder.layer.0" in module for module in named.layers)
    named.save(tmp_path)
    expected = {"a": outputs_alone(model, named, x), None: outputs_alone(model, None, x)}
    bank = lora.AdapterBank(model, {"a": named}, max_rank=6)
    bank.load("b", tmp_path)
    expected["b"] = expected["a"]
    names = ["a", None, "b", "a"]
    assert_rows(bank.predict(x, names), names, expected)


@pytest.mark.skipif(LEGACY, reason="keras_hub runs on Keras 3")
def test_adapters_with_the_names_of_timm():
    model = MODELS["ViTImageClassifier"].make()
    x = keras_hub_models.images(count=3)
    adapter = random_adapter(model, 1, lora_targets="attention")
    named = lora.translate_adapter(adapter, "timm", model=model)
    assert "blocks.0.attn.qkv" in named.layers
    expected = {"a": outputs_alone(model, adapter, x), None: outputs_alone(model, None, x)}
    bank = lora.AdapterBank(model, {"a": named})
    assert_rows(bank.predict(x, ["a", None, "a"]), ["a", None, "a"], expected)


@pytest.mark.backends
@pytest.mark.skipif(LEGACY, reason="a convolution as classifier is the same on both Kerases")
@pytest.mark.parametrize(
    "data_format",
    [
        "channels_last",
        pytest.param(
            "channels_first",
            marks=pytest.mark.skipif(BACKEND == "tensorflow", reason="not on the CPU"),
        ),
    ],
)
def test_a_classifier_that_is_a_convolution(data_format):
    """MobileNetV3 classifies with a 1x1 convolution, in the data format of the model."""
    first = data_format == "channels_first"

    def make(classes):
        keras.utils.set_random_seed(1)
        entry = keras.Input((3, 5, 4) if first else (5, 4, 3))
        options = dict(data_format=data_format)
        x = keras.layers.Conv2D(6, 3, activation="relu", name="conv", **options)(entry)
        x = keras.layers.GlobalAveragePooling2D(keepdims=True, **options)(x)
        x = keras.layers.Conv2D(classes, 1, name="logits", **options)(x)
        x = keras.layers.Flatten()(x)
        return keras.Model(entry, keras.layers.Activation("softmax")(x))

    model = make(3)
    x = normal(4, *model.input_shape[1:])
    others = of_other_classes(model, make(5), x)
    kinds = {n: k for n, k in KINDS.items() if n != "dora"}
    adapters = {n: random_adapter(model, i, 0.1, **k) for i, (n, k) in enumerate(kinds.items())}
    expected = {n: outputs_alone(model, adapters.get(n), x) for n in (*adapters, None)}
    adapters["other"], expected["other"] = others["other"]
    names = ["plain", "other", None, "classifier"]
    with lora.AdapterBank(model, adapters) as bank:
        rows = bank.predict(x, names)
    assert_rows(rows, names, {n: np.log(y) for n, y in expected.items()})


@pytest.mark.skipif(LEGACY, reason="it is the same on both Kerases")
@pytest.mark.parametrize("minimalistic", nightly_except([False, True], ["True"], str))
def test_mobilenet_v3(minimalistic):
    model, other = (
        keras.applications.MobileNetV3Small(
            input_shape=(32, 32, 3), weights=None, classes=c, minimalistic=minimalistic
        )
        for c in (3, 5)
    )
    x = 255 * np.random.default_rng(0).random((3, 32, 32, 3)).astype("float32")
    ((adapter, outputs),) = of_other_classes(model, other, x).values()
    expected = {"a": np.log(outputs), None: np.log(outputs_alone(model, None, x))}
    with lora.AdapterBank(model, {"a": adapter}) as bank:
        assert_rows(bank.predict(x, ["a", None, "a"]), ["a", None, "a"], expected)
