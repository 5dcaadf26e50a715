"""Which settings are trained for how long, by one process or several, and within the time."""

import itertools
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.helpers.kerases import keras
from tfimm_lora.finetuning.optimizer import create_optimizer, rate_of_step
from tfimm_lora.finetuning.tuning import search as search_module
from tfimm_lora.finetuning.tuning.record import Tuned, TunedTrial, best_trial
from tfimm_lora.finetuning.tuning.rungs import rungs
from tfimm_lora.finetuning.tuning.search import Outcome, Search
from tfimm_lora.finetuning.tuning.space import Space
from tfimm_lora.finetuning.tuning.storage import open_study
from tfimm_lora.finetuning.tuning.tune import tune

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[3]
SPACE = Space((1e-4, 1e-1), (2, 4))


def loss(rate, rank, epochs):
    """The lowest at a rate of 0.01 and rank 4, and lower with more epochs."""
    return abs(math.log10(rate) + 2) + (0.1 if rank == 2 else 0.0) + 1 / epochs


class Clock:
    """A clock that a test turns on."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(search_module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(search_module.time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.now += seconds


def searched(study, ladder=None, *, space=SPACE, train=None, seconds=1e9, seed=0, alone=False):
    trained = []

    def train_well(rate, rank, epochs, is_over):
        trained.append((rate, rank, epochs))
        for epoch in range(epochs):
            is_over(epoch)
        value = loss(rate, rank, epochs)
        return Outcome(value, {"val_loss": value})

    search = Search(
        study,
        space,
        space.starts(1e-3, 2),
        ladder or rungs(9, 9, steps=10),
        monitor="val_loss",
        train=train or train_well,
        seconds=seconds,
        seed=seed,
        say=lambda message: None,
    )
    if alone:
        search.continue_alone()
    search.run()
    return search, trained


@pytest.mark.parametrize("steps, warmup", [(10, 0.1), (7, 0.0), (40, 0.3), (1, 0.5)])
def test_rates_are_those_of_the_schedule_of_keras(steps, warmup):
    optimizer = create_optimizer(keras, steps=steps, learning_rate=0.3, warmup=warmup)
    schedule = optimizer._learning_rate
    for step in range(steps + 2):
        expected = float(schedule(step))
        assert rate_of_step(step, steps, 0.3, warmup) == pytest.approx(expected, abs=1e-7)


def test_the_best_third_is_trained_again_for_longer():
    search, trained = searched(open_study(None, {}))
    first, second = trained[:9], trained[9:]
    assert [epochs for *_, epochs in trained] == 9 * [1] + 3 * [3]
    # The default first, usual rates with its rank, the other rank with a middle rate.
    assert first[:4] == [(1e-3, 2, 1), (3e-3, 2, 1), (1e-2, 2, 1), (3e-3, 4, 1)]
    best = sorted(first, key=lambda x: loss(*x))[:3]
    assert {x[:2] for x in second} == {x[:2] for x in best}
    found = best_trial(search.finished(), "val_loss")
    assert (found.learning_rate, found.rank, found.epochs) == (*best[0][:2], 3)
    for rank in SPACE.ranks:  # no setting is tried twice
        rates = sorted(rate for rate, of, _ in first if of == rank)
        assert all(b / a > 1.29 for a, b in itertools.pairwise(rates))


def test_a_search_is_repeatable_and_another_seed_gives_another():
    (_, one), (_, two) = searched(open_study(None, {})), searched(open_study(None, {}))
    _, three = searched(open_study(None, {}), seed=1)
    assert one == two and one != three


def test_a_training_that_does_not_fit_into_the_time_is_not_started(monkeypatch):
    clock = Clock(monkeypatch)

    def train(rate, rank, epochs, is_over):
        for epoch in range(epochs):
            clock.now += 10
            is_over(epoch)
        return Outcome(1.0, {"val_loss": 1.0})

    search, _ = searched(open_study(None, {}), train=train, seconds=35)
    assert search.timed_out and len(search.finished()) == 3 and clock.now == 30
    search, _ = searched(open_study(None, {}), train=train, seconds=1)
    assert search.timed_out and len(search.finished()) == 1


def test_a_training_that_takes_longer_than_expected_is_stopped_after_an_epoch(monkeypatch):
    clock, stopped = Clock(monkeypatch), []

    def train(rate, rank, epochs, is_over):
        for epoch in range(epochs):
            clock.now += 10 if epochs == 2 else 30
            if is_over(epoch):
                stopped.append((epochs, epoch))
                return Outcome(0.0, {"val_loss": 0.0}, complete=False)
        return Outcome(1.0, {"val_loss": 1.0})

    ladder = rungs(6, 18, steps=10)
    assert [(x.count, x.epochs) for x in ladder] == [(6, 2), (2, 6)]
    search, _ = searched(open_study(None, {}), ladder, train=train, seconds=190)
    assert stopped == [(6, 0)] and search.timed_out and clock.now == 150
    assert {x.epochs for x in search.finished()} == {2}


def test_trainings_that_diverged_are_never_chosen():
    def train(rate, rank, epochs, is_over):
        is_over(0)
        return Outcome(None if rank == 4 else 1.0, {} if rank == 4 else {"val_loss": 1.0})

    search, _ = searched(open_study(None, {}), train=train)
    trials = search.finished()
    assert any(x.value is None for x in trials)
    assert best_trial(trials, "val_loss").rank == 2
    assert all(x.rank == 2 for x in trials if x.epochs == 3)
    bad = tuple(x for x in trials if x.value is None)
    with pytest.raises(FloatingPointError, match="diverged"):
        best_trial(bad, "val_loss")


def test_equal_accuracies_are_ranked_by_loss():
    def trial(number, accuracy, loss):
        metrics = {"val_accuracy": accuracy, "val_loss": loss}
        return TunedTrial(number, 0.1 * number, 4, 3, accuracy, metrics, 1.0, "me")

    trials = (trial(1, 0.5, 0.1), trial(2, 0.7, 0.9), trial(3, 0.7, 0.8))
    assert best_trial(trials, "val_accuracy").number == 3


def test_a_killed_search_continues_with_what_is_left(tmp_path):
    _whole, expected = searched(open_study(tmp_path / "whole", {}))
    started, patch = [], pytest.MonkeyPatch()

    def killed(rate, rank, epochs, is_over):
        started.append((rate, rank, epochs))
        if len(started) in (2, 11):
            # As after SIGKILL: the trial remains marked as running.
            patch.setattr(Search, "_give_up", lambda self, trial: None)
            raise SystemExit
        value = loss(rate, rank, epochs)
        return Outcome(value, {"val_loss": value})

    for _ in range(2):
        with pytest.raises(SystemExit):
            searched(open_study(tmp_path / "killed", {}), train=killed, alone=True)
        patch.undo()
    search, _rest = searched(open_study(tmp_path / "killed", {}), alone=True)
    kept = search.finished()
    assert sorted(x.epochs for x in kept) == sorted(epochs for *_, epochs in expected)
    starts = {(x.learning_rate, x.rank) for x in kept if x.epochs == 1}
    assert set(SPACE.starts(1e-3, 2)) <= starts
    again, nothing = searched(open_study(tmp_path / "killed", {}), alone=True)
    assert not nothing and again.finished() == kept


def test_a_study_with_other_settings_is_refused(tmp_path):
    open_study(tmp_path / "journal", {"epochs": 3, "rates": (1, 2)})
    open_study(tmp_path / "journal", {"epochs": 3, "rates": (1, 2)})
    with pytest.raises(ValueError, match="epochs=3, now 4"):
        open_study(tmp_path / "journal", {"epochs": 4, "rates": (1, 2)})


@pytest.mark.parametrize("attempts", [1, 3])
def test_a_database_that_another_process_creates_now_is_opened(tmp_path, monkeypatch, attempts):
    """Each attempt finds a table that did not exist when it looked."""
    from optuna.storages._rdb.models import BaseModel

    create, calls = BaseModel.metadata.create_all, []

    def create_all(engine):
        create(engine)
        if len(calls) < attempts:
            calls.append(engine)
            create(engine, checkfirst=False)

    monkeypatch.setattr(BaseModel.metadata, "create_all", create_all)
    monkeypatch.setattr("tfimm_lora.finetuning.tuning.storage.PAUSES", (0.0,) * 3)
    study = open_study(f"sqlite:///{tmp_path / 'new'}", {"epochs": 3})
    assert study.user_attrs["settings"] == {"epochs": 3} and len(calls) == attempts


@pytest.mark.long
@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_processes_with_one_storage_divide_the_trainings(tmp_path, kind, monkeypatch):
    """Two searches whose trainings overlap in time, in two processes."""
    storage = str(tmp_path / "shared")
    if kind == "sqlite":
        storage = f"sqlite:///{storage}"
    code = textwrap.dedent(
        """
        import sys, time
        from tests.finetuning.tuning.test_search import *
        def train(rate, rank, epochs, is_over):
            print(rate, rank, epochs, flush=True)
            time.sleep(0.3)
            value = loss(rate, rank, epochs)
            return Outcome(value, {"val_loss": value})
        search, _ = searched(open_study(sys.argv[1], {}), train=train)
        best = best_trial(search.finished(), "val_loss")
        print("best", best.learning_rate, best.rank, len(search.finished()))
        """
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, storage],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), ended
    lines = [out.splitlines() for out, _ in ended]
    assert lines[0][-1] == lines[1][-1] and lines[0][-1].endswith(" 12")
    trained = [own[:-1] for own in lines]
    assert len(set(trained[0] + trained[1])) == len(trained[0] + trained[1]) == 12
    assert min(map(len, trained)) >= 3  # one may start seconds later than the other


def test_a_waiting_process_ends_with_its_time(monkeypatch):
    clock, study = Clock(monkeypatch), open_study(None, {})
    ladder = rungs(3, 9, steps=10)
    assert [x.count for x in ladder] == [3]
    for _ in range(3):
        study.ask()  # taken by processes that never report
    search, _trained = searched(study, ladder, space=Space((1e-3, 1e-1), (2,)), seconds=20)
    assert search.timed_out and clock.now >= 20


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"minutes": -1}, ValueError, "minutes=-1; expected a number above 0"),
        ({"learning_rate": (1e-2, 1e-3)}, ValueError, "lowest rate first"),
        ({"learning_rate": (1e-3, 1e-3)}, ValueError, "lowest rate first"),
        ({"learning_rate": (1e-3, 1e-2, 1e-1)}, ValueError, "the lowest and the highest"),
        ({"learning_rate": "auto"}, TypeError, "learning_rate='auto'"),
        ({"rank": (4, 4)}, ValueError, "different ranks"),
        ({"rank": "auto"}, TypeError, "rank='auto'"),
        ({"learning_rate": 1e-3, "rank": 4}, ValueError, "nothing to search"),
        ({"trials": 1}, ValueError, "trials=1"),
        ({"epochs": 0}, ValueError, "epochs=0"),
        ({"warmup": 1.0}, ValueError, "warmup=1.0"),
        ({"clip_norm": "1"}, TypeError, "clip_norm='1'"),
        ({"weight_decay": -1}, ValueError, "weight_decay=-1"),
        ({"seed": "1"}, TypeError, "seed='1'"),
        ({"first": 1e-3}, TypeError, "first=0.001; expected a rate and a rank"),
        ({"first": ("high", 2)}, TypeError, "expected a number above 0"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_trained(options, error, message):
    def create_model(rank):
        raise AssertionError

    with pytest.raises(error, match=message):
        tune(create_model, [1, 2], None, **{"minutes": 1, "epochs": 3, **options})


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"tfimm_lora\[tune\]"):
        tune(lambda rank: None, [1], None, minutes=1, epochs=1)


def test_a_result_survives_its_file(tmp_path):
    from tfimm_lora.finetuning.tuning.record import read_search

    trials = (
        TunedTrial(0, 1e-3, 4, 2, 0.5, {"val_loss": 0.5, "val_accuracy": 0.8}, 1.5, "a 1"),
        TunedTrial(1, 1e-1, 4, 2, None, {}, 1.0, "b 2"),
    )
    tuned = Tuned(1e-3, 4, "val_loss", trials, (1e-4, 1e-1), (4,), 10, (8, 2))
    tuned.write(tmp_path, {"seed": 3})
    assert read_search(tmp_path) == (tuned, {"seed": 3})
    table = (tmp_path / "tuning" / "trials.csv").read_text().splitlines()
    assert table[1] == "0,0.001,4,2,0.5,1.5,a 1,0.5,0.8" and table[2].endswith(",,")
    assert read_search(tmp_path / "nothing") is None
