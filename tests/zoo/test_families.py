"""Every tfimm family has a LoRA version that keeps the promises of a model."""

from pathlib import Path

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import LEGACY, array, ids, keras, randomise, run, values
from tests.helpers.selection import nightly_except
from tfimm_lora.model.merge import lora_layers

if not LEGACY:
    pytest.skip("tfimm needs legacy Keras", allow_module_level=True)

import tensorflow as tf
import tfimm

from tests.helpers.tiny_architectures import ARCHITECTURES, CLASSIFIERS, digits

# Float32 through up to thirty layers.
CLOSE = dict(rtol=1e-3, atol=1e-4)

#: `make test` builds these models; the others differ in what they contain.
QUICK = {"vit", "resnet", "convnext", "swin", "efficientnet"}

classifiers = pytest.mark.parametrize("name", nightly_except(CLASSIFIERS, QUICK))


def loss_of(labels, logits):
    """Cross entropy; distilled models give the logits of both heads."""
    labels = tf.reshape(tf.cast(labels, tf.int32), (-1,))
    if logits.shape.rank == 3:
        labels = tf.stack([labels, labels], axis=1)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    return tf.reduce_mean(losses)


def leaves(model):
    return {path.rpartition("/")[2] for path in lora_layers(model)}


@pytest.mark.parametrize("name", nightly_except(CLASSIFIERS, {"vit", "convnext"}))
def test_adapts_trains_merges_saves_and_reloads(name, tmp_path):
    tiny = ARCHITECTURES[name]
    base = tiny.make()
    x, y = digits(16, tiny.size)
    before = run(base, x)
    model = lora.convert_to_lora_model(base, lora_rank=2)
    assert type(model) is lora.lora_architecture(type(base))
    assert leaves(model) == set(tiny.leaves.split())
    assert len(lora_layers(model)) == tiny.count
    np.testing.assert_allclose(run(model, x), before, **CLOSE)

    named = model.trainable_weights
    assert ids(named) == ids(lora.lora_trainable_weights(model))
    assert len(named) == 2 * tiny.count
    frozen = model.non_trainable_weights
    still, start = values(frozen), values(named)
    model.compile(keras.optimizers.Adam(0.02), loss_of)
    losses = model.fit(x, y, epochs=8, batch_size=16, verbose=0).history["loss"]
    assert losses[-1] < losses[0] - 0.005, losses
    for variable, value in zip(frozen, still):
        np.testing.assert_array_equal(array(variable), value, err_msg=variable.name)
    for variable, value in zip(named, start):
        assert np.abs(array(variable) - value).max() > 0, variable.name

    trained = run(model, x)
    assert np.abs(trained - before).max() > 1e-2
    values_trained = values(model.weights)
    lora.merge_lora_weights(model)
    np.testing.assert_allclose(run(model, x), trained, **CLOSE)
    lora.unmerge_lora_weights(model)
    for variable, value in zip(model.weights, values_trained):
        np.testing.assert_array_equal(array(variable), value)
    regular = lora.convert_to_regular_model(model)
    assert type(regular) is type(base)
    np.testing.assert_allclose(run(regular, x), trained, **CLOSE)

    model.save_weights(str(tmp_path / "model.weights.h5"))
    fresh = lora.convert_to_lora_model(base, lora_rank=2)
    fresh.load_weights(str(tmp_path / "model.weights.h5"))
    np.testing.assert_allclose(run(fresh, x), trained, **CLOSE)
    model.save(str(tmp_path / "saved"), save_traces=False)
    loaded = keras.models.load_model(str(tmp_path / "saved"), compile=False)
    assert type(loaded) is type(model)
    np.testing.assert_allclose(run(loaded, x), trained, **CLOSE)
    assert len(loaded.trainable_weights) == len(named)
    assert ids(loaded.trainable_weights) == ids(lora.lora_trainable_weights(loaded))


@classifiers
def test_new_classifier_other_size_and_channels(name):
    """Conversion to other classes, a larger input and one channel at once."""
    tiny = ARCHITECTURES[name]
    base = tiny.make()
    changes = dict(nb_classes=5, in_channels=1)
    resizable = not isinstance(base, tfimm.architectures.MLPMixer)  # mixes over positions
    if resizable:
        changes["input_size"] = tiny.larger
    model = lora.convert_to_lora_model(base, lora_rank=2, **changes)
    x = digits(2, model.cfg.input_size)[0][..., :1]
    names = base.cfg.classifier
    heads = [names] if isinstance(names, str) else list(names)
    logits = run(model, x)
    assert logits.shape == ((2, 5) if len(heads) == 1 else (2, 2, 5))
    expected = lora.lora_trainable_weights(model, trainable_layers=heads)
    assert ids(model.trainable_weights) == ids(expected)
    assert len(expected) == 2 * tiny.count + 2 * len(heads)
    # Everything else that has the same shape came over from the base model.
    theirs = {_own_name(v): array(v) for v in base.weights}
    mine = {_own_name(v): array(v) for v in model.weights}
    for key, value in theirs.items():
        is_head = any(f"{head}/" in f"{key}/" for head in heads)
        if mine[key].shape == value.shape and not is_head and "attn_mask" not in key:
            np.testing.assert_array_equal(mine[key], value, err_msg=key)
    if name != "vit_hybrid":  # which standardises its first kernel
        # One channel of the value v is three channels of v, at the old size.
        same = lora.convert_to_lora_model(base, lora_rank=2, in_channels=1)
        grey = digits(2, tiny.size)[0]
        np.testing.assert_allclose(run(same, grey[..., :1]), run(base, grey), **CLOSE)


def _own_name(variable):
    return variable.name.split("/", 1)[1]


@classifiers
def test_features_and_models_without_classifier(name):
    tiny = ARCHITECTURES[name]
    base = tiny.make()
    model = lora.convert_to_lora_model(base, lora_rank=2)
    randomise(model)
    x = digits(2, tiny.size)[0]
    logits, features = model(x, return_features=True)
    assert set(features) == set(base.feature_names)
    np.testing.assert_allclose(array(features["logits"]), array(logits))
    headless = lora.convert_to_lora_model(base, lora_rank=2, nb_classes=0)
    assert len(headless.trainable_weights) == 2 * tiny.count
    expected = base(x, return_features=True)[1]
    pooled = array(expected["features"])
    if pooled.ndim == 4:  # ResNetV2 and VGG pool in their heads
        pooled = pooled.mean(axis=(1, 2))
    given = array(headless(x))
    np.testing.assert_allclose(given.reshape(pooled.shape), pooled, **CLOSE)


@pytest.mark.parametrize("name", nightly_except(ARCHITECTURES, QUICK))
def test_targets_all_adapts_every_layer_but_the_classifier(name):
    """Squeeze-and-excite, grouped, depthwise and standardised convolutions too."""
    base = ARCHITECTURES[name].make()
    inputs = (
        base.dummy_inputs if name == "segment_anything" else digits(2, base.cfg.input_size)[0]
    )

    def outputs(model):
        return np.concatenate([array(t).ravel() for t in tf.nest.flatten(model(inputs))])

    before = outputs(base)
    lora.inject_lora(base, lora_rank=2, lora_targets="all")
    kinds = (keras.layers.Dense, keras.layers.Conv2D, keras.layers.DepthwiseConv2D)
    plain = [
        x
        for x in base._flatten_layers()
        if isinstance(x, kinds)
        and not isinstance(x, lora.LoRALayer)
        and not isinstance(x, keras.layers.Conv2DTranspose)
    ]
    names = getattr(base.cfg, "classifier", ())
    heads = [names] if isinstance(names, str) else list(names)
    assert len(plain) == len(heads)
    np.testing.assert_allclose(outputs(base), before, **CLOSE)
    randomise(base, size=0.05)
    changed = outputs(base)
    lora.merge_lora_weights(base)
    size = np.abs(changed).max()
    np.testing.assert_allclose(outputs(base), changed, rtol=1e-3, atol=1e-4 * max(size, 1))
    lora.remove_lora(base, merge=False)
    np.testing.assert_array_equal(outputs(base), before)


PROJECTIONS = {
    "vit": {"qkv": "qv"},
    "swin": {"qkv": "qv"},
    "pit_distilled": {"qkv": "qv"},
    "cait": {"qkv": "qv", "q": None, "v": None},
    "pvt": {"q": None, "kv": "v"},
    "pvt_v2": {"q": None, "kv": "v"},
    "segment_anything": {"qkv": "qv"},
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_query_and_value_alone_move_queries_and_values_alone(name):
    """The setting of the paper, section 4.2, in fused and in separate projections."""
    base = ARCHITECTURES[name].make()
    model = lora.convert_to_lora_model(
        base, lora_rank=2, lora_targets="attention", lora_qkv="qv"
    )
    assert leaves(model) == {*PROJECTIONS[name], "proj"}
    randomise(model)
    for path, layer in lora_layers(model).items():
        leaf = path.rpartition("/")[2]
        assert layer.lora.qkv == PROJECTIONS[name].get(leaf)
        moved = layer.merged_kernel() != layer.lora_values()["kernel"]
        parts = np.split(moved.any(axis=0), len(leaf) if leaf in ("qkv", "kv") else 1)
        named = leaf if leaf in ("qkv", "kv") else [leaf]
        for letter, part in zip(named, parts):
            assert part.all() == part.any() == (letter != "k"), (path, letter)


def test_presets_are_those_of_the_family():
    base = ARCHITECTURES["vit"].make
    assert leaves(lora.inject_lora(base(), lora_targets="attention")) == {"qkv", "proj"}
    assert leaves(lora.convert_to_lora_model(base(), lora_targets="mlp")) == {"fc1", "fc2"}
    everything = lora.inject_lora(base(), lora_targets="all")
    assert "patch_embed/proj" in lora_layers(everything)
    with pytest.raises(ValueError, match="'attention'.*Presets: mlp, default, all"):
        lora.inject_lora(ARCHITECTURES["mixer"].make(), lora_targets="attention")
    se = lora.inject_lora(ARCHITECTURES["seresnext"].make(), lora_targets=["se/fc1", "se/fc2"])
    assert leaves(se) == {"fc1", "fc2"}


def test_layers_in_a_sequential_have_the_paths_of_the_weights():
    """tfimm names them from the model down; the Sequential around them has no own name."""
    model = lora.inject_lora(ARCHITECTURES["resnet"].make(), lora_targets="all")
    paths = set(lora_layers(model))
    assert {"conv1/0", "conv1/3", "layer1/0/downsample/1", "layer4/0/conv3"} < paths
    weights = {_own_name(w).rpartition("/")[0].replace("remove/", "") for w in model.weights}
    assert paths < weights


@pytest.mark.nightly
@pytest.mark.parametrize("decoder", [False, True])
def test_segment_anything_learns_synthetic_masks(decoder, tmp_path):
    """Squares on noise, each asked for by a point in it."""
    base = ARCHITECTURES["segment_anything"].make()
    modules = ("mask_decoder",) if decoder else ()
    model = lora.convert_to_lora_model(base, lora_rank=4, lora_train_modules=modules)
    assert isinstance(model, lora.LoRASegmentAnythingModel)
    rng = np.random.default_rng(0)
    images = 0.1 * rng.normal(size=(8, 32, 32, 3)).astype("float32")
    masks = np.zeros((8, 1, 32, 32), "float32")
    centres = rng.integers(8, 24, size=(8, 2))
    for image, mask, (row, column) in zip(images, masks, centres):
        image[row - 6 : row + 6, column - 6 : column + 6] += 1
        mask[0, row - 6 : row + 6, column - 6 : column + 6] = 1
    inputs = {
        "images": images,
        "points": centres[:, None, ::-1].astype("float32"),
        "labels": np.ones((8, 1), "float32"),
        "boxes": np.zeros((8, 0, 4), "float32"),
        "masks": np.zeros((8, 0, 16, 16), "float32"),
    }
    named, frozen = model.trainable_weights, model.non_trainable_weights
    expected = lora.lora_trainable_weights(model, trainable_layers=list(modules))
    assert ids(named) == ids(expected)
    own = {v.name.split("/")[1] for v in named}
    assert own == ({"image_encoder", "mask_decoder"} if decoder else {"image_encoder"})
    start, still = values(named), values(frozen)
    optimizer = keras.optimizers.Adam(0.01)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            logits = model(inputs, training=True, return_logits=True)[0]
            loss = tf.nn.sigmoid_cross_entropy_with_logits(masks, logits)
            loss = tf.reduce_mean(loss)
        gradients = tape.gradient(loss, named)
        pairs = [(g, v) for g, v in zip(gradients, named) if g is not None]
        optimizer.apply_gradients(pairs)
        return loss

    losses = [float(step()) for _ in range(25)]
    assert losses[-1] < losses[0] - 0.01
    for variable, value in zip(frozen, still):
        np.testing.assert_array_equal(array(variable), value, err_msg=variable.name)
    moved = [np.abs(array(v) - value).max() > 0 for v, value in zip(named, start)]
    assert all(moved[: 2 * 8])
    trained = array(model(inputs, return_logits=True)[0])
    regular = lora.convert_to_regular_model(model)
    given = array(regular(inputs, return_logits=True)[0])
    np.testing.assert_allclose(given, trained, rtol=1e-3, atol=1e-3)
    model.save_weights(str(tmp_path / "model.weights.h5"))
    fresh = lora.convert_to_lora_model(base, lora_rank=4, lora_train_modules=modules)
    fresh.load_weights(str(tmp_path / "model.weights.h5"))
    given = array(fresh(inputs, return_logits=True)[0])
    np.testing.assert_allclose(given, trained, rtol=1e-3, atol=1e-3)


def test_every_tfimm_name_has_a_lora_architecture():
    names = tfimm.list_models()
    assert len(names) >= 285
    for name in names:
        cls = tfimm.models.model_class(name)
        made = lora.lora_architecture(cls)
        assert issubclass(made, cls) and made.__name__ == f"LoRA{cls.__name__}"
        assert lora.lora_config(cls) is made.cfg_class
        assert "default" in made.cfg_class.presets()
    families = {tfimm.models.model_class(name) for name in names}
    assert {tfimm.models.model_class(t.name) for t in ARCHITECTURES.values()} == families
    assert {"sam_vit_b", "resnet18"} < set(lora.list_models())


ROOT = Path(__file__).parents[2]

#: A small model of each family, whose numbers are counted again.
COUNTED = [
    "cait_xxs24_224",
    "convmixer_768_32",
    "convnext_tiny",
    "efficientnet_es",
    "gmixer_24_224",
    "pit_ti_224",
    "poolformer_s12",
    "pvt_tiny",
    "pvt_v2_b0",
    "resnet18",
    "resnetv2_50x1_bitm",
    "swin_tiny_patch4_window7_224",
    "vit_tiny_patch16_224",
]


@pytest.mark.nightly
def test_numbers_in_the_table_of_architectures_are_those_of_the_models():
    """One model of each family is counted; `make quality` compares the rest with the code."""
    (page,) = ROOT.glob("docs/**/architectures.md")
    rows = {
        line.split("`")[1]: line
        for line in page.read_text().splitlines()
        if line.startswith("| `")
    }
    for name in COUNTED:
        model = tfimm.create_model(name)
        total = count(model.weights)
        trained = count(lora.inject_lora(model, lora_rank=4).trainable_weights)
        share = f"{100 * trained / total:.2f} %"
        assert rows[name] == (
            f"| `{name}` | {total / 1e6:.1f} M | {trained / 1e3:,.1f} k | {share} |"
        )
        keras.backend.clear_session()


def count(variables):
    return sum(int(np.prod(variable.shape)) for variable in variables)
