"""The start of factors beside PEFT's own, on a linear layer of torch: nn.Linear's weight is
W^T, its A and B are ours transposed."""

import numpy as np
import peft
import pytest
import torch

from tfimm_lora.initializers.from_kernel import initial_factors

SHAPES = [(24, 10), (10, 24), (16, 16)]


def adapted(weight, method, rank, alpha, seed=0):
    """A, B (as ours) and the base weight (as ours) of PEFT's layer for a kernel (m, n)."""
    m, n = weight.shape
    body = torch.nn.Sequential(torch.nn.Linear(m, n, bias=False))
    body[0].weight.data = torch.from_numpy(weight.T.copy())
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=method
    )
    torch.manual_seed(seed)
    layer = peft.get_peft_model(body, config).base_model.model[0]
    found = (layer.lora_A.default.weight, layer.lora_B.default.weight, layer.base_layer.weight)
    return tuple(t.detach().numpy().T for t in found)


def kernel(m, n, decay=0.8):
    rng = np.random.default_rng(m)
    u, _, vt = np.linalg.svd(rng.normal(size=(m, n)), full_matrices=False)
    return ((u * decay ** np.arange(len(vt))) @ vt).astype("float32")


def assert_equal_up_to_signs(ours, theirs, atol):
    """Each component, a column of A with its row of B, may have another sign."""
    signs = np.sign((ours.a * theirs[0]).sum(axis=0))
    np.testing.assert_array_equal(signs, np.sign((ours.b * theirs[1]).sum(axis=1)))
    np.testing.assert_allclose(ours.a * signs, theirs[0], atol=atol)
    np.testing.assert_allclose(ours.b * signs[:, None], theirs[1], atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank, alpha", [(4, 4), (4, 16), (8, 2), (10, 5)])
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_factors_and_residual_kernel_are_those_of_peft(method, shape, rank, alpha):
    w = kernel(*shape)
    theirs = adapted(w, method, rank, alpha)
    scale = alpha / rank
    ours = initial_factors(method, w, rank, scale, np.random.default_rng(0))
    assert ours.subtracted
    assert_equal_up_to_signs(ours, theirs, 2e-5)
    np.testing.assert_allclose(w - scale * ours.a @ ours.b, theirs[2], atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_randomized_pissa_is_pefts_where_values_fall_off(shape):
    w = kernel(*shape, decay=0.4)
    theirs = adapted(w, "pissa_niter_16", 3, 6)
    ours = initial_factors("pissa_niter_16", w, 3, 2.0, np.random.default_rng(0))
    assert_equal_up_to_signs(ours, theirs, 1e-4)
    np.testing.assert_allclose(w - 2.0 * ours.a @ ours.b, theirs[2], atol=1e-5)


def test_randomized_pissa_is_no_farther_from_the_best_than_pefts():
    w = np.random.default_rng(0).normal(size=(120, 90)).astype("float32")
    best = np.linalg.norm(adapted(w, "pissa", 6, 6)[2])
    theirs = np.linalg.norm(adapted(w, "pissa_niter_4", 6, 6)[2])
    a, b, _ = initial_factors("pissa_niter_4", w, 6, 1.0, np.random.default_rng(0))
    ours = np.linalg.norm(w - a @ b)
    assert best - 1e-4 < ours <= theirs + 1e-4


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("method", ["gaussian", "orthogonal"])
def test_drawn_factors_have_pefts_distribution(method, rank):
    w = np.random.default_rng(0).normal(size=(1200, 900)).astype("float32")
    theirs = adapted(w, method, rank, 2 * rank)
    ours = initial_factors(method, w, rank, 2.0, np.random.default_rng(0))
    assert not ours.subtracted
    np.testing.assert_array_equal(theirs[2], w)
    for mine, its in zip(ours[:2], theirs):
        values, expected = (np.linalg.svd(x, compute_uv=False) for x in (mine, its))
        assert (values > 1e-3).sum() == (expected > 1e-3).sum()
        np.testing.assert_allclose(values, expected, rtol=0.15, atol=1e-4)
        assert mine.mean() == pytest.approx(its.mean(), abs=0.05 / rank)
        assert mine.std() == pytest.approx(its.std(), rel=0.1)
    for a, b in (ours[:2], theirs[:2]):
        assert np.abs(a @ b).max() < 1e-6


def test_both_refuse_an_odd_rank_for_orthogonal():
    w = kernel(8, 8)
    with pytest.raises(ValueError, match="even"):
        adapted(w, "orthogonal", 3, 3)
    with pytest.raises(ValueError, match="even"):
        initial_factors("orthogonal", w, 3, 1.0, np.random.default_rng(0))
