"""Vision models of keras_hub adapt by default, train, merge, and are saved and loaded."""

import inspect
import re
import warnings

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import keras_hub_models as zoo
from tests.helpers.kerases import BACKEND, LEGACY, array, ids, keras, normal, randomise, values
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.model.new_classifier import with_classifier

pytestmark = [
    pytest.mark.backends,
    pytest.mark.skipif(LEGACY, reason="keras_hub needs Keras 3"),
]

CLOSE = dict(rtol=2e-4, atol=2e-5)

#: These run with the quick tests; the others are long.
QUICK = {"ResNetBackbone", "ViTImageClassifier", "DINOV2Backbone", "SegFormerImageSegmenter"}


def of_each(models):
    return [
        pytest.param(m, id=m.name, marks=() if m.name in QUICK else pytest.mark.nightly)
        for m in models
    ]


def outputs(model, x) -> dict[str, np.ndarray]:
    """The outputs of a model in inference mode, by their place in its structure."""
    if BACKEND == "jax":  # compiled, because each operation by itself is compiled otherwise
        import jax

        trained, others = ([v.value for v in part] for part in _variables(model))
        y, _ = jax.jit(lambda *args: model.stateless_call(*args, training=False))(
            trained, others, x
        )
    else:
        y = model(keras.tree.map_structure(keras.ops.convert_to_tensor, x), training=False)
    return {str(i): array(part) for i, part in enumerate(keras.tree.flatten(y))}


def _variables(model):
    return model.trainable_variables, model.non_trainable_variables


def assert_equal(given, expected):
    assert given.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(given[key], value, **CLOSE, err_msg=key)


def differ(one, other) -> bool:
    return any(np.abs(one[key] - other[key]).max() > 1e-4 for key in one)


# -- the catalogue ------------------------------------------------------------------------


#: Base classes, and what makes no features of pictures.
NOT_LISTED = re.compile(
    "^(Backbone|FeaturePyramidBackbone|ImageClassifier|ImageSegmenter|ImageObjectDetector|"
    "ObjectDetector|DepthEstimator)$"
)


def test_the_catalogue_has_every_vision_model_of_keras_hub():
    hub = zoo.hub()
    classes = {n: c for n, c in vars(hub).items() if inspect.isclass(c)}
    tasks = (hub.ImageClassifier, hub.ImageSegmenter, hub.ObjectDetector, hub.DepthEstimator)
    wanted = {n for n, c in classes.items() if issubclass(c, tasks)}
    wanted |= {
        c.backbone_cls.__name__ for n, c in classes.items() if n in wanted and c.backbone_cls
    }
    wanted |= {n for n, c in classes.items() if issubclass(c, hub.FeaturePyramidBackbone)}
    wanted |= {n for n in classes if n.endswith("VisionEncoder")}
    listed = {model.cls for model in zoo.MODELS}
    assert {n for n in wanted if not NOT_LISTED.search(n)} <= listed


# -- what every model does ----------------------------------------------------------------


@pytest.mark.parametrize("spec", of_each(zoo.MODELS))
def test_model(spec, tmp_path):
    if not spec.is_here:
        pytest.skip(f"keras_hub's {spec.cls} does not run on {BACKEND}")
    plain, x = spec.make(), spec.inputs()
    heads = classifier_paths(plain)
    before, weights = outputs(plain, x), values(plain.weights)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*Compile it again")  # tasks compile themselves
        model = lora.inject_lora(plain, lora_rank=2)
    chosen = lora_layers(model)
    _assert_sensible(chosen, heads)
    assert_equal(outputs(model, x), before)
    randomise(model)
    changed = outputs(model, x)
    assert differ(changed, before)

    lora.merge_lora_weights(model)
    assert_equal(outputs(model, x), changed)
    lora.unmerge_lora_weights(model)
    regular = lora.convert_to_regular_model(model)
    assert not any("tfimm_lora" in type(x).__module__ for x in regular._flatten_layers())
    assert_equal(outputs(regular, x), changed)

    lora.save_adapter(model, tmp_path)
    other = spec.make()
    for variable, value in zip(other.weights, weights):
        variable.assign(value)
    lora.load_adapter(other, tmp_path)
    assert_equal(outputs(other, x), changed)

    _trains_only_its_factors(model, spec, x)
    lora.remove_lora(model, merge=False)
    for variable, value in zip(model.weights, weights):
        np.testing.assert_array_equal(array(variable), value)
    assert_equal(outputs(model, x), before)


def _assert_sensible(chosen, heads):
    """The projections and convolutions, but no classifier and no table of positions."""
    assert chosen and not set(chosen) & set(heads)
    assert not [p for p in chosen if re.search("position", p.rpartition("/")[2])]


def _trains_only_its_factors(model, spec, x):
    named = lora.lora_trainable_weights(model)
    others = lora.lora_non_trainable_weights(model)
    assert ids(model.trainable_weights) == ids(named)
    before, still = values(named), values(others)
    y = None if spec.labels is None else spec.labels()
    if y is None:
        results = model.output
        # Without the metrics of tasks, which are for one output and survive another compile.
        loss = zoo.squared_error(results)
        keras.Model.compile(model, keras.optimizers.SGD(1e-2), loss, metrics=None)
        model._compile_metrics = None
        shapes = [part.shape for part in outputs(model, x).values()]
        y = keras.tree.pack_sequence_as(results, [normal(*shape) for shape in shapes])
    else:
        model.compile(optimizer=keras.optimizers.SGD(1e-2))
    # That of keras_hub's tasks takes labels of one tensor only.
    loss = keras.Model.train_on_batch(model, x, y)
    assert np.isfinite(np.asarray(loss if np.isscalar(loss) else loss[0])).all()
    for variable, value in zip(others, still):
        np.testing.assert_array_equal(array(variable), value, err_msg=variable.path)
    moved = [np.abs(array(v) - old).max() > 0 for v, old in zip(named, before)]
    assert sum(moved) > len(moved) / 2


# -- classifiers of backbones -------------------------------------------------------------


@pytest.mark.parametrize("spec", of_each([m for m in zoo.BACKBONES if m.features]))
def test_a_backbone_gets_a_classifier(spec, tmp_path):
    backbone = spec.make()
    x = zoo.images()
    model = with_classifier(backbone, 5)
    assert model.output_shape == (None, 5) and classifier_paths(model) == ["predictions"]
    assert tuple(model.get_layer("predictions").kernel.shape) == (spec.features, 5)
    assert tuple(model.input_shape) == (None, *zoo.IMAGE)
    lora.inject_lora(model, lora_rank=2, lora_train_classifier=True)
    randomise(model)
    logits = outputs(model, x)
    regular = lora.convert_to_regular_model(model)
    regular.save(tmp_path / "m.keras")
    assert_equal(outputs(keras.models.load_model(tmp_path / "m.keras"), x), logits)
