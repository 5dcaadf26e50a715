"""Heat maps over pictures, and the pictures that a model sees."""

import io

import numpy as np
import pytest
from PIL import Image

from tfimm_lora.explanations.overlay import overlay
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.explained_pictures import png

pytestmark = pytest.mark.once


def test_places_without_evidence_are_grey_and_others_get_lighter():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    maps = np.zeros((2, 4, 5))
    maps[1] = np.linspace(0, 1, 20).reshape(4, 5)
    drawn = overlay(pictures, maps)
    for picture, grey in zip(pictures[:1], drawn[:1]):
        expected = np.asarray(Image.fromarray(picture).convert("L")).astype(int)
        assert np.abs(grey - expected[..., None]).max() <= 1  # Pillow rounds down
    ramp = overlay(np.full((1, 1, 20, 3), 60, np.uint8), maps[1].reshape(1, 1, 20))[0, 0]
    lightness = ramp.astype(int).sum(-1)
    assert (np.diff(lightness[2:]) > 0).all() and lightness[-1] > 2 * lightness[0]


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_pixels_are_those_from_which_inputs_were_made(order):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    given = Preprocessing((6, 6), mean, std, crop_pct=1.0, channel_order=order)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    inputs = np.stack([given.function(resize=True)(picture) for picture in pictures])
    np.testing.assert_array_equal(given.pixels(inputs), pictures)


def test_pixels_of_grey_pictures():
    given = Preprocessing((4, 4), (0.5,), (0.5,), in_channels=1, crop_pct=1.0)
    picture = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1) * 16
    inputs = np.stack([given.function(resize=True)(picture[0])])
    np.testing.assert_array_equal(given.pixels(inputs), picture.repeat(3, axis=-1))


def test_small_pictures_are_enlarged_without_new_colours():
    picture = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    drawn = np.asarray(Image.open(io.BytesIO(png(picture))))
    assert drawn.shape == (224, 336, 3)
    np.testing.assert_array_equal(drawn[::28, ::28], picture)
