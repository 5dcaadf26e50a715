"""Exclusion, numbered blocks, and the table that tells what is adapted and why not."""

import dataclasses
import json

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import tiny_models
from tests.helpers.kerases import LEGACY, array, ids, keras, normal
from tfimm_lora.config import LoRAConfig
from tfimm_lora.layer_paths import index_of
from tfimm_lora.model.explain_targets import TargetTable, explain_targets
from tfimm_lora.model.merge import has_lora, lora_layers

layers = keras.layers


def adapted_paths(model):
    return sorted(lora_layers(model))


# -- exclusion -----------------------------------------------------------------------------


EXCLUSIONS = [
    (dict(lora_exclude=["stem"]), ["dw", "hidden", "pw"]),
    (dict(lora_exclude=("stem", "dw")), ["hidden", "pw"]),
    (dict(lora_exclude=r".w"), ["hidden", "stem"]),
    (dict(lora_targets=["hidden", "out"], lora_exclude=["out"]), ["hidden"]),
    (dict(lora_targets=["hidden"], lora_exclude=["stem"]), ["hidden"]),
    (dict(lora_targets="all-linear", lora_exclude=[]), ["dw", "hidden", "pw", "stem"]),
    (dict(lora_targets="ALL-LINEAR"), ["dw", "hidden", "pw", "stem"]),
]


def test_what_is_excluded_is_not_adapted_even_where_targets_mean_it():
    model = tiny_models.functional()
    for arguments, expected in EXCLUSIONS:
        assert adapted_paths(lora.inject_lora(model, **arguments)) == expected
        lora.remove_lora(model, merge=False)


def test_a_preset_can_be_excluded():
    model = lora.inject_lora(tiny_models.subclassed(), lora_exclude="attention")
    kinds = {path.rpartition("/")[2] for path in adapted_paths(model)}
    assert kinds == {"fc0", "fc1", "in_dict"}


WRONG_EXCLUSIONS = [
    (dict(lora_exclude=["hiden"]), ValueError, r"lora_exclude=\['hiden'\].*first: hidden"),
    (dict(lora_exclude=["bn1"]), ValueError, r"lora_exclude=\['bn1'\].*no layer that can"),
    (dict(lora_exclude="nowhere"), ValueError, "lora_exclude='nowhere'"),
    (dict(lora_exclude="("), ValueError, r"lora_exclude='\('.*not a regular expression"),
    (dict(lora_exclude=3), TypeError, "lora_exclude=3"),
    (dict(lora_exclude=[3]), TypeError, r"lora_exclude=\(3,\)"),
    (dict(lora_exclude=".*"), ValueError, r"lora_exclude='\.\*'.*leave no layer"),
    (dict(lora_exclude="all"), ValueError, "lora_exclude='all'.*leave no layer"),
    (
        dict(lora_targets=["stem"], lora_exclude=["stem"]),
        ValueError,
        r"lora_targets=\['stem'\], lora_exclude=\('stem',\).*leave no layer",
    ),
]


def test_exclusions_that_mean_nothing_or_all_are_errors():
    model = tiny_models.functional()
    for arguments, kind, words in WRONG_EXCLUSIONS:
        with pytest.raises(kind, match=words):
            lora.inject_lora(model, **arguments)
        assert not has_lora(model)


# -- numbered blocks -----------------------------------------------------------------------


NUMBERS = [
    ("blocks/3/attn/qkv", None, 3),
    ("blocks.3.attn.qkv", None, 3),
    ("image_encoder/blocks/11/attn/qkv", None, 11),
    ("stages/2/blocks/0/mlp/fc1", None, 2),
    ("stages/2/blocks/0/mlp/fc1", ["blocks"], 0),
    ("stages/2/blocks/0/mlp/fc1", ["nothing", "blocks", "stages"], 0),
    ("layer1/0/conv1", None, 0),
    ("layer1/0/conv1", ["layer1"], 0),
    ("layer1/0/conv1", ["layer"], 1),
    ("layer10/0/conv1", ["layer1"], None),
    ("layer10/3/conv1", ["layer1"], None),
    ("stages/1/downsample/1", None, 1),
    ("features/4", None, None),
    ("4/conv", None, None),
    ("head", None, None),
    ("block3/fc", None, None),
    ("block3/fc", ["block"], 3),
    ("block_3/fc", ["block"], 3),
    ("my_block3/fc", ["block"], None),
    ("my_block3/fc", ["my_(block)"], 3),
    ("resnet50/blocks/2/fc", None, 2),
    ("blocks/1/experts/0/fc", None, 1),
    ("blocks/1#2/fc", None, 1),
    ("a/blocks/1/blocks/2/fc", ["blocks"], 1),
    ("blocks/3/attn/qkv", ["bl|h"], None),
    ("h/3/attn/qkv", ["bl|h"], 3),
]


def test_number_of_a_layer():
    for path, patterns, expected in NUMBERS:
        assert index_of(path, patterns) == expected, (path, patterns)


def numbered():
    """Two stages of two blocks each, named as Keras names them."""
    x = entry = keras.Input((4,))
    x = layers.Dense(4, name="first")(x)
    for i in range(2):
        outer = stage = keras.Input((4,))
        for j in range(2):
            inner = keras.Input((4,))
            block = keras.Model(inner, layers.Dense(4, name="fc")(inner), name=f"block{j}")
            stage = block(stage)
        x = keras.Model(outer, stage, name=f"stage_{i}")(x)
    return keras.Model(entry, layers.Dense(2, name="head")(x), name="numbered")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (
            dict(lora_layers=1, lora_layers_pattern="block"),
            ["stage_0/block1", "stage_1/block1"],
        ),
        (
            dict(lora_layers=[1], lora_layers_pattern="stage"),
            ["stage_1/block0", "stage_1/block1"],
        ),
        (
            dict(
                lora_layers=range(2),
                lora_layers_pattern=["stage"],
                lora_exclude=r".*1/fc",
            ),
            ["stage_0/block0", "stage_1/block0"],
        ),
    ],
)
def test_only_the_blocks_of_these_numbers_are_adapted(arguments, expected):
    model = lora.inject_lora(numbered(), **arguments)
    assert adapted_paths(model) == [f"{path}/fc" for path in expected]


WRONG_NUMBERS = [
    (dict(lora_layers=-1), ValueError, "lora_layers=-1.*negative"),
    (dict(lora_layers=[]), ValueError, r"lora_layers=\[\].*at least one"),
    (dict(lora_layers=True), TypeError, "lora_layers=True"),
    (dict(lora_layers=1.0), TypeError, "lora_layers=1.0"),
    (dict(lora_layers="1"), TypeError, "lora_layers='1'"),
    (dict(lora_layers_pattern="block"), ValueError, "without lora_layers"),
    (dict(lora_layers=1, lora_layers_pattern=3), TypeError, "lora_layers_pattern=3"),
    (dict(lora_layers=1, lora_layers_pattern="("), ValueError, "not a regular expression"),
    (dict(lora_layers=1), ValueError, "block 1: none of their paths.*lora_layers_pattern"),
    (
        dict(lora_layers=[1, 2, 7], lora_layers_pattern="block"),
        ValueError,
        "in the block 2, 7: their numbers are 0, 1",
    ),
    (
        dict(lora_layers=1, lora_layers_pattern="blok"),
        ValueError,
        r"lora_layers_pattern=\('blok',\)",
    ),
]


def test_numbers_that_no_layer_has_are_errors():
    model = numbered()
    for arguments, kind, words in WRONG_NUMBERS:
        with pytest.raises(kind, match=words):
            lora.inject_lora(model, **arguments)
        assert not has_lora(model)


def test_config_keeps_plain_values_however_they_were_given():
    config = LoRAConfig(
        lora_layers=np.arange(2), lora_layers_pattern="h", lora_exclude=(n for n in ("a", "b"))
    )
    assert (config.lora_layers, config.lora_layers_pattern) == ((0, 1), ("h",))
    assert config.lora_exclude == ("a", "b")
    twin = LoRAConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert twin.lora_layers == config.lora_layers and twin.lora_exclude == config.lora_exclude
    assert LoRAConfig(lora_layers=3).lora_layers == (3,)


# -- the table -----------------------------------------------------------------------------

CONFIGS = [
    {},
    dict(lora_rank=2, lora_alpha=3, lora_use_rslora=True),
    dict(lora_rank_pattern={"hidden|fc0|query|first": 7}, lora_alpha_pattern={".*": 2.5}),
    dict(lora_targets="all", lora_train_classifier=True),
    dict(lora_targets="attention"),
    dict(lora_targets="attention", lora_qkv="qv"),
    dict(lora_qkv="v"),
    dict(lora_targets=["head", "out"]),
    dict(lora_targets=["fc0", "fc1"], lora_exclude=r"block0/.*"),
    dict(lora_targets=r".*(fc|hidden|query).*", lora_exclude=["query"]),
    dict(lora_exclude=["nothing"]),
    dict(lora_targets=["nothing"]),
    dict(lora_layers=1),
    dict(lora_layers=1, lora_layers_pattern="block"),
    dict(lora_layers=[0], lora_layers_pattern="block", lora_exclude="attention"),
    dict(lora_train_modules=["block1", "bn"]),
    dict(lora_train_modules=["hidden", "out"], lora_train_bias="all"),
    dict(lora_train_modules=["nowhere"]),
    dict(lora_dropout=0.1),
]


def state_of(model):
    """All that LoRA changes in a model."""
    inside = list(model._flatten_layers())
    return (
        [type(x) for x in inside],
        [x.trainable for x in inside],
        [id(v) for v in model.weights],
        [id(v) for v in model.trainable_weights],
        [sorted(k for k in x.__dict__ if "lora" in k) for x in inside],
    )


@pytest.mark.parametrize("spec", tiny_models.MODELS, ids=tiny_models.IDS)
def test_the_table_is_what_injection_does(spec):
    model = spec.make()
    before, values = state_of(model), [array(v).copy() for v in model.weights]
    agreed = 0
    for config in CONFIGS:
        table = explain_targets(model, **config)
        assert state_of(model) == before
        owners = [x for x in model._flatten_layers() if _has_weights_of_its_own(x)]
        assert len(table) == len(owners) and all(r.adapted or r.reason for r in table)
        try:
            lora.inject_lora(model, **config)
        except ValueError as error:
            assert table.error == str(error), config
            continue
        agreed += 1
        assert table.error is None
        done = lora_layers(model)
        assert sorted(table.adapted) == sorted(done)
        rows = {row.path: row for row in table if row.adapted}
        for path, layer in done.items():
            got = (layer.lora.rank, layer.lora.alpha, layer.lora.scale)
            assert (rows[path].rank, rows[path].alpha, rows[path].scale) == got
        lora.remove_lora(model, merge=False)
    assert agreed >= 3
    for old, variable in zip(values, model.weights):
        np.testing.assert_array_equal(array(variable), old)


def _has_weights_of_its_own(layer):
    inside = [x for x in layer._flatten_layers(include_self=False)]
    below = set().union(*(ids(x.weights) for x in inside)) if inside else set()
    return bool(ids(layer.weights) - below) and not isinstance(layer, keras.metrics.Metric)


def reasons(model, **arguments):
    return {row.path: row.reason for row in explain_targets(model, **arguments)}


def test_every_reason_is_given():
    told = reasons(
        tiny_models.subclassed(),
        lora_targets=r"block.*|head",
        lora_exclude=["in_dict"],
        lora_layers=0,
        lora_layers_pattern="block",
        lora_qkv="q",
        lora_train_modules=["bn", "block0/fc1"],
    )
    assert told[""] == "no LoRA for Subclassed"
    assert told["bn"] == told["block0/fc1"] == "fully trained"
    assert told["head"] == "in no numbered block, not in lora_layers"
    assert told["block0"] == "no LoRA for Block"
    assert told["block0/in_dict"] == "in lora_exclude"
    assert told["block1/fc0"] == "in block 1, not in lora_layers"
    assert told["block0/attention/key"] == "not in lora_qkv='q'"
    assert told["block0/attention/query"] == told["block0/fc0"] == ""
    assert reasons(tiny_models.subclassed())["head"] == "classifier"
    assert (
        reasons(tiny_models.functional(), lora_targets=["pw"])["out"] == "not among the targets"
    )
    whole = reasons(tiny_models.functional(), lora_train_classifier=True)
    assert whole["out"] == "fully trained"


class Deaf(layers.Dense):
    """A layer that never looks at its kernel."""

    def call(self, x):
        return x


def test_layers_that_cannot_be_adapted_are_rows_with_the_reason():
    entry = keras.Input((4,))
    x = Deaf(4, name="deaf")(layers.Dense(4, name="fc")(entry))
    model = keras.Model(entry, layers.Dense(2, name="head")(x))
    before = state_of(model)
    table = explain_targets(model)
    assert state_of(model) == before
    assert table.adapted == ["fc"]
    assert "never reads its kernel" in reasons(model)["deaf"] and "Deaf" in table.error
    with pytest.raises(ValueError) as raised:
        lora.inject_lora(model)
    assert str(raised.value) == table.error
    grouped = keras.Input((6, 6, 4))
    x = layers.Conv2D(4, 3, groups=2, name="grouped")(grouped)
    model = keras.Model(grouped, layers.Conv2D(4, 3, name="plain")(x))
    table = explain_targets(model, lora_dropout=0.1)
    assert table.adapted == ["plain"] and "lora_dropout=0" in table.error


def test_a_layer_that_was_never_used_is_a_row():
    class Half(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.unused = (
                layers.Dense(3, name="used"),
                layers.Dense(3, name="unused"),
            )

        def call(self, x):
            return self.used(x)

    model = Half()
    model(normal(2, 3))
    table = explain_targets(model, lora_targets=["used", "unused"])
    assert reasons(model, lora_targets=["used", "unused"]) == {
        "used": "",
        "unused": "not built",
    }
    assert isinstance(table, TargetTable) and "'unused' is not built" in table.error


def test_all_leaves_out_positions_and_what_is_never_called():
    class Tokens(keras.Model):
        def __init__(self):
            super().__init__()
            self.token_embedding = layers.Embedding(5, 4, name="token_embedding")
            self.position_embedding = layers.Embedding(3, 4, name="position_embedding")
            self.compose = layers.Dense(4, name="compose")
            self.unused = layers.Dense(4, name="unused")
            self.head = layers.Dense(2, name="head")

        def call(self, x):
            places = self.position_embedding(np.arange(3, dtype="int32"))
            return self.head(self.compose(self.token_embedding(x) + places))

    model = Tokens()
    model(np.ones((2, 3), "int32"))
    expected = {
        "token_embedding": "",
        "position_embedding": "position embedding",
        "compose": "",
        "unused": "not built",
        "head": "classifier",
    }
    for targets in (None, "all"):
        assert reasons(model, lora_targets=targets, lora_exclude=None) == expected
    lora.inject_lora(model, lora_rank=2)
    assert type(model.unused).__name__ == "FrozenDense"
    lora.remove_lora(model)
    lora.inject_lora(model, lora_rank=2, lora_targets=["position_embedding"])
    assert type(model.position_embedding).__name__ == "LoRAEmbedding"


def test_the_table_prints_and_is_plain_data():
    table = explain_targets(tiny_models.functional(), lora_rank=8, lora_targets=["hiden"])
    assert "Candidates, nearest first: hidden" in table.error and table.adapted == []
    table = explain_targets(tiny_models.functional(), lora_rank=8, lora_alpha=4)
    lines = str(table).splitlines()
    assert lines[0].split() == ["layer", "kind", "rank", "scale"]
    assert lines[1].split() == ["stem", "Conv2D", "8", "0.5"]
    assert lines[2].split(maxsplit=4)[-1] == "no LoRA for BatchNormalization"
    assert lines[-1] == "4 of 7 layers with weights would be adapted."
    assert repr(table) == str(table)
    data = json.loads(json.dumps(table.to_dict()))
    assert data["error"] is None
    assert data["layers"][0] == {
        "path": "stem",
        "kind": "Conv2D",
        "adapted": True,
        "rank": 8,
        "alpha": 4,
        "scale": 0.5,
        "reason": "",
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        table[0].rank = 3


def test_arguments_and_models_that_are_wrong_are_refused_as_by_injection():
    model = tiny_models.functional()
    with pytest.raises(TypeError, match="explain_targets: lora_rnk; did you mean lora_rank"):
        explain_targets(model, lora_rnk=3)
    with pytest.raises(ValueError, match="lora_rank=0"):
        explain_targets(model, lora_rank=0)
    with pytest.raises(ValueError, match="not built"):
        explain_targets(keras.Sequential([layers.Dense(3)]))
    with pytest.raises(ValueError, match="has LoRA layers already"):
        explain_targets(lora.inject_lora(model))


def test_an_adapter_is_loaded_where_another_exclusion_was(tmp_path):
    spec = tiny_models.GENERIC[0]
    adapter = lora.adapter_of(lora.inject_lora(spec.make(), lora_targets=["stem", "hidden"]))
    model = lora.inject_lora(spec.make(), lora_exclude=["stem"])
    lora.load_adapter(model, adapter)
    assert adapted_paths(model) == ["hidden", "stem"]


# -- registered architectures --------------------------------------------------------------


@pytest.mark.skipif(not LEGACY, reason="of tfimm")
def test_registered_architectures_take_the_same_and_keep_it_in_their_config():
    base = tiny_models._vit()
    arguments = dict(lora_layers=[1], lora_exclude=["attn/proj"], lora_rank=2)
    model = lora.convert_to_lora_model(base, **arguments)
    expected = ["blocks/1/attn/qkv", "blocks/1/mlp/fc1", "blocks/1/mlp/fc2"]
    assert (
        adapted_paths(model) == sorted(explain_targets(base, **arguments).adapted) == expected
    )
    twin = type(model).from_config(json.loads(json.dumps(model.get_config())))
    assert adapted_paths(twin) == expected
    assert twin.cfg.lora_layers == model.cfg.lora_layers == (1,)
    adapter = lora.adapter_of(lora.convert_to_lora_model(base, lora_targets=["attn/proj"]))
    lora.load_adapter(model, adapter)
    assert adapted_paths(model) == ["blocks/0/attn/proj", "blocks/1/attn/proj"]
    assert model.cfg.lora_exclude is None and model.cfg.lora_layers is None


@pytest.mark.skipif(not LEGACY, reason="of tfimm")
def test_stages_are_what_is_numbered_where_there_are_some():
    base = tiny_models._convnext()
    last = explain_targets(base, lora_layers=3).adapted
    assert last == ["stages/3/blocks/0/mlp/fc1", "stages/3/blocks/0/mlp/fc2"]
    second = explain_targets(base, lora_layers=1, lora_layers_pattern="blocks").adapted
    assert second == ["stages/2/blocks/1/mlp/fc1", "stages/2/blocks/1/mlp/fc2"]
    small = dict(embed_dim=8, nb_blocks=2, nb_heads=2, input_size=(32, 32))
    model = lora.create_model(
        "vit_tiny_patch16_224", lora_layers=1, lora_exclude="mlp", **small
    )
    assert adapted_paths(model) == ["blocks/1/attn/proj", "blocks/1/attn/qkv"]
