"""``tune`` and ``find_learning_rate`` on small models, on every Keras and framework."""

import gc
import weakref

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import BACKEND, keras
from tfimm_lora.finetuning.checkpoint import values_of
from tfimm_lora.finetuning.training import finetune
from tfimm_lora.finetuning.tuning import learning_rate_finder as finder_module
from tfimm_lora.finetuning.tuning import tune as tune_module
from tfimm_lora.finetuning.tuning.learning_rate_finder import curve_of, find_learning_rate
from tfimm_lora.finetuning.tuning.trainer import Trainer
from tfimm_lora.finetuning.tuning.tune import Trainers, direction, tune

pytestmark = pytest.mark.backends

#: Keras draws the dropout of torch from torch's own generator, which no training restarts.
DROPOUT = 0.0 if BACKEND == "torch" else 0.1


def points(count, seed):
    """Points (count, 5) in three clusters, their classes."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, count).astype("int32")
    return 0.3 * rng.normal(size=(count, 5)).astype("float32") + np.eye(3, 5, dtype="f")[y], y


def batches(count, seed):
    """Batches of eight points."""
    x, y = points(count, seed)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.data.Dataset.from_tensor_slices((x, y)).batch(8)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return -(-len(y) // 8)

        def __getitem__(self, i):
            return x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8]

    return Batches()


class Traced(keras.layers.Layer):
    """Counts how often its call is traced, or run where nothing is traced."""

    count = 0

    def call(self, x):
        type(self).count += 1
        return x


def net(rank=2, dropout=DROPOUT):
    keras.utils.set_random_seed(3)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(16, activation="relu", name="fc"),
            layers.BatchNormalization(name="bn"),
            layers.Dropout(dropout, name="drop"),
            Traced(name="traced"),
            layers.Dense(3, name="head"),
        ]
    )
    settings = {"lora_rank": rank, "lora_train_classifier": True, "lora_dropout": dropout}
    return lora.inject_lora(model, **settings)


class Endless:
    """Epochs of one order as a generator, for which Keras has no class weights."""

    steps_per_epoch = 10

    def epochs(self, first):
        x, y = points(80, seed=0)
        while True:
            for i in range(0, 80, 8):
                yield x[i : i + 8], y[i : i + 8]


@pytest.fixture(scope="module")
def data():
    return batches(80, seed=0), batches(40, seed=1)


def fitted(trainer, epochs, rate):
    history = []
    trainer.reset()
    trainer.fit(
        trainer.scheduled(epochs, rate, 0.1),
        epochs,
        after_epoch=lambda epoch, metrics: history.append(metrics) or False,
    )
    return history


@pytest.mark.parametrize("endless", [False, True])
def test_a_trainer_trains_as_finetune_does_without_another_trace(data, endless):
    train, validation = data
    train = Endless() if endless else train
    options = {
        "weight_decay": 0.1,
        "clip_norm": 0.1,
        "class_weight": {0: 0.2, 1: 1.0, 2: 3.0},
        "metrics": ["accuracy"],
    }
    expected = finetune(
        net(), train, validation, epochs=3, learning_rate=0.03, verbose="none", **options
    )
    with Trainer(net(), train, validation, **options) as trainer:
        fitted(trainer, 1, 0.1)
        traced = Traced.count
        first, second = fitted(trainer, 3, 0.03), fitted(trainer, 3, 0.03)
        assert BACKEND == "torch" or Traced.count == traced
    assert first == second
    for one, other in zip(first, expected.history):
        for name in other:  # the schedule of Keras is computed in float32
            assert one[name] == pytest.approx(other[name], rel=1e-4), name


def test_tune_finds_a_rate_that_trains_and_frees_its_models(data):
    train, validation = data
    created, said = [], []

    def create_model(rank):
        model = net(rank)
        created.append((rank, weakref.ref(model)))
        return model

    tuned = tune(
        create_model,
        train,
        validation,
        minutes=60,
        rank=(1, 2),
        learning_rate=(1e-5, 0.3),
        epochs=9,
        first=(1e-5, 1),
        say=said.append,
    )
    assert sorted(rank for rank, _ in created) == [1, 2]
    assert tuned.learning_rate >= 1e-2 and tuned.rank in (1, 2)
    assert [trial.epochs for trial in tuned.trials] == [1] * 6 + [3] * 2
    # What it reports is what finetune does with these settings.
    best = tuned.best
    again = finetune(
        net(best.rank),
        train,
        validation,
        epochs=best.epochs,
        learning_rate=best.learning_rate,
        verbose="none",
    )
    expected = again.history[again.best_epoch - 1]
    assert best.value == pytest.approx(expected["val_loss"], rel=1e-3)
    assert any(line.startswith(f"chosen: rate {tuned.learning_rate:g}") for line in said)
    gc.collect()
    assert all(model() is None for _, model in created)


class Reached(Exception):
    """Carries the settings that reached a trainer."""


def test_all_settings_reach_the_trainer(data, monkeypatch):
    def reached(model, train, validation=None, **options):
        raise Reached(train, validation, options)

    options = {
        "weight_decay": 0.3,
        "clip_norm": 0.2,
        "loss": "mse",
        "task": lora.Regression(("a", "b", "c"), (0.0,) * 3, (1.0,) * 3),
        "class_weight": {0: 2.0},
        "steps_per_epoch": 3,
        "seed": 5,
    }
    monkeypatch.setattr(tune_module, "Trainer", reached)
    with pytest.raises(Reached) as found:
        tune(net, *data, minutes=60, rank=2, epochs=2, metrics=["mae"], **options)
    assert found.value.args == (*data, {**options, "metrics": ["mae"]})
    monkeypatch.setattr(finder_module, "Trainer", reached)
    with pytest.raises(Reached) as found:
        find_learning_rate(net(), data[0], **{**options, "steps_per_epoch": 20})
    assert found.value.args[::2] == (
        data[0],
        {**options, "steps_per_epoch": 20, "metrics": ()},
    )


@pytest.mark.parametrize(
    "monitor, best", [("val_loss", 1), ("val_accuracy", 0), ("val_mae", 2)]
)
def test_the_best_epoch_counts(monitor, best):
    history = [
        {"val_loss": 0.3, "val_accuracy": 0.9, "val_mae": 0.6},
        {"val_loss": 0.1, "val_accuracy": 0.7, "val_mae": 0.7},
        {"val_loss": 0.2, "val_accuracy": 0.8, "val_mae": 0.5},
    ]

    class Recorded:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def reset(self):
            pass

        def scheduled(self, *settings):
            assert settings == (3, 0.01, 0.25)

        def fit(self, rates, epochs, after_epoch):
            assert not any(after_epoch(i, history[i]) for i in range(epochs))

    with Trainers(lambda rank: Recorded(), 0.25, monitor) as trainers:
        found = trainers.train(0.01, 2, 3, lambda epoch: False)
    assert found.metrics == history[best] and found.value == history[best][monitor]
    assert direction(monitor) == ("maximize" if monitor == "val_accuracy" else "minimize")


def test_a_storage_keeps_the_trainings(data, tmp_path):
    options = {"minutes": 60, "rank": 2, "epochs": 1, "trials": 2}
    storage = tmp_path / "journal"
    expected = tune(net, *data, storage=storage, first=(7e-3, None), **options)
    assert expected.trials[0].learning_rate == 7e-3
    again = tune(None, *data, storage=storage, first=(7e-3, None), **options)
    assert again == expected


def test_trainings_that_all_diverge_are_an_error(data):
    with pytest.raises(FloatingPointError, match="diverged"):
        tune(net, *data, minutes=60, rank=2, learning_rate=(1e25, 1e30), epochs=1, trials=2)


def test_an_unknown_metric_is_named(data):
    with pytest.raises(ValueError, match="monitor='val_f1'; expected one of the metrics: "):
        tune(net, *data, minutes=60, rank=2, epochs=1, monitor="val_f1")


def test_a_model_of_another_rank_than_asked_for_is_refused(data):
    with pytest.raises(ValueError, match=r"create_model\(4\).*rank 2; expected rank 4"):
        tune(lambda rank: net(2), *data, minutes=60, rank=(2, 4), learning_rate=1e-3, epochs=1)


def test_ranks_that_were_not_tried_are_named(data):
    said = []
    tune(net, *data, minutes=60, rank=(1, 2, 4), epochs=1, trials=2, say=said.append)
    assert "not tried: rank 2, 4; more trials or minutes include other ranks" in said


def test_a_storage_with_a_search_of_other_settings_is_refused(data, tmp_path):
    options = {"minutes": 60, "rank": (1, 2), "learning_rate": 1e-3, "epochs": 1}
    options["storage"] = tmp_path / "journal.log"
    tune(net, *data, **options)
    for changed, message in (
        ({"clip_norm": 0.0}, "clip_norm=1.0, now 0.0"),
        ({"class_weight": {0: 2.0}}, "class_weight="),
    ):
        with pytest.raises(ValueError, match=message):
            tune(net, *data, **options, **changed)


def test_finding_a_rate_changes_nothing():
    model = net()
    model.compile(optimizer=keras.optimizers.Adam(0.1), loss="mse", metrics=["mae"])
    x, y = np.ones((8, 5), "float32"), np.ones((8, 3), "float32")
    model.fit(x, y, verbose=0)
    optimizer, loss = model.optimizer, model.loss
    before = values_of(model, optimizer)
    frozen = [np.array(w) for w in model.get_weights()]
    curve = find_learning_rate(model, batches(240, seed=0))
    assert model.optimizer is optimizer and model.loss is loss
    after = values_of(model, optimizer)
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    for value, now in zip(frozen, model.get_weights()):
        np.testing.assert_array_equal(now, value)
    model.fit(x, y, verbose=0)  # as before, with the state of its optimizer
    np.testing.assert_allclose(curve.rates, np.geomspace(1e-5, 1, 30), rtol=1e-9)
    assert len(curve.losses) == 30
    assert finetune(
        model, batches(80, seed=0), epochs=3, learning_rate=curve.suggestion, verbose="none"
    ).history[-1]["loss"] < np.log(3)


def test_a_trainer_reports_the_loss_of_each_step():
    """With a rate of almost zero, it is that of the untrained model on each batch."""
    model, (x, y) = net(dropout=0.0), points(160, seed=0)
    logits = np.array(model.predict(x, verbose=0), "float64")
    log = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -log[np.arange(160), y].reshape(20, 8).mean(1)
    losses = []
    with Trainer(model, batches(160, seed=0), weight_decay=0.0, clip_norm=0) as trainer:
        trainer.fit(lambda step: 1e-12, after_step=losses.append)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_the_suggestion_is_a_tenth_of_the_rate_at_the_minimum():
    rates = np.geomspace(1e-5, 10, 61)
    losses = 1 + (np.log10(rates) + 1) ** 2
    curve = curve_of(rates, losses)
    assert curve.suggestion == pytest.approx(0.01, rel=0.1)
    noisy = losses + np.random.default_rng(0).normal(size=61) * 0.5
    assert 0.003 < curve_of(rates, noisy).suggestion < 0.03
    cut = np.where(rates > 0.5, np.nan, losses)
    assert curve_of(rates, cut).suggestion == pytest.approx(0.01, rel=0.3)
    with pytest.raises(FloatingPointError, match="never falls"):
        curve_of(rates, np.arange(61.0))
    with pytest.raises(FloatingPointError, match="below the lowest rate that was tried, 1e-05"):
        curve_of(rates, 1 + (np.log10(rates) + 4.5) ** 2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 3}, "steps=3; expected an integer of at least 20"),
        ({"steps": 40}, "Received 30 batches for 40 steps"),
        ({"lowest": 0.1, "highest": 0.01}, "highest=0.01"),
        ({"lowest": 0.0}, "lowest=0.0"),
    ],
)
def test_wrong_arguments_of_the_finder(options, message):
    with pytest.raises(ValueError, match=message):
        find_learning_rate(net(), batches(240, seed=0), **options)


def test_a_model_without_lora_is_refused():
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="LoRA"):
        find_learning_rate(model, batches(240, seed=0))
