"""What every model with LoRA in it must do, in either Keras."""

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import BACKEND, LEGACY, array, ids, keras, randomise, run, values
from tfimm_lora.model.merge import lora_layers

# Float32 through some ten layers.
CLOSE = dict(rtol=1e-4, atol=1e-5)


def compile_for(model, rate=0.05, **kwargs):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, **kwargs)


def adapted(spec, **kwargs):
    """The model with LoRA, its factors non-zero."""
    model = lora.inject_lora(spec.make(), **{"lora_rank": 2, **kwargs})
    randomise(model)
    return model


def classes_in(model):
    return [type(layer) for layer in model._flatten_layers()]


def state(model):
    """Everything of a model that a conversion must leave alone."""
    layers = list(model._flatten_layers())
    return (
        [type(layer) for layer in layers],
        [layer.trainable for layer in layers],
        [id(v) for v in model.weights],
        ids(model.trainable_weights),
    )


# -- promises ----------------------------------------------------------------------------


def starts_with_the_same_outputs_and_variables(spec, path):
    model, x = spec.make(), spec.inputs()
    before, variables = run(model, x), list(model.weights)
    predicted = model.predict(x, verbose=0)
    assert lora.inject_lora(model, lora_rank=2) is model
    np.testing.assert_allclose(run(model, x), before, **CLOSE)
    assert ids(variables) < ids(model.weights)
    added = [v for v in model.weights if id(v) not in ids(variables)]
    assert len(added) == 2 * len(list(lora_layers(model)))
    randomise(model)
    changed = run(model, x)
    assert np.abs(changed - before).max() > 1e-3
    # `predict` had been traced before; it must not give what it gave then.
    np.testing.assert_allclose(model.predict(x, verbose=0), changed, **CLOSE)
    np.testing.assert_allclose(predicted, before, **CLOSE)


def everybody_agrees_on_what_is_trained(spec, path):
    for train_bias in ("none", "lora_only", "all"):
        model = adapted(spec, lora_train_bias=train_bias)
        named = lora.lora_trainable_weights(model, train_bias=train_bias)
        others = lora.lora_non_trainable_weights(model, train_bias=train_bias)
        assert len(ids(named)) == len(named) and len(ids(others)) == len(others)
        assert ids(named) | ids(others) == ids(model.weights)
        assert not ids(named) & ids(others)
        again = lora.lora_trainable_weights(model, train_bias=train_bias)
        assert [id(v) for v in named] == [id(v) for v in again]
        assert ids(model.trainable_weights) == ids(named)
        assert len(model.trainable_weights) == len(named)
        assert ids(model.non_trainable_weights) == ids(others)
        counts = _summary_counts(model)
        assert counts == [sum(array(v).size for v in part) for part in (named, others)]
        entry = keras.Input(spec.input_shape)
        parent = keras.Model(entry, keras.layers.Dense(2, use_bias=False)(model(entry)))
        assert ids(parent.trainable_weights) > ids(named)
        assert len(parent.trainable_weights) == len(named) + 1


def _summary_counts(model):
    lines = []
    model.summary(print_fn=lambda line, **kwargs: lines.append(line))
    found = {}
    for line in "\n".join(lines).splitlines():
        for word in ("Trainable params", "Non-trainable params"):
            if line.strip().startswith(word):
                found[word] = int(line.split(":")[1].split("(")[0].replace(",", ""))
    return [found["Trainable params"], found["Non-trainable params"]]


def fit_changes_exactly_the_named_variables(spec, path):
    x, y = spec.inputs(), spec.labels()
    for train_bias in ("none", "all"):
        model = adapted(spec, lora_train_bias=train_bias)
        named = lora.lora_trainable_weights(model, train_bias=train_bias)
        frozen = lora.lora_non_trainable_weights(model, train_bias=train_bias)
        before, still = values(named), values(frozen)
        compile_for(model)
        losses = model.fit(x, y, epochs=8, verbose=0).history["loss"]
        assert losses[-1] < losses[0]
        for variable, value in zip(frozen, still):
            np.testing.assert_array_equal(array(variable), value, err_msg=variable.name)
        moved = [np.abs(array(v) - old).max() > 0 for v, old in zip(named, before)]
        # A key's bias cancels in the softmax, and a ReLU may never be on.
        assert sum(moved) >= len(named) - (0 if train_bias == "none" else 4)


class Trained(keras.callbacks.Callback):
    """Records which variables Keras trains, at the start, in and at the end of fit."""

    def on_train_begin(self, logs=None):
        self.seen = [ids(self.model.trainable_weights)]

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(ids(self.model.trainable_weights))

    def on_train_end(self, logs=None):
        self.seen.append(ids(self.model.trainable_weights))


def keras_trains_what_is_reported(spec, path):
    """Before, during and after fit; what the optimizer holds state for, too."""
    model = adapted(spec, lora_train_bias="all")
    named = lora.lora_trainable_weights(model, train_bias="all")
    others = lora.lora_non_trainable_weights(model, train_bias="all")
    still, trained = values(others), Trained()
    assert ids(model.trainable_weights) == ids(named)
    compile_for(model, run_eagerly=BACKEND == "tensorflow")
    x, y = spec.inputs(), spec.labels()
    model.fit(x, y, batch_size=len(x) // 2, verbose=0, callbacks=[trained])
    assert len(trained.seen) == 4 and all(seen == ids(named) for seen in trained.seen)
    assert ids(model.trainable_weights) == ids(named)
    for variable, value in zip(others, still):
        np.testing.assert_array_equal(array(variable), value, err_msg=variable.name)
    # Adam has two variables for each that it trains, and some of its own.
    optimizer = model.optimizer.variables
    shapes = [tuple(v.shape) for v in (optimizer() if callable(optimizer) else optimizer)]
    expected = [tuple(v.shape) for v in named]
    assert all(shapes.count(shape) >= 2 * expected.count(shape) for shape in set(expected))
    assert len(shapes) - 2 * len(expected) <= 2


def merges_and_unmerges_without_loss(spec, path):
    model, x = adapted(spec), spec.inputs()
    before, output = values(model.weights), run(model, x)
    model.predict(x, verbose=0)
    assert lora.merge_lora_weights(model) is model
    lora.merge_weights(model)
    np.testing.assert_allclose(run(model, x), output, **CLOSE)
    np.testing.assert_allclose(model.predict(x, verbose=0), output, **CLOSE)
    lora.unmerge_lora_weights(model)
    lora.unmerge_lora_weights(model)
    for variable, value in zip(model.weights, before):
        np.testing.assert_array_equal(array(variable), value)
    np.testing.assert_allclose(model.predict(x, verbose=0), output, **CLOSE)


def respects_trainable_and_undoes_it(spec, path):
    model = adapted(spec, lora_train_bias="all")
    named = ids(model.trainable_weights)
    everything = [id(v) for v in model.weights]
    model.trainable = False
    assert model.trainable_weights == []
    assert sorted(id(v) for v in model.non_trainable_weights) == sorted(everything)
    model.trainable = True
    assert ids(model.trainable_weights) == named
    entry = keras.Input(spec.input_shape)
    parent = keras.Model(entry, model(entry))
    parent.trainable = False
    assert parent.trainable_weights == []
    parent.trainable = True
    assert ids(parent.trainable_weights) == named


def comes_back_as_it_was(spec, path):
    for merge in (True, False):
        model, x = spec.make(), spec.inputs()
        before, found, kernels = run(model, x), state(model), values(model.weights)
        lora.inject_lora(model, lora_rank=2, lora_dropout=0.0, lora_train_bias="all")
        randomise(model)
        output = run(model, x)
        assert lora.remove_lora(model, merge=merge) is model
        assert state(model) == found
        assert not any("tfimm_lora" in cls.__module__ for cls in classes_in(model))
        expected = output if merge else before
        np.testing.assert_allclose(run(model, x), expected, **CLOSE)
        np.testing.assert_allclose(model.predict(x, verbose=0), expected, **CLOSE)
        if not merge:
            for variable, value in zip(model.weights, kernels):
                np.testing.assert_array_equal(array(variable), value)
        compile_for(model, run_eagerly=True)
        model.fit(x, spec.labels(), verbose=0)


def frozen_parts_are_found_and_left_frozen(spec, path):
    model = spec.make()
    layers = [x for x in model._flatten_layers(include_self=False) if x.weights]
    for layer in layers[::2]:
        layer.trainable = False
    found = state(model)
    lora.inject_lora(model, lora_rank=2)
    assert ids(model.trainable_weights) == ids(lora.lora_trainable_weights(model))
    assert len(model.trainable_weights) > 0
    lora.remove_lora(model)
    assert state(model) == found


def converts_to_new_models(spec, path):
    model, x = spec.make(), spec.inputs()
    before, found = run(model, x), state(model)
    adapted_copy = lora.convert_to_lora_model(model, lora_rank=2)
    assert not ids(adapted_copy.weights) & ids(model.weights)
    np.testing.assert_allclose(run(adapted_copy, x), before, **CLOSE)
    randomise(adapted_copy)
    output = run(adapted_copy, x)
    assert np.abs(output - before).max() > 1e-3
    assert state(model) == found
    np.testing.assert_array_equal(run(model, x), before)
    for merged in (False, True):
        if merged:
            lora.merge_lora_weights(adapted_copy)
        kept, kept_state = values(adapted_copy.weights), state(adapted_copy)
        regular = lora.convert_to_regular_model(adapted_copy)
        assert classes_in(regular) == classes_in(model)
        assert not ids(regular.weights) & ids(adapted_copy.weights)
        np.testing.assert_allclose(run(regular, x), output, **CLOSE)
        assert len(regular.trainable_weights) == len(model.trainable_weights)
        assert state(adapted_copy) == kept_state
        for variable, value in zip(adapted_copy.weights, kept):
            np.testing.assert_array_equal(array(variable), value)
        np.testing.assert_allclose(run(adapted_copy, x), output, **CLOSE)


def weight_files_load_and_train_on(spec, path):
    model, x = adapted(spec), spec.inputs()
    output = run(model, x)
    formats = ["a.weights.h5"] + (["b.h5", "checkpoint"] if LEGACY else [])
    for merged in (False, True):
        if merged:
            lora.merge_lora_weights(model)
        for name in formats:
            file = str(path / name)
            model.save_weights(file)
            twin = lora.inject_lora(spec.make(), lora_rank=2)
            twin.load_weights(file)
            np.testing.assert_allclose(run(twin, x), output, **CLOSE, err_msg=name)
            assert len(twin.trainable_weights) == 2 * len(lora_layers(model))
        before = values(twin.trainable_weights)
        compile_for(twin, run_eagerly=True)
        twin.fit(x, spec.labels(), verbose=0)
        after = values(twin.trainable_weights)
        assert any(np.abs(a - b).max() > 0 for a, b in zip(after, before))


def copies_of_raw_weights_agree(spec, path):
    """get_weights of a merged model never makes its update apply twice."""
    model, x = adapted(spec), spec.inputs()
    output = run(model, x)
    lora.merge_lora_weights(model)
    twin = lora.inject_lora(spec.make(), lora_rank=2)
    twin.set_weights(model.get_weights())
    np.testing.assert_allclose(run(twin, x), output, **CLOSE)


def whole_files_load_and_train_on_or_are_refused(spec, path):
    for train_bias in ("none", "all"):
        model, x = adapted(spec, lora_train_bias=train_bias), spec.inputs()
        names = ["model.keras", *(["saved", "model.h5"] if LEGACY else [])]
        for name in names:
            file = str(path / f"{train_bias}_{name}")
            if not spec.rebuildable:
                # Legacy Keras itself refuses a subclassed model in HDF5.
                refused = "load_weights|Functional model or a Sequential"
                with pytest.raises((ValueError, NotImplementedError), match=refused):
                    model.save(file)
                continue
            output = run(model, x)
            model.save(file)
            loaded = keras.models.load_model(file)
            np.testing.assert_allclose(run(loaded, x), output, **CLOSE)
            named = lora.lora_trainable_weights(loaded, train_bias=train_bias)
            assert ids(loaded.trainable_weights) == ids(named)
            assert len(named) == len(model.trainable_weights)
            frozen = loaded.non_trainable_weights
            still, before = values(frozen), values(named)
            compile_for(loaded, run_eagerly=True)
            loaded.fit(x, spec.labels(), verbose=0)
            for variable, value in zip(frozen, still):
                np.testing.assert_array_equal(array(variable), value)
            assert any(np.abs(a - b).max() > 0 for a, b in zip(values(named), before))
            loaded.trainable = False
            loaded.trainable = True
            assert ids(loaded.trainable_weights) == ids(named)
            lora.remove_lora(loaded)
            assert classes_in(loaded) == classes_in(spec.make())


def regular_model_saves_as_an_ordinary_one(spec, path):
    model, x = adapted(spec), spec.inputs()
    output = run(model, x)
    regular = lora.convert_to_regular_model(model)
    regular.save_weights(str(path / "regular.weights.h5"))
    fresh = spec.make()
    fresh.load_weights(str(path / "regular.weights.h5"))
    np.testing.assert_allclose(run(fresh, x), output, **CLOSE)


def adapts_trains_merges_and_comes_back(spec, path):
    """All of it in one go, for models that take long to trace."""
    model, x = spec.make(), spec.inputs()
    before, found, variables = run(model, x), state(model), ids(model.weights)
    lora.inject_lora(model, lora_rank=2)
    assert variables < ids(model.weights)
    np.testing.assert_allclose(run(model, x), before, **CLOSE)
    named, frozen = model.trainable_weights, model.non_trainable_weights
    assert ids(named) == ids(lora.lora_trainable_weights(model))
    start, still = values(named), values(frozen)
    randomise(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-3), loss)
    model.train_on_batch(x, spec.labels())
    assert sum(np.abs(array(v) - old).max() > 0 for v, old in zip(named, start)) > 2
    for variable, value in zip(frozen, still):
        np.testing.assert_array_equal(array(variable), value, err_msg=variable.name)
    trained = run(model, x)
    assert np.isfinite(trained).all() and np.abs(trained - before).max() > 1e-6
    lora.merge_lora_weights(model)
    np.testing.assert_allclose(run(model, x), trained, rtol=1e-3, atol=1e-4)
    with pytest.warns(UserWarning, match="ompile it again"):
        lora.remove_lora(model)
    assert state(model) == found
    np.testing.assert_allclose(run(model, x), trained, rtol=1e-3, atol=1e-4)


PROMISES = [
    starts_with_the_same_outputs_and_variables,
    everybody_agrees_on_what_is_trained,
    keras_trains_what_is_reported,
    fit_changes_exactly_the_named_variables,
    merges_and_unmerges_without_loss,
    respects_trainable_and_undoes_it,
    comes_back_as_it_was,
    frozen_parts_are_found_and_left_frozen,
    converts_to_new_models,
    weight_files_load_and_train_on,
    copies_of_raw_weights_agree,
    whole_files_load_and_train_on_or_are_refused,
    regular_model_saves_as_an_ordinary_one,
]
