"""The decoder of a segmentation: which features it takes, and what it computes."""

import numpy as np
import pytest
from PIL import Image

import tfimm_lora as lora
from tests.helpers.kerases import LEGACY, array, keras, normal
from tests.helpers.mask_pictures import SIDE, save_model
from tfimm_lora.backend import default_backend
from tfimm_lora.finetuning.base.dense import dense_base
from tfimm_lora.finetuning.base.opened import BaseModel
from tfimm_lora.finetuning.base_model import open_base_model
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.new_decoder import Grid, grid_of, with_decoder
from tfimm_lora.zoo.weights.module_names import ModuleNames


def opened(model):
    size = tuple(model.input_shape[1:3])
    return BaseModel(model, Preprocessing(size, (0.0,) * 3, (1.0,) * 3), False, False, "")


def weights_of(decoder):
    """The weights of a decoder by "layer/weight"."""
    return {
        f"{layer.name}/{w.name.rpartition('/')[2].partition(':')[0]}": array(w)
        for layer in decoder.layers
        for w in layer.weights
    }


def normalized(x, weights, name):
    mean, std = x.mean(-1, keepdims=True), np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return (x - mean) / std * weights[f"{name}/gamma"] + weights[f"{name}/beta"]


def resized(x, size):
    planes = [
        [Image.fromarray(np.ascontiguousarray(one[..., i])) for i in range(x.shape[-1])]
        for one in x.astype("float32")
    ]
    method = Image.Resampling.BILINEAR
    large = [[np.asarray(p.resize(size[::-1], method)) for p in each] for each in planes]
    return np.moveaxis(np.array(large), 1, -1)


@pytest.mark.backends
def test_the_decoder_is_what_its_documentation_says(tmp_path):
    """Of the last sum of the model, and of that at an eighth of the size, by NumPy."""
    save_model(tmp_path / "model.keras")
    classifier = keras.models.load_model(tmp_path / "model.keras", compile=False)
    model = with_decoder(classifier, 4)
    assert model.output_shape == (None, SIDE, SIDE, 4)
    assert classifier_paths(model) == ["pixel_head"]
    decoder = model.get_layer("pixel_head")
    for seed, weight in enumerate(decoder.weights):
        weight.assign(0.3 * normal(*weight.shape, seed=seed) + 0.1)
    x = np.abs(normal(2, SIDE, SIDE, 3))
    maps = [classifier.get_layer(f"block{i}_add").output for i in (3, 2)]
    high, fine = map(array, keras.Model(classifier.inputs[0], maps)(x))
    assert high.shape == (2, 2, 2, 32) and fine.shape == (2, 4, 4, 16)
    w = weights_of(decoder)
    one = normalized(high, w, "norm") @ w["conv/kernel"][0, 0] + w["conv/bias"]
    two = normalized(fine, w, "fine_norm") @ w["fine_conv/kernel"][0, 0] + w["fine_conv/bias"]
    y = np.maximum(resized(one, (4, 4)) + two, 0)
    y = y @ w["classifier/kernel"][0, 0] + w["classifier/bias"]
    np.testing.assert_allclose(array(model(x)), resized(y, (SIDE, SIDE)), rtol=1e-3, atol=1e-4)


@pytest.mark.once
def test_patches_among_tokens():
    assert grid_of(196, (224, 224)) == Grid(0, 14, 14)
    assert grid_of(257, (224, 224)) == Grid(1, 16, 16)
    assert grid_of(198, (224, 224)) == Grid(2, 14, 14)  # with a distillation token
    assert grid_of(5 + 16 * 12, (256, 192)) == Grid(5, 16, 12)  # with four registers
    assert grid_of(130, (224, 224)) is None and grid_of(1, (32, 32)) is None


def test_tokens_become_a_map(tmp_path):
    layers = keras.layers
    inputs = keras.Input((24, 16, 3))
    x = layers.Conv2D(6, 8, strides=8, name="patches")(inputs)
    tokens = layers.Reshape((6, 6), name="tokens")(x)
    x = layers.LayerNormalization(name="norm")(layers.ZeroPadding1D((1, 0))(tokens))
    x = layers.Dense(3)(layers.GlobalAveragePooling1D()(x))
    model = with_decoder(keras.Model(inputs, x), 2)
    assert model.output_shape == (None, 24, 16, 2)
    decoder = model.get_layer("pixel_head")
    tokens = normal(1, 7, 6)
    whole = decoder.get_layer("map").output
    found = array(keras.Model(decoder.inputs[0], whole)(tokens))
    np.testing.assert_array_equal(found, tokens[:, 1:].reshape(1, 3, 2, 6))


@pytest.mark.parametrize("name", ["MobileNetV2", "ConvNeXtTiny", "ResNet50"])
@pytest.mark.nightly
def test_models_of_keras_applications(name):
    model = open_base_model(name, classes=3, input_size=(64, 64), dense=True).model
    assert model.output_shape == (None, 64, 64, 3)
    decoder = model.get_layer("pixel_head")
    assert [tuple(x.shape)[1:3] for x in decoder.inputs] == [(2, 2), (8, 8)]


def test_a_model_that_returns_pixels_gets_a_new_last_layer():
    layers = keras.layers
    inputs = keras.Input((16, 16, 3))
    down = layers.Conv2D(8, 3, strides=2, padding="same", name="down")(inputs)
    up = layers.Conv2DTranspose(8, 3, strides=2, padding="same", name="up")(down)
    y = layers.Conv2D(5, 1, activation="softmax", name="scores")(up)
    unet = keras.Model(inputs, y, name="unet")
    assert classifier_paths(unet) == ["scores"]
    base = dense_base(opened(unet), 3)
    assert base.model.output_shape == (None, 16, 16, 3) and base.new_classifier
    assert classifier_paths(base.model) == ["scores"]
    kept = dense_base(opened(base.model), 3)
    assert kept.model is base.model and not kept.new_classifier
    lora.inject_lora(base.model, lora_rank=2, lora_train_classifier=True)
    assert lora.adapter_of(base.model).modules == ("scores",)


def test_models_without_feature_maps_say_so():
    layers = keras.layers
    flat = keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(3)])
    with pytest.raises(ValueError, match="no layer returns a map of features"):
        with_decoder(flat, 2)
    anything = keras.Input((None, None, 3))
    y = layers.Dense(2)(layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(anything)))
    with pytest.raises(ValueError, match="pictures of any size"):
        with_decoder(keras.Model(anything, y), 2)
    vector = keras.Sequential([keras.Input((8,)), layers.Dense(3)])
    with pytest.raises(ValueError, match="no functional or Sequential model of pictures"):
        with_decoder(vector, 2)
    picture = keras.Input((16, 16, 3))
    good = keras.Model(picture, keras.layers.Conv2D(4, 3, strides=2)(picture))
    for classes, error in ((0, ValueError), ("3", TypeError), (None, TypeError)):
        with pytest.raises(error, match="expected an integer of at least 1"):
            with_decoder(good, classes)
    with pytest.raises(ValueError, match="which has a decoder"):
        with_decoder(with_decoder(good, 3), 5)


@pytest.mark.skipif(not LEGACY, reason="of tfimm")
@pytest.mark.parametrize("name", ["vit", "convnext", "resnet", "efficientnet", "swin", "pvt"])
def test_tfimm_models_keep_their_class_names_and_weights(name):
    from tests.helpers.tiny_architectures import ARCHITECTURES
    from tfimm_lora.zoo.segmentation_classes import tfimm_segmenter

    key = next(key for key in ARCHITECTURES if name in key.lower())
    classifier = ARCHITECTURES[key].make()
    model = tfimm_segmenter(classifier, 4)
    x = normal(1, *classifier.cfg.input_size, 3)
    assert tuple(model(x).shape) == (1, *classifier.cfg.input_size, 4)
    own = {k: w for k, w in named(classifier).items() if "head" not in k}
    new = {k: w for k, w in named(model).items() if "head" not in k}
    shared = own.keys() & new.keys()
    assert new.keys() <= own.keys() and len(shared) > 5
    for key in shared:
        np.testing.assert_array_equal(new[key], own[key])
    lora.inject_lora(model, lora_rank=2, lora_train_classifier=True)
    adapter = lora.adapter_of(model)
    plain = lora.adapter_of(lora.inject_lora(classifier, lora_rank=2))
    assert adapter.layers.keys() == plain.layers.keys()
    again = type(model).from_config(lora.convert_to_regular_model(model).get_config())
    assert tuple(again(x).shape) == (1, *classifier.cfg.input_size, 4)


def named(model):
    names = ModuleNames(model)
    return {weight.key: weight.raw_value() for weight in names.weights}


@pytest.mark.skipif(LEGACY, reason="of keras_hub")
@pytest.mark.parametrize("kind", ["vit", "resnet", "segformer", "deeplab", "dinov2"])
def test_models_of_keras_hub_keep_the_names_of_their_layers(kind, tmp_path):
    from tests.helpers import keras_hub_models as models

    pytest.importorskip("keras_hub")
    made = getattr(models, kind)()
    if kind == "segformer":
        made = models.hub().SegFormerImageSegmenter(made, 5)
    elif kind == "deeplab":
        made = models.hub().DeepLabV3ImageSegmenter(made, 5)
    made.save_to_preset(str(tmp_path / "preset"))
    base = open_base_model(tmp_path / "preset", classes=3, normalisation="unit", dense=True)
    assert base.model.output_shape == (None, *made.input_shape[1:3], 3)
    naming = ModuleNames(base.model).naming
    assert naming is not None and naming.library == "keras_hub"
    head = classifier_paths(base.model)
    assert (head == ["pixel_head"]) == (kind not in ("segformer", "deeplab"))
    lora.inject_lora(base.model, lora_rank=2, lora_train_classifier=True)
    lora.save_adapter(base.model, tmp_path / "adapter")
    x = np.abs(normal(1, *made.input_shape[1:3], 3))
    again = open_base_model(tmp_path / "preset", classes=3, normalisation="unit", dense=True)
    loaded = lora.load_adapter(again.model, tmp_path / "adapter")
    np.testing.assert_allclose(array(loaded(x)), array(base.model(x)), atol=1e-5)
    assert default_backend().is_functional(loaded)
