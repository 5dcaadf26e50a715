"""``explain`` compared with NumPy, on every kind of model, and its errors."""

import warnings

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import BACKEND, LEGACY, array, keras, normal, randomise
from tfimm_lora.backend import default_backend
from tfimm_lora.explanations.resizing import enlarged
from tfimm_lora.model.state import record_task
from tfimm_lora.model.task_record import TaskRecord

pytestmark = pytest.mark.backends

layers = keras.layers


# -- independent computations ---------------------------------------------------------------


def with_linear_head(units=3, end=None):
    """A map of 4 x 4 places, its mean over the places, and a dense layer."""
    x = entry = keras.Input((8, 8, 2))
    x = layers.Conv2D(5, 3, strides=2, padding="same", activation="tanh", name="map")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(entry, layers.Dense(units, activation=end, name="head")(x))


def numpy_grad_cam(model, x, target, sign):
    """Grad-CAM of that model: y = mean(F) W, so the weights of channels are W / places."""
    convolution, head = model.get_layer("map"), model.get_layer("head")
    kernel, bias = (array(v).astype("float64") for v in convolution.weights)
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    maps = np.zeros((len(x), 4, 4, 5))
    for row in range(4):
        for column in range(4):
            part = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            maps[:, row, column] = np.tanh(np.tensordot(part, kernel, 3) + bias)
    weights = array(head.weights[0]).astype("float64")[:, target] / 16
    return sign((maps * weights[None, None, None] if np.ndim(target) == 0 else None).sum(-1))


def relu(x):
    return np.maximum(x, 0)


@pytest.mark.parametrize("end", [None, "softmax", "sigmoid"])
@pytest.mark.parametrize("method", ["grad_cam", "integrated_gradients"])
def test_maps_are_those_of_numpy(end, method):
    """For this model both methods have the same evidence, whatever follows the logits."""
    model, x = with_linear_head(end=end), normal(3, 8, 8, 2)
    for target in range(3):
        found = lora.explain(model, x, target, method, batch_size=2)
        expected = numpy_grad_cam(model, x, target, relu)
        expected = enlarged(expected, (8, 8))
        expected /= expected.max((1, 2), keepdims=True)
        assert found.layer == "map" and (found.targets == target).all()
        np.testing.assert_allclose(found.maps, expected, atol=1e-5)
    activation = getattr(model.get_layer("head"), "activation", None)
    assert activation.__name__ == (end or "linear")


def test_a_softmax_layer_is_left_out_and_works_afterwards():
    plain = with_linear_head()
    model = keras.Model(plain.input, layers.Softmax()(plain.output))
    x = normal(2, 8, 8, 2)
    before = array(model(x))
    found = lora.explain(model, x, 1)
    np.testing.assert_allclose(found.maps, lora.explain(plain, x, 1).maps, atol=1e-6)
    np.testing.assert_allclose(found.outputs, array(plain(x)), atol=1e-6)
    np.testing.assert_array_equal(array(model(x)), before)


def test_integrated_gradients_sum_up_to_the_change_of_the_output():
    """Of a model that is not linear after its map, as SciPy's quadrature would."""
    x = entry = keras.Input((6, 6, 1))
    x = layers.Conv2D(3, 3, name="map")(x)
    x = layers.Flatten()(x)
    x = layers.Dense(8, activation="tanh", name="hidden")(x)
    model = keras.Model(entry, layers.Dense(1, name="head")(x))
    picture = 0.5 * normal(1, 6, 6, 1)
    kernel, bias = (array(v).astype("float64") for v in model.get_layer("map").weights)
    features = np.zeros((4, 4, 3))
    for row in range(4):
        for column in range(4):
            part = picture[0, row : row + 3, column : column + 3]
            features[row, column] = np.tensordot(part, kernel, 3) + bias
    w1, b1 = (array(v).astype("float64") for v in model.get_layer("hidden").weights)
    w2, _ = (array(v).astype("float64") for v in model.get_layer("head").weights)
    flat, evidence, steps = features.reshape(-1), 0, 50
    for step in range(steps):
        hidden = np.tanh((step + 0.5) / steps * flat @ w1 + b1)
        evidence += w1 @ ((1 - hidden**2) * w2[:, 0]) / steps
    evidence = (flat * evidence).reshape(4, 4, 3).sum(-1)
    change = (np.tanh(flat @ w1 + b1) - np.tanh(b1)) @ w2[:, 0]
    np.testing.assert_allclose(evidence.sum(), change, rtol=1e-3)
    record_task(model, TaskRecord("regression", ("angle",), None, (0.0,), (1.0,)))
    found = lora.explain(model, picture, None, "integrated_gradients", steps=steps)
    expected = enlarged(np.abs(evidence)[None], (6, 6))  # numbers: in both directions
    np.testing.assert_allclose(found.maps, expected / expected.max(), atol=1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="compares with TensorFlow's resize")
def test_maps_are_enlarged_as_by_tensorflow():
    import tensorflow as tf

    maps = np.random.default_rng(0).random((2, 3, 5))
    expected = tf.image.resize(maps[..., None], (16, 21))[..., 0].numpy()
    np.testing.assert_allclose(enlarged(maps, (16, 21)), expected, atol=1e-6)


@pytest.mark.skipif(not LEGACY, reason="in a process with both Kerases, once")
def test_both_kerases_have_the_same_maps_for_the_same_weights():
    import keras as keras3

    def make(keras):
        entry = keras.Input((16, 16, 3))
        x = keras.layers.Conv2D(6, 3, strides=2, activation="relu")(entry)
        x = keras.layers.Conv2D(8, 3, activation="relu", name="map")(x)
        x = keras.layers.Flatten()(x)
        return keras.Model(entry, keras.layers.Dense(4)(x))

    first, second = make(keras), make(keras3)
    second.set_weights(first.get_weights())
    x = normal(3, 16, 16, 3)
    for method in ("grad_cam", "integrated_gradients"):
        maps = [lora.explain(model, x, [0, 3, 2], method).maps for model in (first, second)]
        np.testing.assert_allclose(*maps, atol=1e-4)


def test_with_lora_unmerged_and_merged_the_explanation_is_that_of_the_changed_model():
    x, y = normal(4, 8, 8, 2), [0, 1, 2, 0]
    model = lora.inject_lora(with_linear_head(), lora_rank=2)
    before = lora.explain(model, x, y)
    randomise(model)
    changed = lora.explain(model, x, y)
    lora.merge_lora_weights(model)
    merged = lora.explain(model, x, y)
    assert np.abs(changed.maps - before.maps).max() > 0.1
    np.testing.assert_allclose(merged.maps, changed.maps, atol=1e-4)


# -- layers, and kinds of models ------------------------------------------------------------


def test_another_layer_and_a_nested_model():
    inner = with_linear_head()
    entry = keras.Input((8, 8, 2))
    model = keras.Model(entry, inner(entry))
    x = normal(2, 8, 8, 2)
    found = lora.explain(model, x, 2)
    assert found.layer == f"{inner.name}/map"
    np.testing.assert_allclose(found.maps, lora.explain(inner, x, 2).maps, atol=1e-6)
    assert lora.explain(inner, x, layer="map").layer == "map"


class Subclassed(keras.Model):
    """Two maps, the second of which is added outside of a layer, and a head."""

    def __init__(self):
        super().__init__()
        self.one = layers.Conv2D(4, 3, padding="same", name="one")
        self.two = layers.Conv2D(4, 3, padding="same", name="two")
        self.pool = layers.GlobalAveragePooling2D(name="pool")
        self.head = layers.Dense(3, name="head")

    def call(self, x):
        x = self.one(x)
        return self.head(self.pool(x + self.two(x)))


def test_a_subclassed_model_of_pictures_that_are_not_square():
    model, x = Subclassed(), normal(2, 8, 12, 3)
    found = lora.explain(model, x, 1)
    assert (found.layer, found.grid, found.maps.shape) == ("two", (8, 12), (2, 8, 12))
    assert "call" not in model.two.__dict__


@pytest.mark.skipif(BACKEND == "tensorflow", reason="no convolution with channels first")
def test_channels_first():
    entry = keras.Input((2, 8, 8))
    first = {"data_format": "channels_first"}
    x = layers.Conv2D(5, 3, strides=2, padding="same", activation="tanh", **first)(entry)
    x = layers.GlobalAveragePooling2D(**first)(x)
    model = keras.Model(entry, layers.Dense(3)(x))
    other, x = with_linear_head(), normal(2, 8, 8, 2)
    model.set_weights(other.get_weights())
    maps = lora.explain(model, np.moveaxis(x, -1, 1), 0).maps
    np.testing.assert_allclose(maps, lora.explain(other, x, 0).maps, atol=1e-5)


def test_half_precision(policy):
    if BACKEND == "torch" or LEGACY:
        pytest.skip("bfloat16 on the CPU is tested on Keras 3 with TensorFlow and JAX")
    policy("mixed_bfloat16")
    model = with_linear_head()
    policy("float32")
    exact, x = with_linear_head(), normal(2, 8, 8, 2)
    exact.set_weights(model.get_weights())
    maps = lora.explain(model, x, 0).maps
    # bfloat16 has 8 bits, and differences of features may cancel.
    np.testing.assert_allclose(maps, lora.explain(exact, x, 0).maps, atol=0.1)


@pytest.mark.skipif(not LEGACY, reason="tfimm needs legacy Keras")
@pytest.mark.parametrize(
    "name, layer, grid",
    [
        ("convnext", "stages/3", (2, 2)),
        ("vit", "patch_embed/norm", (2, 2)),
    ],
)
def test_tfimm(name, layer, grid):
    from tests.helpers.tiny_architectures import ARCHITECTURES

    size = {"input_size": (64, 64)} if name == "convnext" else {}  # for more than one place
    model = ARCHITECTURES[name].make(**size)
    x = normal(2, *model.cfg.input_size, 3)
    found = [lora.explain(model, x, target, steps=2) for target in range(3)]
    method = "grad_cam" if name == "convnext" else "integrated_gradients"
    assert {(one.layer, one.grid, one.method) for one in found} == {(layer, grid, method)}
    assert max(one.maps.max() for one in found) == 1


# -- targets --------------------------------------------------------------------------------


def test_targets_are_numbers_or_recorded_labels():
    model, x = with_linear_head(), normal(3, 8, 8, 2)
    record_task(model, TaskRecord("multilabel", ("a", "b", "c"), "sigmoid"))
    mixed = lora.explain(model, x, ["c", 0, None])
    best = array(model(x))[2].argmax()
    assert mixed.targets.tolist() == [2, 0, best] and mixed.labels == ("a", "b", "c")
    for row, target in enumerate((2, 0, int(best))):
        one = lora.explain(model, x[row : row + 1], np.int64(target))
        np.testing.assert_allclose(mixed.maps[row], one.maps[0], atol=1e-5)


def test_a_map_without_evidence_is_zero():
    model, x = with_linear_head(), normal(2, 8, 8, 2)
    kernel, bias = (array(v) for v in model.get_layer("map").weights)
    head = np.full((5, 3), -1.0, "float32")
    model.set_weights([0 * kernel, 0 * bias + 1, head, np.zeros(3, "float32")])
    assert not lora.explain(model, x, 0).maps.any()  # everything speaks against it


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"target": 3}, ValueError, "target=3 for a model with 3 outputs; expected a number f"),
        ({"target": -1}, ValueError, "expected a number from 0 to 2"),
        ({"target": True}, TypeError, "target=True; expected the number or label"),
        ({"target": 1.5}, TypeError, "target=1.5; expected the number or label"),
        ({"target": "cat"}, ValueError, "'cat'; expected a number: the model records no label"),
        ({"target": [1]}, ValueError, "1 targets for 2 pictures"),
        ({"method": "cam"}, ValueError, "method='cam'; expected 'auto', 'grad_cam', 'integrat"),
        ({"layer": "no"}, ValueError, "which does not exist; expected one of.*: .*map"),
        ({"layer": "pool"}, ValueError, "returns no feature map of more than one place"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"steps": 0}, ValueError, "steps=0"),
        ({"pictures": normal(8, 8, 2)}, ValueError, r"shape \(8, 8, 2\).*picture\[None\]"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    model = with_linear_head()
    with pytest.raises(error, match=message):
        lora.explain(model, **{"pictures": normal(2, 8, 8, 2), **arguments})
    assert not any("call" in layer.__dict__ for layer in model.layers)


def test_models_that_cannot_be_explained():
    flat = keras.Sequential(
        [keras.Input((8, 8, 2)), layers.Flatten(), layers.Dense(4), layers.Dense(3)]
    )
    with pytest.raises(ValueError, match="no layer returns a feature map.*convolutional netw"):
        lora.explain(flat, normal(1, 8, 8, 2))
    dense = keras.Sequential([keras.Input((8, 8, 2)), layers.Conv2D(3, 3, padding="same")])
    with pytest.raises(ValueError, match=r"outputs of shape \(1, 8, 8, 3\) for 1 pictures"):
        lora.explain(dense, normal(1, 8, 8, 2))


class EndsInAnUnknownSoftmax(Subclassed):
    def call(self, x):
        y = super().call(x)
        y = default_backend().keras.activations.softmax(y)
        return y


def test_probabilities_of_an_unknown_softmax_are_reported():
    with pytest.warns(UserWarning, match="seems to return probabilities.*expected logits"):
        lora.explain(EndsInAnUnknownSoftmax(), normal(2, 8, 8, 3), 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*probabilities")
        lora.explain(Subclassed(), normal(2, 8, 8, 3), 0)
