"""The loss and metrics of a segmentation on every Keras, against NumPy and scikit-learn."""

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score

from tests.finetuning.tasks.test_losses import loss_of, tensor
from tests.helpers.kerases import array, normal
from tfimm_lora.backend import default_backend
from tfimm_lora.finetuning.data.mask_classes import MaskClasses
from tfimm_lora.finetuning.segmentation_metrics import KEPT, SegmentationCollector
from tfimm_lora.finetuning.tasks.named import task_of_record
from tfimm_lora.finetuning.tasks.segmentation import Segmentation
from tfimm_lora.model.task_record import TaskRecord

pytestmark = pytest.mark.backends

TASK = Segmentation(("a", "b", "c", "never"))


def example(n=3, side=6, seed=0):
    """Logits of four classes, and masks of the first three with ignored pixels."""
    logits = 3 * normal(n, side, side, 4, seed=seed)
    logits[..., 3] = -9  # never predicted
    masks = np.random.default_rng(seed).integers(-1, 3, (n, side, side)).astype("int32")
    return logits, masks


@pytest.mark.parametrize("weights", [None, {0: 0.5, 2: 4.0}])
def test_the_loss_leaves_ignored_pixels_out(weights):
    logits, masks = example()
    masks[2] = -1  # nothing is known of the last picture
    log_p = log_softmax(logits.astype("float64"), axis=-1)
    expected = []
    for p, mask in zip(log_p, masks):
        terms = [
            -(weights or {}).get(label, 1.0) * p[y, x, label]
            for (y, x), label in np.ndenumerate(mask)
            if label >= 0
        ]
        expected.append(np.mean(terms) if terms else 0.0)
    found = loss_of(TASK, masks, logits, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[2] == 0


def test_shapes_that_do_not_fit_are_refused():
    logits, masks = example()
    bad = ((masks[:, :5], logits), (masks, logits[..., :3]), (masks[0], logits))
    for labels, outputs in bad:
        with pytest.raises(ValueError, match="expected masks"):
            loss_of(TASK, labels, outputs)


def test_the_mean_iou_in_training_is_that_of_scikit_learn():
    (metric,) = TASK.metrics(default_backend())
    known, predicted = [], []
    for seed in (0, 1):
        logits, masks = example(seed=seed)
        metric.update_state(tensor(masks), tensor(logits))
        known.append(masks[masks >= 0])
        predicted.append(logits.argmax(-1)[masks >= 0])
    true, guess = np.concatenate(known), np.concatenate(predicted)
    expected = jaccard_score(true, guess, average="macro")
    np.testing.assert_allclose(array(metric.result()), expected, rtol=1e-5)
    assert metric.name == "mean_iou"


@pytest.mark.once
def test_metrics_are_those_of_scikit_learn_over_all_batches():
    collector, known, predicted, losses = SegmentationCollector(TASK.labels), [], [], []
    for seed in (0, 1):
        logits, masks = example(seed=seed)
        collector.add(logits, masks)
        known.append(masks[masks >= 0])
        predicted.append(logits.argmax(-1)[masks >= 0])
        losses += loss_of(TASK, masks, logits).tolist()
    value = collector.evaluation([f"{i}.png" for i in range(6)])
    true, guess = np.concatenate(known), np.concatenate(predicted)
    expected = confusion_matrix(true, guess, labels=range(4))
    np.testing.assert_array_equal(value.confusion, expected)
    np.testing.assert_allclose(value.accuracy, accuracy_score(true, guess))
    np.testing.assert_allclose(value.mean_iou, jaccard_score(true, guess, average="macro"))
    np.testing.assert_allclose(value.mean_dice, f1_score(true, guess, average="macro"))
    np.testing.assert_allclose(value.loss, np.mean(losses), rtol=1e-5)
    ious = jaccard_score(true, guess, average=None)
    np.testing.assert_allclose([x.iou for x in value.classes[:3]], ious)
    assert value.classes[3].iou is None and value.classes[3].pixels == 0
    whole = TASK.evaluate(*map(np.concatenate, zip(example(seed=0), example(seed=1))))
    np.testing.assert_array_equal(whole.confusion, expected)
    assert [x.path for x in value.predictions] == [f"{i}.png" for i in range(6)]


@pytest.mark.once
def test_one_class_for_all_pixels_is_reported():
    logits, masks = example()
    views = TASK.views
    assert views.advice(TASK.evaluate(logits, masks)) is None
    logits[..., 1] = 99
    found = views.advice(TASK.evaluate(logits, masks))
    assert found.startswith("all pixels are classified as b.")
    # Which is right if there is nothing else.
    assert views.advice(TASK.evaluate(logits, np.minimum(masks, 0) + (masks >= 0))) is None


@pytest.mark.once
def test_only_the_masks_of_the_worst_pictures_are_kept():
    collector = SegmentationCollector()
    logits, masks = example(n=KEPT + 9)
    collector.add(logits[:10], masks[:10])
    collector.add(logits[10:], masks[10:])
    value = collector.evaluation()
    kept = [x for x in value.predictions if x.predicted is not None]
    assert len(kept) == KEPT and set(map(id, kept)) == set(map(id, value.worst(KEPT)))
    index = value.predictions.index(kept[0])
    np.testing.assert_array_equal(kept[0].predicted, logits[index].argmax(-1))
    np.testing.assert_array_equal(kept[0].true, masks[index])


@pytest.mark.once
def test_bad_outputs_and_masks_are_refused():
    logits, masks = example()
    for labels, outputs, message in (
        (masks + 9, logits, "expected 0 to 3"),
        (masks, np.full_like(logits, np.nan), "NaN"),
        (masks[:, :2], logits, "expected integers of shape"),
        (masks, logits[..., :3], "4 labels for a model with 3"),
    ):
        with pytest.raises(ValueError, match=message):
            TASK.evaluate(outputs, labels)
    with pytest.raises(ValueError, match="no pixels with a class"):
        TASK.evaluate(logits, np.full_like(masks, -1))


@pytest.mark.once
def test_a_record_has_the_values_of_the_masks():
    classes = MaskClasses(("road", "car"), ("#000000", "#ff0000"), ("#ffffff",))
    task = Segmentation(classes.names, classes)
    values = task.record().to_dict()
    assert values["masks"] == {"values": ["#000000", "#ff0000"], "ignored": ["#ffffff"]}
    assert task_of_record(TaskRecord.from_dict(values)) == task
    with pytest.raises(ValueError, match="3 values of masks for 2 labels"):
        TaskRecord.from_dict({**values, "masks": {"values": [1, 2, 3], "ignored": []}})
