"""EVA: the start of A at the inputs of its layer, against NumPy on inputs found otherwise."""

import contextlib
import dataclasses
import warnings

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import tiny_models
from tests.helpers.kerases import BACKEND, LEGACY, array, keras, normal, randomise, run, values
from tests.helpers.layer_cases import CASES
from tests.helpers.selection import nightly_except
from tfimm_lora.config import lora_field_names
from tfimm_lora.initializers.covariance import (
    Covariance,
    SketchedCovariance,
    covariance_for,
    redistribute_ranks,
)
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.model.state import config_of
from tfimm_lora.training import eva

layers = keras.layers
backends = pytest.mark.backends


def principal(rows):
    """The directions of rows about their mean, and their shares, by an SVD of all at once."""
    rows = np.asarray(rows, "float64")
    _, s, vt = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    return vt.T, s**2 / (s**2).sum()


def assert_same_columns(found, expected, atol=1e-4):
    """Columns agree but for their signs."""
    found = np.asarray(found, "float64")
    signs = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found * signs, expected, atol=atol)


def falling(count, width, by=0.8, seed=0, mean=0.0):
    """Rows that vary less and less in some directions, about a mean."""
    rng = np.random.default_rng(seed)
    turned, _ = np.linalg.qr(rng.normal(size=(width, width)))
    rows = (rng.normal(size=(count, width)) * by ** np.arange(width)) @ turned
    return (rows + mean * rng.normal(size=width)).astype("float32")


def batches(x, size=8):
    return [x[i : i + size] for i in range(0, len(x), size)]


# -- directions -----------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("sizes", [[64], [1, 1, 62], [20, 0, 20, 24], [1] * 64])
def test_directions_are_those_of_an_svd_of_all_rows(sizes, mean):
    rows = falling(64, 12, mean=mean).astype("float64")
    spread, at = Covariance(12), 0
    for size in sizes:
        spread.add(rows[at : at + size])
        at += size
    found = spread.directions(5)
    vectors, ratios = principal(rows)
    assert_same_columns(found.vectors, vectors[:, :5], 1e-6)
    np.testing.assert_allclose(found.ratios, ratios[:5], rtol=1e-6)
    largest = np.abs(found.vectors).argmax(axis=0)
    assert (found.vectors[largest, np.arange(5)] > 0).all()


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_the_sketch_of_wide_rows_is_near(mean):
    rows = falling(600, 400, by=0.97, mean=mean)
    spread = SketchedCovariance(400, 8)
    for batch in batches(rows, 50):
        spread.add(batch)
    found = spread.directions(8)
    vectors, ratios = principal(rows)
    overlap = np.linalg.svd(found.vectors.T @ vectors[:, :8], compute_uv=False)
    assert overlap.min() > 0.999
    np.testing.assert_allclose(found.ratios, ratios[:8], rtol=1e-3)
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(8), atol=1e-10)


def test_wide_rows_are_sketched_in_little_memory():
    assert type(covariance_for(1024, 8)) is Covariance
    wide = covariance_for(50_000, 8)
    assert wide._products.size < 50_000 * 150
    wide.add(np.eye(3, 50_000))
    assert wide.directions(8).vectors.shape == (50_000, 2)


@pytest.mark.parametrize("kind", [Covariance, lambda width: SketchedCovariance(width, 4)])
def test_there_are_no_more_directions_than_rows_vary_in(kind):
    rng = np.random.default_rng(0)
    for rank, rows in [
        (0, np.full((9, 6), 7.3)),
        (0, rng.normal(size=(1, 6))),
        (2, rng.normal(size=(3, 6))),
        (3, rng.normal(size=(40, 3)) @ rng.normal(size=(3, 6)) + 5),
        (4, rng.normal(size=(40, 6)) * [1, 0, 1, 1, 0, 1]),
    ]:
        spread = kind(6)
        for batch in batches(rows, 3):
            spread.add(batch.astype("float32"))
        assert spread.directions(6).ratios.shape == (rank,)
    assert kind(6).directions(3).vectors.shape == (6, 0)


def test_scale_and_place_of_rows_do_not_matter():
    rows = falling(30, 5)
    for factor in (1e-12, 1e12):
        spread = Covariance(5)
        spread.add(rows * factor)
        assert_same_columns(spread.directions(3).vectors, principal(rows)[0][:, :3])


# -- ranks ----------------------------------------------------------------------------------


def shared_by_greed(ratios, ranks, rho):
    """One rank at a time to whoever explains most with the next."""
    found = dict.fromkeys(ratios, 1)
    for _ in range(sum(ranks.values()) - len(ranks)):
        open_to = [
            (ratios[key][found[key]], key)
            for key in ratios
            if found[key] < min(int(rho * ranks[key]), len(ratios[key]))
        ]
        if open_to:
            found[max(open_to)[1]] += 1
    return found


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 8.0])
@pytest.mark.parametrize("seed", range(20))
def test_ranks_go_to_what_explains_most(seed, rho):
    rng = np.random.default_rng(seed)
    ranks = {f"layer{i}": int(rng.integers(1, 9)) for i in range(6)}
    ratios = {}
    for key, rank in ranks.items():
        share = np.sort(rng.exponential(size=int(rng.integers(rank, 20))) ** 3)[::-1]
        ratios[key] = share / share.sum()
    found = redistribute_ranks(ratios, ranks, rho)
    assert found == shared_by_greed(ratios, ranks, rho)
    assert sum(found.values()) == sum(ranks.values())
    assert all(1 <= found[key] <= rho * ranks[key] for key in ranks)
    assert found == ranks if rho == 1 else True


def test_ranks_that_nobody_can_use_are_dropped():
    ratios = {"a": np.array([1.0]), "b": np.array([0.5, 0.5])}
    assert redistribute_ranks(ratios, {"a": 4, "b": 1}, 2.0) == {"a": 1, "b": 2}


# -- rows -----------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_times_the_kernel_are_the_layers_product(case):
    layer, x = case.make(), case.inputs()
    rows = layer._input_rows()
    if rows is None:
        names = ("embed", "depthwise", "grouped", "one_group")
        shared = "EinsumDense" in type(layer).__name__
        assert any(name in case.name for name in names) or shared
        return
    kernel = layer.lora_values()["kernel"].astype("float64")
    expected = case.product(x, kernel)
    given = []
    layer.__dict__[rows.method] = lambda x, *more: (
        given.append(array(x))
        or (type(layer).__dict__.get(rows.method) or getattr(type(layer), rows.method))(
            layer, x, *more
        )
    )
    run(layer, x)
    del layer.__dict__[rows.method]
    found = np.concatenate([chunk for one in given for chunk in rows.chunks(one)])
    assert found.shape[1] == rows.width
    product = found.astype("float64") @ _matrix(layer, kernel, rows.width)
    np.testing.assert_allclose(np.sort(product, None), np.sort(expected, None), atol=1e-4)
    # A in its shape does what its columns do: A B is the columns times B.
    columns = normal(rows.width, case.rank, seed=4)
    a = rows.factor(columns)
    assert a.shape == tuple(layer.kernel_lora_a.shape)
    b = layer.lora_values()["kernel_lora_b"]
    update = case.update(a.astype("float64"), b.astype("float64"))
    if not layer.lora.qkv:
        narrow = columns @ b.reshape(case.rank, -1)
        np.testing.assert_allclose(_matrix(layer, update, rows.width), narrow, atol=1e-4)


def _matrix(layer, kernel, width):
    """A kernel as (inputs, outputs); of the einsum cases the summed axes may be anywhere."""
    if hasattr(layer, "equation"):
        inputs, outputs = layer.equation.replace(" ", "").split("->")
        axes = inputs.partition(",")[2]
        summed = [i for i, axis in enumerate(axes) if axis not in outputs]
        kernel = np.moveaxis(kernel, summed, range(len(summed)))
    return kernel.reshape(width, -1)


def test_rows_are_worked_on_in_parts(monkeypatch):
    whole = {}
    for at_once in (2**23, 1):
        monkeypatch.setattr("tfimm_lora.layers.input_rows._AT_ONCE", at_once)
        for case in CASES:
            layer = case.make()
            rows = layer._input_rows()
            if rows is None or case.name.startswith("conv1d_causal"):
                continue
            chunks = list(rows.chunks(case.inputs()))
            found = np.concatenate(chunks)
            np.testing.assert_array_equal(found, whole.setdefault(case.name, found))
            assert at_once > 1 or len(chunks) > 1


# -- whole models ---------------------------------------------------------------------------


def tapped(model, names, x):
    """The outputs of layers of a functional model, by name."""
    outputs = {name: model.get_layer(name).output for name in names}
    found = keras.Model(model.input, outputs)(x)
    return {name: array(found[name]) for name in names}


def small():
    entry = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, strides=2, padding="same", name="conv")(entry)
    x = layers.Activation("tanh", name="after_conv")(x)
    x = layers.Conv2D(5, 2, name="conv2")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(7, activation="tanh", name="fc")(x)
    return keras.Model(entry, layers.Dense(3, name="head")(x), name="small")


PICTURES = normal(40, 8, 8, 3, seed=1) * np.linspace(0.1, 2.0, 3, dtype="float32")


def patches(x, kernel, stride, pad):
    x = np.pad(x, [(0, 0), pad, pad, (0, 0)])
    size = (x.shape[1] - kernel) // stride + 1
    found = [
        x[:, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
        for i in range(size)
        for j in range(size)
    ]
    return np.concatenate(found).reshape(-1, kernel * kernel * x.shape[-1])


def inputs_of_small(model, x):
    """What the layers multiply with their kernels, by the plain model's own layers."""
    seen = tapped(model, ["after_conv", "pool"], x)
    return {
        "conv": patches(x, 3, 2, (0, 1)),
        "conv2": patches(seen["after_conv"], 2, 1, (0, 0)),
        "fc": seen["pool"],
    }


@backends
@pytest.mark.parametrize("rho", [1.0, 2.0, 3.5])
def test_factors_and_ranks_are_those_of_numpy(rho):
    model = small()
    expected = {path: principal(x) for path, x in inputs_of_small(model, PICTURES).items()}
    before = run(model, PICTURES)
    lora.inject_lora(model, lora_rank=4, lora_alpha=8, lora_rank_pattern={"fc": 2})
    ranks = lora.initialize_eva(model, batches(PICTURES), rho=rho)
    ratios = {path: ratio for path, (_, ratio) in expected.items()}
    assert ranks == shared_by_greed(ratios, {"conv": 4, "conv2": 4, "fc": 2}, rho)
    assert (ranks == {"conv": 4, "conv2": 4, "fc": 2}) is (rho == 1.0)
    for path, layer in lora_layers(model).items():
        a = array(layer.kernel_lora_a)
        assert layer.lora.rank == ranks[path] == a.shape[-1]
        assert_same_columns(a.reshape(-1, ranks[path]), expected[path][0][:, : ranks[path]])
        assert not array(layer.kernel_lora_b).any()
        assert layer.lora.scale == (4.0 if path == "fc" else 2.0)
    np.testing.assert_array_equal(run(model, PICTURES), before)


@backends
@pytest.mark.parametrize("kind", tiny_models.MODELS, ids=tiny_models.IDS)
def test_every_model_keeps_its_outputs_and_its_budget(kind):
    model = kind.make()
    lora.inject_lora(model, lora_rank=2)
    x = normal(24, *kind.input_shape, seed=3)
    before = run(model, x[:4])
    trained = len(model.trainable_weights)
    ranks = lora.initialize_eva(model, batches(x))
    np.testing.assert_array_equal(run(model, x[:4]), before)
    assert sum(ranks.values()) == 2 * len(ranks)
    assert all(1 <= rank <= 4 for rank in ranks.values())
    assert len(model.trainable_weights) == trained
    for layer in lora_layers(model).values():
        assert not {"call", "convolution_op"} & set(layer.__dict__)
        if layer._input_rows() is not None:
            a = array(layer.kernel_lora_a).reshape(-1, layer.lora.rank)
            np.testing.assert_allclose(a.T @ a, np.eye(layer.lora.rank), atol=1e-5)


@pytest.mark.parametrize(
    "kind", nightly_except(tiny_models.MODELS, ["convnext" if LEGACY else "functional"])
)
def test_a_model_trains_the_same_afterwards(kind):
    model = kind.make()
    lora.inject_lora(model, lora_rank=2)
    x = normal(16, *kind.input_shape, seed=3)
    lora.initialize_eva(model, batches(x))
    frozen = values(lora.lora_non_trainable_weights(model))
    trained = values(model.trainable_weights)
    model.compile("sgd", "mse")
    model.fit(x, np.ones((16, kind.classes), "float32"), epochs=2, verbose=0)
    for old, new in zip(frozen, lora.lora_non_trainable_weights(model)):
        np.testing.assert_array_equal(array(new), old)
    assert all((array(new) != old).any() for old, new in zip(trained, model.trainable_weights))
    merged = run(model, x)
    lora.merge_lora_weights(model)
    np.testing.assert_allclose(run(model, x), merged, atol=1e-5)


@backends
def test_all_uses_of_a_layer_count():
    model = tiny_models.nested()
    x = falling(32, 6)
    block = model.get_layer("block")
    once = array(block(x))
    rows = np.concatenate([x, once])  # the block is used twice
    middle = np.concatenate([tapped_first(block, x), tapped_first(block, once)])
    lora.inject_lora(model, lora_rank=2)
    lora.initialize_eva(model, [x[:16], x[16:]], rho=1)
    found = lora_layers(model)
    for path, expected in (("block/first", rows), ("block/inner_model/inner", middle)):
        assert_same_columns(array(found[path].kernel_lora_a), principal(expected)[0][:, :2])


def tapped_first(block, x):
    return array(block.get_layer("first")(x))


@backends
def test_axes_of_einsum_layers():
    entry = keras.Input((5, 6))
    x = layers.EinsumDense("abc,cde->abde", (None, 2, 4), name="to_heads")(entry)
    x = layers.EinsumDense("abde,dec->abc", (None, 3), name="from_heads")(x)
    model = keras.Model(entry, x)
    given = falling(60, 6).reshape(12, 5, 6)
    middle = tapped(model, ["to_heads"], given)["to_heads"]
    lora.inject_lora(model, lora_rank=3, lora_targets=["to_heads", "from_heads"])
    lora.initialize_eva(model, batches(given, 4), rho=1)
    for name, rows in (
        ("to_heads", given.reshape(-1, 6)),
        ("from_heads", middle.reshape(-1, 8)),
    ):
        a = array(model.get_layer(name).kernel_lora_a).reshape(rows.shape[1], 3)
        assert_same_columns(a, principal(rows)[0][:, :3])
    assert tuple(model.get_layer("from_heads").kernel_lora_a.shape) == (2, 4, 3)


def test_parts_of_a_fused_projection_get_the_same_directions():
    entry = keras.Input((6,))
    x = layers.Dense(12, name="qkv")(entry)
    model = keras.Model(entry, layers.Dense(8, name="fc")(x))
    given = falling(40, 6, by=0.9)
    lora.inject_lora(model, lora_rank=2, lora_qkv="qv", lora_targets=["qkv", "fc"])
    before = run(model, given)
    ranks = lora.initialize_eva(model, [given], rho=3)
    assert sum(ranks.values()) == 4
    layer, rank = model.get_layer("qkv"), ranks["qkv"]
    a = array(layer.kernel_lora_a)
    assert a.shape == (6, 2 * rank) and layer.lora.qkv == "qv"
    np.testing.assert_array_equal(a[:, :rank], a[:, rank:])
    assert_same_columns(a[:, :rank], principal(given)[0][:, :rank])
    np.testing.assert_array_equal(run(model, given), before)


def test_layers_without_rows_keep_their_start_and_rank():
    entry = keras.Input((6,), dtype="int32")
    x = layers.Embedding(9, 4, name="embedding")(entry)
    x = layers.Conv1D(8, 3, groups=2, name="grouped")(x)
    x = layers.Dense(5, name="fc")(layers.Flatten()(x))
    model = keras.Model(entry, layers.Dense(3, name="head")(x))
    lora.inject_lora(model, lora_rank=2)
    before = {
        name: array(model.get_layer(name).kernel_lora_a) for name in ("embedding", "grouped")
    }
    given = np.random.default_rng(0).integers(0, 9, size=(40, 6)).astype("int32")
    assert lora.initialize_eva(model, [given]) == {"embedding": 2, "grouped": 2, "fc": 2}
    for name, a in before.items():
        np.testing.assert_array_equal(array(model.get_layer(name).kernel_lora_a), a)
    only = keras.Sequential([keras.Input((6,), dtype="int32"), layers.Embedding(9, 4)])
    lora.inject_lora(only, lora_rank=2)
    with pytest.raises(ValueError, match="whose inputs EVA is defined for"):
        lora.initialize_eva(only, [given])


def two(first=6, second=6, **arguments):
    """Two layers side by side, for the beginning and for the end of the input."""
    entry = keras.Input((first + second,))
    x = layers.Dense(4, name="fc1")(entry[:, :first])
    y = layers.Dense(4, name="fc2")(entry[:, first:])
    x = layers.Dense(3, name="head")(layers.Concatenate()([x, y]))
    model = keras.Model(entry, x, name="two")
    if arguments:
        lora.inject_lora(model, **arguments)
    return model


#: What fc1 is given varies in few directions, what fc2 is given in all.
UNEVEN = np.concatenate([falling(64, 6, by=0.3), normal(64, 6, seed=9)], axis=1)
FIRST = UNEVEN[:, :6]


@pytest.mark.parametrize(
    "arguments",
    [
        dict(lora_alpha=8),
        dict(lora_alpha=8, lora_use_rslora=True),
        dict(),
        dict(lora_alpha=4, lora_alpha_pattern={"fc2": 12}),
    ],
    ids=str,
)
def test_a_layers_scale_is_kept(arguments):
    model = two(lora_rank=3, **arguments)
    scales = {path: layer.lora.scale for path, layer in lora_layers(model).items()}
    ranks = lora.initialize_eva(model, [UNEVEN])
    assert ranks["fc1"] < 3 < ranks["fc2"]
    for path, layer in lora_layers(model).items():
        assert layer.lora.scale == pytest.approx(scales[path], rel=1e-12)


@pytest.mark.parametrize("arguments", [dict(lora_alpha=8), dict()], ids=str)
def test_the_config_and_the_adapter_know_the_ranks(arguments, tmp_path):
    model = two(lora_rank=3, **arguments)
    ranks = lora.initialize_eva(model, [UNEVEN])
    config = config_of(model)
    again = two(**{name: getattr(config, name) for name in lora_field_names()})
    assert {p: x.lora.rank for p, x in lora_layers(again).items()} == ranks
    assert {p: x.lora.scale for p, x in lora_layers(again).items()} == {
        p: x.lora.scale for p, x in lora_layers(model).items()
    }
    for one, other in zip(model.weights, again.weights):
        other.assign(one)
    randomise(model)
    lora.save_adapter(model, tmp_path)
    for fresh in (again, two(lora_rank=3)):
        for one, other in zip(model.weights, fresh.weights):
            if tuple(one.shape) == tuple(other.shape):
                other.assign(one)
        lora.load_adapter(fresh, tmp_path)
        np.testing.assert_allclose(run(fresh, UNEVEN), run(model, UNEVEN), atol=1e-6)


def test_a_rank_is_of_one_layer_though_anothers_path_ends_alike():
    entry = keras.Input((12,))
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(4, name="fc")], name="inner")
    x = layers.Concatenate()([inner(entry[:, :6]), layers.Dense(4, name="fc")(entry[:, 6:])])
    model = keras.Model(entry, layers.Dense(3, name="head")(x))
    lora.inject_lora(model, lora_rank=3)
    ranks = lora.initialize_eva(model, [UNEVEN])
    assert ranks["inner/fc"] < 3 < ranks["fc"]
    arguments = config_of(model).arguments()
    lora.remove_lora(model, merge=False)
    lora.inject_lora(model, **arguments)
    assert {p: x.lora.rank for p, x in lora_layers(model).items()} == ranks


@pytest.mark.parametrize("policy_name", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy_name, policy):
    policy(policy_name)
    model = two(lora_rank=2)
    before = run(model, UNEVEN)
    lora.initialize_eva(model, [UNEVEN])
    np.testing.assert_array_equal(run(model, UNEVEN), before)
    layer = model.get_layer("fc1")
    a = array(layer.kernel_lora_a)
    assert a.dtype == "float32"
    assert_same_columns(a, principal(FIRST)[0][:, : layer.lora.rank], 5e-2)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(lora_dropout=0.5),
        dict(lora_freeze_a=True),
        dict(lora_regularizer="l2"),
        dict(lora_train_bias="all"),
        dict(lora_use_dora=True),
        dict(lora_bias=True),
        dict(lora_init="eva"),
        dict(lora_init="gaussian"),
        dict(lora_train_modules=["head"]),
    ],
    ids=str,
)
def test_with_every_option(arguments):
    model = two(lora_rank=3, **arguments)
    before = run(model, UNEVEN)
    names = sorted(v.name for v in model.trainable_weights)
    losses = len(model.losses)
    ranks = lora.initialize_eva(model, [UNEVEN])
    assert sum(ranks.values()) == 6 and len(set(ranks.values())) == 2
    np.testing.assert_allclose(run(model, UNEVEN), before, atol=1e-6)
    assert sorted(v.name for v in model.trainable_weights) == names
    assert len(model.losses) == losses
    shaped = {tuple(v.shape) for v in model.trainable_weights}
    assert (6, 3) not in shaped


def test_what_was_frozen_by_hand_stays_so():
    model = two(lora_rank=3)
    model.get_layer("fc2").trainable = False
    lora.initialize_eva(model, [UNEVEN])
    assert not model.get_layer("fc2").trainable and len(model.trainable_weights) == 2


def test_the_result_is_the_same_each_time():
    found = []
    for _ in range(2):
        model = two(lora_rank=3)
        for i, variable in enumerate(model.weights):
            if "lora" not in variable.name:
                variable.assign(normal(*variable.shape, seed=i))
        lora.initialize_eva(model, batches(UNEVEN))
        found.append(values(model.weights))
    for one, other in zip(*found):
        np.testing.assert_array_equal(one, other)


def test_rank_above_the_directions_of_the_input_goes_to_others():
    model = two(2, 6, lora_rank=4)
    assert lora.initialize_eva(model, [normal(30, 8)]) == {"fc1": 2, "fc2": 6}
    model = two(6, 6, lora_rank=4)
    few = np.repeat(normal(3, 12), 5, axis=0)
    assert lora.initialize_eva(model, [few]) == {"fc1": 2, "fc2": 2}


def test_by_the_classes_own_code():
    """Layers that were adapted by hand, or created adapted."""
    entry = keras.Input((12,))
    x = lora.LoRADense(4, lora_rank=3, name="fc1")(entry[:, :6])
    y = layers.Dense(4, name="fc2")(entry[:, 6:])
    model = keras.Model(entry, layers.Concatenate()([x, y]))
    lora.convert_to_lora_layer(model.get_layer("fc2"), lora_rank=3)
    before = run(model, UNEVEN)
    ranks = lora.initialize_eva(model, [UNEVEN])
    assert ranks["fc1"] < 3 < ranks["fc2"]
    np.testing.assert_array_equal(run(model, UNEVEN), before)
    assert type(model.get_layer("fc1")) is lora.LoRADense


@pytest.mark.skipif(not LEGACY, reason="tfimm needs legacy Keras")
def test_a_tfimm_model_is_created_again_with_its_ranks(tmp_path):
    model = next(m for m in tiny_models.TFIMM if m.name == "vit").make()
    model = lora.convert_to_lora_model(model, lora_rank=3, lora_alpha=6)
    x = normal(16, 16, 16, 3)
    kept = model.cfg
    ranks = lora.initialize_eva(model, batches(x), rho=3)
    assert len(set(ranks.values())) > 1
    assert kept.lora_rank_pattern == {} and model.cfg.lora_rank_pattern
    again = type(model)(model.cfg)
    assert {p: x.lora.rank for p, x in lora_layers(again).items()} == ranks
    randomise(model)
    path = str(tmp_path / "model.keras")
    model.save(path)
    loaded = keras.models.load_model(path)
    np.testing.assert_allclose(run(loaded, x), run(model, x), atol=1e-6)


# -- traces and compilation -----------------------------------------------------------------


@pytest.mark.parametrize("rho", [1, 2], ids=["ranks stay", "ranks change"])
def test_a_compiled_model_stays_compiled(rho):
    model = two(lora_rank=3)
    model.compile("adam", "mse")
    before = model.predict(UNEVEN, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ranks = lora.initialize_eva(model, [UNEVEN], rho=rho)
    assert (len(set(ranks.values())) > 1) == (rho == 2)
    np.testing.assert_allclose(model.predict(UNEVEN, verbose=0), before, atol=1e-6)
    model.fit(UNEVEN, UNEVEN[:, :3], verbose=0)
    assert array(model.get_layer("fc1").kernel_lora_b).any()


# -- data -----------------------------------------------------------------------------------


def factor(model):
    return array(model.get_layer("fc1").kernel_lora_a)


@backends
@pytest.mark.parametrize(
    "kind", ["tuple", "list", "weighted", "dataset", "generator", "sequence"]
)
def test_data_are_given_as_to_fit(kind):
    import tensorflow as tf

    y = np.zeros((8, 3), "float32")

    class Batches(keras.utils.Sequence if LEGACY else keras.utils.PyDataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return UNEVEN[8 * i : 8 * i + 8], y

    if kind == "dataset" and BACKEND == "torch":
        pytest.skip("torch takes no tensors of TensorFlow")
    given = {
        "tuple": [(x, y) for x in batches(UNEVEN)],
        "list": [[x, y] for x in batches(UNEVEN)],
        "weighted": [(x, y, np.ones(8)) for x in batches(UNEVEN)],
        "dataset": tf.data.Dataset.from_tensor_slices((UNEVEN, UNEVEN)).batch(8),
        "generator": (x for x in batches(UNEVEN)),
        "sequence": Batches(),
    }[kind]
    model = two(lora_rank=2)
    lora.initialize_eva(model, given, rho=1)
    assert_same_columns(factor(model), principal(FIRST)[0][:, :2])


def test_only_so_many_batches_are_used():
    taken = []

    def endless():
        for i in range(10**9):
            taken.append(i)
            yield UNEVEN[i % 4 * 16 : i % 4 * 16 + 16]

    model = two(lora_rank=2)
    lora.initialize_eva(model, endless(), rho=1, max_batches=2)
    assert len(taken) == 2
    assert_same_columns(factor(model), principal(FIRST[:32])[0][:, :2])
    lora.initialize_eva(model, endless(), rho=1)
    assert len(taken) == 2 + 16
    lora.initialize_eva(model, batches(UNEVEN, 2), rho=1, max_batches=None)
    assert_same_columns(factor(model), principal(FIRST)[0][:, :2])


def test_a_model_of_several_inputs():
    first, second = keras.Input((6,), name="one"), keras.Input((6,), name="two")
    x = layers.Dense(6, name="fc1")(first + second if LEGACY else keras.ops.add(first, second))
    model = keras.Model({"one": first, "two": second}, layers.Dense(3, name="head")(x))
    lora.inject_lora(model, lora_rank=2)
    given = [{"one": x, "two": 2 * x} for x in batches(FIRST)]
    lora.initialize_eva(model, [(x, np.zeros(8)) for x in given], rho=1)
    assert_same_columns(factor(model), principal(FIRST)[0][:, :2])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.function")
def test_a_compiled_call_is_inspected():
    import tensorflow as tf

    class Compiled(keras.Model):
        def __init__(self):
            super().__init__()
            self.fc1, self.head = layers.Dense(6, name="fc1"), layers.Dense(3, name="head")

        @tf.function
        def inner(self, x):
            return self.fc1(x)

        def call(self, x):
            return self.head(self.inner(x))

    model = Compiled()
    model(FIRST)
    lora.inject_lora(model, lora_rank=2, lora_targets=["fc1"])
    model(FIRST)
    lora.initialize_eva(model, [FIRST])
    assert_same_columns(array(model.fc1.kernel_lora_a), principal(FIRST)[0][:, :2])
    assert not tf.config.functions_run_eagerly()


# -- errors, after which all is as it was ---------------------------------------------------


@contextlib.contextmanager
def unchanged(model):
    """Asserts that a model, whatever happens within, is what it was."""

    def state():
        seen = lora_layers(model) if any("lora" in v.name for v in model.weights) else {}
        return (
            [type(x) for x in seen.values()],
            [x.lora for x in seen.values()],
            [{"call", "convolution_op"} & set(x.__dict__) for x in seen.values()],
            [(v.name, tuple(v.shape)) for v in model.weights],
            sorted(v.name for v in model.trainable_weights),
            config_of(model),
            dataclasses.asdict(config_of(model)) if seen else None,
        )

    before, numbers = state(), values(model.weights)
    yield
    assert state() == before
    for one, other in zip(numbers, model.weights):
        np.testing.assert_array_equal(one, array(other))


def refused(model, data, error=ValueError, match=None, **arguments):
    with unchanged(model), pytest.raises(error, match=match):
        lora.initialize_eva(model, data, **arguments)


def test_wrong_arguments():
    model = two(lora_rank=2)
    for rho in (0.5, 0, -1.0, float("nan"), float("inf")):
        refused(model, [UNEVEN], match="Received rho=.*expected", rho=rho)
    for rho in ("2", None, True):
        refused(model, [UNEVEN], TypeError, "Received rho=", rho=rho)
    for number in (0, -3):
        refused(model, [UNEVEN], match="Received max_batches=", max_batches=number)
    for number in (1.5, "all", True):
        refused(model, [UNEVEN], TypeError, "Received max_batches=", max_batches=number)
    for data in (
        UNEVEN,
        keras.ops.convert_to_tensor(UNEVEN) if not LEGACY else UNEVEN,
        {},
        "x",
    ):
        refused(model, data, TypeError, r"expected batches, .*as a list: \[x\]")


def test_data_that_say_nothing():
    model = two(lora_rank=2)
    refused(model, [], match="without a batch")
    used = iter([UNEVEN])
    next(used)
    refused(model, used, match="without a batch")
    refused(model, [UNEVEN[:1]], match=r"'fc1' did not vary .*rows: 1")
    refused(model, [np.ones((20, 12), "float32")], match=r"'fc1' did not vary .*rows: 20")
    broken = UNEVEN.copy()
    broken[3, 2] = np.nan
    refused(model, [broken], match="'fc1' has values that are not finite")


def test_data_that_do_not_fit_the_model():
    refused(two(lora_rank=2), [UNEVEN, UNEVEN[:, :4]], Exception)
    refused(two(lora_rank=2), [UNEVEN, object()], Exception)

    def broken():
        yield UNEVEN
        raise OSError("gone")

    refused(two(lora_rank=2), broken(), OSError, "gone")


def test_a_model_that_is_not_new():
    refused(two(), [UNEVEN], match="no LoRA layers")
    model = two(lora_rank=2)
    randomise(model)
    refused(model, [UNEVEN], match="'fc1' has a kernel_lora_b that is not zero")
    for start in ("pissa", "olora", "orthogonal"):
        model = two(lora_rank=2, lora_init=start)
        refused(model, [UNEVEN], match="kernel_lora_b .* initialized in another way")
    model = two(lora_rank=2)
    lora.merge_lora_weights(model)
    refused(model, [UNEVEN], match="'fc1' is merged. Call unmerge_lora_weights first")
    lora.unmerge_lora_weights(model)
    with lora.disable_adapter(model):
        refused(model, [UNEVEN], match="disable_adapter")
    lora.initialize_eva(model, [UNEVEN])


def test_a_layer_that_the_data_do_not_reach():
    @keras.utils.register_keras_serializable("test_eva")
    class Branching(keras.Model):
        def __init__(self):
            super().__init__()
            self.fc1, self.other = layers.Dense(6, name="fc1"), layers.Dense(6, name="other")

        def call(self, x, both=False):
            y = self.fc1(x)
            return y + self.other(x) if both else y

    model = Branching()
    model(FIRST, both=True)
    lora.inject_lora(model, lora_rank=2, lora_targets=["fc1", "other"])
    refused(model, [FIRST], match="'other' was never used")


@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_error_on_the_way_undoes_what_was_done(monkeypatch, fails_at):
    model = two(lora_rank=3)
    adapt, calls = eva.adapt_layer, []

    def failing(layer, spec):
        calls.append(layer)
        if len(calls) == fails_at:
            raise MemoryError("no more")
        return adapt(layer, spec)

    monkeypatch.setattr(eva, "adapt_layer", failing)
    with unchanged(model), pytest.raises(MemoryError):
        lora.initialize_eva(model, [UNEVEN])
    assert len(calls) > fails_at
    monkeypatch.undo()
    lora.initialize_eva(model, [UNEVEN])
