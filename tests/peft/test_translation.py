"""``LoRAConfig.from_peft`` and ``to_peft``, against what real PEFT made of its configs.

``golden/peft_configs.json`` was written by real PEFT; the tests in ``interop`` run it.
"""

import dataclasses
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

import tfimm_lora as lora
from tests import golden
from tests.helpers import tiny_models
from tests.helpers.kerases import LEGACY, array, keras, normal
from tfimm_lora.adapters.peft_targets import lora_arguments_from_peft
from tfimm_lora.config import LoRAConfig
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.peft import translation
from tfimm_lora.zoo.weights.module_names import ModuleNames

FOLDER = Path(golden.__file__).parent
GOLDEN = json.loads((FOLDER / "peft_configs.json").read_text())

#: Those in whose models timm and tfimm call every layer the same.
SAME_NAMES = [
    n for n, x in GOLDEN.items() if x["model"] not in ("swin", "pvt_v2", "poolformer")
]


def adapted(model):
    """Module -> rank and scale, of every adapted layer."""
    names = ModuleNames(model)
    return {
        names.modules[path]: (layer.lora.rank, pytest.approx(layer.lora.scale))
        for path, layer in lora_layers(model).items()
    }


def trained_whole(model):
    """Modules that are trained, or around what is trained, less adapted ones and biases."""
    return set(lora.adapter_of(model).modules)


def model_of(name):
    from tests.zoo.test_weights import make

    return make(GOLDEN[name]["model"])


def check(model, name):
    expected = GOLDEN[name]
    assert adapted(model) == {m: tuple(x) for m, x in expected["adapted"].items()}
    whole = trained_whole(model)
    for module in whole:
        assert any(f"{module}.".startswith(f"{w}.") for w in expected["whole"]), module
    for module in expected["whole"]:
        assert any(f"{m}.".startswith(f"{module}.") for m in whole), module


@pytest.mark.skipif(not LEGACY, reason="of tfimm")
@pytest.mark.parametrize("name", GOLDEN)
def test_what_peft_adapts_in_timm_is_adapted_in_tfimm(name):
    model, fields = model_of(name), GOLDEN[name]["fields"]
    arguments = lora_arguments_from_peft(model, fields)
    check(lora.inject_lora(model, **arguments), name)
    if name in SAME_NAMES:
        lora.remove_lora(model)
        config = LoRAConfig.from_peft(fields)
        check(lora.inject_lora(model, **config.arguments()), name)


def test_a_config_round_trips_through_peft():
    for name in GOLDEN:
        fields = GOLDEN[name]["fields"]
        config = LoRAConfig.from_peft(fields)
        written = config.to_peft()
        assert LoRAConfig.from_peft(written) == config
        assert LoRAConfig.from_peft(json.loads(json.dumps(written))) == config
        one_pattern = isinstance(fields["layers_pattern"], str)
        one_layer = isinstance(fields["layers_to_transform"], int)
        for key, value in written.items():
            expected = fields[key]
            if key == "layers_pattern" and one_pattern:
                expected = [expected]
            if key == "layers_to_transform" and one_layer:
                expected = [expected]
            expected = None if expected == [] else expected
            assert value == expected, key


@pytest.mark.skipif(not LEGACY, reason="of tfimm")
@pytest.mark.parametrize(
    "name", ["plain", "patterns", "convolutions", "classifier", "bfloat16"]
)
def test_the_config_beside_an_adapter_means_the_layers_in_it(name):
    from tests.adapters.test_adapters_tfimm import GOLDEN as BASES
    from tests.zoo.test_weights import make

    model = make(BASES[name])
    arguments = lora_arguments_from_peft(model, FOLDER / f"peft_{name}")
    lora.inject_lora(model, **arguments)
    theirs = lora.Adapter.load(FOLDER / f"peft_{name}")
    expected = {m: (x.rank, pytest.approx(x.scale)) for m, x in theirs.layers.items()}
    assert adapted(model) == expected
    assert set(theirs.weights) <= set(lora.adapter_of(model).weights)


REPRESENTABLE = [
    dict(lora_targets=["attn/qkv", "fc1"], lora_alpha=8),
    dict(lora_targets=r".*\.(fc1|fc2)", lora_alpha=0.5, lora_rank=1, lora_dropout=0.25),
    dict(lora_targets="all-linear", lora_alpha=4, lora_exclude=["head"]),
    dict(lora_targets=["fc1"], lora_alpha=4, lora_exclude=r"blocks\.0\..*"),
    dict(lora_targets=["fc1"], lora_alpha=4, lora_layers=[0, 3]),
    dict(lora_targets=["fc1"], lora_alpha=4, lora_layers=2, lora_layers_pattern="blocks"),
    dict(lora_targets=["fc1"], lora_alpha=4, lora_layers=2, lora_layers_pattern=["h", "(a|b)"]),
    dict(lora_targets=["fc1"], lora_alpha=4, lora_use_rslora=True, lora_train_bias="all"),
    dict(
        lora_targets=["fc1"],
        lora_alpha=3,
        lora_rank_pattern={r"blocks\.1\..*": 7, "fc1": 2},
        lora_alpha_pattern={"fc1": 1.5},
    ),
    dict(lora_targets=["fc1"], lora_alpha=4, lora_train_modules=["head", "blocks/1/norm"]),
    *(
        dict(lora_targets=["fc1"], lora_rank=8, lora_alpha=4, lora_init=name)
        for name in ("gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal", "eva")
    ),
    dict(lora_targets=["fc1"], lora_alpha=4, lora_use_dora=True),
    dict(lora_targets=["fc1"], lora_alpha=4, lora_bias=True),
]


def test_settings_that_both_formats_have_round_trip():
    for arguments in REPRESENTABLE:
        config = LoRAConfig(**arguments)
        assert LoRAConfig.from_peft(config.to_peft()) == config


def test_a_scale_of_one_is_written_as_the_number_that_gives_it():
    plain = LoRAConfig(lora_rank=9, lora_targets=["fc"])
    assert plain.to_peft()["lora_alpha"] == 9
    rooted = LoRAConfig(lora_rank=9, lora_targets=["fc"], lora_use_rslora=True)
    assert rooted.to_peft()["lora_alpha"] == 3
    entry = keras.Input((4,))
    x = keras.layers.Dense(4, name="b")(keras.layers.Dense(4, name="a")(entry))
    model = keras.Model(entry, keras.layers.Dense(2, name="head")(x))
    mixed = LoRAConfig(
        lora_rank=9,
        lora_targets="all-linear",
        lora_rank_pattern={"a": 4},
        lora_alpha_pattern={"head": 5.0},
    )
    twin = LoRAConfig.from_peft(mixed.to_peft())
    for config in (mixed, twin):
        arguments = {
            **config.arguments(),
            "lora_alpha_pattern": {
                k: v for k, v in config.lora_alpha_pattern.items() if k != "head"
            },
        }
        lora.inject_lora(model, **arguments)
        assert adapted(model) == {"a": (4, 1.0), "b": (9, 1.0)}
        lora.remove_lora(model)


def test_a_pattern_of_paths_becomes_one_of_modules():
    targets = r"(.*/)?blocks\/[01]/[^/]*/fc\d"
    fields = LoRAConfig(lora_targets=targets, lora_exclude=r".*/fc2").to_peft()
    assert fields["target_modules"] == r"(.*\.)?blocks\.[01]\.[^\.]*\.fc\d"
    from tfimm_lora.layer_paths import matches

    for path in (
        "blocks/0/mlp/fc1",
        "blocks/2/mlp/fc1",
        "blocks/0/mlp/x/fc1",
        "a/blocks/1/b/fc2",
        "blocks/0/mlp/xfc1",
        "ablocks/0/mlp/fc1",
    ):
        module = path.replace("/", ".")
        assert matches(path, targets) == matches(module, fields["target_modules"]), path
        assert matches(path, r".*/fc2") == matches(module, fields["exclude_modules"]), path


def test_files_folders_and_objects_are_read(tmp_path):
    class Config:
        def to_dict(self):
            return {"r": 2, "target_modules": {"b", "a"}, "exclude_modules": ("c",)}

    config = LoRAConfig.from_peft(Config())
    assert config.lora_targets == ["a", "b"] and config.lora_exclude == ("c",)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config.to_peft()))
    assert LoRAConfig.from_peft(tmp_path) == config
    assert LoRAConfig.from_peft(str(tmp_path / "adapter_config.json")) == config
    assert LoRAConfig.from_peft(OrderedDict(r=3)).lora_rank == 3
    defaults = LoRAConfig.from_peft({})
    assert (defaults.lora_rank, defaults.lora_alpha, defaults.lora_targets) == (8, 8, None)
    assert LoRAConfig.from_peft({}, lora_dropout=0.5).lora_dropout == 0.5
    given = {"target_modules": ["a"], "rank_pattern": {"a": 3}}
    before = json.dumps(given)
    LoRAConfig.from_peft(given).lora_rank_pattern["b"] = 1
    assert json.dumps(given) == before


REFUSED = [
    ("nowhere", FileNotFoundError, "nowhere.*adapter_config.json or its folder"),
    (3, TypeError, "Received 3; expected a PEFT LoraConfig"),
    ({"peft_type": "IA3"}, ValueError, "peft_type='IA3', expected 'LORA'"),
    ({"r": 0}, ValueError, "r=0"),
    ({"r": "8"}, ValueError, "r='8'"),
    ({"target_modules": 3}, ValueError, "target_modules=3"),
    ({"target_modules": [3]}, ValueError, r"target_modules=\[3\]"),
    ({"target_modules": ["a"], "layers_to_transform": "x"}, TypeError, "lora_layers='x'"),
    ({"layers_to_transform": 1, "layers_pattern": 5}, ValueError, "layers_pattern=5"),
    (
        {"layers_to_transform": 1, "layers_pattern": "a|b"},
        ValueError,
        r"layers_pattern='a\|b'",
    ),
    ({"layers_pattern": "blocks"}, ValueError, "without lora_layers"),
    ({"modules_to_save": [1]}, ValueError, "modules_to_save"),
    ({"bias": "some"}, ValueError, "bias='some'"),
    ({"init_lora_weights": False}, ValueError, "init_lora_weights=False .B would not"),
    ({"init_lora_weights": "loftq"}, ValueError, "'loftq' .not supported here"),
    ({"init_lora_weights": "pissa_niter_x"}, ValueError, "pissa_niter_x"),
    ({"use_dora": 1}, ValueError, "use_dora=1"),
    ({"use_dora": True, "lora_bias": True}, ValueError, "expected at most one of them"),
    (
        {
            "use_bdlora": True,
            "megatron_config": {"a": 1},
            "ensure_weight_tying": True,
            "new": 7,
        },
        ValueError,
        "use_bdlora=True, megatron_config=.*, new=7 .unknown., ensure_weight_tying",
    ),
]


def test_what_has_no_counterpart_is_refused_by_name():
    for source, kind, words in REFUSED:
        with pytest.raises(kind, match=words):
            LoRAConfig.from_peft(source)


def test_a_file_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "adapter_config.json"
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match="adapter_config.json is not JSON"):
            LoRAConfig.from_peft(tmp_path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="which holds a list, expected an object"):
        LoRAConfig.from_peft(tmp_path)
    with pytest.raises(TypeError, match="lora_rnk; did you mean lora_rank"):
        LoRAConfig.from_peft({}, lora_rnk=3)


INEXPRESSIBLE = [
    ({}, "lora_targets=None .its layers"),
    (dict(lora_targets="all"), "lora_targets='all' .its layers"),
    (dict(lora_targets="attention", lora_exclude="mlp"), "'attention'.*lora_exclude='mlp'"),
    (dict(lora_targets=["a#2"]), "lora_targets with 'a#2'"),
    (dict(lora_targets="a.*", lora_layers=1), "lora_layers .with lora_targets"),
    (dict(lora_targets=["a"], lora_qkv="qv"), "lora_qkv='qv' .*save_adapter"),
    (dict(lora_targets=["a"], lora_train_classifier=True), "name the classifier"),
    (dict(lora_targets=["a"], lora_initializer="zeros"), "lora_initializer='zeros'"),
    (
        dict(lora_targets=["a"], lora_rank_pattern={"a": 3}, lora_alpha_pattern={"a": None}),
        r"lora_alpha_pattern\['a'\]=None",
    ),
    (
        dict(lora_targets=["a"], lora_regularizer="l2", lora_qkv="q"),
        "lora_regularizer='l2'.*lora_qkv='q'",
    ),
]


def test_what_peft_cannot_say_is_refused_by_name():
    for arguments, words in INEXPRESSIBLE:
        with pytest.raises(ValueError, match=f"cannot express: .*{words}"):
            LoRAConfig(**arguments).to_peft()


def test_normal_factors_have_the_spread_that_peft_gives_them():
    peft = {"r": 4, "target_modules": ["hidden"], "init_lora_weights": "Gaussian"}
    model = tiny_models.functional()
    entry = keras.Input((400,))
    model = keras.Model(entry, keras.layers.Dense(3, name="hidden")(entry))
    config = LoRAConfig.from_peft(peft)
    lora.inject_lora(model, **config.arguments())
    a = array(model.get_layer("hidden").kernel_lora_a)
    assert abs(a.std() - 1 / 4) < 0.02 and abs(a.mean()) < 0.02
    assert np.abs(a).max() > 0.5, "normal, not uniform"


def test_lookup_in_a_model_names_all_that_is_not_there():
    model = tiny_models.functional()
    peft = {
        "target_modules": ["hidden", "fc9"],
        "exclude_modules": ["fc8"],
        "modules_to_save": ["fc7"],
        "rank_pattern": {"fc6": 2},
    }
    with pytest.warns(UserWarning, match="'fc9'.*'fc8'.*'fc7'.*'fc6'.*hidden"):
        assert lora_arguments_from_peft(model, peft)["lora_targets"] == ["hidden"]
    with pytest.warns(UserWarning, match="exclude_modules with 'fc.'"):
        lora_arguments_from_peft(
            model, {"target_modules": ["hidden"], "exclude_modules": "fc."}
        )
    for nothing in ([], ""):
        with pytest.raises(ValueError, match="which selects no module"):
            lora_arguments_from_peft(model, {"target_modules": nothing})
        with pytest.raises(ValueError, match="which selects no module"):
            LoRAConfig.from_peft({"target_modules": nothing})
    with pytest.raises(ValueError, match="layers_to_transform=1 with target_modules='hid"):
        LoRAConfig.from_peft({"target_modules": "hidden", "layers_to_transform": 1})
    with pytest.raises(ValueError, match="leaves no layer"):
        lora_arguments_from_peft(model, {"target_modules": "fc."})
    everything = lora_arguments_from_peft(
        model, {"target_modules": "all-linear", "modules_to_save": ["out", "bn1"]}
    )
    assert sorted(everything["lora_targets"]) == ["dw", "hidden", "pw", "stem"]
    assert everything["lora_train_modules"] == ["bn1", "out"]
    lora.inject_lora(model, **everything)
    with pytest.raises(ValueError, match="has LoRA layers already"):
        lora_arguments_from_peft(model, {"target_modules": ["hidden"]})


def test_a_layer_whose_name_ends_another_one_keeps_its_own_rank():
    """The pattern for "fc" would mean "block.fc" too, which has another rank."""

    def make():
        entry = keras.Input((4,))
        inner = keras.Model(entry, keras.layers.Dense(4, name="fc")(entry), name="block")
        outer = keras.Input((4,))
        x = keras.layers.Dense(4, name="fc")(keras.layers.Dense(4, name="c")(inner(outer)))
        return keras.Model(outer, keras.layers.Dense(3, name="head")(x))

    def update(rank, scale, seed):
        a, b = normal(rank, 4, seed=seed), normal(4, rank, seed=seed + 1)
        return lora.LayerUpdate(a, b, scale=scale)

    for scales in ((1.5, 1.5, 1.5), (3.0, 1.5, 1.5), (1.0, 1.0, 1.0), (2 / 3, 1.0, 1.0)):
        updates = {
            "fc": update(3, scales[0], 0),
            "block.fc": update(2, scales[1], 2),
            "c": update(2, scales[2], 4),
        }
        model = lora.load_adapter(make(), lora.Adapter(updates))
        for module, given in lora.adapter_of(model).layers.items():
            np.testing.assert_allclose(given.delta(), updates[module].delta(), rtol=1e-5)
            assert given.rank == updates[module].rank
        scale = {p: x.lora.scale for p, x in lora_layers(model).items()}
        assert scale == pytest.approx({"fc": scales[0], "block/fc": scales[1], "c": scales[2]})


@pytest.mark.skipif(not LEGACY, reason="of tfimm")
def test_configs_of_architectures_know_their_own_targets():
    cfg = tiny_models._vit().cfg
    values = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    fields = lora.LoRAViTConfig(**values, lora_targets="attention").to_peft()
    assert fields["target_modules"] == ["attn.qkv", "attn.proj"]
    config = lora.LoRAViTConfig.from_peft(fields, **values)
    assert config.lora_targets == ["attn/qkv", "attn/proj"] and config.name == cfg.name
    default = lora.LoRAViTConfig(**values).to_peft()
    assert default["target_modules"] == ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


def test_a_setting_that_cannot_be_translated_is_refused():
    values = {**lora.LoRAConfig(lora_targets=["fc"]).arguments(), "lora_new": 2}
    with pytest.raises(ValueError, match=r"lora_new=2 \(PEFT has no such field"):
        translation.fields_from(values, lora.LoRAConfig.presets())
