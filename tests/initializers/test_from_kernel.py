"""Initialization of the factors, against NumPy code written for the purpose."""

import numpy as np
import pytest

from tfimm_lora.initializers.from_kernel import (
    KNOWN,
    InitialFactors,
    check_init,
    initial_factors,
)
from tfimm_lora.initializers.svd import randomized_svd

pytestmark = pytest.mark.once

SHAPES = [(12, 7), (7, 12), (9, 9)]
DRAWN = ["gaussian", "orthogonal", "pissa_niter_2"]
ALL = ["gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"]


def rng(seed=0):
    return np.random.default_rng(seed)


def kernel(m, n, decay=1.0, seed=3):
    """A matrix whose singular values are 1, decay, decay^2, ..."""
    left, _ = np.linalg.qr(rng(seed).normal(size=(m, m)))
    right, _ = np.linalg.qr(rng(seed + 1).normal(size=(n, n)))
    k = min(m, n)
    return (left[:, :k] * decay ** np.arange(k)) @ right[:k]


def tail(w, rank):
    """The error of the best approximation of a rank (Eckart and Young), by eigenvalues."""
    squares = np.sort(np.linalg.eigvalsh(w @ w.T))[::-1]
    return np.sqrt(max(squares[rank:].sum(), 0.0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ALL)
def test_factors_have_their_shapes_and_type(method, shape):
    found = initial_factors(method, rng(1).normal(size=shape), 4, 1.5, rng())
    assert isinstance(found, InitialFactors)
    assert found.a.shape == (shape[0], 4) and found.b.shape == (4, shape[1])
    assert found.a.dtype == found.b.dtype == np.float32
    assert found.subtracted is (method not in ("gaussian", "orthogonal"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("scale", [1.0, 0.25, 4.0])
def test_pissa_leaves_the_error_of_the_best_approximation(shape, rank, scale):
    w = rng(5).normal(size=shape)
    a, b, subtracted = initial_factors("pissa", w, rank, scale, rng())
    left = np.linalg.norm(w - scale * a.astype("float64") @ b)
    assert subtracted and left == pytest.approx(tail(w, rank), abs=2e-6)
    # The magnitude is shared evenly: column i of A and row i of B have the norm sqrt(S_i / s).
    values = np.sqrt(np.linalg.eigvalsh(w @ w.T)[::-1][:rank])
    for norms in (np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1)):
        np.testing.assert_allclose(norms, np.sqrt(values / scale), rtol=1e-5)
    for gram in (a.T @ a, b @ b.T):
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-5)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_randomized_pissa_comes_close_where_values_fall_off(shape):
    w = kernel(*shape, decay=0.7)
    exact = initial_factors("pissa", w, 4, 2.0, rng())
    found = initial_factors("pissa_niter_3", w, 4, 2.0, rng(11))
    np.testing.assert_allclose(found.a, exact.a, atol=1e-5)
    np.testing.assert_allclose(found.b, exact.b, atol=1e-5)


def test_more_power_iterations_come_closer_on_a_flat_spectrum():
    w = rng(2).normal(size=(200, 160))

    def excess(method):
        a, b, _ = initial_factors(method, w, 6, 1.0, rng(1))
        return np.linalg.norm(w - a.astype("float64") @ b) - tail(w, 6)

    found = [excess(f"pissa_niter_{n}") for n in (0, 1, 2, 4, 8)]
    assert found == sorted(found, reverse=True)
    assert -1e-5 < found[-1] < 0.05 * found[0]


def test_randomized_svd_is_exact_for_a_rank_that_it_looks_for():
    w = rng(1).normal(size=(30, 3)) @ rng(2).normal(size=(3, 20))
    u, s, vt = randomized_svd(w, 3, 0, rng(4))
    assert u.shape == (30, 13) and vt.shape == (13, 20)
    np.testing.assert_allclose((u * s) @ vt, w, atol=1e-12)
    np.testing.assert_allclose(s[:3], np.sqrt(np.linalg.eigvalsh(w.T @ w)[::-1][:3]))
    np.testing.assert_allclose(u.T @ u, np.eye(13), atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_olora_is_the_beginning_of_a_qr_decomposition(shape, rank):
    w = rng(5).normal(size=shape)
    a, b, subtracted = initial_factors("olora", w, rank, 0.5, rng())
    assert subtracted
    np.testing.assert_allclose(b @ b.T, np.eye(rank), atol=1e-6)
    # W b^T is A, as Q^T W^T is R; A is lower triangular, as R is upper.
    np.testing.assert_allclose(w @ b.T.astype("float64"), a, atol=1e-5)
    square = a[: min(a.shape)]
    np.testing.assert_allclose(square, np.tril(square), atol=1e-6)
    assert (np.diag(square) > 0).all()
    # Gram and Schmidt by hand.
    basis = []
    for column in w[: b.shape[0]]:
        column = column - sum((column @ q) * q for q in basis)
        basis.append(column / np.linalg.norm(column))
    np.testing.assert_allclose(b, basis, atol=1e-5)
    if rank == min(shape):
        np.testing.assert_allclose(a @ b, w, atol=1e-5)


def test_olora_does_not_depend_on_the_scale():
    w = rng(5).normal(size=(6, 8))
    for one, other in zip(
        initial_factors("olora", w, 3, 0.5, rng()), initial_factors("olora", w, 3, 8.0, rng())
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rank", [2, 8, 20])
def test_orthogonal_factors_cancel(rank):
    a, b, subtracted = initial_factors("orthogonal", np.zeros((40, 30)), rank, 1.0, rng(8))
    assert not subtracted
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    assert lengths > 0.1 and np.abs(a @ b).max() < 1e-6 * lengths
    for factor in (a, b):
        values = np.linalg.svd(factor.astype("float64"), compute_uv=False)
        assert (values[: rank // 2] > 1e-3).all()  # half of the rank each
        assert (values[rank // 2 :] < 1e-6).all()


def test_orthogonal_factors_have_the_variance_of_peft():
    """An entry is the sum of r/2 products of a normal with a row of an orthogonal matrix."""
    a, b, _ = initial_factors("orthogonal", np.zeros((600, 500)), 16, 1.0, rng(8))
    for factor in (a, b):
        assert np.mean(factor**2) == pytest.approx(0.01 / 2, rel=0.1)


@pytest.mark.parametrize("rank", [1, 2, 16])
def test_gaussian_has_the_deviation_of_one_over_the_rank(rank):
    a, b, subtracted = initial_factors("gaussian", np.zeros((20_000, 5)), rank, 3.0, rng(8))
    assert not subtracted and not b.any()
    assert a.std() == pytest.approx(1 / rank, rel=0.03)
    assert abs(a.mean()) < 0.03 / rank
    # Of a normal distribution 68.3 % are within one deviation.
    assert np.mean(np.abs(a) < 1 / rank) == pytest.approx(0.683, abs=0.01)


@pytest.mark.parametrize("method", ALL)
def test_the_same_seed_gives_identical_values(method):
    w = rng(5).normal(size=(30, 24))
    one, same, other = (initial_factors(method, w, 4, 1.0, rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.a, same.a)
    np.testing.assert_array_equal(one.b, same.b)
    differs = not np.array_equal(one.a, other.a)
    assert differs is (method in ("gaussian", "orthogonal", "pissa_niter_4"))


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_2", "olora"])
def test_what_is_not_drawn_uses_no_random_numbers(method):
    generator = rng(1)
    initial_factors(method, rng(5).normal(size=(9, 8)), 2, 1.0, generator)
    untouched = generator.normal() == rng(1).normal()
    assert untouched is (method != "pissa_niter_2")


@pytest.mark.parametrize("kind", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_kernels_of_other_types_are_taken_at_their_values(method, kind):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    narrow = rng(5).normal(size=(9, 8)).astype(getattr(ml_dtypes, kind, kind))
    found = initial_factors(method, narrow, 3, 1.0, rng())
    expected = initial_factors(method, narrow.astype("float64"), 3, 1.0, rng())
    np.testing.assert_array_equal(found.a, expected.a)


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_2", "olora"])
def test_a_kernel_of_zeros_or_of_low_rank_gives_finite_factors(method):
    for w in (np.zeros((6, 5)), np.ones((6, 5))):
        a, b, _ = initial_factors(method, w, 4, 1.0, rng())
        assert np.isfinite(a).all() and np.isfinite(b).all()
        np.testing.assert_allclose(a @ b, w, atol=1e-6)


def test_the_kernel_stays_as_it_is():
    w = rng(5).normal(size=(9, 8)).astype("float32")
    before = w.copy()
    for method in ALL:
        initial_factors(method, w, 4, 2.0, rng())
    np.testing.assert_array_equal(w, before)


# -- wrong inputs ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ALL, "default", "eva", "pissa_niter_0", "pissa_niter_16"])
def test_known_names_pass(name):
    check_init(name)


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("pisa", "pissa"),
        ("PiSSA", "pissa"),
        ("Gaussian", "gaussian"),
        ("pissa_niter", "pissa_niter_N"),
        ("pissa_niter_N", "pissa_niter_N"),
        ("pissa_niter_-1", "pissa_niter_N"),
        ("pissa_niter_2 ", "pissa_niter_N"),
        ("ortho", "orthogonal"),
        ("", ""),
    ],
)
def test_unknown_names_suggest_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"nearest first: {nearest}") as error:
        check_init(name)
    assert all(known in str(error.value) for known in KNOWN) and repr(name) in str(error.value)


@pytest.mark.parametrize("name", [None, True, 4, ["pissa"]])
def test_names_are_strings(name):
    with pytest.raises(TypeError, match="lora_init=.*expected the name of an initialization"):
        check_init(name)
    with pytest.raises(TypeError, match="lora_init"):
        initial_factors(name, np.ones((4, 4)), 2, 1.0, rng())


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_2", "olora"])
def test_a_rank_above_the_kernels_is_refused(method):
    for shape in ((4, 9), (9, 4)):
        with pytest.raises(ValueError, match=r"lora_rank=5 .* Pass a rank of at most 4"):
            initial_factors(method, np.ones(shape), 5, 1.0, rng())
    for method in ("gaussian", "orthogonal"):
        assert initial_factors(method, np.ones((4, 9)), 6, 1.0, rng()).a.shape == (4, 6)


def test_orthogonal_needs_an_even_rank():
    with pytest.raises(ValueError, match=r"lora_rank=3 .*even rank.* lora_rank=4"):
        initial_factors("orthogonal", np.ones((8, 8)), 3, 1.0, rng())


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_pissa_needs_a_positive_scale(scale):
    with pytest.raises(ValueError, match="positive lora_alpha"):
        initial_factors("pissa", np.ones((8, 8)), 2, scale, rng())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["pissa", "pissa_niter_2", "olora"])
def test_values_that_are_not_finite_are_refused(method, value):
    w = np.ones((8, 8))
    w[3, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        initial_factors(method, w, 2, 1.0, rng())
    assert np.isfinite(initial_factors("gaussian", w, 2, 1.0, rng()).a).all()


@pytest.mark.parametrize("method", ["default", "eva"])
def test_what_does_not_come_from_the_kernel_is_not_computed(method):
    with pytest.raises(ValueError, match="not computed from the kernel"):
        initial_factors(method, np.ones((8, 8)), 2, 1.0, rng())


def test_a_kernel_that_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 3, 4, 4\)"):
        initial_factors("gaussian", np.ones((3, 3, 4, 4)), 2, 1.0, rng())
