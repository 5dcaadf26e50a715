"""``explain`` on pictures whose deciding place is known: it finds them, in trained models."""

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import keras
from tests.helpers.known_places import (
    convolutional,
    hits,
    masks,
    pictures,
    share_inside,
    train,
    transformer,
)


@pytest.fixture(scope="module")
def shown():
    return pictures(40, seed=1)


@pytest.fixture(scope="module")
def trained():
    """A trained network that ends in a softmax; its explanations use the logits."""
    keras.utils.set_random_seed(0)
    return train(convolutional("softmax"), 8, 4e-3, from_logits=False)


def assert_in_the_squares(found, y, corners, share, hit):
    """At random, maps have 14 % of their sum in the square, and 14 % of the maxima."""
    area = masks(corners).mean()
    assert (found.outputs.argmax(1) == y).mean() > 0.9
    assert share_inside(found.maps, corners).mean() > share > 3 * area
    assert hits(found.maps, corners) >= hit > 5 * area
    arbitrary = np.random.default_rng(0).random(found.maps.shape)
    assert share_inside(arbitrary, corners).mean() < 1.3 * area
    assert hits(arbitrary, corners) < 3 * area


def test_a_convolutional_network_is_explained_by_the_deciding_square(trained, shown):
    x, y, corners = shown
    found = lora.explain(trained, x, list(y), batch_size=16)
    assert (found.method, found.layer, found.grid) == ("grad_cam", "features", (8, 8))
    assert found.maps.shape == (40, 32, 32) and found.maps.dtype == np.float32
    np.testing.assert_array_equal(found.targets, y)
    np.testing.assert_allclose(found.maps.max((1, 2)), 1)
    assert found.maps.min() >= 0
    assert_in_the_squares(found, y, corners, 0.45, 0.9)


@pytest.mark.long
def test_a_transformer_is_explained_by_the_deciding_square(shown):
    keras.utils.set_random_seed(0)
    x, y, corners = shown
    model = train(transformer(), 20, 2e-3)
    found = lora.explain(model, x, list(map(int, y)), batch_size=40)
    assert (found.method, found.layer) == ("integrated_gradients", "tokens")
    assert_in_the_squares(found, y, corners, 0.45, 0.75)
    # What the default avoids: the class token alone is used after the last attention.
    with pytest.warns(UserWarning, match="do not depend on the feature map of layer 'last'"):
        last = lora.explain(model, x, list(map(int, y)), "grad_cam", batch_size=40)
    assert not last.maps.any()
