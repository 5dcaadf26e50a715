"""Between an update of a fused projection and those of its query, key and value blocks."""

import numpy as np
import pytest

from tfimm_lora.adapters.fused import fuse, split
from tfimm_lora.adapters.layer_update import LayerUpdate

pytestmark = pytest.mark.once

#: Inputs and outputs of a block, which are not equal in a cross attention.
INPUTS, WIDTH = 6, 4


def update(rank=2, scale=1.0, seed=0, dora=False, bias=False, a=None):
    random = np.random.default_rng(seed)

    def normal(*shape):
        return random.normal(size=shape).astype("float32")

    return LayerUpdate(
        normal(rank, INPUTS) if a is None else a,
        normal(WIDTH, rank),
        scale,
        magnitude=1 + np.abs(normal(WIDTH)) if dora else None,
        bias=normal(WIDTH) if bias else None,
    )


def blocks_of(fused, layout):
    """Block -> its rows of dW."""
    return dict(zip(layout, np.split(fused.delta(), len(layout))))


@pytest.mark.parametrize("layout", ["qkv", "kv"])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 3)])
@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (0.5, 2.0, 3.0)])
def test_delta_of_fused_projection(layout, ranks, scales):
    parts = {
        block: update(rank, scale, seed)
        for seed, (block, rank, scale) in enumerate(zip(layout, ranks, scales))
    }
    fused = fuse(parts, layout)
    for block, delta in blocks_of(fused, layout).items():
        np.testing.assert_allclose(delta, parts[block].delta(), rtol=1e-6, atol=1e-7)
    assert fused.rank == sum(part.rank for part in parts.values())


@pytest.mark.parametrize("chosen", ["q", "v", "qv", "kv", "qk"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_split_reverses_fuse(chosen, scale):
    parts = {block: update(seed=seed, scale=scale) for seed, block in enumerate(chosen)}
    fused = fuse(parts, "qkv")
    assert fused.qkv == (chosen, "qkv")
    assert split(fused, "qkv") == parts


def test_split_reverses_fuse_of_other_ranks():
    parts = {block: update(rank, seed=rank) for rank, block in enumerate("qkv", start=1)}
    fused = fuse(parts, "qkv")
    assert fused.qkv is None and fused.rank == 6
    assert split(fused, "qkv") == parts


def test_split_with_other_scales_has_the_same_deltas():
    parts = {"q": update(2, 0.5), "v": update(3, 4.0, seed=1)}
    back = split(fuse(parts, "qkv"), "qkv")
    assert {block: part.rank for block, part in back.items()} == {"q": 2, "v": 3}
    for block, part in back.items():
        np.testing.assert_allclose(part.delta(), parts[block].delta(), rtol=1e-6, atol=1e-7)


def test_shared_a_keeps_its_rank():
    whole = update(3)
    fused = LayerUpdate(whole.a, np.tile(whole.b, (3, 1)) * np.arange(1, 13)[:, None], 0.5)
    parts = split(fused, "qkv")
    assert {part.rank for part in parts.values()} == {3}
    again = fuse(parts, "qkv")
    assert again == fused


def test_two_blocks_with_the_same_a():
    shared = update(2).a
    parts = {"q": update(2, seed=1, a=shared), "v": update(2, seed=2, a=shared)}
    fused = fuse(parts, "qkv")
    for block, delta in blocks_of(fused, "qkv").items():
        wanted = parts[block].delta() if block in parts else 0 * delta
        np.testing.assert_allclose(delta, wanted, rtol=1e-6)


def test_untrained_update_is_split_by_its_blocks():
    zero = {
        b: LayerUpdate(update(seed=i).a, np.zeros((WIDTH, 2), "f4")) for i, b in enumerate("qv")
    }
    parts = split(fuse(zero, "qkv"), "qkv")
    assert parts == zero
    whole = LayerUpdate(update(2).a, np.zeros((3 * WIDTH, 2), "f4"))
    assert {block: part.rank for block, part in split(whole, "qkv").items()} == dict(
        q=2, k=2, v=2
    )


def test_block_that_was_not_trained_beside_others():
    parts = {"q": update(2), "k": LayerUpdate(update(2, seed=1).a, np.zeros((WIDTH, 2), "f4"))}
    back = split(fuse(parts, "qkv"), "qkv")
    assert set(back) == {"q"}
    assert back["q"] == parts["q"]


def test_magnitudes():
    parts = {block: update(seed=seed, dora=True) for seed, block in enumerate("qkv")}
    fused = fuse(parts, "qkv")
    np.testing.assert_array_equal(
        fused.magnitude, np.concatenate([parts[block].magnitude for block in "qkv"])
    )
    assert split(fused, "qkv") == parts


def test_magnitude_of_a_block_without_update_is_its_norm():
    kernel = np.random.default_rng(3).normal(size=(3 * WIDTH, INPUTS))
    norms = dict(zip("qkv", np.split(np.linalg.norm(kernel, axis=1), 3)))
    parts = {"q": update(dora=True), "v": update(seed=1, dora=True)}
    fused = fuse(parts, "qkv", norms.get)
    adapted = dict(zip("qkv", np.split(fused.effective_kernel(kernel), 3)))
    own = dict(zip("qkv", np.split(kernel, 3)))
    for block in "qv":
        wanted = parts[block].effective_kernel(own[block])
        np.testing.assert_allclose(adapted[block], wanted, rtol=1e-5)
    np.testing.assert_allclose(adapted["k"], own["k"], rtol=1e-6)
    back = split(fused, "qkv")
    for block in "qkv":
        np.testing.assert_allclose(
            back[block].effective_kernel(own[block]), adapted[block], rtol=1e-6
        )


def test_magnitude_without_norms_is_refused():
    with pytest.raises(ValueError, match="DoRA updates of q, v alone"):
        fuse({"q": update(dora=True), "v": update(dora=True)}, "qkv")
    with pytest.raises(ValueError, match="Pass the base model"):
        fuse({"q": update(dora=True)}, "qkv", lambda block: None)


def test_biases():
    parts = {"q": update(scale=0.5, bias=True), "v": update(scale=2.0, seed=1, bias=True)}
    fused = fuse(parts, "qkv")
    shift = dict(zip("qkv", np.split(fused.scale * fused.bias, 3)))
    np.testing.assert_allclose(shift["q"], 0.5 * parts["q"].bias, rtol=1e-6)
    np.testing.assert_allclose(shift["v"], 2.0 * parts["v"].bias, rtol=1e-6)
    assert not shift["k"].any()
    back = split(fused, "qkv")
    assert set(back) == {"q", "v"}
    for block, part in back.items():
        np.testing.assert_allclose(part.scale * part.bias, shift[block], rtol=1e-6)


def test_bias_alone_is_kept():
    zero = np.zeros((3 * WIDTH, 2), "f4")
    zero[0] = 1.0
    bias = np.arange(3 * WIDTH).astype("f4")
    parts = split(LayerUpdate(update(2).a, zero, bias=bias), "qkv")
    np.testing.assert_array_equal(np.concatenate([parts[b].bias for b in "qkv"]), bias)


def test_blocks_of_unequal_size_are_refused():
    with pytest.raises(ValueError, match="10 outputs for the 3 blocks 'qkv'"):
        split(LayerUpdate(np.ones((1, 4)), np.ones((10, 1))), "qkv")


def test_convolutions():
    """A projection by a 1x1 convolution has factors with axes of size 1."""
    parts = {
        b: LayerUpdate(u.a[..., None, None], u.b[..., None, None], kind="conv")
        for b, u in (("q", update()), ("v", update(seed=1)))
    }
    fused = fuse(parts, "qkv")
    assert fused.shape == (3 * WIDTH, INPUTS, 1, 1)
    assert split(fused, "qkv") == parts


def test_a_first_block_without_scale_leaves_the_others():
    parts = {"q": update(scale=0.0), "v": update(scale=2.0, seed=1)}
    rows = blocks_of(fuse(parts, "qkv"), "qkv")
    np.testing.assert_allclose(rows["v"], parts["v"].delta(), rtol=1e-6)
    assert not rows["q"].any() and not rows["k"].any()
