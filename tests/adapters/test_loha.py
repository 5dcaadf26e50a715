"""LoHa: its updates and adapters, by NumPy, and what does not go with it."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tfimm_lora as lora
from tests.helpers.kerases import LEGACY, array, keras, normal, run
from tfimm_lora.adapters.fused import fuse, split
from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.adapters.translation import _in_window
from tfimm_lora.model.merge import lora_layers

CLOSE = dict(rtol=1e-4, atol=1e-5)


def update(rank=2, inputs=(5,), outputs=4, scale=0.75, seed=0, **more):
    shapes = dict(a=(rank, *inputs), b=(outputs, rank, *[1] * (len(inputs) - 1)))
    shapes.update(a2=shapes["a"], b2=shapes["b"])
    random = np.random.default_rng(seed)
    factors = {n: random.normal(size=s).astype("float32") for n, s in shapes.items()}
    return LayerUpdate(**factors, scale=scale, **more)


def delta(x):
    """dW in float64, as the formula says."""
    one, two = (
        b.reshape(len(b), -1).astype("float64") @ a.reshape(len(a), -1).astype("float64")
        for a, b in ((x.a, x.b), (x.a2, x.b2))
    )
    return (x.scale * one * two).reshape(len(x.b), *x.a.shape[1:])


# -- updates ---------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("inputs", [(5,), (5, 3, 3)], ids=["linear", "conv"])
def test_update_is_the_elementwise_product_and_equal_to_one_of_lora(inputs):
    x = update(inputs=inputs, rank=3, outputs=12, kind="conv" if inputs[1:] else "linear")
    expected = delta(x)
    np.testing.assert_allclose(x.delta(), expected, rtol=1e-12)
    plain = x.as_lora()
    assert (plain.rank, x.rank, x.lora_rank) == (9, 3, 9) and not plain.is_loha
    np.testing.assert_allclose(plain.delta(), expected, rtol=1e-5, atol=1e-6)
    assert plain.as_lora() is plain
    matrix = expected.reshape(len(expected), -1)
    singular = np.linalg.svd(matrix, compute_uv=False)[: min(9, *matrix.shape)]
    np.testing.assert_allclose(x.singular_values()[: len(singular)], singular, atol=1e-9)
    assert np.linalg.matrix_rank(matrix) > 3
    assert x.size == 2 * (x.a.size + x.b.size)


@pytest.mark.once
def test_wrong_second_pairs_are_refused():
    x = update()
    for changes, words in (
        (dict(b2=None), "expected a2 of shape"),
        (dict(a2=x.a2[:1]), "expected a2 of shape"),
        (dict(a2=x.a2 * np.nan), "finite"),
        (dict(magnitude=np.ones(4)), "neither a magnitude nor a bias"),
        (dict(kind="embedding"), "for the kind 'embedding'"),
    ):
        values = dict(a=x.a, b=x.b, a2=x.a2, b2=x.b2)
        with pytest.raises(ValueError, match=words):
            LayerUpdate(**{**values, **changes})
    plain = LayerUpdate(x.a, x.b)
    with pytest.raises(ValueError, match="only some updates have a second pair"):
        lora.Adapter({"one": x, "two": plain})
    with pytest.raises(ValueError, match="LoHa for some blocks"):
        fuse({"q": x, "k": plain, "v": plain}, "qkv")


@pytest.mark.once
@pytest.mark.parametrize("chosen", ["qkv", "qv", "k"])
def test_blocks_of_a_fused_projection(chosen):
    parts = {block: update(seed=seed, rank=2) for seed, block in enumerate(chosen)}
    fused = fuse(parts, "qkv")
    rows = dict(zip("qkv", np.split(delta(fused), 3)))
    for block, own in rows.items():
        expected = delta(parts[block]) if block in parts else np.zeros_like(own)
        np.testing.assert_allclose(own, expected, rtol=1e-6, atol=1e-7)
    assert split(fused, "qkv") == parts
    scaled = {**parts, chosen[-1]: update(rank=3, scale=2.5, seed=9)}
    last = np.split(delta(fuse(scaled, "qkv")), 3)["qkv".index(chosen[-1])]
    np.testing.assert_allclose(last, delta(scaled[chosen[-1]]), rtol=1e-5, atol=1e-6)


@pytest.mark.once
def test_untrained_blocks_keep_their_factors():
    """B is zero before training; which ranks belong to a block shows in B2."""
    parts = {
        block: LayerUpdate(x.a, 0 * x.b, a2=x.a2, b2=x.b2)
        for block, x in (("q", update(seed=1)), ("v", update(seed=2)))
    }
    assert split(fuse(parts, "qkv"), "qkv") == parts


@pytest.mark.once
def test_combinations_are_exact_sums():
    one = lora.Adapter({"fc": update(seed=1)})
    two = lora.Adapter({"fc": update(seed=2, rank=3)})
    three = lora.Adapter({"fc": LayerUpdate(np.ones((2, 5)), np.eye(4, 2))})
    both = lora.combine_adapters([one, two, three], [1.0, -2.0, 0.5])
    expected = delta(one.layers["fc"]) - 2 * delta(two.layers["fc"])
    expected = expected + 0.5 * three.layers["fc"].delta()
    np.testing.assert_allclose(both.layers["fc"].delta(), expected, rtol=1e-5, atol=1e-5)
    assert both.layers["fc"].rank == 4 + 9 + 2 and not both.use_loha
    assert lora.combination_errors(both, [one, two, three], [1.0, -2.0, 0.5])["fc"] < 1e-6
    half = lora.Adapter({"fc": dataclasses.replace(one.layers["fc"], scale=0.375)})
    np.testing.assert_allclose(lora.combination_errors(half, [one])["fc"], 0.5, rtol=1e-6)


@pytest.mark.once
def test_in_another_library_a_convolution_may_be_a_linear_layer():
    """The linear layer of a patch has its inputs in the order height, width, channel."""
    conv = update(inputs=(3, 2, 2), kind="conv")
    linear = _in_window(conv, 0)
    assert linear.kind == "linear" and linear.a2.shape == (2, 12)
    expected = delta(conv).transpose(0, 2, 3, 1).reshape(4, 12)
    np.testing.assert_allclose(delta(linear), expected, rtol=1e-6)
    # What PEFT wrote for a convolution looks the same, and has another order.
    with pytest.raises(ValueError, match="does not tell"):
        _in_window(linear, 2)
    assert _in_window(linear, None) is linear


# -- files -----------------------------------------------------------------------------------


def network():
    layers = keras.layers
    keras.utils.set_random_seed(5)
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            layers.Conv2D(4, 3, activation="tanh", name="conv"),
            layers.Conv2D(6, 1, activation="tanh", name="point"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(9, activation="tanh", name="fc"),
            layers.Dense(4, name="head"),
        ]
    )


def tuned(**arguments):
    model = network()
    targets = ["conv", "point", "fc"]
    lora.inject_lora(
        model, lora_rank=2, lora_alpha=3, lora_use_loha=True, lora_targets=targets, **arguments
    )
    for seed, layer in enumerate(lora_layers(model).values()):
        for variable in layer._lora_variables().values():
            variable.assign(array(variable) + normal(*variable.shape, seed=seed))
    return model


X = normal(2, 6, 6, 3, seed=8)


def test_file_has_peft_s_names_and_shapes(tmp_path):
    model = tuned()
    lora.save_adapter(model, tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["alpha"]) == ("LOHA", 2, 3)
    assert "lora_alpha" not in config and "bias" not in config
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.conv.hada_"
    shapes = {key.removeprefix(name): x.shape for key, x in tensors.items() if name in key}
    assert shapes == {"w1_a": (4, 2), "w1_b": (2, 27), "w2_a": (4, 2), "w2_b": (2, 27)}
    layer = model.get_layer("conv")
    one, two = (
        tensors[f"{name}w{n}_a"].astype("float64") @ tensors[f"{name}w{n}_b"] for n in (1, 2)
    )
    change = (1.5 * one * two).reshape(4, 3, 3, 3).transpose(2, 3, 1, 0)
    expected = array(layer._kernel_variable) + change
    np.testing.assert_allclose(layer.merged_kernel(), expected, **CLOSE)
    card = (tmp_path / "README.md").read_text()
    assert "- loha" in card and "PeftModel.from_pretrained" in card
    adapter = lora.Adapter.load(tmp_path)
    assert adapter == lora.adapter_of(model) and adapter.use_loha
    assert adapter.layers["conv"].a.shape == (2, 3, 3, 3)
    assert adapter.not_in_peft() == {}


def test_file_of_peft_without_the_shape_of_the_window(tmp_path):
    model = tuned()
    expected = run(model, X)
    lora.save_adapter(model, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file(load_file(weights), weights)  # without this package's metadata
    adapter = lora.Adapter.load(tmp_path)
    assert adapter.layers["conv"].a.shape == (2, 27)
    fresh = lora.load_adapter(network(), adapter)
    np.testing.assert_allclose(run(fresh, X), expected, **CLOSE)
    # As LoRA the shape must be known.
    plain = lora.combine_adapters([adapter])
    before = network()
    with pytest.raises(ValueError, match="conv is of shape.*combine adapter_of"):
        lora.load_adapter(before, plain)


def test_biases_are_written_in_the_extension(tmp_path):
    model = tuned(lora_train_bias="all")
    model.get_layer("head").bias.assign(np.arange(4.0))
    expected = run(model, X)
    with pytest.raises(ValueError, match="LoHa trains no biases"):
        lora.save_adapter(model, tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()
    lora.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "TFIMM_LORA" and config["bias"] == "all"
    fresh = lora.load_adapter(network(), tmp_path)
    np.testing.assert_allclose(run(fresh, X), expected, **CLOSE)
    with pytest.raises(ValueError, match="LoHa trains no biases"):
        lora.LoRAConfig(
            lora_use_loha=True, lora_train_bias="all", lora_targets=["fc"]
        ).to_peft()


def as_config_of_lora(config):
    for name in ("alpha", "init_weights"):
        del config[name]
    config.update(peft_type="LORA", lora_alpha=3)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda t, c: t.pop("base_model.model.fc.hada_w1_b"), "no hada_w1_b for fc"),
        (lambda t, c: as_config_of_lora(c), "factors of LoHa .* config of LoRA"),
        (lambda t, c: c.update(r=3), "rank 3"),
        (lambda t, c: t.update({"base_model.model.fc.hada_w1_b": np.ones((3, 6))}), "not fit"),
        (
            lambda t, c: t.update({"base_model.model.fc.hada_t1": np.ones((2, 2, 3))}),
            "do not fit",
        ),
        (
            lambda t, c: t.update({"base_model.model.fc.hada_w1_a.default": np.ones((9, 2))}),
            "the name of an adapter, 'default'",
        ),
        (lambda t, c: t.update({"base_model.model.fc.lokr_w1": np.ones(3)}), "not supported"),
        (lambda t, c: c.update(use_magic=True), "use_magic=True"),
        (lambda t, c: c.update(alpha="x"), "alpha='x'"),
        (lambda t, c: c.update(bias="all"), "bias='all'"),
    ],
)
@pytest.mark.once
def test_damaged_files_are_refused(damage, words, tmp_path):
    lora.save_adapter(tuned(), tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, fields = load_file(weights), json.loads(config.read_text())
    damage(tensors, fields)
    save_file({key: np.asarray(x, "float32") for key, x in tensors.items()}, weights)
    config.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=words):
        lora.Adapter.load(tmp_path)


# -- models ----------------------------------------------------------------------------------


@pytest.mark.backends
def test_it_trains_all_four_factors_and_starts_without_effect():
    model = network()
    plain = run(model, X)
    lora.inject_lora(model, lora_rank=2, lora_use_loha=True, lora_targets=["conv", "fc"])
    np.testing.assert_array_equal(run(model, X), plain)
    layer = model.get_layer("fc")
    deviations = {
        name: array(variable).std() for name, variable in layer._lora_variables().items()
    }
    assert deviations["kernel_lora_b"] == 0
    assert 0.5 < deviations["kernel_lora_a"] < 2 and 0.5 < deviations["kernel_lora_a2"] < 2
    assert 0.05 < deviations["kernel_lora_b2"] < 0.2
    model.compile(keras.optimizers.Adam(0.03), "mse")
    y = normal(2, 4, seed=4)
    before = {n: array(v) for n, v in layer._lora_variables().items()}
    first = model.train_on_batch(X, y)
    for _ in range(20):
        last = model.train_on_batch(X, y)
    assert float(last) < 0.7 * float(first)
    for name, variable in layer._lora_variables().items():
        assert np.abs(array(variable) - before[name]).max() > 1e-3, name


@pytest.mark.backends
def test_strength_is_that_of_the_update():
    layer = tuned().get_layer("conv")
    kernel = array(layer._kernel_variable).copy()
    full = layer.merged_kernel() - kernel
    layer.set_strength(0.5)
    np.testing.assert_allclose(layer.merged_kernel() - kernel, 0.5 * full, **CLOSE)
    layer.set_strength(-2)
    np.testing.assert_allclose(layer.merged_kernel() - kernel, -2 * full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [("effective", None), ("factored", None), (None, "whole")])
@pytest.mark.backends
def test_every_form_gives_the_same(form):
    model = tuned()
    expected = run(model, X)
    with lora.use_form(*form):
        again = tuned()
        np.testing.assert_allclose(run(again, X), expected, **CLOSE)


def test_parts_of_a_fused_projection(tmp_path):
    def make():
        keras.utils.set_random_seed(3)
        return keras.Sequential([keras.Input((6,)), keras.layers.Dense(12, name="qkv")])

    x, model = normal(3, 6), make()
    plain = run(model, x)
    arguments = dict(lora_rank=2, lora_use_loha=True, lora_qkv="qv", lora_targets=["qkv"])
    lora.inject_lora(model, **arguments)
    layer = model.get_layer("qkv")
    for seed, variable in enumerate(layer._lora_variables().values()):
        variable.assign(normal(*variable.shape, seed=seed))
    changed = run(model, x)
    update = lora.adapter_of(model).layers["qkv"]
    assert (update.rank, update.lora_rank, update.as_lora().rank) == (4, 2 * 4, 2 * 4)
    np.testing.assert_allclose(update.as_lora().delta(), delta(update), **CLOSE)
    assert update.as_lora().qkv == ("qv", "qkv")
    # As LoRA, whose blocks are separate too.
    fresh = lora.load_adapter(make(), lora.combine_adapters([lora.adapter_of(model)]))
    settings = fresh.get_layer("qkv").lora
    assert (settings.lora_qkv, settings.rank, settings.use_loha) == ("qv", 4, False)
    np.testing.assert_allclose(run(fresh, x), changed, **CLOSE)
    np.testing.assert_allclose(changed[:, 4:8], plain[:, 4:8], rtol=1e-6)
    assert np.abs(changed - plain)[:, [0, 11]].min() > 1e-3
    lora.save_adapter(model, tmp_path, format="peft")
    fresh = lora.load_adapter(make(), tmp_path)
    assert fresh.get_layer("qkv").lora.lora_qkv == "qv"
    np.testing.assert_allclose(run(fresh, x), changed, **CLOSE)


def test_another_start_draws_each_factor_by_itself():
    normal_ = keras.initializers.RandomNormal(stddev=0.3, seed=4)
    for given in ("random_normal", normal_):
        layer = keras.layers.Dense(7)
        run(layer, normal(1, 7))
        lora.convert_to_lora_layer(layer, lora_use_loha=True, lora_initializer=given)
        a, a2, b2 = (array(getattr(layer, f"kernel_lora_{n}")) for n in ("a", "a2", "b2"))
        assert np.abs(a).max() > 0 and np.abs(a - a2).max() > 1e-3
        assert np.abs(a - b2.T).max() > 1e-3 and not array(layer.kernel_lora_b).any()


def test_dropouts_of_peft_are_named_and_no_reason_to_refuse(tmp_path):
    model = tuned()
    lora.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "rank_dropout": 0.2}))
    with pytest.warns(UserWarning, match="rank_dropout=0.2.*without") as caught:
        fresh = lora.load_adapter(network(), lora.Adapter.load(tmp_path))
    assert caught[0].filename == __file__
    np.testing.assert_allclose(run(fresh, X), run(model, X), **CLOSE)


def test_all_factors_are_regularized():
    layer = keras.layers.Dense(7)
    run(layer, normal(1, 7))
    regularizer = keras.regularizers.L2(0.5)
    lora.convert_to_lora_layer(layer, lora_use_loha=True, lora_regularizer=regularizer)
    factors = [array(v).astype("float64") for v in layer._lora_variables().values()]
    assert len(factors) == 4
    expected = 0.5 * sum((x**2).sum() for x in factors)
    np.testing.assert_allclose(float(sum(map(array, layer.losses))), expected, rtol=1e-5)


def test_weights_are_not_transferred_to_a_model_without_the_second_pair():
    model, other = tuned(), network()
    lora.inject_lora(other, lora_rank=2, lora_targets=["conv", "point", "fc"])
    before = [array(v) for v in other.weights]
    with pytest.raises(ValueError, match="no .*kernel_lora_a2.*another variant"):
        lora.transfer_weights(model, other)
    for variable, value in zip(other.weights, before):
        np.testing.assert_array_equal(array(variable), value)
    lora.transfer_weights(model, other, weights_to_ignore=["kernel_lora_[ab]2"])
    layer = other.get_layer("fc")
    np.testing.assert_array_equal(
        array(layer.kernel_lora_a), array(model.get_layer("fc").kernel_lora_a)
    )
    same = network()
    arguments = dict(lora_rank=2, lora_alpha=3, lora_use_loha=True)
    lora.inject_lora(same, **arguments, lora_targets=["conv", "point", "fc"])
    lora.transfer_weights(model, same)
    np.testing.assert_allclose(run(same, X), run(model, X), **CLOSE)


@pytest.mark.once
def test_an_update_with_a_window_is_not_that_of_a_dense_layer():
    update_ = update(inputs=(3, 3, 3), outputs=4, kind="conv")
    model = keras.Sequential([keras.Input((27,)), keras.layers.Dense(4, name="conv")])
    with pytest.raises(ValueError, match="conv is of shape"):
        lora.load_adapter(model, lora.Adapter({"conv": update_}))
    with pytest.raises(ValueError, match="LoHa, which has none"):
        lora.Adapter({"conv": update_}, dropout=0.1)


def test_what_does_not_go_with_it_is_refused():
    for arguments, words in (
        (dict(lora_use_dora=True), "lora_use_dora=True"),
        (dict(lora_bias=True), "lora_bias=True"),
        (dict(lora_dropout=0.1), "lora_dropout=0.1"),
        (dict(lora_init="pissa"), "lora_init='pissa'"),
        (dict(lora_freeze_a=True), "lora_freeze_a=True"),
    ):
        with pytest.raises(ValueError, match=f"lora_use_loha=True and {words}"):
            lora.LoRAConfig(lora_use_loha=True, **arguments)
    model = tuned()
    with pytest.raises(ValueError, match="LoHa"):
        lora.RankAllocator(model, target_rank=1, end=30)
    with pytest.raises(ValueError, match="LoHa"):
        lora.loraplus_optimizer(model, keras.optimizers.Adam(0.1))
    with pytest.raises(ValueError, match="LoHa"):
        lora.initialize_eva(model, [X])
    with pytest.raises(ValueError, match="LoHa"):
        lora.compact_adapter(model)
    with pytest.raises(ValueError, match="lora_use_rslora=True"):
        config = dict(lora_targets=["fc"], lora_use_rslora=True)
        lora.LoRAConfig(lora_use_loha=True, **config).to_peft()
    embedding = keras.Sequential([keras.Input((3,)), keras.layers.Embedding(5, 4)])
    with pytest.raises(ValueError, match="LoHa has no embeddings.*lora_use_loha=False"):
        lora.inject_lora(embedding, lora_use_loha=True, lora_targets="all")
    if not LEGACY or hasattr(keras.layers, "EinsumDense"):
        layer = keras.layers.EinsumDense("abc,bcd->abd", (3, 4))
        with pytest.raises(ValueError, match="axis in common"):
            lora.convert_to_lora_layer(layer, lora_use_loha=True)
