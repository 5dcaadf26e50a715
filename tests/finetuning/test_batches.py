"""Batches of pictures for training and evaluation, and what augmentation does to pictures."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.helpers.kerases import keras
from tests.helpers.picture_folders import break_picture, photograph, write_digits
from tfimm_lora.finetuning.data.augmentation import PRESETS, Augmentation
from tfimm_lora.finetuning.data.batches import PictureBatches
from tfimm_lora.finetuning.data.dataset import Picture, PictureSet, find_pictures
from tfimm_lora.finetuning.data.preprocessing import Preprocessing

pytestmark = pytest.mark.once

#: Leaves pixels as they are but for a division by 255.
PLAIN = Preprocessing((8, 8), (0.0,) * 3, (1.0,) * 3, crop_pct=1.0)

STRONG = Augmentation.named("strong")


def numbered(folder, count, labels=3) -> PictureSet:
    """Pictures in one grey each, 10 times their number: what comes out says what went in."""
    pictures = []
    for i in range(count):
        path = Path(folder) / f"{i:03}.png"
        Image.new("RGB", (9 + i, 12), (10 * i,) * 3).save(path)
        pictures.append(Picture(str(path), i % labels))
    return PictureSet(tuple(pictures), tuple(map(str, range(labels))))


def collected(dataset):
    """Inputs, labels and sizes of the batches of a dataset."""
    xs, ys = zip(*dataset.as_numpy_iterator())
    return np.concatenate(xs), np.concatenate(ys), [len(y) for y in ys]


def order(dataset):
    """Which of the numbered pictures are in a dataset, in turn."""
    x, y, _ = collected(dataset)
    found = np.rint(x.mean((1, 2, 3)) * 25.5).astype(int)
    np.testing.assert_array_equal(y, found % 3)  # each with its own label
    return found.tolist()


@pytest.fixture
def digits(tmp_path):
    return find_pictures(write_digits(tmp_path / "digits", size=(23, 17))).train


# -- order ----------------------------------------------------------------------------------


def test_every_epoch_has_every_picture_once_in_an_order_of_its_own(tmp_path):
    batches = PictureBatches(numbered(tmp_path, 11), PLAIN, 4, seed=5)
    first, second = order(batches.epoch(0)), order(batches.epoch(1))
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second and list(range(11)) not in (first, second)
    assert order(PictureBatches(numbered(tmp_path, 11), PLAIN, 4, seed=6).epoch(0)) != first


def test_last_batch_of_an_epoch_is_smaller_not_left_out(tmp_path):
    batches = PictureBatches(numbered(tmp_path, 11), PLAIN, 4)
    assert batches.steps_per_epoch == 3
    for dataset in (batches.epoch(0), batches.in_order(), batches.epochs(0).take(3)):
        assert collected(dataset)[2] == [4, 4, 3]
    assert collected(batches.epochs(0).take(6))[2] == [4, 4, 3, 4, 4, 3]
    whole = PictureBatches(numbered(tmp_path, 8), PLAIN, 4)
    assert collected(whole.epochs(0).take(4))[2] == [4, 4, 4, 4]
    assert collected(PictureBatches(numbered(tmp_path, 3), PLAIN, 100).epoch(0))[2] == [3]


def test_endless_epochs_are_the_single_ones_in_turn_from_any_on(tmp_path):
    batches = PictureBatches(numbered(tmp_path, 7), PLAIN, 3, augmentation=STRONG)
    x, y, _ = collected(batches.epochs(2).take(6))
    for i, number in enumerate((2, 3)):
        single_x, single_y, _ = collected(batches.epoch(number))
        np.testing.assert_array_equal(x[7 * i : 7 * i + 7], single_x)
        np.testing.assert_array_equal(y[7 * i : 7 * i + 7], single_y)


def test_without_shuffling_epochs_are_in_the_order_of_the_set(tmp_path):
    batches = PictureBatches(numbered(tmp_path, 7), PLAIN, 3, shuffle=False)
    assert order(batches.epoch(0)) == order(batches.epoch(9)) == list(range(7))
    assert order(PictureBatches(numbered(tmp_path, 7), PLAIN, 3).in_order()) == list(range(7))


def test_orders_are_evenly_distributed(tmp_path):
    batches = PictureBatches(numbered(tmp_path, 3), PLAIN, 3)
    found = order(batches.epochs(0).take(180))
    kinds = [tuple(found[i : i + 3]) for i in range(0, len(found), 3)]
    # Six orders, 30 times each, give or take five standard deviations.
    assert all(5 <= kinds.count(kind) <= 55 for kind in set(kinds)) and len(set(kinds)) == 6


def test_datasets_say_how_long_they_are_and_what_is_in_them(digits):
    batches = PictureBatches(digits, PLAIN, 4)
    assert int(batches.epoch(1).cardinality()) == 4 == batches.steps_per_epoch
    assert int(batches.in_order().cardinality()) == 4
    assert int(batches.epochs(1).cardinality()) == tf.data.INFINITE_CARDINALITY
    for dataset in (batches.epoch(0), batches.epochs(0), batches.in_order()):
        x, y = dataset.element_spec
        assert (x.shape.as_list(), x.dtype) == ([None, 8, 8, 3], tf.float32)
        assert (y.shape.as_list(), y.dtype) == ([None], tf.int32)
        policy = dataset.options().experimental_distribute.auto_shard_policy
        assert policy == tf.data.experimental.AutoShardPolicy.DATA


# -- the same again -------------------------------------------------------------------------


def test_new_objects_give_the_same_bytes_for_an_epoch_and_other_epochs_differ(digits):
    def epoch(number, seed=1):
        made = PictureBatches(digits, PLAIN, 4, augmentation=STRONG, seed=seed)
        return collected(made.epoch(number))[0].tobytes()

    assert epoch(3) == epoch(3)
    assert len({epoch(3), epoch(2), epoch(3, seed=2)}) == 3


def test_augmentation_of_a_picture_depends_on_seed_epoch_and_number_only(digits):
    def made(**options):
        return PictureBatches(digits, PLAIN, augmentation=STRONG, seed=1, **options)

    x = collected(made(batch_size=4, shuffle=False).epoch(3))[0]
    np.testing.assert_array_equal(collected(made(batch_size=7, shuffle=False).epoch(3))[0], x)
    mixed = collected(made(batch_size=5).epoch(3))[0]
    assert sorted(p.tobytes() for p in mixed) == sorted(p.tobytes() for p in x)
    fewer = PictureSet(digits.pictures[:6], digits.labels)
    start = PictureBatches(fewer, PLAIN, 4, augmentation=STRONG, seed=1, shuffle=False)
    np.testing.assert_array_equal(collected(start.epoch(3))[0], x[:6])


PROGRAM = """
import hashlib, sys
import tensorflow as tf
if sys.argv[2] == "deterministic":
    tf.keras.utils.set_random_seed(7)
    tf.config.experimental.enable_op_determinism()
import tfimm_lora
from tests.finetuning.test_batches import PLAIN, STRONG, PictureBatches, collected
from tests.finetuning.test_batches import find_pictures
train = find_pictures(sys.argv[1]).train
batches = PictureBatches(train, PLAIN, 4, augmentation=STRONG, seed=1)
x, y, _ = collected(batches.epochs(3).take(batches.steps_per_epoch))
print(hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest())
"""


@pytest.mark.long
@pytest.mark.parametrize("how", ["plain", "deterministic"])
def test_a_process_that_starts_with_an_epoch_gives_the_same_bytes(tmp_path, how):
    folder = write_digits(tmp_path, size=(23, 17))
    made = PictureBatches(find_pictures(folder).train, PLAIN, 4, augmentation=STRONG, seed=1)
    x, y, _ = collected(made.epoch(3))
    printed = in_new_process(PROGRAM, str(folder), how)
    assert printed == hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()


def in_new_process(program, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


DISTRIBUTED = """
import sys
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from tests.finetuning.test_batches import PLAIN, STRONG, PictureBatches, numbered
batches = PictureBatches(numbered(sys.argv[1], 11), PLAIN, 4, augmentation=STRONG)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
distributed = iter(strategy.experimental_distribute_dataset(batches.epochs(2)))
sizes = []
for x, y in batches.epochs(2).take(6):
    parts = next(distributed)
    xs, ys = (strategy.experimental_local_results(part) for part in parts)
    np.testing.assert_array_equal(np.concatenate(xs), x)
    np.testing.assert_array_equal(np.concatenate(ys), y)
    sizes.append([len(part) for part in ys])
print(sizes)
# Python hangs at its end if an iterator is left that still calls Python to read pictures.
del distributed
"""


@pytest.mark.long
def test_two_devices_share_each_batch_of_one(tmp_path):
    sizes = in_new_process(DISTRIBUTED, str(tmp_path))
    assert sizes == str([[2, 2], [2, 2], [2, 1]] * 2)


# -- values ---------------------------------------------------------------------------------


def test_evaluation_resizes_and_crops_as_timm_does(tmp_path):
    """Against Pillow: shorter side to input_size / crop_pct, middle, (x / 255 - mean) / std."""
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.25])
    sizes = [(40, 56), (61, 40), (33, 33), (20, 31)]
    pictures, expected = [], []
    for i, (height, width) in enumerate(sizes):
        image = Image.fromarray(photograph(height, width, seed=i))
        image.save(tmp_path / f"{i}.png")
        pictures.append(Picture(str(tmp_path / f"{i}.png"), 0))
        short = int(24 / 0.8)
        factor = short / min(height, width)
        size = [
            short if side == min(height, width) else int(side * factor)
            for side in (width, height)
        ]
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = round((size[0] - 24) / 2), round((size[1] - 24) / 2)
        array = np.asarray(image.crop((left, top, left + 24, top + 24))) / 255
        expected.append((array - mean) / std)
    made = PictureSet(tuple(pictures), ("a",))
    pre = Preprocessing((24, 24), tuple(mean), tuple(std), crop_pct=0.8)
    x = collected(PictureBatches(made, pre, 3).in_order())[0]
    # Pillow rounds to whole values after rows and after columns, whose kernel enlarges errors.
    assert np.abs(x - np.stack(expected)).max() < 1.2 / 255 / 0.2


def test_no_augmentation_is_exactly_that_of_evaluation(digits):
    pre = Preprocessing((12, 12), (0.5,) * 3, (0.5,) * 3)
    expected = collected(PictureBatches(digits, pre, 4).in_order())[0]
    for none in (None, Augmentation.none(), Augmentation.named("none")):
        made = PictureBatches(digits, pre, 4, augmentation=none, shuffle=False)
        np.testing.assert_array_equal(collected(made.epoch(2))[0], expected)


def test_without_random_crops_the_middle_is_nearly_that_of_evaluation(tmp_path):
    Image.fromarray(photograph(60, 88)).save(tmp_path / "x.png")
    made = PictureSet((Picture(str(tmp_path / "x.png"), 0),), ("a",))
    pre = Preprocessing((24, 24), (0.0,) * 3, (1.0,) * 3, crop_pct=0.8)
    hardly = Augmentation(brightness=1e-6)
    batches = PictureBatches(made, pre, 4, augmentation=hardly)
    difference = collected(batches.epoch(0))[0] - collected(batches.in_order())[0]
    assert 0 < np.abs(difference).mean() < 0.01


def test_grey_models_get_one_channel_and_bgr_models_theirs(tmp_path):
    Image.new("RGB", (20, 20), (250, 100, 0)).save(tmp_path / "x.png")
    made = PictureSet((Picture(str(tmp_path / "x.png"), 0),), ("a",))
    bgr = Preprocessing((8, 8), (0.0,) * 3, (1 / 255,) * 3, channel_order="bgr")
    grey = Preprocessing((8, 8), (0.0,), (1 / 255,), in_channels=1)
    light = Augmentation.named("light")
    for augmentation in (None, light):
        x = collected(PictureBatches(made, bgr, 1, augmentation=augmentation).epoch(0))[0]
        np.testing.assert_allclose(x[0, 0, 0], [0, 100, 250], atol=1e-3)
        x = collected(PictureBatches(made, grey, 1, augmentation=augmentation).epoch(0))[0]
        assert x.shape == (1, 8, 8, 1)
        np.testing.assert_allclose(x, 0.299 * 250 + 0.587 * 100, atol=0.51)


@pytest.mark.parametrize("name", PRESETS)
def test_pictures_of_every_size_come_out_in_the_input_size(tmp_path, name):
    sizes = [(2, 2), (300, 7), (3, 400), (8, 8), (15, 16), (1000, 900), (9, 11)]
    pictures = []
    for i, (width, height) in enumerate(sizes):
        path = tmp_path / f"{i}.{'jpg' if i % 2 else 'png'}"
        Image.fromarray(photograph(height, width, seed=i)).save(path)
        pictures.append(Picture(str(path), 0))
    made = PictureSet(tuple(pictures), ("a",))
    pre = Preprocessing((15, 11), (0.0,) * 3, (1.0,) * 3)
    batches = PictureBatches(made, pre, 3, augmentation=PRESETS[name])
    x = collected(batches.epochs(0).take(9))[0]
    assert x.shape == (21, 15, 11, 3) and x.min() >= 0 and x.max() <= 1
    assert (x.std((1, 2, 3)) > 0).all()  # all have contents


def test_large_jpegs_are_read_smaller_without_showing(tmp_path):
    pixels = photograph(640, 800)
    Image.fromarray(pixels).save(tmp_path / "x.jpg", quality=95)
    Image.fromarray(pixels).save(tmp_path / "x.png")

    def epoch(name):
        made = PictureSet((Picture(str(tmp_path / name), 0),), ("a",))
        return collected(PictureBatches(made, PLAIN, 1, augmentation=STRONG).epoch(0))[0]

    assert np.abs(epoch("x.jpg") - epoch("x.png")).max() < 0.06


# -- failures -------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["epoch", "epochs", "in_order"])
def test_a_picture_that_breaks_after_the_check_is_named(digits, dataset):
    batches = PictureBatches(digits, PLAIN, 4)
    made = batches.in_order() if dataset == "in_order" else getattr(batches, dataset)(0)
    broken = digits.pictures[7].path
    break_picture(broken, "text")
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        for _ in made:
            pass
    assert f"Cannot read the picture {broken}" in str(caught.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"batch_size": 0}, "batch_size=0; expected at least 1"),
        ({"picture_set": PictureSet((), ("a",))}, "empty picture_set"),
        (
            {"preprocessing": Preprocessing((8, 8), (0.0,), (1.0,), in_channels=4)},
            "in_channels=4; expected 3",
        ),
    ],
)
def test_what_cannot_be_batched_is_refused(digits, change, words):
    given = {"picture_set": digits, "preprocessing": PLAIN, "batch_size": 4, **change}
    with pytest.raises(ValueError, match=words):
        PictureBatches(**given)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"scale": (0.5, 1.2)}, r"scale=\(0.5, 1.2\).*at most 1"),
        ({"scale": (0.0, 1.0)}, "above 0"),
        ({"ratio": (2.0, 1.0)}, "ratio="),
        ({"rotate": -1}, "rotate=-1.* to 180"),
        ({"brightness": 1.5}, "brightness=1.5.* to 1"),
    ],
)
def test_augmentation_out_of_bounds_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        Augmentation(**given)


def test_unknown_preset_lists_those_there_are():
    with pytest.raises(ValueError, match="'heavy'; expected one of none, light, strong"):
        Augmentation.named("heavy")


# -- augmentation ---------------------------------------------------------------------------


def many(augmentation, picture, size, count=150):
    """Results for many seeds."""
    function = augmentation.function(size, interpolation="bilinear")
    seeds = tf.stack([tf.range(count), tf.zeros(count, tf.int32) + 3], 1)
    found = tf.data.Dataset.from_tensor_slices(seeds).map(lambda s: function(picture, s))
    return np.stack(list(found.as_numpy_iterator()))


def coordinates(height, width):
    """A picture whose first two channels say where a pixel is, as a share of 255."""
    y, x = np.mgrid[:height, :width]
    shares = [(y + 0.5) / height, (x + 0.5) / width, np.zeros_like(x)]
    return (np.stack(shares, -1) * 255).astype("float32")


@pytest.mark.parametrize("sides", [(200, 200), (120, 300), (400, 90)])
@pytest.mark.parametrize("size", [(16, 16), (12, 24)])
def test_random_crops_keep_to_their_scale_and_ratio_and_reach_every_corner(sides, size):
    height, width = sides
    found = many(Augmentation(scale=(0.2, 0.6)), coordinates(*sides), size) / 255
    # From the third pixel to the third last there are n - 5 steps of n.
    rows = (found[:, -3, 0, 0] - found[:, 2, 0, 0]) * height * size[0] / (size[0] - 5)
    columns = (found[:, 0, -3, 1] - found[:, 0, 2, 1]) * width * size[1] / (size[1] - 5)
    share, ratio = rows * columns / (height * width), columns / rows / (size[1] / size[0])
    assert share.max() < 0.6 * 1.03
    # An area that does not fit with any ratio is as large as can be.
    most = min(
        size[1] / size[0] * 4 / 3 * height / width,
        width / height / (size[1] / size[0] * 3 / 4),
        1,
    )
    assert share.min() > min(0.2, most) * 0.97
    assert ratio.min() > 0.75 * 0.97 and ratio.max() < 4 / 3 * 1.03
    assert share.max() - share.min() > 0.3 * min(most, 1) or most < 0.6
    assert (
        found[..., :2].min((0, 1, 2)).max() < 0.1 and found[..., :2].max((0, 1, 2)).min() > 0.9
    )


def test_a_crop_of_everything_is_the_resized_picture():
    picture = photograph(40, 40)
    found = many(Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0)), picture, (20, 20), 3)
    expected = np.asarray(Image.fromarray(picture).resize((20, 20), Image.Resampling.BILINEAR))
    assert np.abs(found - expected).max() < 1.01 and (found == found[0]).all()


def test_half_of_the_pictures_are_mirrored_and_nothing_else():
    picture = photograph(16, 16).astype("float32")
    found = many(Augmentation(flip=True), picture, (16, 16))
    same = (np.abs(found - picture) < 1e-3).all((1, 2, 3))
    mirrored = (np.abs(found - picture[:, ::-1]) < 1e-3).all((1, 2, 3))
    assert (same ^ mirrored).all() and 45 < mirrored.sum() < 105


GREY = np.array([0.299, 0.587, 0.114])


def test_brightness_multiplies_by_a_factor_in_bounds():
    picture = (photograph(16, 16) / 2).astype("float32")
    found = many(Augmentation(brightness=0.4), picture, (16, 16))
    factors = found.sum((1, 2, 3)) / picture.sum()
    np.testing.assert_allclose(found, factors[:, None, None, None] * picture, atol=1e-2)
    assert 0.6 <= factors.min() < 0.65 and 1.35 < factors.max() <= 1.4


def test_contrast_moves_from_and_to_the_mean_grey():
    picture = (photograph(16, 16) / 4 + 90).astype("float32")
    found = many(Augmentation(contrast=0.4), picture, (16, 16))
    mean = (picture @ GREY).mean()
    factors = (found - mean).std((1, 2, 3)) / (picture - mean).std()
    expected = mean + factors[:, None, None, None] * (picture - mean)
    np.testing.assert_allclose(found, expected, atol=1e-2)
    assert 0.6 <= factors.min() < 0.65 and 1.35 < factors.max() <= 1.4


def test_saturation_moves_from_and_to_grey():
    picture = (photograph(16, 16) / 4 + 90).astype("float32")
    found = many(Augmentation(saturation=0.4), picture, (16, 16))
    grey = (picture @ GREY)[..., None]
    factors = (found - grey).std((1, 2, 3)) / (picture - grey).std()
    expected = grey + factors[:, None, None, None] * (picture - grey)
    np.testing.assert_allclose(found, expected, atol=1e-2)
    assert 0.6 <= factors.min() < 0.65 and 1.35 < factors.max() <= 1.4


def test_colours_stay_in_bounds_and_are_drawn_apart():
    every = Augmentation(brightness=1.0, contrast=1.0, saturation=1.0)
    found = many(every, photograph(16, 16), (16, 16))
    assert found.dtype == np.float32 and found.min() >= 0 and found.max() <= 255
    assert len({p.tobytes() for p in found}) == len(found)
    grey = many(every, photograph(16, 16)[..., :1], (16, 16), 5)
    assert grey.shape == (5, 16, 16, 1) and np.isfinite(grey).all()


def test_turning_is_that_of_pillow_within_bounds():
    # The middles of all pixels as a picture: what comes out says where each was taken from.
    picture = coordinates(41, 41)
    found = many(Augmentation(rotate=20), picture, (41, 41))
    step = picture[0, 1, 1] - picture[0, 0, 1]
    across = (found[:, 20, 25] - found[:, 20, 15]) / (10 * step)
    angles = np.degrees(np.arctan2(across[:, 0], across[:, 1]))
    assert -20 <= angles.min() < -18 and 18 < angles.max() <= 20
    for turned, angle in zip(found[:5], angles):
        for channel in range(2):
            image = Image.fromarray(picture[..., channel])
            expected = np.asarray(image.rotate(angle, Image.Resampling.BILINEAR))
            inside = slice(10, 31)  # where no corner reaches
            np.testing.assert_allclose(
                turned[inside, inside, channel], expected[inside, inside], atol=0.05
            )
    full = many(Augmentation(rotate=20), np.full((9, 9, 3), 77.0, "float32"), (9, 9), 5)
    np.testing.assert_allclose(full, 77.0, rtol=1e-5)  # no black corners


def test_no_random_crop_is_enlarged_from_a_picture_that_is_large_enough():
    for size in ((16, 16), (12, 20)):
        for scale in ((0.1, 1.0), (0.5, 0.5)):
            augmentation = Augmentation(scale=scale)
            short = augmentation.enough(size)
            assert 1 < short / max(size) < 5
            for sides in ((short, short), (short, 3 * short), (3 * short, short)):
                found = many(augmentation, coordinates(*sides), size, 60) / 255
                step = np.array(
                    [
                        found[:, 1, 0, 0] - found[:, 0, 0, 0],
                        found[:, 0, 1, 1] - found[:, 0, 0, 1],
                    ]
                )
                assert (step * np.array(sides)[:, None] > 0.93).all()  # pixels of the picture
    assert Augmentation(flip=True).enough((16, 16)) is None


# -- training -------------------------------------------------------------------------------


@pytest.mark.backends
def test_fit_trains_on_endless_epochs_and_resumes(tmp_path):
    split = find_pictures(write_digits(tmp_path, each=8))
    pre = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3, crop_pct=1.0)
    light = Augmentation(scale=(0.8, 1.0))
    train = PictureBatches(split.train, pre, 5, augmentation=light, seed=2)
    val = PictureBatches(split.val, pre, 4)

    def model():
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Flatten(), keras.layers.Dense(3)]
        made = keras.Sequential([keras.Input((8, 8, 3)), *layers])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        made.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])
        return made

    def fit(model, first, last):
        return model.fit(
            train.epochs(first),
            initial_epoch=first,
            epochs=last,
            steps_per_epoch=train.steps_per_epoch,
            validation_data=val.in_order(),
            shuffle=False,
            verbose=0,
        ).history

    whole, parts = model(), model()
    history = fit(whole, 0, 4)
    parts.fit(train.epoch(0), verbose=0)
    fit(parts, 1, 4)
    for a, b in zip(whole.get_weights(), parts.get_weights()):
        np.testing.assert_array_equal(a, b)
    assert history["loss"][-1] < history["loss"][0] and history["val_accuracy"][-1] > 0.6


#: What a thread of TensorFlow does, and what was done before Python ended.
READS_ON = """
import atexit, threading, time
done = []
atexit.register(lambda: print(*done))  # the first handler runs last
from tfimm_lora.finetuning.data.exit import until_exit

@until_exit
def read():
    time.sleep(0.3)
    done.append("read")

def thread():
    try:
        while True:
            read()
    except StopIteration:
        done.append("stopped")

threading.Thread(target=thread, daemon=True).start()
time.sleep(0.1)
"""

ENDS_EARLY = """
import sys
from tests.finetuning.test_batches import PLAIN, numbered
from tfimm_lora.finetuning.data.batches import PictureBatches

iterator = iter(PictureBatches(numbered(sys.argv[1], 20), PLAIN, 4).epochs())
print(next(iterator)[0].shape)
"""


def ended(program, *arguments):
    """What a program of its own prints. With legacy Keras it hung more often."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "TF_USE_LEGACY_KERAS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reading_stops_when_python_ends_and_python_waits_for_it():
    assert ended(READS_ON) == "read stopped\n"


@pytest.mark.long
@pytest.mark.parametrize("attempt", range(4))
def test_python_ends_while_an_iterator_is_in_use(attempt, tmp_path):
    """Threads of TensorFlow, which Python waits for then, waited for Python: not each time."""
    assert ended(ENDS_EARLY, str(tmp_path)) == "(4, 8, 8, 3)\n"
