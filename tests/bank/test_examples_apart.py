"""Models in unusual orders: computed right, or refused, never computed wrongly."""

import types

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.banks import assert_rows, outputs_alone, random_adapter
from tests.helpers.kerases import BACKEND, LEGACY, keras, normal, run
from tests.helpers.selection import NIGHTLY_ON_LEGACY

pytestmark = NIGHTLY_ON_LEGACY

layers = keras.layers
on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")
if LEGACY:
    import tensorflow as tf

    ops = types.SimpleNamespace(
        transpose=tf.transpose,
        concatenate=tf.concat,
        shape=tf.shape,
        mean=tf.reduce_mean,
        stack=tf.stack,
        reshape=tf.reshape,
    )
else:
    ops = keras.ops

NAMES = ["a", None, "b", "a"]


class Odd(keras.Model):
    """A model that calls a dense layer as ``function`` says, and then a head."""

    def __init__(self, function, shape, layer=None, head=None, **kwargs):
        super().__init__(**kwargs)
        self.function = function
        self.fc = layer or layers.Dense(5, activation="tanh", name="fc")
        self.head = head or layers.Dense(3, name="head")
        self(normal(2, *shape))

    def call(self, x, training=False):
        return self.head(self.function(self.fc, x))


def bank_of(model, x, **arguments):
    """A bank with two adapters, and what they give alone."""
    arguments = {"lora_targets": ["fc"], **arguments}
    adapters = {n: random_adapter(model, seed, **arguments) for seed, n in enumerate("ab")}
    expected = {n: outputs_alone(model, adapters.get(n), x) for n in ("a", "b", None)}
    return lora.AdapterBank(model, adapters), expected


# -- refused ---------------------------------------------------------------------------------


def positions_first(fc, x):
    """As in torch's attention: (positions, batch, channels)."""
    return ops.transpose(fc(ops.transpose(x, (1, 0, 2))), (1, 0, 2))[:, 0]


def windows_first(fc, x):
    """The halves of all pictures: first the left ones."""
    y = fc(ops.concatenate([x[:, :2], x[:, 2:]], 0))
    count = ops.shape(x)[0]
    return (y[:count] + 2 * y[count:])[:, 0]


def table(rows):
    """The same for all examples: a table of positions."""
    return lambda fc, x: x[:, 0] + fc(normal(rows, 5, seed=3))[0]


def minus_the_mean(fc, x):
    y = fc(x)[:, 0]
    return y - ops.mean(y, 0, keepdims=True)


def classes_first(fc, x):
    return ops.transpose(fc(x)[:, 0], (1, 0))


REFUSED = {
    "positions_first": (positions_first, (4, 4)),
    "other_positions_first": (positions_first, (6, 4)),
    "windows_first": (windows_first, (4, 4)),
    "table_of_as_many_rows": (table(4), (4, 5)),
    "table": (table(12), (4, 5)),
    "mean_of_batch": (minus_the_mean, (4, 4)),
    "classes_first": (classes_first, (4, 4)),
}
WORDS = "adapter for each|adapters for 4 examples|batch as their first axis"


@pytest.mark.backends
@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_mixes_examples_is_refused(name):
    function, shape = REFUSED[name]
    head = layers.Activation("linear") if name == "classes_first" else None
    model, x = Odd(function, shape, head=head), normal(4, *shape)
    bank, expected = bank_of(model, x)
    for _ in range(2):
        with pytest.raises(ValueError, match=WORDS):
            bank.predict(x, NAMES)
    with pytest.raises(ValueError, match=WORDS):
        bank.model({"inputs": x, "adapter": bank.slots(NAMES)})
    if name != "classes_first":
        # One adapter for all examples needs no order.
        assert_rows(bank.predict(x, ["a"] * 4), ["a"] * 4, expected)
    bank.close()
    np.testing.assert_array_equal(run(model, x), expected[None])


class OfOwn(layers.Dense):
    """A dense layer whose call is not that of Keras."""

    def call(self, x):
        return super().call(x / 2)


def test_a_class_with_a_call_of_its_own_is_refused():
    model = Odd(lambda fc, x: fc(x)[:, 0], (4, 4), OfOwn(5, name="fc"))
    with pytest.raises(ValueError, match=r"targets=\['fc'\].*OfOwn, whose own call"):
        lora.AdapterBank(model, targets=["fc"])
    adapter = random_adapter(model, lora_targets=["fc"])
    with pytest.raises(ValueError, match="'a'.*fc is of the class OfOwn, whose own call"):
        lora.AdapterBank(model, {"a": adapter})
    bank = lora.AdapterBank(model)  # of the classifier alone
    with pytest.raises(ValueError, match="fc is of the class OfOwn"):
        bank.load("a", adapter)
    assert bank.names == ()


def test_a_classifier_with_a_call_of_its_own_is_no_classifier_of_a_bank():
    model = Odd(lambda fc, x: fc(x)[:, 0], (4, 4), head=OfOwn(3, name="head"))
    x = normal(4, 4, 4)
    bank, expected = bank_of(model, x)
    assert_rows(bank.predict(x, NAMES), NAMES, expected)
    bank.close()
    trained = random_adapter(model, lora_targets=["fc"], lora_train_classifier=True)
    with pytest.raises(ValueError, match="head.weight is fully trained"):
        lora.AdapterBank(model, {"a": trained})


class Doubled(layers.LayerNormalization):
    """A normalization that does something after it has added its bias."""

    def call(self, x):
        return 2 * super().call(x)


def test_the_bias_of_a_normalization_with_a_call_of_its_own_is_refused():
    model = Odd(lambda fc, x: fc(x)[:, 0], (4, 4), head=Doubled(name="norm"))
    adapter = random_adapter(model, lora_targets=["fc"], lora_train_bias="all")
    with pytest.raises(ValueError, match=r"norm.bias is trained.*class Doubled, not a norm"):
        lora.AdapterBank(model, {"a": adapter})
    assert not lora.AdapterBank(model).names


class ByKeyword(layers.Layer):
    """A dense layer and a normalization, which is given its inputs by keyword."""

    def __init__(self):
        super().__init__(name="outer")
        self.fc = layers.Dense(5, name="fc")
        self.norm = layers.BatchNormalization(name="norm")

    def call(self, x):
        return self.norm(inputs=self.fc(x))


def test_a_normalization_that_gets_its_inputs_by_keyword():
    model, x = Odd(lambda fc, x: fc(x)[:, 0], (4, 4), ByKeyword()), normal(4, 4, 4)
    bank, expected = bank_of(model, x, lora_train_bias="all")
    with bank:
        assert_rows(bank.predict(x, NAMES), NAMES, expected)


def test_a_head_that_is_tied_to_an_embedding_is_refused():
    class Tied(keras.Model):
        def __init__(self):
            super().__init__()
            self.embed = layers.Embedding(9, 4, name="embed")
            self(np.array([[1, 2]]))

        def call(self, ids, training=False):
            return self.embed(ids)[:, 0] @ ops.transpose(self.embed.embeddings)

    model = Tied()
    adapter = random_adapter(model, lora_targets=["embed"])
    bank = lora.AdapterBank(model, {"a": adapter})
    with pytest.raises(ValueError, match="'embed' cannot use an adapter for each.*tied"):
        bank.predict(np.array([[1, 2], [3, 8]]), ["a", None])


@on_tensorflow
def test_a_layer_in_a_function_that_was_compiled_before_is_refused():
    """It would have been traced without adapters, and run so for every batch."""
    import tensorflow as tf

    class Compiled(layers.Layer):
        def __init__(self):
            super().__init__(name="outer")
            self.fc = layers.Dense(5, name="fc")

        @tf.function
        def apply(self, x):
            return self.fc(x)

        def call(self, x):
            return self.apply(x)

    model = Odd(lambda fc, x: fc(x)[:, 0], (4, 4), Compiled())
    x = normal(4, 4, 4)
    adapter = random_adapter(model, lora_targets=["fc"])
    bank = lora.AdapterBank(model, {"a": adapter})
    run(model, x)
    with pytest.raises(ValueError, match="'a' changes the layers .*fc, where it would have no"):
        bank.predict(x, ["a", None, "a", None])


def test_a_layer_that_is_not_called_is_left_out():
    model = Odd(lambda fc, x: fc(x)[:, 0], (4, 4), layers.Dense(4, name="fc"))
    model.function = lambda fc, x: x[:, 0]
    x = normal(4, 4, 4)
    unchanged = lora.adapter_of(lora.inject_lora(model, lora_targets=["fc"]))
    lora.remove_lora(model, merge=False)
    bank = lora.AdapterBank(model, {"a": unchanged})
    assert len(bank.predict(x, ["a", None, "a", None])) == 4
    fc = unchanged.layers["fc"]
    changed = lora.Adapter({"fc": lora.LayerUpdate(fc.a, fc.b + 1)})
    with pytest.raises(ValueError, match="'b' changes the layers fc"):
        bank.load("b", changed)
    assert bank.names == ("a",)


# -- computed right --------------------------------------------------------------------------


def twice(fc, x):
    return fc(fc(x))[:, 0]


def windows(fc, x):
    """As Swin: the windows of a picture side by side."""
    y = fc(ops.reshape(x, (-1, 2, 4)))
    return ops.reshape(y, (-1, 2, 2, y.shape[-1]))[:, 1, 0]


def over_the_other_axis(fc, x):
    """As in a mixer: the last axis is that of positions."""
    return fc(ops.transpose(x, (0, 2, 1)))[:, 1]


RIGHT = {
    "twice": (twice, layers.Dense(4, activation="tanh", name="fc")),
    "windows": (windows, None),
    "over_the_other_axis": (over_the_other_axis, None),
    "time_distributed": (
        lambda fc, x: fc(x)[:, 1],
        layers.TimeDistributed(layers.Dense(5, name="fc"), name="outer"),
    ),
}


@pytest.mark.backends
@pytest.mark.parametrize("name", RIGHT)
def test_examples_side_by_side_are_computed_right(name):
    function, layer = RIGHT[name]
    model, x = Odd(function, (4, 4), layer), normal(4, 4, 4)
    bank, expected = bank_of(model, x)
    with bank:
        assert_rows(bank.predict(x, NAMES), NAMES, expected)


@on_tensorflow
@pytest.mark.parametrize("train_head", [False, True])
def test_sizes_that_are_not_known_are_computed_right(train_head):
    """PVT's convolutions: the graph does not know the size of their pictures."""

    def pictures(conv, x):
        side = ops.shape(x)[1] // 2
        y = conv(ops.reshape(x, (-1, side, side, 4)))
        return ops.mean(y, (1, 2))

    for options in (dict(strides=2), dict(padding="same", strides=3), dict(padding="same")):
        model = Odd(pictures, (8, 8), layers.Conv2D(5, 3, name="fc", **options))
        x = normal(4, 8, 8)
        bank, expected = bank_of(model, x, lora_train_classifier=train_head)
        with bank:
            assert_rows(bank.predict(x, NAMES), NAMES, expected)
