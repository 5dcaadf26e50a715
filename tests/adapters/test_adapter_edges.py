"""What a review of adapters found: each a bug once."""

import copy
import json
import pickle
import warnings

import numpy as np
import pytest

import tfimm_lora as lora
from tests.adapters.test_adapters import assert_unchanged as unchanged
from tests.adapters.test_adapters import base_like, everything, tuned
from tests.helpers import tiny_models
from tests.helpers.kerases import LEGACY, array, keras, run, weights_file
from tfimm_lora.model.merge import has_lora, lora_layers

layers = keras.layers
SPEC = tiny_models.GENERIC[0]


def update(rank=2, scale=1.0, out=4, width=4, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rank, width)), rng.normal(size=(out, rank))
    return lora.LayerUpdate(a.astype("float32"), b.astype("float32"), scale)


def model_of(*names, width=4):
    x = entry = keras.Input((width,))
    for name in names:
        x = layers.Dense(width, name=name)(x)
    return keras.Model(entry, layers.Dense(3, name="head")(x))


def test_one_adapter_is_one_sequence_of_bytes(tmp_path):
    """safetensors writes metadata in an order of chance, different for each call."""
    layers = {"größe": update(out=3), "b": update(3, 0.3)}
    adapter = lora.Adapter(layers, {"c.weight": np.ones(3)}, ("c",))
    written = set()
    for number in range(8):
        adapter.save(tmp_path / str(number))
        written.add((tmp_path / str(number) / "adapter_model.safetensors").read_bytes())
    assert len(written) == 1
    again = lora.Adapter.load(tmp_path / "0")
    for name, one in adapter.layers.items():
        np.testing.assert_array_equal(again.layers[name].a, one.a)
        assert again.layers[name].scale == one.scale
    np.testing.assert_array_equal(again.weights["c.weight"], np.ones(3))


@pytest.mark.parametrize("rank", [2, 3])
def test_a_layer_whose_name_ends_anothers_keeps_its_scale_and_rank(rank, tmp_path):
    """PEFT's patterns mean every path that ends in them; the first one counts."""
    adapter = lora.Adapter(
        {
            "conv1": update(rank, 0.5),
            "layer1.conv1": update(2, 1.0),
            "layer2.conv1": update(2, 1.0),
        }
    )
    adapter.save(tmp_path)
    assert lora.Adapter.load(tmp_path) == adapter
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert list(config["alpha_pattern"])[-1] == "conv1"


@pytest.mark.parametrize("rank, alpha", [(5, 1), (7, 3), (3, 1), (11, 0.1)])
def test_scales_are_restored_exactly(rank, alpha, tmp_path):
    adapter = lora.Adapter({"a.fc": update(rank, alpha / np.sqrt(rank))})
    adapter.save(tmp_path)
    assert lora.Adapter.load(tmp_path) == adapter


def test_a_disabled_adapter_is_saved_with_its_classifier():
    model = lora.load_adapter(
        SPEC.make(), lora.adapter_of(tuned(SPEC, lora_train_classifier=True))
    )
    adapter = lora.adapter_of(model)
    with lora.disable_adapter(model):
        assert lora.adapter_of(model) == adapter
    assert lora.adapter_of(model) == adapter


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(
    "kept", [dict(lora_train_classifier=True), dict(lora_train_bias="lora_only")]
)
def test_weights_trained_here_stay_in_what_is_saved_later(kept, rank):
    model, x = tuned(SPEC, **kept), SPEC.inputs()
    with pytest.warns(UserWarning, match="stay as they are"):
        lora.load_adapter(model, lora.adapter_of(tuned(SPEC, lora_rank=rank)))
    later = lora.adapter_of(model)
    assert later.weights
    fresh = base_like(model, SPEC)
    np.testing.assert_allclose(
        run(lora.load_adapter(fresh, later), x), run(model, x), rtol=1e-4, atol=1e-5
    )


def test_removing_lora_keeps_or_restores_replaced_weights():
    with_head = lora.adapter_of(tuned(SPEC, lora_train_classifier=True))
    without = lora.adapter_of(tuned(SPEC))
    x = SPEC.inputs()
    model = SPEC.make()
    before, plain = everything(model), run(model, x)
    lora.load_adapter(model, with_head)
    lora.remove_lora(model, merge=False)
    unchanged(model, before)
    np.testing.assert_array_equal(run(model, x), plain)
    lora.load_adapter(model, with_head)
    lora.remove_lora(model)
    head = array(model.get_layer("out").kernel)
    lora.load_adapter(model, without)
    np.testing.assert_array_equal(array(model.get_layer("out").kernel), head)
    assert lora.adapter_of(model).modules == ()


def test_lora_is_not_removed_while_it_is_disabled():
    model = tuned(SPEC)
    for merge in (True, False):
        refused = pytest.raises(ValueError, match="disable_adapter block")
        with refused, lora.disable_adapter(model):
            lora.remove_lora(model, merge=merge)
        assert has_lora(model)


def test_model_from_a_whole_file_has_its_statistics_in_the_adapter(tmp_path):
    model = tuned(SPEC, lora_train_modules=["bn2"])
    model.get_layer("bn2").moving_mean.assign(np.full(6, 0.5))
    adapter = lora.adapter_of(model)
    model.save(str(tmp_path / "m.keras"))
    loaded = keras.models.load_model(str(tmp_path / "m.keras"), compile=False)
    assert set(lora.adapter_of(loaded).weights) == set(adapter.weights)
    np.testing.assert_array_equal(lora.adapter_of(loaded).weights["bn2.running_mean"], 0.5)
    # And it takes an adapter of another rank.
    other = lora.adapter_of(tuned(SPEC, lora_rank=3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora.load_adapter(loaded, other)
    assert {x.rank for x in lora.adapter_of(loaded).layers.values()} == {3}


def test_two_layers_of_one_name_in_the_file_are_refused():
    entry = keras.Input((4,))
    inner = keras.Model(entry, layers.Dense(4, name="fc")(entry), name="block")
    outer = keras.Input((4,))
    x = layers.Dense(4, name="block.fc")(inner(outer))
    model = lora.inject_lora(keras.Model(outer, layers.Dense(3, name="head")(x)))
    with pytest.raises(ValueError, match="'block.fc' would both|both be called 'block.fc'"):
        lora.adapter_of(model)


def test_classifier_and_a_layer_of_its_name_are_distinguished(tmp_path):
    entry = keras.Input((4,))
    inner = keras.Model(entry, layers.Dense(4, name="fc")(entry), name="block")
    outer = keras.Input((4,))
    model = keras.Model(outer, layers.Dense(3, name="fc")(inner(outer)))
    lora.inject_lora(model, lora_train_classifier=True, lora_train_bias="lora_only")
    adapter = lora.adapter_of(model)
    assert adapter.modules == ("fc",) and list(adapter.layers) == ["block.fc"]
    adapter.save(tmp_path)
    assert lora.Adapter.load(tmp_path) == adapter


def test_nothing_left_to_adapt_is_an_error():
    model = model_of("fc1")
    with pytest.raises(ValueError, match="leave no layer to adapt"):
        lora.inject_lora(model, lora_targets=["fc1"], lora_train_modules=["fc1"])
    assert not has_lora(model)


def test_scale_restarts_with_other_weights(tmp_path):
    model = lora.inject_lora(SPEC.make(), lora_rank=2)  # B is zero
    model.save_weights(weights_file(tmp_path))
    for seed, layer in enumerate(lora_layers(model).values()):
        shape = tuple(layer.kernel_lora_b.shape)
        layer.kernel_lora_b.assign(np.random.default_rng(seed).normal(size=shape))
    lora.set_adapter_scale(model, 0.0)
    model.load_weights(weights_file(tmp_path))
    lora.set_adapter_scale(model, 1.0)
    for layer in lora_layers(model).values():
        np.testing.assert_array_equal(array(layer.kernel_lora_b), 0)


def test_an_unbuilt_model_is_an_error():
    model = keras.Sequential([layers.Dense(3)])
    with pytest.raises(ValueError, match="not built"):
        lora.load_adapter(model, lora.Adapter({"fc": update()}))


def test_adapters_are_copied_and_pickled():
    adapter = lora.adapter_of(tuned(SPEC, lora_train_classifier=True))
    for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert twin == adapter
        with pytest.raises(ValueError):
            next(iter(twin.layers.values())).a[...] = 0


@pytest.mark.parametrize(
    "a, b, scale",
    [
        (np.ones((2, 3), int), np.ones((4, 2)), 1.0),
        (np.full((2, 3), np.nan), np.ones((4, 2)), 1.0),
        (np.ones((0, 3)), np.ones((4, 0)), 1.0),
        (np.ones((2, 3)), np.ones((4, 2)), np.inf),
    ],
)
def test_updates_that_no_file_could_hold_are_refused(a, b, scale):
    with pytest.raises(ValueError, match="finite floating point"):
        lora.LayerUpdate(a, b, scale)


def test_an_edited_card_is_kept(tmp_path):
    adapter = lora.Adapter({"fc": update()})
    adapter.save(tmp_path)
    assert "Written by tfimm_lora" in (tmp_path / "README.md").read_text()
    adapter.save(tmp_path)
    (tmp_path / "README.md").write_text("My project")
    adapter.save(tmp_path)
    assert (tmp_path / "README.md").read_text() == "My project"


def test_targets_may_be_gone_through_once():
    model = lora.inject_lora(SPEC.make(), lora_targets=(n for n in ("hidden", "pw")))
    assert set(lora_layers(model)) == {"hidden", "pw"}
    with pytest.raises(TypeError, match="lora_use_rslora='false'"):
        lora.LoRAConfig(lora_use_rslora="false")
    with pytest.raises(ValueError, match="not a regular expression"):
        lora.LoRAConfig(lora_rank_pattern={"(?i)FC1": 3})


def test_layers_of_one_path_have_adapters_of_their_own():
    """Two layers called "fc" in one list: the second is "fc#2"."""
    entry = keras.Input((4,))
    block = Twins(name="blk")
    model = keras.Model(entry, layers.Dense(3, name="head")(block(entry)))
    lora.inject_lora(model, lora_rank=2)
    paths = set(lora_layers(model))
    assert paths == {"blk/fc", "blk/fc#2"}
    adapter = lora.adapter_of(model)
    one = {m: u for m, u in adapter.layers.items() if m.endswith("#2")}
    wide = {m: update(3 if m.endswith("#2") else 2, 0.5, seed=1) for m in adapter.layers}
    for layers_of in (one, wide):
        lora.load_adapter(model, lora.Adapter(layers_of))
        given = lora.adapter_of(model)
        assert {m: u.rank for m, u in given.layers.items()} == {
            m: u.rank for m, u in layers_of.items()
        }


class Twins(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [layers.Dense(4, name="fc") for _ in range(2)]

    def build(self, shape):
        for part in self.parts:
            if not part.built:
                part.build(shape)
        super().build(shape)

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


@pytest.mark.skipif(not LEGACY, reason="tfimm needs legacy Keras")
@pytest.mark.parametrize("train_bias", ["none", "all"])
def test_swin_of_four_stages_and_modules_of_renamed_layers(train_bias, tmp_path):
    """timm's names of today for one stage are the old ones of another."""
    from tests.helpers.tiny_architectures import ARCHITECTURES, digits

    tiny = ARCHITECTURES["swin"]
    changes = dict(nb_blocks=(1, 1, 1), nb_heads=(1, 1, 2), input_size=(32, 32))
    base = tiny.make(**changes)
    x = digits(2, (32, 32))[0]
    model = lora.convert_to_lora_model(
        base,
        lora_rank=2,
        lora_use_rslora=True,
        lora_alpha=3,
        lora_train_bias=train_bias,
        lora_train_modules=["layers/0/downsample"],
    )
    for seed, variable in enumerate(model.trainable_weights):
        noise = np.random.default_rng(seed).normal(size=tuple(variable.shape))
        variable.assign_add(0.1 * noise.astype("float32"))
    lora.save_adapter(model, tmp_path)
    assert any(m.startswith("layers.1.downsample") for m in lora.adapter_of(model).modules)
    lora.load_adapter(base, tmp_path)
    np.testing.assert_allclose(run(base, x), run(model, x), rtol=1e-5, atol=1e-6)
    assert lora.adapter_of(base) == lora.adapter_of(model)
    # Into a model of the LoRA class with rsLoRA: the adapter's own scale, to the bit.
    other = lora.convert_to_lora_model(tiny.make(**changes), lora_rank=3, lora_use_rslora=True)
    lora.load_adapter(other, tmp_path)
    assert other.cfg.lora_use_rslora is False
    theirs = lora.adapter_of(model).layers
    for module, mine in lora.adapter_of(other).layers.items():
        assert mine == theirs[module]


@keras.saving.register_keras_serializable(package="tests")
class TwoOfOneName(layers.Layer):
    def build(self, shape):
        self.one = self.add_weight(name="scale", shape=(4,), initializer="ones")
        self.two = self.add_weight(name="scale", shape=(4,), initializer="ones")
        super().build(shape)

    def call(self, x):
        return x * self.one + self.two


def test_weights_of_one_name_matter_only_where_they_are_trained():
    entry = keras.Input((4,))
    x = TwoOfOneName(name="own")(layers.Dense(4, name="fc")(entry))
    model = keras.Model(entry, layers.Dense(3, name="head")(x))
    lora.inject_lora(model, lora_rank=2)
    assert list(lora.adapter_of(model).layers) == ["fc"]
    lora.load_adapter(model, lora.adapter_of(model))
    lora.remove_lora(model)
    lora.inject_lora(model, lora_train_modules=["own"])
    with pytest.raises(ValueError, match="both be called 'own.scale'"):
        lora.adapter_of(model)


@pytest.fixture
def two_adapters(tmp_path):
    """A folder with the adapters "one" and "two" in folders of their own."""
    pytest.importorskip("safetensors")
    update = lora.LayerUpdate(np.ones((2, 4), "float32"), np.ones((3, 2), "float32"))
    for name in ("one", "two"):
        lora.Adapter({"fc": update}).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    "subfolder, error, message",
    [
        ("three", FileNotFoundError, "subfolder='three'.*one, two.*subfolder='one'"),
        ("../two", ValueError, "inside the path"),
        ("/two", ValueError, "inside the path"),
        (3, TypeError, "subfolder=3; expected a string"),
    ],
)
def test_a_wrong_subfolder_is_named(two_adapters, subfolder, error, message):
    with pytest.raises(error, match=message):
        lora.Adapter.load(two_adapters, subfolder=subfolder)
    with pytest.raises((ValueError, TypeError)):
        lora.Adapter.load("hf://user/repo", subfolder="../x" if error is not TypeError else 3)


def test_options_of_a_path_are_not_dropped_where_there_is_none(two_adapters):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="fc")])
    adapter = lora.Adapter.load(two_adapters, subfolder="one")
    with pytest.raises(TypeError, match="Received subfolder with an Adapter"):
        lora.load_adapter(model, adapter, subfolder="two")
    assert [type(layer).__name__ for layer in model.layers] == ["Dense"]


def test_a_model_that_is_not_built_is_named(two_adapters):
    unbuilt = keras.Sequential([keras.layers.Dense(3, name="fc")], name="unbuilt")
    adapter = lora.Adapter.load(two_adapters, subfolder="one")
    update = adapter.layers["fc"]
    dora = lora.Adapter(
        {"fc": lora.LayerUpdate(update.a, update.b, magnitude=np.ones(3, "float32"))}
    )
    for use in (
        lambda: lora.combination_errors(dora, [dora], model=unbuilt),
        lambda: lora.load_adapter(unbuilt, adapter),
        lambda: lora.AdapterBank(unbuilt, {"one": adapter}),
        lambda: adapter.summary(unbuilt),
    ):
        with pytest.raises(ValueError, match="'unbuilt', which is not built"):
            use()
