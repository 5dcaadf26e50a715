"""The numbers of several labels and of a regression, against scikit-learn's and NumPy's."""

import warnings

import numpy as np
import pytest
from scipy.special import expit
from sklearn import metrics

from tfimm_lora.finetuning.multilabel_metrics import (
    MultiLabelEvaluation,
    average_precision,
    best_threshold,
)
from tfimm_lora.finetuning.regression_metrics import RegressionEvaluation, half_width
from tfimm_lora.finetuning.tasks.multilabel import MultiLabel
from tfimm_lora.finetuning.tasks.regression import Regression

pytestmark = pytest.mark.once


def labelled(n=200, seed=0):
    rng = np.random.default_rng(seed)
    true = rng.random((n, 5)) < (0.5, 0.3, 0.1, 0.02, 0.7)
    logits = rng.normal(size=(n, 5)) + 1.5 * true - 0.5
    logits[:, 1] = np.round(logits[:, 1])  # equal scores
    return logits, true.astype("float32")


def test_numbers_of_several_labels_are_those_of_scikit_learn():
    logits, true = labelled()
    limits = (0.5, 0.3, 0.7, 0.2, 0.4)
    value = MultiLabelEvaluation.of(logits, true, thresholds=limits)
    p, y = expit(logits), true.astype(int)
    expected = metrics.average_precision_score(y, p, average=None)
    np.testing.assert_allclose([x.average_precision for x in value.scores], expected)
    mean = metrics.average_precision_score(y, p, average="macro")
    np.testing.assert_allclose(value.mean_average_precision, mean)
    chosen = (p >= limits).astype(int)
    table = metrics.precision_recall_fscore_support(y, chosen, zero_division=0)
    mine = [(x.precision, x.recall, x.f1, x.count) for x in value.scores]
    np.testing.assert_allclose(mine, np.transpose(table))
    np.testing.assert_allclose(value.macro_f1, metrics.f1_score(y, chosen, average="macro"))
    np.testing.assert_allclose(value.micro_f1, metrics.f1_score(y, chosen, average="micro"))
    np.testing.assert_allclose(value.exact, metrics.accuracy_score(y, chosen))
    losses = [metrics.log_loss(y[:, i], p[:, i]) for i in range(5)]
    np.testing.assert_allclose(value.loss, np.mean(losses), rtol=1e-9)
    wrong = value.mistakes()
    assert len(wrong) == (chosen != y).sum()
    assert wrong == sorted(wrong, key=lambda x: (-x.margin, x.label, x.path or ""))
    assert [x.label for x in value.mistakes("3")] == ["3"] * int((chosen != y)[:, 3].sum())
    assert sum(x.missing for x in wrong) == ((y == 1) & (chosen == 0)).sum()


def test_a_label_without_pictures_has_no_average_precision():
    logits, true = labelled(50)
    true[:, 2] = 0
    value = MultiLabelEvaluation.of(logits, true)
    assert value.scores[2].average_precision is None
    others = [x.average_precision for i, x in enumerate(value.scores) if i != 2]
    np.testing.assert_allclose(value.mean_average_precision, np.mean(others))
    assert average_precision(np.ones(3, bool), np.zeros(3)) == 1
    assert best_threshold(np.zeros(3, bool), np.array([0.1, 0.2, 0.3])) == 0.5
    with pytest.raises(ValueError, match="NaN or infinity for 1 of 50"):
        MultiLabelEvaluation.of(np.where(np.arange(50)[:, None] == 3, np.nan, logits), true)
    with pytest.raises(ValueError, match=r"shape \(50, 4\)"):
        MultiLabelEvaluation.of(logits, true[:, :4])


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_have_the_largest_f1_of_all(seed):
    logits, true = labelled(60, seed)
    for y, p in zip(true.T.astype(bool), expit(logits).T):
        if not y.any():
            continue
        found = best_threshold(y, p)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            every = [metrics.f1_score(y, p >= t) for t in p]  # between them nothing changes
        assert metrics.f1_score(y, p >= found) >= max(every) - 1e-12
        assert 0 < found < 1 and found not in p


def test_numbers_of_a_regression_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(80, 2)) * (3, 100) + (5, 2000)
    predicted = true + rng.normal(size=(80, 2)) * (1, 50)
    value = RegressionEvaluation.of(
        predicted, true, std=(3, 100), half_widths=(1.5, 80.0), level=0.9
    )
    for i, scores in enumerate(value.scores):
        y, p = true[:, i], predicted[:, i]
        np.testing.assert_allclose(scores.mae, metrics.mean_absolute_error(y, p))
        np.testing.assert_allclose(scores.rmse, metrics.root_mean_squared_error(y, p))
        np.testing.assert_allclose(scores.r2, metrics.r2_score(y, p))
        assert scores.coverage == np.mean(np.abs(y - p) <= (1.5, 80.0)[i])
    relative = (predicted - true) / (3, 100)
    np.testing.assert_allclose(value.loss, (relative**2).mean())
    order = [x.error for x in value.worst()]
    np.testing.assert_allclose(order, np.sort(np.sqrt((relative**2).mean(1)))[::-1])
    constant = RegressionEvaluation.of(np.zeros((3, 1)), np.ones((3, 1))).scores[0]
    assert constant.r2 is None and constant.coverage is None


def test_several_labels_that_are_the_same_for_all_pictures_are_reported():
    logits, true = labelled()
    names = ("a", "b", "c", "d", "e")
    views = MultiLabel(names).views
    assert views.advice(MultiLabelEvaluation.of(logits, true, names)) is None
    logits[:] = (9, -9, 9, -9, -9)
    found = views.advice(MultiLabelEvaluation.of(logits, true, names))
    assert found.startswith("all pictures are given a, c.")
    found = views.advice(MultiLabelEvaluation.of(np.full_like(logits, -9.0), true, names))
    assert found.startswith("all pictures are given no label.")
    # Which is right if all have the same ones.
    assert views.advice(MultiLabelEvaluation.of(logits, logits > 0, names)) is None


def test_numbers_that_are_the_same_for_all_pictures_are_reported():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(50, 2)) * (3, 100)
    predicted = true + rng.normal(size=(50, 2)) * (1, 40)
    views = Regression(("width", "depth")).views

    def advice():
        return views.advice(RegressionEvaluation.of(predicted, true, ("width", "depth")))

    assert advice() is None
    predicted[:, 1] = 7 + 1e-3 * rng.normal(size=50)
    assert advice().startswith("all predictions of depth are the same.")
    true[:, 1] = 7  # which is right if the targets are
    assert advice() is None


def test_intervals_contain_new_numbers_as_often_as_they_promise():
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(400):
        width = half_width(rng.standard_t(3, 50), 0.9)
        inside.append(np.abs(rng.standard_t(3, 200)) <= width)
    # Exactly ceil(51 * 0.9) / 51 = 0.902 on average; 400 means of coverages with a standard
    # deviation of about 0.04 have a standard error of 0.002.
    assert abs(np.mean(inside) - 46 / 51) < 0.01
    assert half_width(np.arange(8.0), 0.9) is None and half_width(np.arange(9.0), 0.9) == 8


def test_intervals_have_the_level_of_the_task():
    task = Regression(("a",), mean=(5.0,), std=(2.0,), level=0.5)
    outputs = np.zeros((9, 1))
    found = task.with_validation(outputs, 5.0 + np.arange(1.0, 10)[:, None])
    assert found.half_widths == (5.0,)  # of the errors 1 to 9, the (9 + 1) / 2 = 5th
    again = Regression.of_record(found.record())
    assert again == found and again.evaluate(outputs, outputs).level == 0.5
    assert again.views.answer("x", np.array([3.0]), None, None)["intervals"] == {"a": [-2, 8]}
