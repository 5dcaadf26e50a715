"""create_model and the conversion of tfimm models."""

import dataclasses

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import tiny_models
from tests.helpers.kerases import LEGACY, array, ids, keras, normal, randomise, run, values
from tests.helpers.selection import nightly_except
from tfimm_lora.model.merge import lora_layers

if not LEGACY:
    pytest.skip("tfimm needs legacy Keras", allow_module_level=True)

import tfimm


@pytest.fixture(scope="module", autouse=True)
def tiny_names():
    """Two small models under names of tfimm's registry."""
    for spec in tiny_models.TFIMM:
        model = spec.make()
        cls, cfg = type(model), dataclasses.replace(model.cfg, name=f"tiny_{spec.name}")

        def register(cls=cls, cfg=cfg):
            return cls, cfg

        register.__name__ = cfg.name
        register.__module__ = __name__
        tfimm.models.register_model(register)
    yield


def count(variables):
    return sum(int(np.prod(v.shape)) for v in variables)


def test_convnext_tiny_has_the_parameters_of_the_paper():
    model = lora.create_model("convnext_tiny", lora_rank=2)
    assert type(model) is lora.LoRAConvNeXt
    lines = []
    model.summary(print_fn=lines.append)
    text = "\n".join(lines)
    for number in ("28721608", "132480", "28589128"):
        assert number in text
    assert count(model.trainable_weights) == 132_480
    assert count(model.non_trainable_weights) == 28_589_128


@pytest.mark.parametrize("name, cls", [("convnext", "LoRAConvNeXt"), ("vit", "LoRAViT")])
def test_trained_model_converts_to_the_same_regular_one(name, cls):
    model = lora.create_model(f"tiny_{name}", lora_rank=2)
    assert type(model).__name__ == cls
    x, y = normal(8, *model.cfg.input_size, 3), np.arange(8) % 3
    start = run(model, x)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss)
    losses = model.fit(x, y, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    output = run(model, x)
    assert np.abs(output - start).max() > 1e-2
    regular = lora.convert_to_regular_model(model)
    assert type(regular) is lora.lora_base_architecture(type(model))
    assert type(regular).__module__.startswith("tfimm.")
    np.testing.assert_allclose(run(regular, x), output, rtol=1e-4, atol=1e-5)


def test_only_the_targets_are_adapted():
    model = lora.create_model("tiny_vit", lora_rank=2)
    leaves = {path.rpartition("/")[2] for path in lora_layers(model)}
    assert leaves == {"qkv", "proj", "fc1", "fc2"}
    assert "patch_embed/proj" not in lora_layers(model)
    model = lora.create_model("tiny_vit", lora_targets=["attn/qkv"])
    assert set(lora_layers(model)) == {"blocks/0/attn/qkv", "blocks/1/attn/qkv"}
    injected = lora.inject_lora(tiny_models.TFIMM[0].make())
    leaves = {path.rpartition("/")[2] for path in lora_layers(injected)}
    assert leaves == {"fc1", "fc2"}


def test_classifier_is_trained_where_it_is_new():
    same = lora.create_model("tiny_convnext")
    new = lora.create_model("tiny_convnext", nb_classes=5)
    explicit = lora.create_model("tiny_convnext", nb_classes=5, lora_train_classifier=False)
    assert len(new.trainable_weights) == len(same.trainable_weights) + 2
    assert len(explicit.trainable_weights) == len(same.trainable_weights)
    assert ids(new.fc.weights) < ids(new.trainable_weights)
    base = tfimm.create_model("tiny_convnext")
    converted = lora.convert_to_lora_model(base, nb_classes=13)
    assert converted.fc.units == 13 and ids(converted.fc.weights) < ids(
        converted.trainable_weights
    )
    headless = lora.create_model("tiny_convnext", nb_classes=0)
    assert len(headless.trainable_weights) == len(same.trainable_weights)


def test_every_bias_is_listed_once():
    """The ancestor listed the head's bias twice with train_bias="all"."""
    model = lora.create_model(
        "tiny_convnext", nb_classes=5, lora_train_bias="all", lora_train_classifier=True
    )
    listed = model.trainable_weights
    assert len(ids(listed)) == len(listed)
    named = lora.lora_trainable_weights(model, "all", ["head/fc"])
    assert ids(named) == ids(listed)


@pytest.mark.parametrize(
    "arguments, kind, words",
    [
        (dict(lora_rnk=2), TypeError, "lora_rnk; did you mean lora_rank"),
        (dict(lora_train_classifer=True), TypeError, "did you mean lora_train_classifier"),
        (dict(nb_clases=2), TypeError, "nb_clases; did you mean nb_classes"),
        (dict(lora_rank=0), ValueError, "lora_rank=0"),
        (dict(lora_train_bias="some"), ValueError, "train_bias='some'"),
        (dict(lora_targets=["mlp/fc3"]), ValueError, "mlp/fc3.*nearest first: stages"),
        (dict(lora_train_classifier="yes"), TypeError, "lora_train_classifier='yes'"),
    ],
)
def test_wrong_arguments(arguments, kind, words):
    with pytest.raises(kind, match=words):
        lora.create_model("tiny_convnext", **arguments)


def test_unknown_name_gives_the_nearest():
    with pytest.raises(ValueError, match="Nearest: convnext_tiny"):
        lora.create_model("convnext_tny")


def test_list_models():
    names = lora.list_models("convnext_*")
    assert "convnext_tiny" in names and all(n.startswith("convnext_") for n in names)
    assert "vit_tiny_patch16_224" in lora.list_models()
    assert lora.list_models("nothing*") == []


@pytest.mark.parametrize(
    "train_bias, merged, form",
    [
        ("none", False, "keras"),
        pytest.param("all", True, "keras", marks=pytest.mark.nightly),
        pytest.param("all", False, "savedmodel", marks=pytest.mark.nightly),
        pytest.param("none", True, "savedmodel", marks=pytest.mark.nightly),
    ],
)
def test_saved_lora_model_loads_and_trains_on(tmp_path, train_bias, merged, form):
    """The ancestor froze the classifier on loading and forgot the merged flag."""
    model = lora.create_model("tiny_convnext", nb_classes=5, lora_train_bias=train_bias)
    randomise(model)
    x, y = normal(4, 32, 32, 3), np.arange(4)
    output = run(model, x)
    if merged:
        lora.merge_lora_weights(model)
    path = str(tmp_path / ("model.keras" if form == "keras" else "model"))
    model.save(path)
    loaded = keras.models.load_model(path, compile=False)
    assert type(loaded) is lora.LoRAConvNeXt
    np.testing.assert_allclose(run(loaded, x), output, rtol=1e-4, atol=1e-5)
    assert len(loaded.trainable_weights) == len(model.trainable_weights)
    named = lora.lora_trainable_weights(loaded, train_bias, ["head/fc"])
    assert ids(loaded.trainable_weights) == ids(named)
    before = values(loaded.trainable_weights)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loaded.compile(keras.optimizers.Adam(0.01), loss)
    # Two steps: where B is zero, as in a SavedModel of a merged model, A moves in the second.
    loaded.fit(x, y, epochs=2, verbose=0)
    moved = [np.abs(array(v) - b).max() > 0 for v, b in zip(loaded.trainable_weights, before)]
    assert sum(moved) >= len(moved) - 2


@pytest.mark.long
def test_model_path_of_a_lora_model_keeps_the_adaptation(tmp_path):
    """The ancestor dropped it without a word."""
    model = lora.create_model("tiny_convnext", lora_rank=3)
    randomise(model)
    x = normal(2, 32, 32, 3)
    model.save(str(tmp_path / "saved"))
    loaded = lora.create_model("tiny_convnext", model_path=str(tmp_path / "saved"))
    assert loaded.cfg.lora_rank == 3
    np.testing.assert_allclose(run(loaded, x), run(model, x), rtol=1e-4, atol=1e-5)
    wider = lora.create_model("tiny_convnext", model_path=str(tmp_path / "saved"), nb_classes=4)
    assert wider.fc.units == 4 and wider.cfg.lora_train_classifier is True
    for mine, theirs in zip(*(list(lora_layers(m).values()) for m in (wider, model))):
        np.testing.assert_array_equal(array(mine.kernel_lora_b), array(theirs.kernel_lora_b))
    with pytest.raises(ValueError, match="has shape"):
        lora.create_model("tiny_convnext", model_path=str(tmp_path / "saved"), lora_rank=2)


def test_model_path_of_a_regular_model(tmp_path):
    base = tfimm.create_model("tiny_convnext")
    base.save(str(tmp_path / "saved"))
    model = lora.create_model("tiny_convnext", model_path=str(tmp_path / "saved"), lora_rank=2)
    x = normal(2, 32, 32, 3)
    np.testing.assert_allclose(run(model, x), run(base, x), rtol=1e-5, atol=1e-6)


def test_features_and_other_input_sizes_work():
    model = lora.create_model("tiny_vit", lora_rank=2, input_size=(24, 24))
    x = normal(2, 24, 24, 3)
    logits, features = model(x, return_features=True)
    assert logits.shape == (2, 3) and "block_1" in features
    base = tiny_models.TFIMM[1].make()
    converted = lora.convert_to_lora_model(base, input_size=(24, 24))
    assert converted.pos_embed.shape == (1, 10, 8)
    assert run(converted, x).shape == (2, 3)


def test_conversion_keeps_the_dtype_policy(policy):
    policy("mixed_float16")
    base = tfimm.create_model("tiny_vit")
    policy("float32")
    model = lora.convert_to_lora_model(base, lora_rank=2)
    assert model.dtype_policy.name == "mixed_float16"
    assert model.blocks[0].mlp.fc1.compute_dtype == "float16"
    randomise(model)
    regular = lora.convert_to_regular_model(model)
    x = normal(2, 16, 16, 3)
    y = run(model, x).astype("float32")
    np.testing.assert_allclose(run(regular, x).astype("float32"), y, atol=2e-2)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", nightly_except(["convnext", "vit"], ["vit"]))
def test_models_train_in_16_bits(kind, name, policy):
    policy(kind)
    model = lora.create_model(f"tiny_{name}", lora_rank=2)
    x, y = normal(8, *model.cfg.input_size, 3), np.arange(8) % 3
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss)
    losses = model.fit(x, y, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.long
@pytest.mark.parametrize("name", nightly_except(["convnext", "vit"], ["convnext"]))
def test_models_train_the_same_under_xla(name):
    results = []
    weights = None
    for jit in (False, True):
        model = lora.create_model(f"tiny_{name}", lora_rank=2, drop_path_rate=0.0)
        weights = weights or [w.numpy() for w in model.weights]
        model.set_weights(weights)
        x, y = normal(4, *model.cfg.input_size, 3), np.arange(4) % 3
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=jit)
        results.append(model.fit(x, y, epochs=3, verbose=0, shuffle=False).history["loss"])
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4)


def test_custom_loop_trains_what_the_model_names():
    import tensorflow as tf

    model = lora.create_model("tiny_convnext", nb_classes=4)
    x, y = normal(4, 32, 32, 3), np.arange(4)
    optimizer = keras.optimizers.SGD(0.1)
    named, others = model.trainable_weights, model.non_trainable_weights
    before, still = values(named), values(others)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
        optimizer.apply_gradients(zip(tape.gradient(loss, named), named))

    for _ in range(2):
        step()
    assert all(np.abs(array(v) - b).max() > 0 for v, b in zip(named, before))
    for variable, value in zip(others, still):
        np.testing.assert_array_equal(array(variable), value)
