"""transfer_weights between models of every kind."""

import dataclasses

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import tiny_models
from tests.helpers.kerases import LEGACY, array, keras, normal, randomise, run, values
from tfimm_lora.model.transfer import adapt_channels


@pytest.mark.parametrize("spec", tiny_models.MODELS, ids=tiny_models.IDS)
def test_every_kind_of_model_takes_the_weights_of_another(spec):
    src, dst, x = spec.make(), spec.make(), spec.inputs()
    for variable in src.weights:
        variable.assign(array(variable) + 0.25)
    kept = values(src.weights)
    assert np.abs(run(src, x) - run(dst, x)).max() > 1e-3
    ignore = ["never_there"]
    lora.transfer_weights(src, dst, weights_to_ignore=ignore)
    np.testing.assert_array_equal(run(dst, x), run(src, x))
    assert ignore == ["never_there"]
    for variable, value in zip(src.weights, kept):
        np.testing.assert_array_equal(array(variable), value)


def test_ignored_weights_stay():
    src, dst = tiny_models.functional(), tiny_models.functional()
    kept = array(dst.get_layer("hidden").kernel).copy()
    lora.transfer_weights(src, dst, weights_to_ignore=["hidden/kernel"])
    np.testing.assert_array_equal(array(dst.get_layer("hidden").kernel), kept)
    np.testing.assert_array_equal(
        array(dst.get_layer("out").kernel), array(src.get_layer("out").kernel)
    )


def small(width=4, hidden="hidden"):
    entry = keras.Input((3,))
    x = keras.layers.Dense(width, name=hidden)(entry)
    return keras.Model(entry, keras.layers.Dense(2, name="out")(x), name="small")


def test_all_problems_in_one_error_and_nothing_is_changed():
    src, dst = small(5, "other"), small(4)
    kept = values(dst.weights)
    with pytest.raises(ValueError) as error:
        lora.transfer_weights(src, dst)
    for words in (
        "missing in the source: hidden/kernel",
        "hidden/bias",
        "out/kernel has shape",
    ):
        assert words in str(error.value)
    for variable, value in zip(dst.weights, kept):
        np.testing.assert_array_equal(array(variable), value)


@pytest.mark.skipif(LEGACY, reason="Keras 3 counts variables without a name")
def test_variables_without_a_name_are_found():
    class Scaled(keras.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=shape[-1:], initializer="ones")
            self.shift = self.add_weight(shape=shape[-1:], initializer="zeros")

        def call(self, x):
            return x * self.scale + self.shift

    def make():
        return keras.Sequential([keras.Input((3,)), Scaled(name="scaled")])

    source, other = make(), make()
    assert source.weights[0].name != other.weights[0].name
    source.set_weights([normal(3), normal(3, seed=1)])
    lora.transfer_weights(source, other)
    for ours, theirs in zip(other.weights, source.weights):
        np.testing.assert_array_equal(array(ours), array(theirs))


def test_unbuilt_models_are_refused():
    with pytest.raises(ValueError, match="src_model.*no weights"):
        lora.transfer_weights(keras.Sequential([keras.layers.Dense(3)]), small())
    with pytest.raises(ValueError, match="dst_model.*no weights"):
        lora.transfer_weights(small(), keras.Sequential([keras.layers.Dense(3)]))


def test_an_update_is_not_lost_on_the_way():
    src = lora.inject_lora(small(), lora_rank=2)
    randomise(src)
    x = normal(4, 3)
    with pytest.raises(ValueError, match="updates of hidden would be lost"):
        lora.transfer_weights(src, small())
    dst = small()
    lora.merge_lora_weights(src)
    lora.transfer_weights(src, dst)
    np.testing.assert_allclose(run(dst, x), run(src, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("src_merged", [False, True])
@pytest.mark.parametrize("dst_merged", [False, True])
def test_between_lora_models_the_update_is_applied_once(src_merged, dst_merged):
    models = [lora.inject_lora(small(), lora_rank=2) for _ in range(2)]
    for seed, model in enumerate(models):
        randomise(model, seed)
    src, dst = models
    x = normal(4, 3)
    expected, factors = run(src, x), values(src.trainable_weights)
    for model, merged in zip(models, (src_merged, dst_merged)):
        if merged:
            lora.merge_lora_weights(model)
    lora.transfer_weights(src, dst)
    np.testing.assert_allclose(run(dst, x), expected, rtol=1e-5, atol=1e-6)
    for variable, value in zip(dst.trainable_weights, factors):
        np.testing.assert_array_equal(array(variable), value)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_first_kernel_for_other_channels(channels):
    kernel = normal(2, 2, 3, 5)
    adapted = adapt_channels(kernel, channels)
    assert adapted.shape == (2, 2, channels, 5) and adapted.dtype == kernel.dtype
    if channels == 3:
        np.testing.assert_array_equal(adapted, kernel)
    elif channels == 1:
        np.testing.assert_allclose(adapted[:, :, 0], kernel.sum(axis=2), rtol=1e-6)
    else:
        for c in range(channels):
            expected = kernel[:, :, c % 3] * 3 / channels
            np.testing.assert_allclose(adapted[:, :, c], expected, rtol=1e-6)


@pytest.mark.skipif(not LEGACY, reason="tfimm needs legacy Keras")
class TestLikeTfimm:
    """The same weights as tfimm's own function gives."""

    @pytest.mark.parametrize(
        "name, changes",
        [
            ("convnext", dict(in_channels=1)),
            ("convnext", dict(in_channels=5, nb_classes=7)),
            ("convnext", dict(nb_classes=0)),
            ("vit", dict(input_size=(24, 32))),
            ("vit", dict(nb_classes=4, in_channels=2)),
        ],
    )
    def test_changed_config(self, name, changes):
        import tfimm

        src = {m.name: m for m in tiny_models.TFIMM}[name].make()
        twins = []
        for transfer in (tfimm.models.transfer_weights, lora.transfer_weights):
            dst = type(src)(dataclasses.replace(src.cfg, **changes))
            dst(dst.dummy_inputs)
            for variable in dst.weights:
                variable.assign(np.full(variable.shape, 0.5, "float32"))
            transfer(src, dst)
            twins.append(dst)
        for theirs, ours in zip(*(m.weights for m in twins)):
            np.testing.assert_allclose(array(ours), array(theirs), rtol=1e-6, err_msg=ours.name)
