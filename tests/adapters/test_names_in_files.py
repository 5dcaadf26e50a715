"""Names: of layers that are called like PEFT's own levels, and of modules that PEFT matches."""

import itertools
import json
import re

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import LEGACY, array, ids, keras, normal, run
from tfimm_lora.model.merge import lora_layers

pytest.importorskip("safetensors")
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.once

K = keras.layers
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
P = "base_model.model."

#: Levels that PEFT inserts, and ends of its tensors' names.
WORDS = (
    *("base_layer", "modules_to_save", "original_module", "default", "weight", "bias"),
    *("lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector", "lora_E", "model"),
)


def nested(*names):
    """A model with a submodel whose layers have these names."""
    keras.utils.set_random_seed(0)
    inner = [K.Dense(8, name="fc"), *(K.Dense(8, name=name) for name in names)]
    inner = keras.Sequential([K.Input((8,)), *inner], name="inner")
    return keras.Sequential([K.Input((8,)), inner, K.Dense(3, name="head")])


def assert_comes_back(make, folder, **arguments):
    arguments = {"lora_rank": 2, "lora_train_classifier": False, **arguments}
    model = lora.inject_lora(make(), **arguments)
    for seed, variable in enumerate(model.trainable_weights):
        variable.assign(array(variable) + 0.3 * normal(*variable.shape, seed=seed))
    lora.save_adapter(model, folder)
    adapter = lora.adapter_of(model)
    assert lora.Adapter.load(folder) == adapter
    fresh = lora.load_adapter(make(), folder)
    x = normal(4, 8)
    np.testing.assert_allclose(run(fresh, x), run(model, x), rtol=1e-5, atol=1e-5)
    assert lora.adapter_of(fresh) == adapter


@pytest.mark.parametrize("word", WORDS)
def test_a_layer_named_like_a_level_of_peft_round_trips(word, tmp_path):
    for index, arguments in enumerate(
        (
            dict(lora_targets=["fc"], lora_train_modules=[word]),
            dict(lora_targets=["fc"], lora_train_bias="all"),
            dict(lora_targets=[word], lora_train_bias="lora_only", lora_use_dora=True),
            dict(lora_targets=[word], lora_train_modules=["head"], lora_train_bias="all"),
        )
    ):
        assert_comes_back(lambda: nested(word), tmp_path / str(index), **arguments)


#: Pairs of words. `make test` runs those with the first word.
PAIRS = [
    pytest.param(pair, id="-".join(pair), marks=[] if WORDS[0] in pair else pytest.mark.nightly)
    for pair in itertools.combinations(WORDS[:9], 2)
]


@pytest.mark.parametrize("pair", PAIRS)
def test_two_layers_named_like_levels_of_peft_round_trip(pair, tmp_path):
    for index, (target, whole) in enumerate((pair, pair[::-1])):
        arguments = dict(lora_targets=[target], lora_train_modules=[whole])
        folder = tmp_path / str(index)
        assert_comes_back(lambda: nested(*pair), folder, lora_train_bias="all", **arguments)


def test_a_layer_inside_one_named_like_a_level_round_trips(tmp_path):
    def make():
        keras.utils.set_random_seed(0)
        parts = [
            keras.Sequential([K.Input((8,)), K.Dense(8, name="fc")], name=name)
            for name in ("modules_to_save", "original_module", "base_layer")
        ]
        body = keras.Sequential([K.Input((8,)), *parts, K.Dense(8, name="fc")], name="body")
        return keras.Sequential([K.Input((8,)), body, K.Dense(3, name="head")])

    for index, arguments in enumerate(
        (
            dict(lora_targets=["head"], lora_train_modules=["fc"]),
            dict(lora_targets=["original_module.fc"], lora_train_bias="all"),
            dict(lora_targets=["base_layer/fc", "body/fc"], lora_train_bias="all"),
        )
    ):
        assert_comes_back(make, tmp_path / str(index), **arguments)


# -- what PEFT writes -----------------------------------------------------------------------


def towers():
    """A model in which the name of a top-level layer is the end of others."""
    keras.utils.set_random_seed(0)
    parts = [
        keras.Sequential(
            [K.Input((8,)), K.Dense(8, name="fc"), K.LayerNormalization(name="norm")],
            name=f"part{i}",
        )
        for i in range(2)
    ]
    rest = [K.LayerNormalization(name="norm"), K.Dense(3, name="head")]
    return keras.Sequential([K.Input((8,)), *parts, *rest])


def write(folder, modules=("part0.fc", "part1.fc"), whole=(), extra=None, **config):
    """A folder as PEFT writes it."""
    folder.mkdir(exist_ok=True)
    tensors = dict(extra or {})
    for seed, module in enumerate(modules):
        tensors[f"{P}{module}.lora_A.weight"] = normal(2, 8, seed=seed)
        tensors[f"{P}{module}.lora_B.weight"] = normal(8, 2, seed=seed + 9)
    for seed, module in enumerate(whole):
        shape = (3, 8) if module == "head" else (8,)
        tensors[f"{P}{module}.weight"] = normal(*shape, seed=seed + 20)
        tensors[f"{P}{module}.bias"] = normal(shape[0], seed=seed + 40)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["fc"], **config}
    (folder / CONFIG).write_text(json.dumps(fields))
    return folder


NORMS = ("norm", "part0.norm", "part1.norm")


@pytest.mark.parametrize(
    ("names", "whole"),
    [
        (["norm"], NORMS),
        (["orm"], NORMS),
        (["part1.norm", "head"], ("part1.norm", "head")),
        (["model.norm"], ("norm",)),
        (["head", "classifier", "nothing"], ("head",)),
    ],
)
def test_names_in_modules_to_save_are_ends_of_modules_as_in_peft(names, whole, tmp_path):
    folder = write(tmp_path, whole=whole, modules_to_save=names)
    assert lora.Adapter.load(folder).modules == tuple(sorted(whole))
    model = lora.load_adapter(towers(), folder)
    assert lora.adapter_of(model) == lora.Adapter.load(folder)


def test_only_the_module_of_a_short_name_is_trained_after_loading(tmp_path):
    """ "norm" would mean the norms of the parts too."""
    model = lora.inject_lora(towers(), lora_rank=2, lora_targets=["fc"])
    update = lora.adapter_of(model).layers
    adapter = lora.Adapter(
        update, {"norm.weight": np.ones(8, "f4"), "norm.bias": np.ones(8, "f4")}, ("norm",)
    )
    adapter.save(tmp_path)
    assert lora.Adapter.load(tmp_path) == adapter
    fresh = lora.load_adapter(towers(), tmp_path)
    assert lora.adapter_of(fresh) == adapter
    trained = ids(fresh.trainable_weights)
    for part in ("part0", "part1"):
        assert not ids(fresh.get_layer(part).get_layer("norm").weights) & trained
    assert ids(fresh.get_layer("norm").weights) <= trained


def test_copies_of_fully_trained_modules_written_by_bias_all_are_ignored(tmp_path):
    copies = {
        f"{P}head.{level}.bias": normal(3, seed=99)
        for level in ("original_module", "modules_to_save")
    }
    # In a module of several layers PEFT leaves the name of the adapter in the key.
    copies[f"{P}part1.modules_to_save.default.norm.bias"] = normal(8, seed=98)
    biases = {f"{P}{module}.bias": normal(8, seed=3) for module in NORMS}
    biases[f"{P}part0.fc.base_layer.bias"] = normal(8, seed=4)
    folder = write(
        tmp_path,
        whole=["head"],
        extra={**copies, **biases},
        modules_to_save=["head"],
        bias="all",
    )
    found = lora.Adapter.load(folder).weights
    np.testing.assert_array_equal(found["head.bias"], normal(3, seed=40))
    assert set(found) == {
        *("head.weight", "head.bias", "part0.fc.bias"),
        *(f"{module}.bias" for module in NORMS),
    }
    lora.load_adapter(towers(), folder)


def test_nested_fully_trained_modules_that_peft_cannot_reload_are_refused(tmp_path):
    folder = write(tmp_path, whole=["part1.norm"], modules_to_save=["part1", "part1.norm"])
    with pytest.raises(ValueError, match="names part1.norm and the module that it is in"):
        lora.Adapter.load(folder)


# -- what a file lacks ----------------------------------------------------------------------


def warned(folder):
    """What is said when a folder is loaded."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lora.load_adapter(towers(), folder)
    return " ".join(str(w.message) for w in caught if "adapter has" in str(w.message))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(modules=["part0.fc"]), "no values for 1 layers .*: part1.fc. They stay"),
        (dict(modules=["part0.fc"], target_modules=r".*\.fc"), "part1.fc"),
        (dict(target_modules=["part0.fc"]), "does not select: part1.fc. They are loaded"),
        (dict(exclude_modules=["part0.fc"]), "does not select: part0.fc"),
        (dict(modules_to_save=["head"]), "no values for 1 layers .*: head"),
        (dict(whole=["norm"], modules_to_save=["norm"]), "part0.norm, part1.norm"),
    ],
)
def test_what_the_config_selects_and_the_file_lacks_is_named(given, words, tmp_path):
    assert re.search(words, warned(write(tmp_path, **given)))


@pytest.mark.parametrize(
    "given",
    [
        {},
        dict(target_modules=r"part\d\.fc"),
        dict(target_modules=["part0.fc", "part1.fc", "nothing"]),
        dict(modules=["part0.fc"], target_modules=["fc"], exclude_modules=r"part1\..*"),
        dict(modules=["part0.fc"], target_modules=["part0.fc"], layers_to_transform=[7]),
        dict(whole=NORMS, modules_to_save=["norm"], bias="all"),
        dict(target_modules="all-linear"),
        dict(target_modules=None),
    ],
)
def test_complete_files_raise_no_alarm(given, tmp_path):
    assert warned(write(tmp_path, **given)) == ""


@pytest.mark.parametrize("train_bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("targets", ["all", ["part0/fc"], ["head", "fc"]])
def test_files_from_here_raise_no_alarm(train_bias, targets, tmp_path):
    arguments = dict(lora_targets=targets, lora_train_modules=["/norm"], lora_rank=2)
    model = lora.inject_lora(
        towers(), lora_train_bias=train_bias, lora_train_classifier=False, **arguments
    )
    lora.save_adapter(model, tmp_path)
    assert warned(tmp_path) == ""
    assert lora.Adapter.load(tmp_path) == lora.adapter_of(model)


def test_a_fully_trained_module_with_only_some_weights_is_refused(tmp_path):
    folder = write(tmp_path, whole=["head"], modules_to_save=["head"])
    tensors = load_file(folder / WEIGHTS)
    del tensors[f"{P}head.weight"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match="no head.weight, but other weights of its fully"):
        lora.load_adapter(towers(), folder)


def test_a_file_from_here_without_one_of_its_layers_is_refused(tmp_path):
    lora.save_adapter(lora.inject_lora(towers(), lora_targets=["fc"]), tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / WEIGHTS, "numpy") as file:
        metadata = file.metadata()
    tensors = {k: v for k, v in load_file(tmp_path / WEIGHTS).items() if "part1" not in k}
    save_file(tensors, tmp_path / WEIGHTS, metadata)
    with pytest.raises(ValueError, match="values for 1 layers, and its config names others"):
        lora.Adapter.load(tmp_path)


def test_an_adapter_whose_layers_were_changed_raises_no_alarm(tmp_path):
    import dataclasses

    adapter = lora.Adapter.load(write(tmp_path))
    less = dataclasses.replace(adapter, layers={"part0.fc": adapter.layers["part0.fc"]})
    model = lora.load_adapter(towers(), less)
    assert list(lora_layers(model)) == ["part0/fc"]


# -- messages -------------------------------------------------------------------------------


def test_a_state_dict_of_a_model_is_distinguished_from_a_file(tmp_path):
    for key in (
        "fc.lora_A.default.weight",
        "fc.lora_B.cats.bias",
        "fc.lora_embedding_A.default",
        "fc.lora_magnitude_vector.default.weight",
    ):
        folder = write(tmp_path, extra={P + key: normal(2, 8)})
        with pytest.raises(ValueError, match="name of an adapter, '(default|cats)'.*save_pre"):
            lora.Adapter.load(folder)


def test_the_folder_around_a_named_adapter_says_where_it_is(tmp_path):
    for name in ("cats", "dogs"):
        write(tmp_path / name)
    with pytest.raises(
        FileNotFoundError, match="adapters: cats, dogs. Pass .*subfolder='cats'"
    ):
        lora.load_adapter(towers(), tmp_path)
    model = lora.load_adapter(towers(), tmp_path, subfolder="dogs")
    assert lora.adapter_of(model) == lora.Adapter.load(tmp_path / "dogs")
    with pytest.raises(TypeError, match="load_adapter.*subfoldr; did you mean subfolder"):
        lora.load_adapter(towers(), tmp_path, subfoldr="dogs")
    with pytest.raises(TypeError, match="revision='main'.*only with a path on the hub"):
        lora.Adapter.load(tmp_path, revision="main")


def test_a_subfolder_on_the_hub_is_downloaded(tmp_path, monkeypatch):
    from tfimm_lora.adapters import hub_download

    write(tmp_path / "cats")
    asked = []

    def download(repository, filename):
        asked.append((repository.identifier, repository.revision, filename))
        return tmp_path / filename

    monkeypatch.setattr(hub_download.Repository, "download", download)
    lora.Adapter.load("hf://user/repo@v2", subfolder="cats/")
    assert asked == [("user/repo", "v2", f"cats/{name}") for name in (CONFIG, WEIGHTS)]


def test_a_grouped_convolution_of_peft_is_named(tmp_path):
    extra = {
        f"{P}conv.lora_A.weight": np.zeros((4, 8, 3, 3), "f4"),
        f"{P}conv.lora_B.weight": np.zeros((8, 2, 1, 1), "f4"),
    }
    with pytest.raises(
        ValueError, match="for conv, as PEFT writes them for a convolution with"
    ):
        lora.Adapter.load(write(tmp_path, extra=extra))


def test_a_branch_bias_without_a_bias_to_merge_it_into_is_refused_in_terms_of_the_file(
    tmp_path,
):
    def make():
        return keras.Sequential(
            [K.Input((8,)), K.Dense(8, use_bias=False, name="fc"), K.Dense(3, name="head")]
        )

    extra = {f"{P}fc.lora_B.bias": normal(8)}
    folder = write(tmp_path, modules=["fc"], extra=extra, lora_bias=True)
    with pytest.raises(ValueError, match="fc cannot take the bias of its branch") as refused:
        lora.load_adapter(make(), folder)
    assert "lora_bias=False" not in str(refused.value)


def test_dropout_is_no_reason_to_refuse_an_adapter(tmp_path):
    @keras.utils.register_keras_serializable("tests")
    class Scaled(K.Dense):
        def call(self, inputs):
            return 2 * super().call(inputs)

    def make():
        layers = [Scaled(8, name="fc"), K.Dense(8, name="fc2"), K.Dense(3, name="head")]
        return keras.Sequential([K.Input((8,)), *layers])

    folder = write(tmp_path, modules=["fc"], lora_dropout=0.1)
    model = lora.load_adapter(make(), folder)
    assert list(lora_layers(model)) == ["fc"]


@pytest.mark.skipif(not LEGACY, reason="needs tfimm")
def test_tfimm_models_without_a_table_have_timms_names(tmp_path):
    model = lora.create_model(
        "cait_xxs24_224", nb_blocks=1, embed_dim=16, nb_heads=2, lora_rank=2
    )
    lora.save_adapter(model, tmp_path, names="timm")
    assert lora.Adapter.load(tmp_path) == lora.adapter_of(model)
    with pytest.raises(ValueError, match="no family whose names are known"):
        lora.save_adapter(model, tmp_path / "other", names="transformers")
    assert not (tmp_path / "other").exists()
