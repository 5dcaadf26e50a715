"""Pictures without TensorFlow: random numbers, resizing, augmentation and batches."""

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.picture_folders import break_picture, photograph, write_digits
from tfimm_lora.finetuning.data import augmentation as augmentation_module
from tfimm_lora.finetuning.data import batches as batches_module
from tfimm_lora.finetuning.data.augmentation import Augmentation
from tfimm_lora.finetuning.data.batches import PictureBatches
from tfimm_lora.finetuning.data.dataset import find_pictures
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.data.random_numbers import fold_in, shuffled, uniform
from tfimm_lora.finetuning.data.share import Share
from tfimm_lora.finetuning.distributed.jax_devices import JaxDevices
from tfimm_lora.finetuning.distributed.padding import padded
from tfimm_lora.zoo.weights import preprocessing as preprocessing_module
from tfimm_lora.zoo.weights.resizing import resized

# Only Keras 3 runs without TensorFlow.
pytestmark = pytest.mark.once

SEEDS = [(1, 2), (-7, 123456789012), (0, 0), (2**62, -5)]


@pytest.fixture
def without_tensorflow(monkeypatch):
    """A function that switches to the code that runs where TensorFlow is not installed."""

    def switch():
        for module in (augmentation_module, batches_module, preprocessing_module):
            monkeypatch.setattr(module, "installed", lambda package: package != "tensorflow")

    return switch


@pytest.mark.parametrize("seed", SEEDS)
def test_random_numbers_are_those_of_tensorflow(seed):
    tensor = tf.constant(seed, tf.int64)
    for n in (1, 9, 10):
        expected = tf.random.stateless_uniform((n,), tensor, alg="philox")
        np.testing.assert_array_equal(uniform(seed, n), expected)
    for number in (0, 3, -4, 10**12):
        expected = tf.random.fold_in(tensor, tf.constant(number, tf.int64), alg="philox")
        assert fold_in(seed, number) == tuple(expected.numpy().tolist())
    for number in (0, 3, -4):
        expected = tf.random.fold_in(tensor, number, alg="philox")
        assert fold_in(seed, number, bits=32) == tuple(expected.numpy().tolist())
    for n in (0, 1, 2, 5, 1001):
        numbers = tf.range(n, dtype=tf.int64)
        expected = tf.random.experimental.stateless_shuffle(numbers, tensor, alg="philox")
        np.testing.assert_array_equal(shuffled(seed, n), expected)


@pytest.mark.parametrize("method", ["bilinear", "bicubic", "lanczos3", "nearest", "area"])
@pytest.mark.parametrize("size", [(16, 24), (90, 70), (40, 10)])
def test_resizing_is_that_of_tensorflow(method, size):
    if method == "area" and size != (16, 24):
        pytest.skip("enlarging by area is repeating, whose borders both define differently")
    picture = photograph(48, 72)
    expected = tf.image.resize(picture, size, method, antialias=True).numpy()
    np.testing.assert_allclose(resized(picture, size, method), expected, atol=2e-3)
    both = resized(np.stack([picture, picture[::-1]]), size, method)
    np.testing.assert_allclose(both[0], expected, atol=2e-3)


def test_resizing_names_an_interpolation_that_needs_tensorflow():
    with pytest.raises(ValueError, match="'gaussian' without TensorFlow.*pip install"):
        resized(photograph(), (8, 8), "gaussian")


AUGMENTATIONS = {
    "none": Augmentation(),
    "strong": Augmentation.named("strong"),
    "light": Augmentation.named("light"),
    "turned": Augmentation(scale=(0.5, 1.0), rotate=40, flip=True),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("channels", [3, 1])
def test_augmentation_is_that_of_tensorflow(name, channels, without_tensorflow):
    picture = photograph(50, 34)[..., :channels]
    made = AUGMENTATIONS[name]
    expected = [made.function((20, 28))(picture, [i, 3]).numpy() for i in range(20)]
    without_tensorflow()
    found = [made.function((20, 28))(picture, np.array([i, 3])) for i in range(20)]
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in found)
    np.testing.assert_allclose(found, expected, atol=0.02)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("sides", [(30, 41), (41, 30), (7, 5)])
def test_preprocessing_is_that_of_tensorflow(sides, dtype, without_tensorflow):
    prepare = Preprocessing((12, 10), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), channel_order="bgr")
    picture = photograph(*sides)

    def made(images):
        return preprocessing_module.create_preprocessing(prepare, dtype=dtype, resize=True)(
            images
        )

    expected = np.asarray(made(picture), np.float32)
    several = np.asarray(prepare.function(resize=True)(picture[None]))
    without_tensorflow()
    found = made(picture)
    assert found.dtype.name == dtype and found.shape == (12, 10, 3)
    atol = 1e-4 if dtype == "float32" else 0.05
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=atol)
    np.testing.assert_allclose(prepare.function(resize=True)(picture[None]), several, atol=1e-4)


@pytest.fixture
def digits(tmp_path):
    return find_pictures(write_digits(tmp_path / "digits", size=(23, 17))).train


def collected(batches):
    xs, ys = zip(*((np.asarray(x), np.asarray(y)) for x, y in batches))
    return np.concatenate(xs), np.concatenate(ys), [len(y) for y in ys]


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_are_those_of_tensorflow(digits, shuffle, without_tensorflow):
    prepare = Preprocessing((8, 8), (0.4,) * 3, (0.2,) * 3)
    options = {"augmentation": Augmentation.named("strong"), "seed": 5, "shuffle": shuffle}
    made = PictureBatches(digits, prepare, 4, **options)
    expected = [collected(made.epoch(2)), collected(made.in_order())]
    several = collected(made.epochs(2).take(2 * made.steps_per_epoch))
    without_tensorflow()
    made = PictureBatches(digits, prepare, 4, **options)
    epoch, in_order, stream = made.epoch(2), made.in_order(), made.epochs(2)
    assert len(epoch) == len(in_order) == made.steps_per_epoch
    found = [collected(epoch), collected(in_order)]
    parts = [next(stream) for _ in range(2 * made.steps_per_epoch)]
    for (x, y, sizes), wanted in zip([*found, collected(parts)], [*expected, several]):
        np.testing.assert_allclose(x, wanted[0], atol=1e-3)
        np.testing.assert_array_equal(y, wanted[1])
        assert sizes == wanted[2] and x.dtype == np.float32 and y.dtype == np.int32
    again = collected(epoch)  # a dataset can be read several times, from any batch
    np.testing.assert_array_equal(again[0], found[0][0])
    np.testing.assert_array_equal(epoch[1][0], found[0][0][4:8])


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("multiple", [4, 8])
def test_shares_of_the_processes_are_the_batches_of_one(
    digits, multiple, installed, without_tensorflow
):
    if not installed:
        without_tensorflow()
    prepare = Preprocessing((8, 8), (0.4,) * 3, (0.2,) * 3)
    made = PictureBatches(digits, prepare, 8, seed=5)
    assert len(digits) % 4  # the last batch is filled up
    shares = [made.with_share(Share(4, first=i, count=2, multiple=multiple)) for i in (0, 2)]
    for whole, *parts in zip(made.epoch(1), *(share.epoch(1) for share in shares)):
        x, y = map(np.asarray, whole)
        own_x, own_y, weights = (np.concatenate(arrays) for arrays in zip(*parts))
        size = -(-len(y) // multiple) * multiple
        filled = np.arange(size) % len(y)
        np.testing.assert_array_equal(own_x, x[filled])
        np.testing.assert_array_equal(own_y, y[filled])
        np.testing.assert_array_equal(weights > 0, np.arange(size) < len(y))
        np.testing.assert_allclose(weights[: len(y)], size / len(y), rtol=1e-6)
        assert [len(part[1]) for part in parts] == [len(filled) // 2] * 2


def test_a_picture_that_became_unreadable_is_named(digits, without_tensorflow):
    without_tensorflow()
    made = PictureBatches(digits, Preprocessing((8, 8), (0.4,) * 3, (0.2,) * 3), 4)
    break_picture(digits.pictures[0].path)
    with pytest.raises(ValueError, match=digits.pictures[0].path):
        collected(made.in_order())


@pytest.mark.parametrize("class_weight", [None, {0: 2.0, 2: 0.5}])
def test_padding_is_that_of_tensorflow(class_weight):
    x, y = np.arange(14, dtype="float32").reshape(7, 2), np.arange(7, dtype="int32") % 3
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    size = JaxDevices._padded_size

    class Two:
        replicas = 2

    def to_even(number, n, where):
        return size(Two, number, n, where)

    expected = list(padded(dataset, to_even, class_weight).as_numpy_iterator())
    stream = ((x[i : i + 4], y[i : i + 4]) for i in (0, 4))
    found = list(padded(stream, to_even, class_weight))
    assert len(found) == len(expected) == 2 and len(found[1][0]) == 4
    for one, other in zip(found, expected):
        for array, wanted in zip(one, other):
            np.testing.assert_array_equal(array, wanted)
            assert array.dtype == wanted.dtype
