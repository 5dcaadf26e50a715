"""Cases at the edges, each of which once went wrong without a word."""

import os
import subprocess
import sys

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import tiny_models
from tests.helpers.kerases import (
    BACKEND,
    LEGACY,
    array,
    ids,
    keras,
    normal,
    randomise,
    run,
    values,
)
from tests.helpers.selection import nightly_except, nightly_on_legacy
from tfimm_lora.model.merge import lora_layers

layers = keras.layers


def dense_model(*names, width=8, inputs=8):
    entry = x = keras.Input((inputs,))
    for name in names:
        x = layers.Dense(width, name=name)(x)
    return keras.Model(entry, x)


# -- files in a fresh process ------------------------------------------------------------


@pytest.mark.skipif(BACKEND != "tensorflow", reason="once is enough")
@pytest.mark.parametrize("train_bias", nightly_except(["none", "all"], ["all"]))
@nightly_on_legacy
def test_whole_file_loads_in_a_fresh_process_and_trains_the_same(tmp_path, train_bias):
    model, x = tiny_models.functional(), normal(4, 8, 8, 3)
    lora.inject_lora(model, lora_rank=2, lora_train_bias=train_bias)
    randomise(model)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", run(model, x))
    names = ["model.keras", *(["model.h5", "saved"] if LEGACY else [])]
    for name in names:
        model.save(str(tmp_path / name))
    code = f"""
import sys, numpy as np, tfimm_lora as lora, tensorflow as tf
folder = {str(tmp_path)!r}
x, y = np.load(folder + "/x.npy"), np.load(folder + "/y.npy")
for name in {names!r}:
    model = tf.keras.models.load_model(folder + "/" + name)
    np.testing.assert_allclose(np.array(model(x)), y, rtol=1e-4, atol=1e-5)
    assert len(model.trainable_weights) == {len(model.trainable_weights)}, name
    named = lora.lora_trainable_weights(model, {train_bias!r})
    assert {{id(v) for v in named}} == {{id(v) for v in model.trainable_weights}}
    frozen = [np.array(v) for v in model.non_trainable_weights]
    model.compile("sgd", "mse")
    model.fit(x, y + 1, verbose=0)
    for value, variable in zip(frozen, model.non_trainable_weights):
        assert np.array_equal(value, np.array(variable)), name
    regular = lora.convert_to_regular_model(model)
    lora.remove_lora(model)
    for plain in (regular, model):
        assert len(plain.trainable_weights) == 14, (name, len(plain.trainable_weights))
        assert len(plain.non_trainable_weights) == 4
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_classes_of_one_name_stay_apart_in_files(tmp_path):
    class Dense(keras.layers.Dense):
        def call(self, x):
            return super().call(x) * 2

    entry = keras.Input((8,))
    x = Dense(8, name="mine")(entry)
    x = layers.Dense(8, name="theirs")(x)
    x = Dense(8, name="mine_frozen")(x)
    model = keras.Model(entry, layers.Dense(8, name="theirs_frozen")(x))
    lora.inject_lora(model, lora_targets=["mine", "theirs"])
    randomise(model)
    x = normal(3, 8)
    lora.register_layer_classes(Dense)
    model.save(str(tmp_path / "model.keras"))
    loaded = keras.models.load_model(str(tmp_path / "model.keras"))
    np.testing.assert_allclose(run(loaded, x), run(model, x), rtol=1e-5, atol=1e-5)
    assert [type(x) for x in loaded.layers] == [type(x) for x in model.layers]
    with pytest.raises(TypeError, match="expected a Keras"):
        lora.register_layer_classes(int)


# -- layers of one name, shared layers, several outputs ----------------------------------


class Twins(keras.Model):
    def __init__(self, make):
        super().__init__()
        self.first, self.second = make(), make()
        self.head = layers.Dense(2, name="head")

    def call(self, x):
        return self.head(self.second(self.first(x)))


def test_layers_of_one_name_are_all_adapted_merged_and_restored():
    model, x = Twins(lambda: layers.Dense(8, name="fc")), normal(3, 8)
    run(model, x)
    lora.inject_lora(model, lora_targets=["fc"])
    assert all(isinstance(x, lora.LoRADense) for x in (model.first, model.second))
    randomise(model)
    output = run(model, x)
    lora.merge_lora_weights(model)
    assert model.first.merged and model.second.merged
    np.testing.assert_allclose(run(model, x), output, rtol=1e-4, atol=1e-5)
    lora.remove_lora(model)
    np.testing.assert_allclose(run(model, x), output, rtol=1e-4, atol=1e-5)


def test_weights_of_layers_of_one_name_are_transferred_in_order():
    models = [Twins(lambda: layers.Dense(8, name="fc")) for _ in range(2)]
    x = normal(3, 8)
    for model in models:
        run(model, x)
    lora.transfer_weights(*models)
    np.testing.assert_array_equal(run(models[1], x), run(models[0], x))


def test_variables_of_one_name_in_one_layer_are_transferred_in_order():
    class Pair(layers.Layer):
        def build(self, shape):
            self.one = self.add_weight(name="w", shape=(shape[-1],), initializer="normal")
            self.two = self.add_weight(name="w", shape=(shape[-1],), initializer="normal")

        def call(self, x):
            return x * self.one + self.two

    def make():
        entry = keras.Input((4,))
        return keras.Model(entry, Pair(name="pair")(entry))

    src, dst = make(), make()
    lora.transfer_weights(src, dst)
    for mine, theirs in zip(dst.weights, src.weights):
        np.testing.assert_array_equal(array(mine), array(theirs))


def test_ignored_weights_do_not_shift_the_others():
    def make():
        return keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.Dense(4)])

    src, dst = make(), make()
    kept = array(dst.layers[0].kernel).copy()
    lora.transfer_weights(src, dst, weights_to_ignore=[dst.layers[0].name + "/"])
    np.testing.assert_array_equal(array(dst.layers[0].kernel), kept)
    np.testing.assert_array_equal(array(dst.layers[1].kernel), array(src.layers[1].kernel))


def test_lora_models_with_numbered_names_transfer_their_factors():
    def make():
        model = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.Dense(4)])
        return lora.inject_lora(model, lora_rank=2)

    src, dst, x = make(), make(), normal(3, 4)
    randomise(src)
    lora.transfer_weights(src, dst)
    np.testing.assert_allclose(run(dst, x), run(src, x), rtol=1e-6)


def test_only_the_classifier_is_trained_not_layers_of_a_similar_name():
    backbone = dense_model("fc1", "head")
    entry = keras.Input((8,))
    model = keras.Model(entry, layers.Dense(3, name="head")(backbone(entry)))
    lora.inject_lora(model, lora_train_classifier=True)
    assert isinstance(backbone.get_layer("head"), lora.LoRADense)
    assert type(model.get_layer("head")) is layers.Dense
    assert len(model.trainable_weights) == 2 * 2 + 2


def test_classifier_is_found_through_a_shared_activation():
    relu, entry = layers.ReLU(), keras.Input((8,))
    hidden = relu(layers.Dense(8, name="d1")(entry))
    model = keras.Model(entry, relu(layers.Dense(3, name="d2")(hidden)))
    lora.inject_lora(model, lora_train_classifier=True)
    assert type(model.get_layer("d2")) is layers.Dense
    assert isinstance(model.get_layer("d1"), lora.LoRADense)


def test_every_head_of_a_model_with_several_is_a_classifier():
    entry = keras.Input((8,))
    x = layers.Dense(8, name="body")(entry)
    heads = [layers.Dense(n, name=f"task{n}")(x) for n in (2, 3)]
    model = lora.inject_lora(keras.Model(entry, heads))
    assert list(lora_layers(model)) == ["body"]


def test_training_a_classifier_that_is_not_there_is_an_error():
    entry = keras.Input((4, 4, 3))
    x = layers.Conv2D(4, 3, name="conv")(entry)
    model = keras.Model(entry, layers.LayerNormalization()(x))
    with pytest.raises(ValueError, match="no classifier was found"):
        lora.inject_lora(model, lora_train_classifier=True)
    assert type(model.get_layer("conv")) is layers.Conv2D


# -- parts of adapted models -------------------------------------------------------------


def nested_pair():
    backbone = dense_model("fc1", "fc2")
    entry = keras.Input((8,))
    return backbone, keras.Model(entry, layers.Dense(3, name="head")(backbone(entry)))


def test_injection_into_a_frozen_part_is_refused_and_changes_nothing():
    backbone, model = nested_pair()
    lora.inject_lora(model, lora_targets=["head"])
    named, classes = ids(model.trainable_weights), [type(x) for x in backbone.layers]
    with pytest.raises(ValueError, match="part of a model that LoRA was injected into"):
        lora.inject_lora(backbone, lora_targets=["fc1"])
    assert ids(model.trainable_weights) == named
    assert [type(x) for x in backbone.layers] == classes


def test_single_layer_of_an_adapted_model_is_not_adapted_behind_its_back():
    _, model = nested_pair()
    lora.inject_lora(model, lora_targets=["fc1"])
    head = model.get_layer("head")
    with pytest.raises(ValueError, match="lora_targets"):
        lora.convert_to_lora_layer(head)
    assert type(head).__name__ == "FrozenDense"


def test_a_model_whose_lora_was_removed_can_be_freed():
    backbone, model = nested_pair()
    lora.inject_lora(model, lora_targets=["fc1"])
    lora.remove_lora(backbone)
    lora.remove_lora(model)
    assert type(model.get_layer("head")) is layers.Dense
    assert len(model.trainable_weights) == 6
    lora.inject_lora(model)


def test_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    from tfimm_lora.layers import base

    model = tiny_models.functional()
    found = [type(x) for x in model.layers], [id(v) for v in model.weights]
    trained = ids(model.trainable_weights)
    attach, calls = base.LoRALayer._attach, []

    def failing(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError("on purpose")
        return attach(self, *args, **kwargs)

    monkeypatch.setattr(base.LoRALayer, "_attach", failing)
    with pytest.raises(MemoryError, match="on purpose"):
        lora.inject_lora(model)
    assert ([type(x) for x in model.layers], [id(v) for v in model.weights]) == found
    assert ids(model.trainable_weights) == trained
    monkeypatch.undo()
    lora.inject_lora(model)


@pytest.mark.skipif(not LEGACY, reason="tfimm needs legacy Keras")
def test_lora_is_removed_from_an_architecture_inside_another_model():
    from tfimm.architectures.vit import ViT

    vit = tiny_models.TFIMM[1].make()
    adapted = lora.convert_to_lora_model(vit, lora_rank=2)
    entry = keras.Input((16, 16, 3))
    model = keras.Model(entry, layers.Dense(2, name="new")(adapted(entry)))
    x = normal(2, 16, 16, 3)
    randomise(model)
    output = run(model, x)
    lora.remove_lora(model)
    assert type(adapted) is ViT and type(adapted.cfg) is ViT.cfg_class
    np.testing.assert_allclose(run(model, x), output, rtol=1e-4, atol=1e-5)
    assert len(model.trainable_weights) == len(vit.trainable_weights) + 2


def test_regular_copy_of_a_model_written_with_lora_layers_is_trainable():
    model = keras.Sequential([keras.Input((4,)), lora.LoRADense(8, lora_rank=2)])
    regular = lora.convert_to_regular_model(model)
    assert len(regular.trainable_weights) == 2
    lora.remove_lora(model)
    assert len(model.trainable_weights) == 2


def test_statistics_are_no_trained_variables_after_removal(tmp_path):
    model = lora.inject_lora(tiny_models.functional())
    model.save(str(tmp_path / "model.keras"))
    loaded = keras.models.load_model(str(tmp_path / "model.keras"))
    lora.remove_lora(loaded)
    plain = tiny_models.functional()
    for one, other in zip(loaded.weights, plain.weights):
        assert tuple(one.shape) == tuple(other.shape)
    assert len(loaded.trainable_weights) == len(plain.trainable_weights)


# -- merged models -----------------------------------------------------------------------


def test_values_set_while_merged_win_over_those_kept():
    model, x = lora.inject_lora(tiny_models.functional()), normal(2, 8, 8, 3)
    randomise(model)
    output, raw = run(model, x), model.get_weights()
    lora.merge_lora_weights(model)
    model.set_weights(raw)
    lora.unmerge_lora_weights(model)
    np.testing.assert_allclose(run(model, x), output, rtol=1e-4, atol=1e-5)


# -- other layers ------------------------------------------------------------------------


@pytest.mark.skipif(BACKEND != "tensorflow", reason="float64 is off on JAX")
@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: lora.LoRADense(4, dtype="float64", lora_rank=2), (2, 3, 5)),
        (lambda: lora.LoRAConv2D(4, 3, dtype="float64", lora_rank=2), (2, 5, 5, 3)),
        (
            lambda: lora.LoRAEinsumDense("abc,cd->abd", (None, 4), dtype="float64"),
            (2, 3, 5),
        ),
    ],
)
def test_float64_layers_work(make, shape):
    layer, x = make(), normal(*shape).astype("float64")
    run(layer, x)
    randomise(layer)
    output = run(layer, x)
    assert output.dtype == np.float64
    layer.merge_weights()
    np.testing.assert_allclose(run(layer, x), output, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(LEGACY or not hasattr(layers, "ReversibleEmbedding"), reason="of Keras 3")
def test_reversible_embedding_works_in_both_directions():
    layer = layers.ReversibleEmbedding(9, 4)
    numbers = np.array([[1, 2, 3]])
    run(layer, numbers)
    lora.convert_to_lora_layer(layer, lora_rank=2)
    randomise(layer)
    forth = run(layer, numbers)
    back = run(layer, forth, reverse=True)
    layer.merge_weights()
    np.testing.assert_allclose(run(layer, numbers), forth, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(layer, forth, reverse=True), back, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(layers, "SpectralNormalization"), reason="too old")
def test_spectral_normalisation_stands_still():
    entry = keras.Input((8,))
    x = layers.SpectralNormalization(layers.Dense(8, name="inner"))(entry)
    model = keras.Model(entry, layers.Dense(3, name="head")(layers.Dense(8, name="fc")(x)))
    lora.inject_lora(model, lora_targets=["fc"])
    frozen = model.non_trainable_weights
    still = values(frozen)
    model.compile("sgd", "mse")
    model.fit(normal(4, 8), normal(4, 3), verbose=0)
    for variable, value in zip(frozen, still):
        np.testing.assert_array_equal(array(variable), value)


@nightly_on_legacy
def test_sequences_with_masks_and_recurrent_layers():
    entry = keras.Input((5,), dtype="int32")
    x = layers.Embedding(9, 8, mask_zero=True, name="emb")(entry)
    x = layers.TimeDistributed(layers.Dense(8, name="step"))(x)
    x = layers.Bidirectional(layers.LSTM(4))(x)
    model = keras.Model(entry, layers.Dense(2, name="head")(x))
    numbers = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    before = run(model, numbers)
    lora.inject_lora(model, lora_targets=["emb", "step"])
    np.testing.assert_allclose(run(model, numbers), before, rtol=1e-5, atol=1e-6)
    randomise(model)
    changed = run(model, numbers)
    padded = numbers.copy()
    model.get_layer("emb").kernel_lora_a.assign(normal(9, 4))
    assert np.abs(run(model, padded) - changed).max() > 0
    model.compile("sgd", "mse")
    frozen = model.non_trainable_weights
    still = values(frozen)
    model.fit(numbers, np.ones((2, 2)), verbose=0)
    for variable, value in zip(frozen, still):
        np.testing.assert_array_equal(array(variable), value)


@pytest.mark.skipif(not LEGACY, reason="of legacy Keras' HDF5 files")
def test_weight_file_is_the_same_whatever_is_trained(tmp_path):
    models = [
        lora.inject_lora(tiny_models.functional(), lora_train_bias=bias)
        for bias in ("none", "all", "lora_only")
    ]
    src, x = models[0], normal(2, 8, 8, 3)
    for number, variable in enumerate(src.weights):
        variable.assign(np.abs(normal(*variable.shape, seed=number)))
    src.save_weights(str(tmp_path / "w.h5"))
    src.trainable = False
    src.save_weights(str(tmp_path / "off.h5"))
    for name in ("w.h5", "off.h5"):
        for model in models:
            model.load_weights(str(tmp_path / name))
            np.testing.assert_allclose(run(model, x), run(src, x), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(BACKEND != "torch", reason="of torch")
def test_torch_parameters_agree():
    model, x = tiny_models.functional(), normal(2, 8, 8, 3)
    run(model, x)
    assert list(model.parameters())
    lora.inject_lora(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(model.trainable_weights)
    lora.remove_lora(model)
    assert len(list(model.parameters())) == len(model.weights)


def test_no_targets_means_those_of_the_architecture():
    if not LEGACY:
        pytest.skip("tfimm needs legacy Keras")
    base = tiny_models.TFIMM[0].make()
    named = lora.convert_to_lora_model(base, lora_targets=None)
    assert {p.rpartition("/")[2] for p in lora_layers(named)} == {"fc1", "fc2"}
