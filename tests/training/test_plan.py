"""``plan`` says what training will do; checked against what it then does."""

import os

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import BACKEND, LEGACY, array, ids, keras, run, values
from tests.helpers.tiny_models import IDS, MODELS, functional, nested, sequential, subclassed
from tfimm_lora.backend import backend_of
from tfimm_lora.finetuning.step_memory import step_bytes
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.training.plan import OPTIMIZER_SLOTS, plan

SETTINGS = [
    dict(lora_rank=3),
    dict(lora_rank=2, lora_alpha=7, lora_train_bias="all", lora_train_classifier=True),
]


def size(variables):
    return sum(int(np.prod(v.shape)) for v in variables)


def classes(model):
    return [type(x) for _, x in backend_of(model).walk(model)]


def files_of_adapter(model, folder):
    lora.save_adapter(model, folder)
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder)}


@pytest.mark.parametrize("arguments", SETTINGS, ids=["plain", "all"])
@pytest.mark.parametrize("tiny", MODELS, ids=IDS)
def test_plan_is_what_is_then_trained_and_saved(tiny, arguments, tmp_path):
    if tiny.name == "attention":
        arguments = {k: v for k, v in arguments.items() if k != "lora_train_classifier"}
    model = tiny.make()
    total = size(model.weights)
    # Of a model as it was made everything is trained that can be.
    full = size(model.trainable_weights)
    found = plan(model, **arguments)
    assert (found.total, found.full) == (total, full)

    lora.inject_lora(model, **arguments)
    adapted = lora_layers(model)
    assert [x.path for x in found.layers] == list(adapted)
    for planned, layer in zip(found.layers, adapted.values()):
        factors = (layer.kernel_lora_a, layer.kernel_lora_b)
        assert planned.parameters == size(factors)
        assert (planned.rank, planned.scale) == (layer.lora.rank, layer.lora.scale)
        assert planned.kernel == array(layer._kernel_variable).size
    assert found.trainable == size(model.trainable_weights)
    assert found.factors == sum(x.parameters for x in found.layers)
    parts = (found.factors, found.classifier, found.biases, found.modules)
    assert sum(parts) == found.trainable
    assert found.share == found.trainable / total
    left = {id(v) for layer in adapted.values() for v in layer.weights}
    assert sum(x.parameters for x in found.left_out) == size(
        v for v in model.weights if id(v) not in left
    )
    assert found.adapter_files == files_of_adapter(model, tmp_path / "adapter")
    assert plan(model) == found


def test_parts_of_a_projection_are_planned_as_they_are_saved(tmp_path):
    entry = keras.Input((6,))
    x = keras.layers.Dense(18, name="qkv")(entry)
    model = keras.Model(entry, keras.layers.Dense(3, name="head")(x))
    found = plan(model, lora_rank=2, lora_qkv="qv", lora_targets=["qkv"])
    assert found.trainable == 2 * (2 * 6 + 2 * 6)
    lora.inject_lora(model, lora_rank=2, lora_qkv="qv", lora_targets=["qkv"])
    assert found.adapter_files == files_of_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("make", [functional, sequential, nested, subclassed])
def test_planning_leaves_the_model_as_it_was(make):
    model = make()
    x = np.ones((2, *((5, 6) if make is subclassed else model.input_shape[1:])), "float32")
    before, kinds = run(model, x), classes(model)
    trained, held = ids(model.trainable_weights), values(model.weights)
    plan(model, lora_rank=2, lora_train_bias="all")
    assert classes(model) == kinds
    assert ids(model.trainable_weights) == trained
    for value, variable in zip(held, model.weights):
        np.testing.assert_array_equal(array(variable), value)
    np.testing.assert_array_equal(run(model, x), before)


def test_planning_leaves_the_model_as_it_was_after_an_error(monkeypatch):
    model = functional()
    kinds = classes(model)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("tfimm_lora.training.plan.save_adapter", fail)
    with pytest.raises(OSError, match="disk full"):
        plan(model)
    assert classes(model) == kinds


@pytest.mark.parametrize(
    "variant",
    [
        {},
        dict(lora_init="pissa"),
        dict(lora_init="gaussian"),
        dict(lora_init="eva"),
        dict(lora_use_loha=True),
    ],
    ids=lambda variant: "-".join(map(str, variant.values())) or "plain",
)
def test_planning_a_variant_draws_no_random_number_and_counts_its_parameters(variant):
    def factors(planned):
        keras.utils.set_random_seed(6)
        model = functional()
        keras.utils.set_random_seed(7)
        if planned:
            found = plan(model, lora_rank=2, **variant)
        lora.inject_lora(model, lora_rank=2, **variant)
        if planned:
            assert found.trainable == size(model.trainable_weights)
            assert found.adapter_files == plan(model).adapter_files
        draw = array(keras.initializers.RandomNormal()((3,)))  # what comes after
        return [*values(model.trainable_weights), draw]

    for one, other in zip(factors(False), factors(True)):
        np.testing.assert_array_equal(one, other)


def test_reasons_for_leaving_layers_out():
    found = plan(functional(), lora_targets=["hidden", "pw"])
    assert found.reasons == {
        "no LoRA for BatchNormalization": 2,
        "not among the targets": 2,
        "classifier, not trained": 1,
    }
    assert [x.path for x in found.left_out] == ["stem", "bn1", "dw", "bn2", "out"]
    assert {x.type for x in found.left_out if x.path.startswith("bn")} == {"BatchNormalization"}
    whole = plan(
        functional(),
        lora_targets=["hidden"],
        lora_train_modules=["pw"],
        lora_train_classifier=True,
    )
    reasons = {x.path: (x.reason, x.trained) for x in whole.left_out}
    assert reasons["pw"] == ("fully trained", 6 * 6 + 6)
    assert reasons["out"] == ("classifier, fully trained", 10 * 3 + 3)
    assert (whole.modules, whole.classifier, whole.classifier_total) == (42, 33, 33)

    own = {x.path: x.reason for x in plan(subclassed(), lora_qkv="v").left_out}
    assert own[""] == "own weights of a layer with sublayers"
    assert own["block0/attention/query"] == "not in lora_qkv='v'"


@pytest.mark.skipif(not LEGACY, reason="of tfimm")
def test_targets_with_and_without_parts_are_distinguished():
    from tests.helpers.tiny_architectures import ARCHITECTURES

    model = ARCHITECTURES["pvt"].make()
    reasons = {x.path: x.reason for x in plan(model, lora_qkv="v").left_out}
    assert reasons["block1/0/attn/q"] == "not in lora_qkv='v'"
    assert reasons["patch_embed1/proj"] == "not among the targets"


@pytest.mark.parametrize("name", OPTIMIZER_SLOTS)
def test_memory_of_an_optimizer_is_that_of_keras(name):
    made = {"adamw": "AdamW", "adam": "Adam", "lion": "Lion", "rmsprop": "RMSprop"}
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    if name != "sgd":
        optimizer = getattr(keras.optimizers, made[name])(0.1)
    model = functional()
    found = plan(model, lora_rank=2)
    memory = found.memory(name)
    slots, everything = OPTIMIZER_SLOTS[name], size(model.trainable_weights)
    assert memory["full"]["optimizer"] == 4 * slots * everything
    lora.inject_lora(model, lora_rank=2)
    optimizer.build(model.trainable_weights)
    kept = optimizer.variables() if callable(optimizer.variables) else optimizer.variables
    # The others are single numbers: the step and the learning rate.
    assert memory["lora"]["optimizer"] == 4 * size(v for v in kept if len(v.shape))
    assert memory["lora"]["gradients"] == 4 * size(model.trainable_weights)
    assert memory["lora"]["weights"] == 4 * size(model.weights)
    for way in memory.values():
        assert way["together"] == way["weights"] + way["gradients"] + way["optimizer"]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="lora_rank=0"):
        plan(functional(), lora_rank=0)
    with pytest.raises(TypeError, match="did you mean lora_rank"):
        plan(functional(), lora_rnk=2)
    with pytest.raises(ValueError):
        plan(functional(), lora_initializer="no_such_initializer")
    with pytest.raises(ValueError, match="not built"):
        plan(keras.Sequential([keras.layers.Dense(3)]))
    with pytest.raises(ValueError, match="optimizer='adamm'; expected one of adamw, adam"):
        plan(functional()).memory("adamm")
    adapted = lora.inject_lora(functional(), lora_rank=2)
    with pytest.raises(ValueError, match="has LoRA layers already"):
        plan(adapted, lora_rank=4)


def test_a_trained_model_is_refused_and_a_compiled_lora_model_described():
    model = functional()
    model.compile("sgd", "mse", run_eagerly=True)
    planned = plan(model, lora_rank=2).trainable
    assert planned == size(lora.inject_lora(functional(), lora_rank=2).trainable_weights)
    x = np.zeros((2, *model.input_shape[1:]), "float32")
    model.fit(x, np.zeros((2, model.output_shape[-1])), verbose=0)
    with pytest.raises(ValueError, match="was trained; expected a new model"):
        plan(model, lora_rank=2)
    assert "LoRA" not in "".join(c.__name__ for c in classes(model))
    adapted = lora.inject_lora(functional(), lora_rank=2)
    adapted.compile("sgd", "mse")
    assert plan(adapted).trainable == size(adapted.trainable_weights)


def chain(layers, trained=True):
    model = keras.Sequential(
        [keras.Input((64,)), *(keras.layers.Dense(64, "relu") for _ in range(layers))]
    )
    model.trainable = trained
    return model


@pytest.mark.skipif(BACKEND != "tensorflow", reason="counted in graphs of TensorFlow")
@pytest.mark.parametrize("layers", [2, 7])
def test_memory_of_a_step_is_that_of_outputs_and_two_gradients(layers):
    """By hand: ReLU's gradient and the next kernel's need its output; at the highest there are
    also the gradients of the output and input of one layer. Inputs are there before."""
    batch = 4096
    output, gradients = 4 * batch * 64, layers * 4 * (64 * 64 + 64)
    found = step_bytes(chain(layers), (64,), batch)
    assert layers + 1 <= found / output <= layers + 2 + gradients / output + 0.01
    assert step_bytes(chain(layers), (64,), 2 * batch) == pytest.approx(2 * found, rel=0.05)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="counted in graphs of TensorFlow")
def test_gradients_of_kernels_count_to_the_end():
    gradients = 7 * 4 * (64 * 64 + 64)
    assert gradients <= step_bytes(chain(7), (64,), 1) <= 1.2 * gradients


@pytest.mark.skipif(BACKEND != "tensorflow", reason="counted in graphs of TensorFlow")
def test_nothing_is_kept_of_layers_that_are_not_trained():
    model = keras.Sequential([chain(7, trained=False), keras.layers.Dense(64)])
    model.build((None, 64))
    # The output of the last but one layer, three tensors of a layer, a gradient.
    assert step_bytes(model, (64,), 4096) <= 5 * 4 * 4096 * 64
    with pytest.raises(ValueError, match="batch_size=0"):
        step_bytes(model, (64,), 0)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="counted in graphs of TensorFlow")
def test_freezing_the_bottom_saves_memory():
    full = step_bytes(functional(), (8, 8, 3), 64)
    top = lora.inject_lora(functional(), lora_targets=["hidden"])
    assert step_bytes(top, (8, 8, 3), 64) < 0.55 * full
