"""``AdapterBank``: mixed batches of whole models, and what changes a bank."""

import functools

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import tiny_models
from tests.helpers.banks import assert_rows, outputs_alone, random_adapter
from tests.helpers.kerases import BACKEND, LEGACY, array, keras, normal, run, values
from tfimm_lora.backend import backend_of
from tfimm_lora.model.merge import has_lora

layers = keras.layers

SPECS = pytest.mark.parametrize("spec", tiny_models.GENERIC, ids=lambda spec: spec.name)

#: What adapters may have, by name.
KINDS = {
    "plain": dict(),
    "rslora": dict(lora_rank=3, lora_alpha=8, lora_use_rslora=True),
    "dora": dict(lora_use_dora=True),
    "lora_bias": dict(lora_bias=True),
    "loha": dict(lora_rank=2, lora_use_loha=True),
    "bias_only": dict(lora_targets="all", lora_train_bias="lora_only"),
    "bias_all": dict(lora_train_bias="all"),
    "classifier": dict(lora_train_classifier=True, lora_train_bias="all"),
}


def small(classes=3, seed=1, **last):
    """A small model with a hidden layer and a classifier; the same for each call."""
    keras.utils.set_random_seed(seed)
    entry = keras.Input((4,))
    x = layers.Dense(8, activation="tanh", name="fc1")(entry)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.Dense(8, activation="tanh", name="fc2")(x)
    return keras.Model(entry, layers.Dense(classes, name="head", **last)(x), name="small")


X = normal(6, 4, seed=4)


def adapters_of(model, count, **arguments):
    return {f"a{i}": random_adapter(model, i, **arguments) for i in range(count)}


def alone(model, adapters, x=X):
    return {n: outputs_alone(model, adapters.get(n), x) for n in (*adapters, None)}


@pytest.mark.backends
@SPECS
def test_each_example_is_what_its_adapter_alone_gives(spec):
    model, x = spec.make(), spec.inputs(len(KINDS) + 2)
    adapters = {n: random_adapter(model, i, **k) for i, (n, k) in enumerate(KINDS.items())}
    expected = alone(model, adapters, x)
    names = [*KINDS, None, "plain"]
    before = values(model.weights), [type(x) for x in model._flatten_layers()]
    with lora.AdapterBank(model, adapters) as bank:
        assert_rows(bank.predict(x, names), names, expected)
        assert_rows(bank.predict(x, names[::-1]), names[::-1], expected)
        for name in ("dora", "bias_only", "bias_all", None):
            assert_rows(bank.predict(x, [name] * len(x)), [name] * len(x), expected)
        # Outside of the bank the model computes as before.
        np.testing.assert_allclose(run(model, x, training=False), expected[None], atol=1e-6)
    after = values(model.weights), [type(x) for x in model._flatten_layers()]
    assert before[1] == after[1] and not has_lora(model)
    for mine, theirs in zip(before[0], after[0]):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.backends
def test_classifiers_may_have_any_number_of_classes():
    adapters, expected = {}, {None: run(small(), X)}
    for classes in (2, 3, 7, 1000):
        model = small(classes)
        adapters[str(classes)] = random_adapter(model, classes, lora_train_classifier=True)
        expected[str(classes)] = outputs_alone(model, adapters[str(classes)], X)
    names = ["2", None, "1000", "7", "3", "2"]
    with lora.AdapterBank(small(), adapters) as bank:
        rows = bank.predict(X, names)
        assert_rows(rows, names, expected)
        assert [len(row.logits) for row in rows] == [2, 3, 1000, 7, 3, 2]
        assert_rows(bank.predict(X, ["2"] * 6), ["2"] * 6, expected)
        outputs = array(bank.model({"inputs": X, "adapter": bank.slots(names)}))
        assert outputs.shape == (6, 1000) and np.isneginf(outputs[0, 2:]).all()
    bank = lora.AdapterBank(small(), max_classes=5)
    for name in ("2", "3"):
        bank.load(name, adapters[name])
    with pytest.raises(ValueError, match="'7': .* 7 classes, more than max_classes=5"):
        bank.load("7", adapters["7"])
    assert bank.names == ("2", "3")
    assert_rows(bank.predict(X[:2], ["2", "3"]), ["2", "3"], expected)


def test_a_classifier_may_be_adapted_or_have_its_bias_trained():
    """Without being fully trained: LoRA in it, and lora_train_bias="all", which means its bias,
    too."""
    model = small()
    kinds = {
        "lora": dict(lora_targets=["head"], lora_rank=1),
        "dora": dict(lora_targets=["fc1", "head"], lora_use_dora=True, lora_train_bias="all"),
        "bias": dict(lora_train_bias="all"),
    }
    adapters = {n: random_adapter(model, i, **k) for i, (n, k) in enumerate(kinds.items())}
    assert "head.bias" in adapters["bias"].weights
    assert "head.weight" not in adapters["bias"].weights
    expected = alone(model, adapters)
    with lora.AdapterBank(model, adapters) as bank:
        names = [*kinds, None, "bias", "lora"]
        assert_rows(bank.predict(X, names), names, expected)


def test_a_classifier_without_bias():
    model = small(use_bias=False)
    adapters = adapters_of(model, 2, lora_train_classifier=True)
    two = small(2, use_bias=False)
    adapters["two"] = random_adapter(two, 3, lora_train_classifier=True)
    expected = {**alone(model, {n: adapters[n] for n in ("a0", "a1")})}
    expected["two"] = outputs_alone(two, adapters["two"], X)
    with lora.AdapterBank(model, adapters) as bank:
        names = ["a0", "two", None, "a1", "two", "a0"]
        assert_rows(bank.predict(X, names), names, expected)


def without(adapter, *keys):
    weights = {k: x for k, x in adapter.weights.items() if k not in keys}
    return lora.Adapter(adapter.layers, weights)


def test_wrong_classifiers_are_named():
    bank = lora.AdapterBank(small(), max_classes=9)
    five = random_adapter(small(5), lora_train_classifier=True)
    wide = np.zeros((5, 9), "float32")
    wrong = {
        "5 classes, but no head.bias": without(five, "head.bias"),
        "5 classes, but no head.weight": without(five, "head.weight"),
        r"classifiers have \[4, 5\] classes": lora.Adapter(
            five.layers, {**five.weights, "head.bias": np.zeros(4, "float32")}
        ),
        r"head.weight has the shape \(5, 9\), expected \(5, 8\)": lora.Adapter(
            five.layers, {**five.weights, "head.weight": wide}
        ),
        r"head.bias has the shape \(5, 9\), expected \(5,\)": lora.Adapter(
            five.layers, {**five.weights, "head.bias": wide}
        ),
    }
    for words, adapter in wrong.items():
        with pytest.raises(ValueError, match=f"Adapter 'x': .*{words}.*bank is unchanged"):
            bank.load("x", adapter)
        assert bank.names == ()


# -- the outputs -----------------------------------------------------------------------------


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class OwnEnd(keras.Model):
    """A model whose end cannot be read from its layers."""

    def __init__(self, classes=3, end=None):
        super().__init__()
        keras.utils.set_random_seed(1)
        self.fc = layers.Dense(8, activation="tanh", name="fc1")
        self.out = layers.Dense(classes, name="head")
        self.end = end
        self(X)

    def call(self, x, training=False):
        x = self.out(self.fc(x))
        return x if self.end is None else self.end(x)


ENDS = {
    "linear": lambda c: small(c),
    "softmax": lambda c: small(c, activation="softmax"),
    "sigmoid": lambda c: small(c, activation="sigmoid"),
    "own_linear": lambda c: OwnEnd(c),
    "own_softmax": lambda c: OwnEnd(c, keras.activations.softmax),
}


@pytest.mark.parametrize("end", ENDS)
def test_logits_and_probabilities(end):
    adapters, expected = {}, {None: run(ENDS[end](3), X)}
    for name, classes in (("two", 2), ("three", 3)):
        model = ENDS[end](classes)
        adapters[name] = random_adapter(model, classes, lora_train_classifier=True)
        expected[name] = outputs_alone(model, adapters[name], X)
    bank = lora.AdapterBank(ENDS[end](3), adapters)
    bank.load("named", adapters["two"], labels=["cat", "dog"])
    expected["named"] = expected["two"]
    names = ["two", None, "three", "named", "three", None]
    for i, row in enumerate(bank.predict(X, names)):
        output = expected[names[i]][i].astype("float64")
        given = output if end.endswith(("softmax", "sigmoid")) else softmax(output)
        assert row.probabilities.dtype == "float64" and row.logits.dtype == "float32"
        np.testing.assert_allclose(row.probabilities, given, atol=1e-6)
        assert row.activation == ("sigmoid" if end == "sigmoid" else "softmax")
        if end == "softmax":
            np.testing.assert_allclose(row.logits, np.log(output), atol=1e-5)
        elif end == "sigmoid":
            np.testing.assert_allclose(row.logits, np.log(output / (1 - output)), atol=1e-5)
        if names[i] == "named":
            assert row.labels == ("cat", "dog") and row.label == row.labels[output.argmax()]
        else:
            assert row.labels is None and row.label is None


@pytest.mark.backends
def test_outputs_for_each_position_have_the_classes_of_their_adapters():
    """The classes are the last axis, whatever comes before it."""

    def make(classes):
        keras.utils.set_random_seed(1)
        entry = keras.Input((6, 6, 3))
        x = layers.Conv2D(5, 3, padding="same", activation="relu", name="conv")(entry)
        return keras.Model(entry, layers.Dense(classes, name="head")(x))

    x, expected, adapters = normal(4, 6, 6, 3), {}, {}
    for classes in (2, 4):
        model = make(classes)
        adapters[str(classes)] = random_adapter(model, classes, lora_train_classifier=True)
        expected[str(classes)] = outputs_alone(model, adapters[str(classes)], x)
    with lora.AdapterBank(make(3), adapters) as bank:
        names = ["2", "4", "2", "4"]
        rows = bank.predict(x, names)
        assert rows[0].logits.shape == (6, 6, 2)
        assert_rows(rows, names, expected)


def test_classes_that_are_no_axis_of_the_outputs():
    entry = keras.Input((2, 4))
    x = layers.Dense(8, name="fc1")(entry)
    x = layers.Flatten()(layers.Dense(3, name="head")(x))
    model, x = keras.Model(entry, x), normal(2, 2, 4)
    adapters = adapters_of(model, 1)
    expected = alone(model, adapters, x)
    bank = lora.AdapterBank(model, adapters)
    assert_rows(bank.predict(x, ["a0", None]), ["a0", None], expected)
    bank.close()
    bank = lora.AdapterBank(model, adapters, max_classes=5)
    with pytest.raises(ValueError, match=r"shape \(10,\) for an example; expected an axis"):
        bank.predict(x, ["a0", None])


def test_a_model_with_several_outputs_is_refused():
    entry = keras.Input((4,))
    x = layers.Dense(4, name="fc1")(entry)
    model = keras.Model(entry, [layers.Dense(3, name="one")(x), layers.Dense(2, name="two")(x)])
    bank = lora.AdapterBank(model, targets=["fc1"])
    with pytest.raises(ValueError, match="returns 2 outputs; expected a model with one"):
        bank.predict(X, [None] * 6)


@pytest.mark.backends
@pytest.mark.parametrize("kind", ["mixed_bfloat16", "mixed_float16"])
def test_in_16_bits(kind, policy):
    """A small update is not lost beside the kernel, and examples do not mix."""
    policy(kind)
    model = tiny_models.functional()
    x = normal(4, 8, 8, 3)
    adapters = {
        "plain": random_adapter(model, 1, lora_targets="all"),
        "dora": random_adapter(model, 2, lora_use_dora=True),
        "heads": random_adapter(model, 3, lora_train_bias="all", lora_train_classifier=True),
    }
    policy("float32")
    exact = tiny_models.functional()
    lora.transfer_weights(model, exact)
    expected = alone(exact, adapters, x)
    names = ["plain", "dora", None, "heads"]
    with lora.AdapterBank(model, adapters) as bank:
        tolerance = 0.05 if kind == "mixed_bfloat16" else 0.01  # 8 and 11 bits, 8 layers
        assert_rows(bank.predict(x, names), names, expected, tolerance)
        assert_rows(bank.predict(x, ["dora"] * 4), ["dora"] * 4, expected, tolerance)


@pytest.mark.skipif(LEGACY, reason="of the automatic casts of Keras 3")
def test_the_values_of_a_bank_are_not_cast_with_the_weights_of_a_layer(policy):
    """Keras 3 would cast the whole table for every part that a layer reads."""
    policy("mixed_bfloat16")
    backend = backend_of(keras.layers.Layer)
    table = backend.create_table((2, 3), "table")
    backend.write_rows(table, 1, np.full((1, 3), 1.001, "float32"))

    class Reader(layers.Layer):
        def call(self, x):
            return backend.read_rows(table, np.array([1]))

    read = Reader()(np.zeros(1, "float32"))
    assert backend.dtype_of(read) == "float32"
    np.testing.assert_array_equal(array(read), np.float32(1.001))


@pytest.mark.skipif(not LEGACY, reason="Keras 3 converts no conditions")
def test_conditions_over_tensors_in_a_call():
    """As in predict of legacy Keras, whose layers may have them."""
    import tensorflow as tf

    class Condition(layers.Layer):
        def call(self, x):
            if tf.reduce_sum(x[:1]) > 1e9:
                x = 2 * x
            return x

    entry = keras.Input((4,))
    x = layers.Dense(8, name="fc1")(Condition()(entry))
    model = keras.Model(entry, layers.Dense(3, name="head")(x))
    adapters = adapters_of(model, 1)
    expected = alone(model, adapters)
    with lora.AdapterBank(model, adapters) as bank:
        assert_rows(bank.predict(X, ["a0", None] * 3), ["a0", None] * 3, expected)


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8", "int32"])
def test_inputs_of_other_dtypes(dtype):
    model = small()
    x = np.round(10 * np.abs(X)).astype(dtype)
    adapters = adapters_of(model, 1)
    expected = alone(model, adapters, x.astype("float32"))
    with lora.AdapterBank(model, adapters) as bank:
        assert_rows(bank.predict(x, ["a0", None] * 3), ["a0", None] * 3, expected)
        given = bank.predict(x.tolist(), ["a0", None] * 3)
        assert_rows(given, ["a0", None] * 3, expected)


# -- loading and removing --------------------------------------------------------------------


@pytest.mark.backends
@pytest.mark.parametrize("to_folder", [False, True])
@pytest.mark.parametrize("capacity", [1, 2])
def test_more_adapters_than_slots(capacity, to_folder, tmp_path):
    model = small()
    adapters = {
        **adapters_of(model, 4, lora_train_classifier=True, lora_train_bias="all"),
        "plain": random_adapter(model, 7),
    }
    expected = alone(model, adapters)
    folder = tmp_path / "new" / "folder" if to_folder else None
    bank = lora.AdapterBank(model, adapters, capacity=capacity, overflow=folder)
    assert bank.capacity == capacity and bank.names == (*adapters,)
    names = ["a0", "plain", "a2", None, "a3", "a1"]
    for _ in range(2):
        assert_rows(bank.predict(X, names), names, expected)
        assert_rows(bank.predict(X, names[::-1]), names[::-1], expected)
    if to_folder:
        assert len(list(folder.rglob("*.npy"))) == 5 - capacity
    bank.remove("a2")
    bank.remove("plain")
    names = ["a0", "a1", "a3", None, "a0", "a1"]
    assert_rows(bank.predict(X, names), names, expected)
    if to_folder:
        assert len(list(folder.rglob("*.npy"))) == 3 - capacity
    with pytest.raises(ValueError, match=f"3 adapters for a bank of {capacity} slots"):
        bank.slots(["a0", "a1", "a3"])
    bank.close()
    assert not to_folder or not list(folder.iterdir())


def test_an_adapter_of_the_same_name_is_replaced():
    model = small()
    adapters = adapters_of(model, 3)
    expected = alone(model, adapters)
    for capacity in (1, 4):  # from memory, and in its slot
        with lora.AdapterBank(model, {"x": adapters["a0"]}, capacity=capacity) as bank:
            bank.load("y", adapters["a1"])
            bank.load("x", adapters["a2"], labels=["abc"] * 3)
            rows = bank.predict(X, ["x", "y", None] * 2)
            assert bank.names == ("x", "y") and rows[0].labels == ("abc",) * 3
            shown = {"x": expected["a2"], "y": expected["a1"], None: expected[None]}
            assert_rows(rows, ["x", "y", None] * 2, shown)


def test_labels():
    model = small()
    (adapter,) = adapters_of(model, 1).values()
    bank = lora.AdapterBank(model, {"a": adapter})
    assert bank.labels("a") is None and bank.labels(None) is None
    bank.load("b", adapter, labels=("x", "y", "z"))
    assert bank.labels("b") == ("x", "y", "z")
    for labels, error, words in (
        (["x", "y"], ValueError, "2 labels for adapter 'c', which has 3 classes"),
        ("xyz", TypeError, "labels='xyz'; expected a list"),
    ):
        with pytest.raises(error, match=words):
            bank.load("c", adapter, labels=labels)
    with pytest.raises(ValueError, match="'c', which is not in the bank.*'a', 'b'"):
        bank.labels("c")
    with pytest.raises(ValueError, match="'c', which is not in the bank"):
        bank.remove("c")
    bank.load("b", adapter)
    assert bank.labels("b") is None


class Counted(layers.Layer):
    """Counts how often its Python code runs."""

    calls = 0

    def call(self, x):
        Counted.calls += 1
        return x


@pytest.mark.backends
@pytest.mark.skipif(BACKEND == "torch", reason="nothing is traced on torch")
def test_adapters_come_and_go_without_a_trace():
    entry = keras.Input((4,))
    x = Counted()(layers.Dense(8, name="fc1")(entry))
    model = keras.Model(entry, layers.Dense(3, name="head")(x))
    kinds = [dict(), dict(lora_rank=3), dict(lora_train_classifier=True)]
    adapters = {f"a{i}": random_adapter(model, i, **k) for i, k in enumerate(kinds)}
    expected = alone(model, adapters)
    bank = lora.AdapterBank(model, capacity=2, max_rank=3)
    bank.warm_up(X)
    calls = Counted.calls
    for name, adapter in adapters.items():
        bank.load(name, adapter)
        for names in ([name, None] * 3, [name] * 6, [None, name], [name]):
            assert_rows(bank.predict(X[: len(names)], names), names, expected)
    bank.remove("a1")
    bank.load("a1", adapters["a1"])
    names = ["a0", "a1", "a2", None, "a1", "a0"]
    assert_rows(bank.predict(X, names), names, expected)
    assert Counted.calls == calls


# -- errors change nothing -------------------------------------------------------------------


def test_wrong_arguments_leave_the_model_alone(tmp_path):
    model = small()
    adapter = random_adapter(model)
    other = lora.Adapter({"nowhere": next(iter(adapter.layers.values()))})
    (tmp_path / "file").write_text("")
    wrong = (
        (dict(capacity=0), ValueError, "capacity"),
        (dict(max_rank=2.5), TypeError, "max_rank"),
        (dict(max_classes=0), ValueError, "max_classes"),
        (dict(max_classes=2), ValueError, "max_classes=2 for model .*3 classes; expected as"),
        (dict(targets=["nothing"]), ValueError, "nothing"),
        (dict(adapters=[adapter]), TypeError, "type list; expected a dictionary"),
        (dict(adapters={"": adapter}), TypeError, "the name ''.*expected a string"),
        (dict(adapters={3: adapter}), TypeError, "the name 3"),
        (dict(adapters={"a": tmp_path / "no"}), FileNotFoundError, "no"),
        (dict(adapters={"a": other}), ValueError, "'a'.*no layer nowhere"),
        (dict(adapters={"a": adapter}, max_rank=1), ValueError, "rank 2, more than max_rank=1"),
        (
            dict(adapters={"a": adapter}, targets=["fc1"]),
            ValueError,
            "fc2 is not among the tar",
        ),
        (dict(overflow=tmp_path / "file"), OSError, "file"),
    )
    before = values(model.weights), [type(x) for x in model._flatten_layers()]
    for arguments, error, words in wrong:
        with pytest.raises(error, match=words):
            lora.AdapterBank(model, **arguments)
        assert before[1] == [type(x) for x in model._flatten_layers()]
        assert len(model.trainable_weights) == len(model.weights)
    for mine, theirs in zip(before[0], values(model.weights)):
        np.testing.assert_array_equal(mine, theirs)


def test_wrong_calls_leave_the_bank_alone():
    model = small()
    adapters = adapters_of(model, 2)
    expected = alone(model, adapters)
    bank = lora.AdapterBank(model, adapters, capacity=1)
    wrong = (
        (
            lambda: bank.predict(X, ["a0"] * 5),
            ValueError,
            r"5 names for inputs of shape \(6, 4",
        ),
        (lambda: bank.predict(X, ["a0", "b"] * 3), ValueError, "'b', which is not in the bank"),
        (lambda: bank.predict(X, "a0"), TypeError, "names='a0'; expected a list"),
        (lambda: bank.predict(X, [0] * 6), TypeError, "expected a list of names and None"),
        (lambda: bank.predict({"x": X}, ["a0"] * 6), TypeError, "inputs of type dict"),
        (lambda: bank.predict(3.0, ["a0"]), TypeError, "inputs of type float"),
        (lambda: bank.predict(X[:, :3], ["a0", None] * 3), ValueError, "3"),
        (lambda: bank.slots(["a0", "a1"]), ValueError, "2 adapters for a bank of 1 slots"),
        (lambda: bank.slots(["b"]), ValueError, "'b', which is not in the bank"),
        (lambda: bank.slots("a0"), TypeError, "names='a0'"),
        (lambda: bank.load(3, adapters["a0"]), TypeError, "the name 3"),
        (lambda: bank.load("a0", 3), TypeError, "int"),
        (lambda: bank.remove("b"), ValueError, "'b', which is not in the bank"),
        (lambda: bank.remove(None), TypeError, "the name None"),
        (lambda: bank.warm_up("x"), TypeError, "inputs of type str"),
    )
    for call, error, words in wrong:
        with pytest.raises(error, match=words):
            call()
        assert bank.names == ("a0", "a1")
    assert bank.predict(X[:0], []) == []
    names = ["a0", "a1", None] * 2
    assert_rows(bank.predict(X, names), names, expected)


def test_a_disk_that_is_full_loses_no_adapter(tmp_path, monkeypatch):
    model = small()
    adapters = adapters_of(model, 3)
    expected = alone(model, adapters)
    two = {n: adapters[n] for n in ("a0", "a1")}
    bank = lora.AdapterBank(model, two, capacity=1, overflow=tmp_path)

    def full(*args, **kwargs):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        for call in (
            lambda: bank.load("a2", adapters["a2"]),
            lambda: bank.load("a0", adapters["a2"]),
            lambda: bank.predict(X, ["a0", "a1", None] * 2),
        ):
            with pytest.raises(OSError, match="no space"):
                call()
            assert bank.names == ("a0", "a1")
    names = ["a0", "a1", None] * 2
    assert_rows(bank.predict(X, names), names, expected)
    bank.load("a2", adapters["a2"])
    names = ["a0", "a1", "a2"] * 2
    assert_rows(bank.predict(X, names), names, expected)


@pytest.mark.backends
def test_what_is_not_finite_stays_with_its_example():
    model = tiny_models.functional()
    adapters = {n: random_adapter(model, i) for i, n in enumerate("ab")}
    weights = {
        k: 0 * x + np.nan
        for k, x in random_adapter(model, lora_train_classifier=True).weights.items()
    }
    adapters["nan"] = lora.Adapter(adapters["a"].layers, weights)
    x = normal(6, 8, 8, 3)
    expected = alone(model, {n: adapters[n] for n in "ab"}, x)
    x[1], x[3] = np.inf, np.nan
    names = ["a", "b", None, "a", "b", "nan"]
    with lora.AdapterBank(model, adapters) as bank:
        rows = bank.predict(x, names)
    for i in (0, 2, 4):
        scale = np.abs(expected[names[i]]).max()
        np.testing.assert_allclose(rows[i].logits, expected[names[i]][i], atol=1e-4 * scale)
    assert all(np.isnan(rows[i].logits).all() for i in (1, 3, 5))


# -- the model of a bank ---------------------------------------------------------------------


@pytest.mark.backends
def test_the_model_of_a_bank():
    model = small()
    adapters = adapters_of(model, 2, lora_use_dora=True)
    expected = alone(model, adapters)
    bank = lora.AdapterBank(model, {"a0": adapters["a0"]}, max_classes=4)
    routed = bank.model
    assert bank.model is routed
    names = ["a0", None, "a0", None, None, "a0"]
    inputs = {"inputs": X, "adapter": bank.slots(names)}
    given = routed.predict(inputs, verbose=0, batch_size=4)
    assert given.shape == (6, 4) and np.isneginf(given[:, 3]).all()
    for i, name in enumerate(names):
        np.testing.assert_allclose(given[i, :3], expected[name][i], atol=1e-5)
    # Those that are loaded later, too, without a new trace.
    bank.load("a1", adapters["a1"])
    names = ["a1", "a0", None, "a1", "a0", None]
    given = routed.predict({"inputs": X, "adapter": bank.slots(names)}, verbose=0)
    for i, name in enumerate(names):
        np.testing.assert_allclose(given[i, :3], expected[name][i], atol=1e-5)
    with pytest.raises(ValueError, match="training=True for the model of a bank"):
        routed({"inputs": X, "adapter": bank.slots(names)}, training=True)
    with pytest.raises(ValueError, match="cannot be saved"):
        routed.get_config()
    # A number for each example: none of another one is used for it.
    for count in (1, 2, 3, 5, 7):
        with pytest.raises(Exception, match="(?i)shape|reshape|size|elements"):
            routed({"inputs": X, "adapter": np.zeros(count, "int32")})


@pytest.mark.backends
def test_functions_of_the_model_of_a_bank():
    model = small()
    adapters = adapters_of(model, 2)
    expected = alone(model, adapters)
    bank = lora.AdapterBank(model, {"a0": adapters["a0"]})
    routed, names = bank.model, ["a0", None, "a0", None, None, "a0"]
    step = compiled(routed)
    for _ in range(2):
        given = step(X, bank.slots(names))
        for i, name in enumerate(names):
            np.testing.assert_allclose(given[i], expected[name][i], atol=1e-5)
        bank.load("a1", adapters["a1"])
        names = ["a1", "a0", None, "a1", "a0", None]


def compiled(routed):
    """A compiled function of inputs and slots."""
    if BACKEND == "jax":
        import jax

        routed({"inputs": X, "adapter": np.zeros(6, "int32")})

        @jax.jit
        def function(state, x, ids):
            return routed.stateless_call(*state, {"inputs": x, "adapter": ids})[0]

        lists = routed.trainable_variables, routed.non_trainable_variables
        return lambda x, ids: np.asarray(
            function([[v.value for v in variables] for variables in lists], x, ids)
        )
    if BACKEND == "torch":
        return lambda x, ids: array(routed({"inputs": x, "adapter": ids}))
    import tensorflow as tf

    signature = [tf.TensorSpec((None, 4)), tf.TensorSpec((None,), tf.int32)]
    function = tf.function(
        lambda x, ids: routed({"inputs": x, "adapter": ids}), input_signature=signature
    )
    return lambda x, ids: array(function(x, ids))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")
def test_the_model_of_a_bank_with_sizes_that_are_not_known():
    import tensorflow as tf

    entry = keras.Input((None, 4))
    x = layers.GlobalAveragePooling1D()(layers.Dense(8, name="fc1")(entry))
    model = keras.Model(entry, layers.Dense(3, name="head")(x))
    adapters, x = adapters_of(model, 2), normal(3, 5, 4)
    expected = alone(model, adapters, x)
    bank = lora.AdapterBank(model, adapters)
    routed, names = bank.model, ["a0", None, "a1"]
    signature = [tf.TensorSpec((None, None, 4)), tf.TensorSpec((None,), tf.int32)]

    def function():
        return tf.function(
            lambda x, ids: routed({"inputs": x, "adapter": ids}), input_signature=signature
        )

    with pytest.raises(ValueError, match="not known; expected known ones. Call bank.warm_up"):
        function()(x, bank.slots(names))
    bank.warm_up(x[:1])
    given = array(function()(x, bank.slots(names)))
    for i, name in enumerate(names):
        np.testing.assert_allclose(given[i], expected[name][i], atol=1e-5)


# -- the end, and models in models -----------------------------------------------------------


def test_a_closed_bank():
    model = small()
    model.get_layer("norm").trainable = False
    model.call = own_call = functools.partial(type(model).call, model)
    adapters = adapters_of(model, 2)
    base = run(model, X)
    trained = [v.name for v in model.trainable_weights]
    with lora.AdapterBank(model, adapters, capacity=1) as bank:
        assert repr(bank) == "AdapterBank(2 adapters, capacity=1, max_rank=2, max_classes=3)"
        routed, slots = bank.model, bank.slots(["a0"] * 6)
        bank.predict(X, ["a0"] * 6)
    bank.close()
    assert repr(bank) == "AdapterBank(closed)"
    for call in (
        lambda: bank.predict(X, ["a0"] * 6),
        lambda: bank.load("a", adapters["a0"]),
        lambda: bank.remove("a0"),
        lambda: bank.labels("a0"),
        lambda: bank.slots(["a0"]),
        lambda: bank.model,
        lambda: bank.warm_up(X),
        # It would compute without adapters.
        lambda: routed({"inputs": X, "adapter": slots}),
    ):
        with pytest.raises(ValueError, match="bank that is closed"):
            call()
    assert [v.name for v in model.trainable_weights] == trained
    assert model.__dict__["call"] is own_call
    assert not has_lora(model)
    np.testing.assert_array_equal(run(model, X), base)
    # It can be in a bank again, and be trained.
    expected = alone(model, adapters)
    with lora.AdapterBank(model, adapters) as bank:
        names = ["a0", "a1", None] * 2
        assert_rows(bank.predict(X, names), names, expected)
    model.compile("sgd", "mse")
    model.fit(X, normal(6, 3), verbose=0)


def test_a_bank_whose_lora_was_removed_is_an_error():
    model = small()
    bank = lora.AdapterBank(model, adapters_of(model, 1))
    routed, slots = bank.model, bank.slots(["a0"] * 6)
    lora.remove_lora(model, merge=False)
    for call in (
        lambda: bank.predict(X, ["a0"] * 6),
        lambda: bank.warm_up(X),
        lambda: routed({"inputs": X, "adapter": slots}),
    ):
        with pytest.raises(ValueError, match="LoRA was removed from or replaced in model"):
            call()
    bank.close()


def test_merging_the_model_of_a_bank_is_an_error():
    model = small()
    bank = lora.AdapterBank(model, adapters_of(model, 1))
    lora.merge_lora_weights(model)
    with pytest.raises(ValueError, match="adapter for each example: it is merged"):
        bank.predict(X, ["a0", None] * 3)
    lora.unmerge_lora_weights(model)
    assert len(bank.predict(X, ["a0", None] * 3)) == 6


def test_a_model_is_in_one_bank():
    model = small()
    adapters = adapters_of(model, 1)
    bank = lora.AdapterBank(model, adapters)
    with pytest.raises(ValueError, match="has LoRA layers already"):
        lora.AdapterBank(model, adapters)
    with pytest.raises(ValueError, match="has LoRA layers already"):
        lora.inject_lora(model)
    assert len(bank.predict(X, ["a0"] * 6)) == 6


@pytest.mark.backends
def test_banks_of_two_models_and_of_a_model_in_a_model():
    inner, other = small(8, seed=2), small(5, seed=3)
    entry = keras.Input((4,))
    outer = keras.Model(entry, layers.Dense(3, name="top")(inner(entry)))
    whole = run(outer, X)
    mine, theirs = (adapters_of(model, 2) for model in (inner, other))
    expected, of_other = alone(inner, mine), alone(other, theirs)
    names = ["a0", "a1", None] * 2
    with lora.AdapterBank(inner, mine) as one, lora.AdapterBank(other, theirs) as two:
        assert_rows(one.predict(X, names), names, expected)
        assert_rows(two.predict(X, names), names, of_other)
        assert_rows(one.predict(X, names[::-1]), names[::-1], expected)
        np.testing.assert_allclose(run(outer, X), whole, atol=1e-6)
        with pytest.raises(ValueError, match="LoRA"):
            lora.AdapterBank(outer)
    np.testing.assert_array_equal(run(outer, X), whole)
