"""Matching of layer paths, and what is adapted by default."""

import warnings

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import tiny_models
from tests.helpers.kerases import LEGACY, array, keras, normal, run, values
from tfimm_lora.layer_paths import matches
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.merge import lora_layers


@pytest.mark.parametrize(
    "path, targets, expected",
    [
        ("blocks/3/mlp/fc1", ["fc1"], True),
        ("blocks/3/mlp/fc1", ["mlp/fc1"], True),
        ("blocks/3/mlp/fc1", ["mlp.fc1"], True),
        ("blocks/3/mlp/fc1", ["blocks/3/mlp/fc1"], True),
        ("blocks/3/mlp/xfc1", ["fc1"], False),
        ("blocks/3/mlp/fc1", ["mlp"], False),
        ("blocks/3/mlp/fc1", "fc1", False),
        ("blocks/3/mlp/fc1", r".*/fc\d", True),
        ("blocks/3/mlp/fc1", r".*\.mlp\.(fc1|fc2)", True),
        ("blocks/3/mlp/fc1", r"blocks/[12]/.*", False),
        ("fc", ["fc"], True),
        ("fc", [], False),
    ],
)
def test_matching(path, targets, expected):
    assert matches(path, targets) is expected


def adapted_paths(model):
    return sorted(lora_layers(model))


def test_default_is_every_supported_layer_but_the_classifier():
    model = lora.inject_lora(tiny_models.functional())
    assert adapted_paths(model) == ["dw", "hidden", "pw", "stem"]


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["hidden", "pw"], ["hidden", "pw"]),
        (("out",), ["out"]),
        (r"(hid|o).*", ["hidden", "out"]),
    ],
)
def test_targets_by_name_and_by_expression(targets, expected):
    model = lora.inject_lora(tiny_models.functional(), lora_targets=targets)
    assert adapted_paths(model) == expected


def test_targets_reach_into_lists_dicts_and_attention():
    model = lora.inject_lora(
        tiny_models.subclassed(),
        lora_targets=["fc0", "attention/query"],
    )
    assert adapted_paths(model) == [
        "block0/attention/query",
        "block0/fc0",
        "block1/attention/query",
        "block1/fc0",
    ]
    model = lora.inject_lora(tiny_models.subclassed(), lora_targets=["in_dict"])
    assert adapted_paths(model) == ["block0/in_dict", "block1/in_dict"]


@pytest.mark.parametrize(
    "targets, words",
    [
        (["hiden"], r"matches no layer.*nearest first: hidden \(Dense\)"),
        (["hidden", "nothing"], r"\['nothing'\]"),
        (["bn1"], "matches no layer that can be adapted"),
        (r"nowhere.*", "nowhere"),
        ([], "matches no layer"),
        ("(", "not a regular expression"),
    ],
)
def test_targets_that_match_nothing_are_errors_and_change_nothing(targets, words):
    model = tiny_models.functional()
    x = normal(2, 8, 8, 3)
    before, variables = run(model, x), list(model.weights)
    classes = [type(layer) for layer in model.layers]
    with pytest.raises(ValueError, match=words):
        lora.inject_lora(model, lora_targets=targets)
    assert [type(layer) for layer in model.layers] == classes
    assert [id(v) for v in model.weights] == [id(v) for v in variables]
    np.testing.assert_array_equal(run(model, x), before)


def test_wrong_type_of_targets():
    with pytest.raises(TypeError, match="lora_targets=3"):
        lora.inject_lora(tiny_models.functional(), lora_targets=3)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("functional", ["out"]),
        ("sequential", None),
        ("nested", ["head"]),
        ("subclassed", ["head"]),
        ("attention", ["head"]),
    ],
)
def test_classifier_is_found(name, expected):
    model = getattr(tiny_models, name)()
    expected = expected or [model.layers[-1].name]
    assert classifier_paths(model) == expected


def test_model_without_a_classifier_has_none():
    entry = keras.Input((4, 4, 3))
    x = keras.layers.Conv2D(4, 3, name="conv")(entry)
    model = keras.Model(entry, keras.layers.LayerNormalization()(x))
    assert classifier_paths(model) == []
    entry = keras.Input((5,))
    x = keras.layers.Dense(5, name="fc")(entry)
    residual = keras.Model(entry, keras.layers.Add()([x, entry]))
    assert classifier_paths(residual) == []
    assert adapted_paths(lora.inject_lora(residual)) == ["fc"]


def test_classifier_is_fully_trained_on_request():
    model = lora.inject_lora(tiny_models.functional(), lora_train_classifier=True)
    out = model.get_layer("out")
    assert type(out) is keras.layers.Dense
    named = lora.lora_trainable_weights(model, trainable_layers=["out"])
    assert {id(v) for v in named} == {id(v) for v in model.trainable_weights}
    assert {id(v) for v in out.weights} < {id(v) for v in named}


def test_trainable_layers_that_do_not_exist_are_an_error():
    model = lora.inject_lora(tiny_models.functional())
    with pytest.raises(ValueError, match=r"\['ot'\].*nearest first: out"):
        lora.lora_trainable_weights(model, trainable_layers=["ot"])
    with pytest.raises(ValueError, match="train_bias='some'"):
        lora.lora_trainable_weights(model, train_bias="some")


def test_batch_norm_in_a_trained_layer_updates_its_statistics():
    model = tiny_models.functional()
    lora.inject_lora(model)
    named = lora.lora_trainable_weights(model, trainable_layers=["bn1"])
    assert len(named) == 8 + 2  # gamma and beta, not the statistics


def test_bias_like_variables_by_their_names():
    model = tiny_models.functional()
    lora.inject_lora(model, lora_train_bias="all")
    leaf = [v.name.rpartition("/")[2].partition(":")[0] for v in model.trainable_weights]
    assert leaf.count("beta") == 2 and leaf.count("bias") == 5
    assert leaf.count("gamma") == 0 and leaf.count("kernel") == 0


def test_model_without_lora_has_no_lora_weights():
    with pytest.raises(ValueError, match="no LoRA layers"):
        lora.lora_trainable_weights(tiny_models.functional())
    for function in (lora.merge_lora_weights, lora.unmerge_lora_weights, lora.remove_lora):
        with pytest.raises(ValueError, match="no LoRA layers"):
            function(tiny_models.functional())
    with pytest.raises(ValueError, match="no LoRA layers"):
        lora.convert_to_regular_model(tiny_models.functional())


def test_injection_into_unbuilt_adapted_or_foreign_models_is_refused():
    with pytest.raises(ValueError, match="not built"):
        lora.inject_lora(keras.Sequential([keras.layers.Dense(3)]))
    with pytest.raises(ValueError, match="not built"):
        lora.inject_lora(tiny_models.Subclassed())
    with pytest.raises(TypeError, match="expected a Keras"):
        lora.inject_lora("model")
    model = lora.inject_lora(tiny_models.functional())
    with pytest.raises(ValueError, match="has LoRA layers already"):
        lora.inject_lora(model)
    with pytest.raises(ValueError, match="has LoRA already"):
        lora.convert_to_lora_model(model)
    with pytest.raises(TypeError, match="lora_rnk; did you mean lora_rank"):
        lora.inject_lora(tiny_models.functional(), lora_rnk=3)
    with pytest.raises(TypeError, match="nb_classes"):
        lora.convert_to_lora_model(tiny_models.functional(), nb_classes=3)


def test_matched_layer_that_was_never_used_is_refused():
    class Half(keras.Model):
        def __init__(self):
            super().__init__()
            self.used = keras.layers.Dense(3, name="used")
            self.unused = keras.layers.Dense(3, name="unused")

        def call(self, x):
            return self.used(x)

    model = Half()
    run(model, normal(2, 3))
    with pytest.raises(ValueError, match="'unused' is not built"):
        lora.inject_lora(model, lora_targets=["used", "unused"])
    assert type(model.used) is keras.layers.Dense
    lora.inject_lora(model, lora_targets=["used"])


def test_wrong_layer_among_good_ones_leaves_the_model_alone():
    entry = keras.Input((6, 6, 4))
    x = keras.layers.Conv2D(4, 3, groups=2, name="grouped")(entry)
    x = keras.layers.Conv2D(4, 3, name="plain")(x)
    model = keras.Model(entry, x)
    variables = [id(v) for v in model.weights]
    with pytest.raises(ValueError, match="'grouped'.*lora_dropout=0"):
        lora.inject_lora(model, lora_dropout=0.1)
    assert [id(v) for v in model.weights] == variables
    assert not any(isinstance(layer, lora.LoRALayer) for layer in model.layers)
    assert len(model.trainable_weights) == 4


def test_a_compiled_model_must_be_compiled_again():
    model = tiny_models.functional()
    model.compile("sgd", "mse")
    x = normal(2, 8, 8, 3)
    model.fit(x, np.zeros((2, 3)), verbose=0)
    with pytest.warns(UserWarning, match="ompile it again"):
        lora.inject_lora(model)
    with pytest.raises((RuntimeError, ValueError), match="compile"):
        model.fit(x, np.zeros((2, 3)), verbose=0)
    model.compile("sgd", "mse")
    model.fit(x, np.zeros((2, 3)), verbose=0)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_model_that_is_compiled_but_not_trained_stays_compiled(mixed, policy):
    if mixed:
        policy("mixed_float16")  # its optimizer is wrapped in one that scales the loss
    model, x = tiny_models.functional(), normal(2, 8, 8, 3)
    model.compile("adam", "mse")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.inject_lora(model, lora_rank=2)
    frozen = model.non_trainable_weights
    before = values(frozen)
    model.fit(x, np.zeros((2, 3)), verbose=0)
    for variable, value in zip(frozen, before):
        np.testing.assert_array_equal(array(variable), value)
    assert max(np.abs(array(v)).max() for v in model.trainable_weights if "_b" in v.name) > 0
    with pytest.warns(UserWarning, match="after it was trained. Compile it again"):
        lora.remove_lora(model)


@pytest.mark.skipif(not LEGACY, reason="of legacy Keras")
def test_an_optimizer_that_does_not_say_whether_it_is_built_counts_as_built():
    model = tiny_models.functional()
    model.compile(keras.optimizers.legacy.SGD(), "mse")
    with pytest.warns(UserWarning, match="Compile it again"):
        lora.inject_lora(model, lora_rank=2)


@pytest.mark.skipif(LEGACY, reason="of Keras 3")
def test_layers_with_keras_own_lora_or_quantised_are_refused():
    model = tiny_models.functional()
    model.get_layer("hidden").enable_lora(2)
    with pytest.raises(ValueError, match="enable_lora"):
        lora.inject_lora(model)
    model = tiny_models.functional()
    model.get_layer("hidden").quantize("int8")
    with pytest.raises(ValueError, match="quantized"):
        lora.inject_lora(model)


def test_presets_go_by_the_words_in_paths():
    model = lora.inject_lora(tiny_models.subclassed(), lora_targets="attention")
    kinds = {path.rpartition("/")[2] for path in adapted_paths(model)}
    assert kinds == {"query", "key", "value", "attention_output"}
    everything = lora.inject_lora(tiny_models.functional(), lora_targets="all")
    assert adapted_paths(everything) == ["dw", "hidden", "pw", "stem"]
    with pytest.raises(
        ValueError, match=r"'mlp'.*nearest.*Presets: default, attention, mlp, all"
    ):
        lora.inject_lora(tiny_models.functional(), lora_targets="mlp")


def test_query_and_value_alone():
    model = lora.inject_lora(tiny_models.subclassed(), lora_targets="attention", lora_qkv="qv")
    kinds = {path.rpartition("/")[2] for path in adapted_paths(model)}
    assert kinds == {"query", "value", "attention_output"}


def fused():
    entry = keras.Input((4, 6))
    x = keras.layers.Dense(9, name="qkv")(entry)
    return keras.Model(entry, keras.layers.Dense(2, name="out")(x))


def test_a_custom_fused_layer_is_found_by_name():
    model, x = fused(), normal(2, 4, 6)
    before = run(model, x)
    lora.inject_lora(model, lora_rank=2, lora_qkv="v")
    layer = model.get_layer("qkv")
    assert tuple(layer.kernel_lora_a.shape) == (6, 2)
    assert tuple(layer.kernel_lora_b.shape) == (2, 3)
    assert layer.get_config()["lora_qkv"] == "v"
    np.testing.assert_allclose(run(model, x), before, atol=1e-6)
    lora.remove_lora(model)
    assert type(model.get_layer("qkv")) is keras.layers.Dense


@pytest.mark.parametrize(
    "arguments, kind, words",
    [
        (dict(lora_qkv="x"), ValueError, "lora_qkv='x'.*letters of"),
        (dict(lora_qkv="qq"), ValueError, "lora_qkv='qq'"),
        (dict(lora_qkv=["q"]), TypeError, r"lora_qkv=\['q'\]"),
        (dict(lora_qkv="q", lora_targets=["out"]), ValueError, "none of the layers.*out"),
        (dict(lora_train_modules="out"), TypeError, "lora_train_modules='out'.*list"),
        (dict(lora_train_modules=["ot"]), ValueError, r"\['ot'\].*nearest first: out"),
    ],
)
def test_wrong_parts_and_modules_leave_the_model_alone(arguments, kind, words):
    model = fused()
    with pytest.raises(kind, match=words):
        lora.inject_lora(model, **arguments)
    assert {type(x) for x in model.layers[1:]} == {keras.layers.Dense}


def test_parts_of_what_is_not_fused_are_refused():
    with pytest.raises(ValueError, match="10 units are not 3 blocks.*lora_qkv=None"):
        lora.LoRADense(10, lora_qkv="q")
    with pytest.raises(ValueError, match="lora_qkv='q' for a kernel with the blocks 'kv'"):
        lora.LoRADense(10, lora_qkv="q", lora_qkv_layout="kv")
    with pytest.raises(ValueError, match="lora_qkv_layout='q'.*at least two"):
        lora.LoRADense(10, lora_qkv="q", lora_qkv_layout="q")
    with pytest.raises(ValueError, match="fused kernels of dense layers only"):
        lora.LoRAConv2D(9, 3, lora_qkv="q")


def test_named_modules_are_fully_trained_and_not_adapted():
    model = lora.inject_lora(tiny_models.subclassed(), lora_train_modules=["block1", "bn"])
    names = lora.lora_trainable_weights(model, trainable_layers=["block1", "bn"])
    assert {id(v) for v in model.trainable_weights} == {id(v) for v in names}
    assert all(path.startswith("block0") for path in adapted_paths(model))
    assert not any(isinstance(x, lora.LoRALayer) for x in model.blocks[1]._flatten_layers())
    assert id(model.norm.gamma) in {id(v) for v in model.trainable_weights}
    assert id(model.norm.moving_mean) not in {id(v) for v in model.trainable_weights}
    lora.remove_lora(model)
    assert len(model.trainable_weights) == len(tiny_models.subclassed().trainable_weights)
