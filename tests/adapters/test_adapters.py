"""Adapters of live models: files, switching, turning off, of every kind of model."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import tiny_models
from tests.helpers.kerases import BACKEND, LEGACY, array, keras, run, values
from tests.helpers.selection import nightly_except
from tfimm_lora.model.merge import has_lora, lora_layers

GENERIC = pytest.mark.parametrize("spec", tiny_models.GENERIC, ids=lambda spec: spec.name)
#: On legacy Keras one that Keras rebuilds and one that it cannot.
KINDS = pytest.mark.parametrize(
    "spec",
    nightly_except(tiny_models.GENERIC, ["functional", "subclassed"])
    if LEGACY
    else tiny_models.GENERIC,
    ids=None if LEGACY else lambda spec: spec.name,
)
CLOSE = dict(rtol=1e-4, atol=1e-5)


def tuned(spec, seed=0, **arguments):
    """A model with LoRA whose trained variables all moved."""
    model = lora.inject_lora(spec.make(), **{"lora_rank": 2, "lora_alpha": 3, **arguments})
    rng = np.random.default_rng(seed)
    for variable in model.trainable_weights:
        noise = rng.normal(size=tuple(variable.shape)).astype("float32")
        variable.assign(array(variable) + 0.2 * noise)
    return model


def base_like(model, spec):
    """The model of a spec with the frozen weights of an adapted one."""
    regular = spec.make()
    with lora.disable_adapter(model):
        plain = lora.convert_to_regular_model(model) if spec.copyable else None
    if plain is not None:
        lora.transfer_weights(plain, regular)
    return regular


def everything(model):
    """What a failed call must leave alone."""
    return [type(x) for x in model._flatten_layers()], values(model.weights)


def assert_unchanged(model, before):
    classes, weights = everything(model)
    assert classes == before[0]
    for mine, theirs in zip(weights, before[1]):
        np.testing.assert_array_equal(mine, theirs)


# -- files ----------------------------------------------------------------------------------


@pytest.mark.backends
@GENERIC
def test_saved_adapter_gives_the_same_outputs_in_the_plain_model(spec, tmp_path):
    model, x = tuned(spec), spec.inputs()
    output = run(model, x)
    plain = base_like(model, spec)
    assert np.abs(run(plain, x) - output).max() > 1e-3
    lora.save_adapter(model, tmp_path / "a")
    loaded = lora.Adapter.load(tmp_path / "a")
    assert loaded == lora.adapter_of(model)
    assert lora.load_adapter(plain, tmp_path / "a") is plain
    np.testing.assert_allclose(run(plain, x), output, **CLOSE)
    assert lora.adapter_of(plain) == loaded
    assert len(plain.trainable_weights) == len(model.trainable_weights)
    # Saved while merged it is the same.
    lora.merge_lora_weights(model)
    lora.save_adapter(model, tmp_path / "b")
    assert lora.Adapter.load(tmp_path / "b") == loaded


@pytest.mark.parametrize("train_bias", ["lora_only", "all"])
def test_classifier_and_biases_are_in_the_file(train_bias, tmp_path):
    spec = tiny_models.GENERIC[0]
    model = tuned(spec, lora_train_bias=train_bias, lora_train_classifier=True)
    x, output = spec.inputs(), run(model, spec.inputs())
    adapter = lora.adapter_of(model)
    assert adapter.modules == ("out",) and adapter.bias == train_bias
    assert {"out.weight", "out.bias", "stem.bias"} <= set(adapter.weights)
    assert ("bn1.bias" in adapter.weights) == (train_bias == "all")
    plain = base_like(model, spec)
    # The classifier and the biases were trained in this model itself, so it kept them.
    base = spec.make()
    lora.transfer_weights(plain, base)
    adapter.save(tmp_path)
    lora.load_adapter(base, tmp_path)
    np.testing.assert_allclose(run(base, x), output, **CLOSE)
    assert lora.adapter_of(base) == adapter


def test_fully_trained_modules_keep_their_statistics(tmp_path):
    spec = tiny_models.GENERIC[0]
    model = tuned(spec, lora_train_modules=["bn2"])
    bn = model.get_layer("bn2")
    bn.moving_mean.assign(array(bn.moving_mean) + 0.5)
    output = run(model, spec.inputs())
    adapter = lora.adapter_of(model)
    assert adapter.modules == ("bn2",)
    assert {"bn2.running_mean", "bn2.weight", "bn2.bias"} <= set(adapter.weights)
    other = base_like(tuned(spec), spec)
    fresh = base_like(model, spec)
    for target in (fresh, other):
        for name in ("stem", "dw", "pw", "hidden", "out", "bn1"):
            for mine, theirs in zip(
                target.get_layer(name).weights, base_like(model, spec).get_layer(name).weights
            ):
                mine.assign(array(theirs))
        lora.load_adapter(target, adapter)
        np.testing.assert_allclose(run(target, spec.inputs()), output, **CLOSE)


def test_file_is_pefts(tmp_path):
    from safetensors.numpy import load_file

    model = tuned(tiny_models.GENERIC[0], lora_targets=["hidden", "pw"], lora_dropout=0.1)
    lora.save_adapter(model, tmp_path, base_model="me/mine")
    assert sorted(os.listdir(tmp_path)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 2 and config["lora_alpha"] == 3
    assert config["base_model_name_or_path"] == "me/mine" and config["lora_dropout"] == 0.1
    assert config["target_modules"] == "hidden|pw"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    hidden, pw = model.get_layer("hidden"), model.get_layer("pw")
    prefix = "base_model.model."
    np.testing.assert_array_equal(
        tensors[f"{prefix}hidden.lora_A.weight"], array(hidden.kernel_lora_a).T
    )
    a = array(pw.kernel_lora_a)  # (1, 1, in, r)
    np.testing.assert_array_equal(tensors[f"{prefix}pw.lora_A.weight"], a.transpose(3, 2, 0, 1))
    b = array(pw.kernel_lora_b)  # (r, out)
    np.testing.assert_array_equal(tensors[f"{prefix}pw.lora_B.weight"], b.T[:, :, None, None])
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size <= lora.Adapter.load(tmp_path).size + 4096
    assert "base_model: me/mine" in (tmp_path / "README.md").read_text()


def test_what_peft_cannot_express_is_an_extension(tmp_path):
    model = tuned(tiny_models.GENERIC[0])
    with pytest.raises(ValueError, match="dw: PEFT's A is not grouped"):
        lora.save_adapter(model, tmp_path / "strict", format="peft")
    assert not (tmp_path / "strict").exists()
    with pytest.raises(ValueError, match="format='torch'"):
        lora.save_adapter(model, tmp_path / "strict", format="torch")
    lora.save_adapter(model, tmp_path / "own")
    config = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert config["peft_type"] == "TFIMM_LORA"
    assert lora.Adapter.load(tmp_path / "own").layers["dw"].kind == "depthwise"


WRITER = """
import sys, numpy as np, tfimm_lora as lora
def make(rank, value):
    layer = lora.LayerUpdate(np.full((rank, 40), value, "float32"),
                             np.full((30, rank), value, "float32"), 0.5 * rank)
    return lora.Adapter({f"block.{i}.fc": layer for i in range(60)})
one, two = make(2, 1.0), make(3, 2.0)
one.save(sys.argv[1])
print("ready", flush=True)
while True:
    two.save(sys.argv[1]); one.save(sys.argv[1])
"""


def test_killed_at_any_moment_one_whole_adapter_is_there(tmp_path):
    from tests.test_package import ROOT

    kinds = set()
    code = tmp_path / "writer.py"
    code.write_text(WRITER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    writer = subprocess.Popen(
        [sys.executable, str(code), str(tmp_path / "a")],
        stdout=subprocess.PIPE,
        env=environment,
    )
    rng = np.random.default_rng(0)
    try:
        assert writer.stdout.readline().strip() == b"ready"
        for _ in range(60):
            # Stopped, not killed: what is on disk is the same, and one process is enough.
            time.sleep(float(rng.uniform(0, 0.02)))
            writer.send_signal(signal.SIGSTOP)
            adapter = lora.Adapter.load(tmp_path / "a")
            ranks = {x.rank for x in adapter.layers.values()}
            values = {float(v) for x in adapter.layers.values() for v in np.unique(x.a)}
            scales = {x.scale for x in adapter.layers.values()}
            assert (ranks, values, scales) in (({2}, {1.0}, {1.0}), ({3}, {2.0}, {1.5}))
            kinds |= ranks
            writer.send_signal(signal.SIGCONT)
    finally:
        writer.kill()
        writer.wait()
    assert kinds == {2, 3}
    lora.Adapter.load(tmp_path / "a")


def test_config_edited_by_hand_counts(tmp_path):
    lora.save_adapter(tuned(tiny_models.GENERIC[1]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 3', '"lora_alpha": 6'))
    assert {x.scale for x in lora.Adapter.load(tmp_path).layers.values()} == {3.0}


# -- switching ------------------------------------------------------------------------------


@pytest.mark.backends
@pytest.mark.parametrize("merged", [False, True])
def test_switching_needs_no_new_trace(merged):
    spec = tiny_models.GENERIC[0]
    model, x = tuned(spec), spec.inputs()
    one, output = lora.adapter_of(model), run(model, x)
    other = tuned(spec, seed=5)
    two = lora.adapter_of(other)
    if merged:
        lora.merge_lora_weights(model)
    traces = []
    call = type(model).call

    def counted(self, *args, **kwargs):
        traces.append(1)
        return call(self, *args, **kwargs)

    type(model).call = counted
    try:
        first = model.predict(x, verbose=0)
        count = len(traces)
        assert count > 0
        lora.load_adapter(model, two)
        second = model.predict(x, verbose=0)
        lora.load_adapter(model, one)
        third = model.predict(x, verbose=0)
    finally:
        type(model).call = call
    if BACKEND != "torch":  # which runs every call anew
        assert len(traces) == count
    np.testing.assert_allclose(first, output, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(third, first, rtol=1e-6, atol=1e-6)
    assert np.abs(second - first).max() > 1e-3
    assert all(layer.merged == merged for layer in lora_layers(model).values())
    if merged:
        lora.unmerge_lora_weights(model)
    assert lora.adapter_of(model) == one


def test_another_alpha_is_absorbed_by_b():
    spec = tiny_models.GENERIC[1]
    strong = tuned(spec, lora_alpha=8)
    adapter, x = lora.adapter_of(strong), spec.inputs()
    model = lora.inject_lora(base_like(strong, spec), lora_rank=2, lora_alpha=3)
    lora.load_adapter(model, adapter)
    np.testing.assert_allclose(run(model, x), run(strong, x), **CLOSE)


def test_other_ranks_and_layers_are_injected_again():
    spec = tiny_models.GENERIC[0]
    wide = tuned(
        spec,
        lora_rank=3,
        lora_rank_pattern={"hidden": 5},
        lora_alpha_pattern={"pw": 9, "hidden": 1},
        lora_use_rslora=True,
        lora_targets=["hidden", "pw", "stem"],
    )
    adapter, x, output = lora.adapter_of(wide), spec.inputs(), run(wide, spec.inputs())
    assert {m: u.rank for m, u in adapter.layers.items()} == {"stem": 3, "pw": 3, "hidden": 5}
    np.testing.assert_allclose(adapter.layers["pw"].scale, 9 / np.sqrt(3))
    np.testing.assert_allclose(adapter.layers["hidden"].scale, 1 / np.sqrt(5))
    plain = base_like(wide, spec)
    model = lora.inject_lora(plain, lora_rank=2, lora_targets=["dw"])
    lora.load_adapter(model, adapter)
    np.testing.assert_allclose(run(model, x), output, **CLOSE)
    assert set(lora_layers(model)) == {"hidden", "pw", "stem"}
    given = lora.adapter_of(model)
    for module, update in adapter.layers.items():
        np.testing.assert_allclose(given.layers[module].scale, update.scale, rtol=1e-12)
        np.testing.assert_array_equal(given.layers[module].b, update.b)
    compiled = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), compiled)
    model.fit(x, spec.labels(), verbose=0)
    assert lora.adapter_of(model) != given


def test_replaced_weights_are_restored_before_the_next_adapter():
    spec = tiny_models.GENERIC[0]
    with_head = lora.adapter_of(tuned(spec, lora_train_classifier=True, lora_train_bias="all"))
    model = spec.make()
    x, output = spec.inputs(), run(model, spec.inputs())
    head = array(model.get_layer("out").kernel).copy()
    zero = lora.adapter_of(lora.inject_lora(spec.make(), lora_rank=2, lora_alpha=3))
    lora.load_adapter(model, with_head)
    tuned_output = run(model, x)
    assert np.abs(tuned_output - output).max() > 1e-2
    with lora.disable_adapter(model):
        np.testing.assert_allclose(run(model, x), output, **CLOSE)
    np.testing.assert_array_equal(run(model, x), tuned_output)
    lora.load_adapter(model, zero)
    np.testing.assert_allclose(run(model, x), output, **CLOSE)
    left = lora.adapter_of(model).weights
    assert set(left) == set(with_head.weights)
    np.testing.assert_array_equal(left["out.weight"], head.T)
    np.testing.assert_array_equal(array(model.get_layer("out").kernel), head)


def test_weights_trained_here_that_an_adapter_has_not_are_named():
    spec = tiny_models.GENERIC[0]
    model = tuned(spec, lora_train_classifier=True)
    other = lora.adapter_of(tuned(spec))
    with pytest.warns(UserWarning, match="out.weight.*stay as they are"):
        lora.load_adapter(model, other)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda a: {**a, "hiden": a["hidden"]}, r"no layer hiden \(nearest: hidden"),
        (
            lambda a: {**a, "hidden": lora.LayerUpdate(np.ones((2, 7)), np.ones((10, 2)))},
            r"hidden is of shape \(10, 6\), the update \(10, 7\)",
        ),
        (
            lambda a: {
                **a,
                "stem": lora.LayerUpdate(np.ones((2, 3, 5, 5)), np.ones((6, 2, 1, 1))),
            },
            r"stem is of shape \(6, 3, 3, 3\), the update \(6, 3, 5, 5\)",
        ),
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_adapter_of_another_model_is_refused_with_what_differs(change, words, adapted):
    spec = tiny_models.GENERIC[0]
    good = lora.adapter_of(tuned(spec))
    model = tuned(spec, seed=3) if adapted else spec.make()
    before = everything(model)
    with pytest.raises(ValueError, match=words):
        lora.load_adapter(model, lora.Adapter(change(dict(good.layers))))
    assert_unchanged(model, before)


def test_classifier_of_other_classes_is_refused_with_the_remedy():
    spec = tiny_models.GENERIC[0]
    good = lora.adapter_of(tuned(spec, lora_train_classifier=True))
    weights = {"out.weight": np.ones((7, 10), "float32"), "out.bias": np.ones(7, "float32")}
    bad = lora.Adapter(good.layers, weights, ("out",))
    model = spec.make()
    before = everything(model)
    with pytest.raises(ValueError, match=r"out.weight has \(3, 10\).*\(7, 10\).*nb_classes="):
        lora.load_adapter(model, bad)
    assert_unchanged(model, before)


def test_update_of_another_kind_is_refused_before_anything_changes():
    spec = tiny_models.GENERIC[0]
    model = tuned(spec)
    before, adapter = everything(model), lora.adapter_of(model)
    update = adapter.layers["hidden"]
    odd = lora.LayerUpdate(np.ones((1, *update.a.shape[1:])), update.b[:, :1], 0.0, "grouped")
    with pytest.raises(
        ValueError, match="hidden is of the kind 'linear', the update 'grouped'"
    ):
        lora.load_adapter(model, lora.Adapter({"hidden": odd}))
    assert_unchanged(model, before)
    assert lora.adapter_of(model) == adapter


# -- off, on, weaker, stronger --------------------------------------------------------------


@pytest.mark.backends
@pytest.mark.parametrize("merged", [False, True])
@KINDS
def test_disabled_adapter_is_off_in_the_block_and_back_after_it(spec, merged):
    model, x = tuned(spec), spec.inputs()
    plain = base_like(model, spec) if spec.copyable else None
    if merged:
        lora.merge_lora_weights(model)
    output, before = run(model, x), values(model.weights)
    predicted = model.predict(x, verbose=0)
    with pytest.raises(RuntimeError, match="in the block"), lora.disable_adapter(model):
        with lora.disable_adapter(model):
            inside = run(model, x)
        np.testing.assert_array_equal(run(model, x), inside)
        np.testing.assert_allclose(model.predict(x, verbose=0), inside, **CLOSE)
        if plain is not None:
            np.testing.assert_allclose(inside, run(plain, x), **CLOSE)
        assert np.abs(inside - output).max() > 1e-3
        raise RuntimeError("in the block")
    for variable, value in zip(model.weights, before):
        np.testing.assert_array_equal(array(variable), value)
    np.testing.assert_array_equal(model.predict(x, verbose=0), predicted)


def test_a_disabled_adapter_is_saved_and_not_changed(tmp_path):
    model = tuned(tiny_models.GENERIC[0])
    adapter = lora.adapter_of(model)
    with lora.disable_adapter(model):
        assert lora.adapter_of(model) == adapter
        with pytest.raises(ValueError, match="disable_adapter block"):
            lora.merge_lora_weights(model)
        with pytest.raises(ValueError, match="disable_adapter"):
            lora.load_adapter(model, adapter)
    assert lora.adapter_of(model) == adapter


@pytest.mark.backends
def test_scale_counts_from_the_adapter_as_it_was():
    spec = tiny_models.GENERIC[1]
    model, x = tuned(spec), spec.inputs()
    before = values(model.weights)
    layer = next(iter(lora_layers(model).values()))
    for scale in (0.5, 2.0, -1.0, 0.0):
        lora.set_adapter_scale(model, scale)
        kernel = layer.lora_values()["kernel"].astype("float64")
        a, b = array(layer.kernel_lora_a), before_b(model, before, layer)
        expected = kernel + scale * 1.5 * np.einsum("...ir,ro->...io", a, b)
        np.testing.assert_allclose(layer.merged_kernel(), expected, rtol=1e-5, atol=1e-6)
    assert run(model, x).shape
    lora.set_adapter_scale(model, 1.0)
    for variable, value in zip(model.weights, before):
        np.testing.assert_array_equal(array(variable), value)
    lora.set_adapter_scale(model, 0.5)
    assert lora.adapter_of(model) != lora.adapter_of(tuned(spec))
    with pytest.raises(ValueError, match="scale=nan"):
        lora.set_adapter_scale(model, float("nan"))
    with pytest.raises(TypeError, match="scale='1'"):
        lora.set_adapter_scale(model, "1")


def before_b(model, before, layer):
    place = next(i for i, v in enumerate(model.weights) if v is layer.kernel_lora_b)
    return before[place].astype("float64")


# -- the value ------------------------------------------------------------------------------


def test_adapter_is_immutable_and_compares_by_content():
    adapter = lora.adapter_of(tuned(tiny_models.GENERIC[1]))
    update = next(iter(adapter.layers.values()))
    with pytest.raises(ValueError):
        update.a[0] = 0
    with pytest.raises(TypeError):
        adapter.layers["x"] = update
    with pytest.raises(AttributeError):
        adapter.bias = "all"
    again = lora.Adapter(dict(adapter.layers), base_model="x")
    assert again != adapter and again == lora.Adapter(adapter.layers, base_model="x")
    source = np.ones((2, 3), "float32")
    mine = lora.LayerUpdate(source, np.ones((4, 2), "float32"))
    source[:] = 7
    assert mine.a.max() == 1
    for a, b in (((2, 3), (4, 3)), ((2,), (4, 2))):
        with pytest.raises(ValueError, match="expected .rank, in"):
            lora.LayerUpdate(np.ones(a), np.ones(b))


def test_summary_has_what_numpy_says():
    spec = tiny_models.GENERIC[0]
    model = tuned(spec, lora_train_classifier=True)
    adapter = lora.adapter_of(model)
    update = adapter.layers["hidden"]
    delta = 1.5 * update.b.astype("float64") @ update.a
    values = np.linalg.svd(delta, compute_uv=False)[:2]
    np.testing.assert_allclose(update.singular_values(), values, rtol=1e-6)
    np.testing.assert_allclose(update.delta(), delta)
    share = values / values.sum()
    effective = np.exp(-(share * np.log(share)).sum())
    weight = np.linalg.norm(model.get_layer("hidden").lora_values()["kernel"])
    line = next(x for x in adapter.summary(model).splitlines() if x.startswith("hidden"))
    assert f"{effective:.2f}" in line and f"{np.linalg.norm(delta):.4g}" in line
    assert f"{100 * np.linalg.norm(delta) / weight:.2f} %" in line
    assert "out.weight" in adapter.summary() and " of weight" not in adapter.summary()
    with pytest.raises(ValueError, match="has no layers"):
        adapter.summary(tiny_models.sequential())


def test_combined_adapters_load_and_add_up():
    """Task arithmetic on a live model: the sum, and one taken off again."""
    spec = tiny_models.GENERIC[1]
    models = [tuned(spec, seed=s, lora_alpha=a) for s, a in ((0, 3), (1, 8))]
    adapters = [lora.adapter_of(m) for m in models]
    base = base_like(models[0], spec)
    combined = lora.combine_adapters(adapters, [1.0, -0.5])
    lora.load_adapter(base, combined)
    # Keras numbers the layers of each model on, so they go by their order.
    alike = zip(*(lora_layers(m).values() for m in (base, *models)))
    for layer, *updates in alike:
        delta = layer.merged_kernel() - layer.lora_values()["kernel"]
        single = [u.merged_kernel() - u.lora_values()["kernel"] for u in updates]
        np.testing.assert_allclose(delta, single[0] - 0.5 * single[1], rtol=1e-3, atol=1e-5)


@GENERIC
def test_extracted_adapter_approximates_a_fully_trained_model(spec):
    base = spec.make()
    changed = spec.make()
    lora.transfer_weights(base, changed)
    rng = np.random.default_rng(0)
    for variable in changed.trainable_weights:
        noise = rng.normal(size=tuple(variable.shape)).astype("float32")
        variable.assign(array(variable) + 0.1 * noise)
    x, output = spec.inputs(), run(changed, spec.inputs())
    own = spec.name == "subclassed"  # has variables of its own, which no adapter holds
    if own:
        with pytest.warns(UserWarning, match="block0.gamma.*token.*left out|token.*gamma"):
            adapter = lora.extract_adapter(base, changed, energy=1.0)
        return
    adapter = lora.extract_adapter(base, changed, energy=1.0)
    lora.load_adapter(base, adapter)
    np.testing.assert_allclose(run(base, x), output, rtol=1e-3, atol=1e-3)
    small = lora.extract_adapter(spec_copy(spec, changed, base), changed, rank=1)
    assert {u.rank for u in small.layers.values()} == {1}
    with pytest.raises(ValueError, match="base with LoRA"):
        lora.extract_adapter(base, changed, rank=1)
    with pytest.raises(ValueError, match="rank"):
        lora.extract_adapter(changed, changed)


def spec_copy(spec, changed, base):
    fresh = spec.make()
    with lora.disable_adapter(base):
        plain = lora.convert_to_regular_model(base) if spec.copyable else fresh
    lora.transfer_weights(plain, fresh)
    return fresh


def test_ranks_alphas_and_patterns_that_match_nothing_are_errors():
    spec = tiny_models.GENERIC[0]
    for name in ("lora_rank_pattern", "lora_alpha_pattern"):
        model = spec.make()
        with pytest.raises(ValueError, match=f"{name} with the key 'hiden'.*hidden"):
            lora.inject_lora(model, **{name: {"hiden": 3}})
        with pytest.raises(TypeError, match=f"{name}=.*dictionary"):
            lora.inject_lora(model, **{name: [3]})
        with pytest.raises(ValueError, match="not a regular expression"):
            lora.inject_lora(model, **{name: {"(": 3}})
        assert not has_lora(model)
