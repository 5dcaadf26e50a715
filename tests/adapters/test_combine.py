"""Combining and extracting adapters, against PEFT's numbers and plain NumPy."""

import itertools
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.combine import combination_errors, combine_adapters
from tfimm_lora.adapters.combine_updates import COMBINATION_TYPES
from tfimm_lora.adapters.decompose import extract_update, extract_updates
from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.adapters.merge_rules import RULES, keep_largest, keep_random, mix

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "peft_combinations.npz"))
CASES = json.loads(str(GOLDEN.pop("cases")))

#: Truncation of random updates to a small rank loses much, and says so.
pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore:combination_type=.* lost:UserWarning"),
]


@pytest.fixture(autouse=True)
def seeded():
    """In place of the one in conftest: there is no Keras here to seed and to clear."""


#: Kind -> shapes of A and B without the rank, as `LayerUpdate` describes them.
SHAPES = {
    "linear": ((6,), (5,)),
    "conv": ((3, 3, 2), (5, 1, 1)),
    "grouped": ((2, 3, 3), (8, 1, 1)),
    "depthwise": ((1, 3, 3), (6, 1, 1)),
    "standardised": ((3, 3, 3), (4, 1, 1)),
    "embedding": ((11,), (4,)),
}


def update(kind="linear", rank=2, seed=0, scale=1.0, dtype="float32"):
    rng = np.random.default_rng([seed, rank, *kind.encode()])
    shape_a, (out, *ones) = SHAPES[kind]
    a = rng.normal(size=(rank, *shape_a)).astype(dtype)
    return LayerUpdate(a, rng.normal(size=(out, rank, *ones)).astype(dtype), scale, kind)


def adapter(seed=0, rank=2, scale=1.0, kinds=tuple(SHAPES), **fields):
    return Adapter({kind: update(kind, rank, seed, scale) for kind in kinds}, **fields)


def matrix(x):
    """dW as a matrix by the definition, a sum over ranks, in float64."""
    shape = x.shape
    total = np.zeros((shape[0], math.prod(shape[1:])))
    for r in range(x.rank):
        total += np.outer(x.b[:, r].astype("float64"), x.a[r].astype("float64"))
    return x.scale * total


def true_sum(adapters, weights, path):
    terms = [w * matrix(x.layers[path]) for x, w in zip(adapters, weights) if path in x.layers]
    return sum(terms)


def relative(value, expected):
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)


def copies(adapters):
    return [
        {path: (x.a.copy(), x.b.copy(), x.scale) for path, x in one.layers.items()}
        for one in adapters
    ]


def options_for(combination_type):
    prunes = combination_type.removesuffix("_svd") not in ("cat", "svd", "linear")
    return {"combination_type": combination_type, **({"density": 0.5} if prunes else {})}


# -- PEFT -----------------------------------------------------------------------------------


def golden(name):
    layers = {}
    kinds = {"conv": "conv", "pointwise": "conv", "table": "embedding"}
    for layer in ("fc", "conv", "pointwise", "table", "last"):
        key = f"{name}/{layer}"
        if f"{key}/a" in GOLDEN:
            a, b, scale = (GOLDEN[f"{key}/{what}"] for what in ("a", "b", "scale"))
            layers[layer] = LayerUpdate(a, b, scale, kinds.get(layer, "linear"))
    return Adapter(layers)


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_peft(case):
    names, weights, options = CASES[case]
    options = {"combination_type": case, **options}
    if "svd_rank" in options:
        options["rank"] = options.pop("svd_rank")
    ours = combine_adapters([golden(name) for name in names], weights, **options)
    theirs = golden(f"combined {case}")
    assert set(ours.layers) == set(theirs.layers)
    for path, x in theirs.layers.items():
        assert ours.layers[path].scale == 1.0
        if names[0] == "two":
            # PEFT leaves rsLoRA on and so multiplies the result by sqrt(rank).
            assert x.scale == pytest.approx(math.sqrt(3))
            x = replace(x, scale=1.0)
        assert x.scale == 1.0
        # PEFT computes in float32.
        assert relative(matrix(ours.layers[path]), matrix(x)) < 1e-5, path
        if options["combination_type"] in RULES:
            np.testing.assert_allclose(ours.layers[path].a, x.a, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(ours.layers[path].b, x.b, rtol=1e-5, atol=1e-6)


# -- sums -----------------------------------------------------------------------------------


def mixed_adapters():
    """Of different ranks, scales (alpha / r, rsLoRA, negative) and sets of layers."""
    return [
        adapter(1, rank=2, scale=0.5),
        adapter(2, rank=3, scale=8 / math.sqrt(3), kinds=("linear", "conv", "depthwise")),
        adapter(3, rank=1, scale=-1.5, kinds=("linear", "grouped", "embedding")),
    ]


def test_cat_is_the_exact_sum():
    adapters, weights = mixed_adapters(), [0.7, -1.2, 3.0]
    combined = combine_adapters(adapters, weights)
    assert set(combined.layers) == set(SHAPES)
    for path, x in combined.layers.items():
        expected = true_sum(adapters, weights, path)
        assert relative(matrix(x), expected) < 1e-6
        assert x.rank == sum(one.layers[path].rank for one in adapters if path in one.layers)
        assert (x.scale, x.kind) == (1.0, path)
        assert x.shape == adapters[0].layers[path].shape
        assert x.b.ndim == adapters[0].layers[path].b.ndim
    assert max(combination_errors(combined, adapters, weights).values()) < 1e-6


def test_weights_are_one_by_default():
    adapters = mixed_adapters()
    assert combine_adapters(adapters) == combine_adapters(adapters, [1, 1, 1], "cat")


@pytest.mark.parametrize("combination_type", COMBINATION_TYPES)
def test_inputs_are_unchanged_and_results_reproducible(combination_type):
    adapters, weights = [adapter(1), adapter(2, scale=2.0)], [1.0, -0.5]
    before = copies(adapters)
    first, again = (
        combine_adapters(adapters, weights, **options_for(combination_type)) for _ in range(2)
    )
    assert first == again
    assert weights == [1.0, -0.5] and len(adapters) == 2
    for old, new in zip(before, copies(adapters)):
        for path in old:
            np.testing.assert_array_equal(old[path][0], new[path][0])
            np.testing.assert_array_equal(old[path][1], new[path][1])
    assert {x.kind for x in first.layers.values()} == set(SHAPES)
    assert all(x.scale == 1 and x.a.dtype == "float32" for x in first.layers.values())


@pytest.mark.parametrize("combination_type", COMBINATION_TYPES)
def test_a_negative_weight_is_the_negated_adapter(combination_type):
    one, two = adapter(1), adapter(2)
    negated = Adapter({p: replace(x, scale=-x.scale) for p, x in two.layers.items()})
    factors_only = combination_type in RULES
    if factors_only and RULES[combination_type].elect:
        # Which factor takes the sign is a matter of choice; A does.
        negated = Adapter({p: replace(x, a=-x.a) for p, x in two.layers.items()})
    options = options_for(combination_type)
    subtracted = combine_adapters([one, two], [1.0, -0.5], **options)
    added = combine_adapters([one, negated], [1.0, 0.5], **options)
    for path, x in subtracted.layers.items():
        np.testing.assert_allclose(matrix(x), matrix(added.layers[path]), atol=1e-5)


@pytest.mark.parametrize("combination_type", ["cat", "svd", "linear"])
def test_an_adapter_minus_itself_is_zero(combination_type):
    one = adapter(1)
    options = {"rank": 2} if combination_type == "svd" else {}
    gone = combine_adapters([one, one], [1.0, -1.0], combination_type, **options)
    if combination_type == "linear":  # There B stays, but A is zero.
        assert not any(x.a.any() for x in gone.layers.values())
    for x in gone.layers.values():
        np.testing.assert_allclose(matrix(x), 0, atol=1e-6)
    errors = combination_errors(one, [one, one], [1.0, -1.0])
    assert set(errors.values()) == {math.inf}
    assert set(combination_errors(one, [one]).values()) == {0.0}


@pytest.mark.parametrize("rank", [1, 2, 4, 5, 100])
def test_svd_is_the_best_of_its_rank(rank):
    adapters, weights = mixed_adapters(), [0.7, -1.2, 3.0]
    combined = combine_adapters(adapters, weights, "svd", rank=rank)
    errors = combination_errors(combined, adapters, weights)
    for path, x in combined.layers.items():
        expected = true_sum(adapters, weights, path)
        s = np.linalg.svd(expected, compute_uv=False)
        tail = np.linalg.norm(s[rank:]) / np.linalg.norm(s)
        assert relative(matrix(x), expected) == pytest.approx(tail, abs=1e-6)
        assert errors[path] == pytest.approx(tail, abs=1e-6)
        assert x.rank <= rank and x.rank <= min(expected.shape)
        # Balanced: both factors carry the roots of the singular values.
        a, b = x.matrices()
        np.testing.assert_allclose(a @ a.T, b.T @ b, atol=1e-4)


def test_svd_has_the_largest_of_a_layers_ranks_by_default():
    combined = combine_adapters(mixed_adapters(), combination_type="svd")
    ranks = {path: x.rank for path, x in combined.layers.items()}
    assert ranks["linear"] == ranks["conv"] == 3
    assert ranks["grouped"] == ranks["standardised"] == 2


@pytest.mark.parametrize("combination_type", [t for t in COMBINATION_TYPES if "svd" in t])
def test_truncation_that_loses_much_is_reported(combination_type):
    adapters, options = [adapter(1), adapter(2)], options_for(combination_type)
    with pytest.warns(UserWarning, match=r"lost \d+% of the norm .* most in '\w+' \(\d+%\)"):
        combine_adapters(adapters, **options, rank=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        combine_adapters(adapters, **options, rank=100)


def test_error_in_the_warning_is_that_of_the_layer():
    one, two = (Adapter({"fc": update(seed=seed)}) for seed in (1, 2))
    with pytest.warns(UserWarning) as record:
        small = combine_adapters([one, two], combination_type="svd", rank=1)
    error = combination_errors(small, [one, two])["fc"]
    assert f"({error:.0%})" in str(record[0].message)
    assert record[0].filename == __file__


def test_linear_is_far_from_the_sum_and_errors_say_so():
    adapters = [adapter(1), adapter(2)]
    combined = combine_adapters(adapters, combination_type="linear")
    errors = combination_errors(combined, adapters)
    for path, x in combined.layers.items():
        expected = true_sum(adapters, [1, 1], path)
        assert errors[path] == pytest.approx(relative(matrix(x), expected), rel=1e-5)
    assert max(errors.values()) > 0.3


def test_layers_that_the_combined_adapter_lacks_are_wholly_in_error():
    one, small = adapter(1), adapter(1, kinds=("linear",))
    errors = combination_errors(small, [one])
    assert errors["linear"] == 0 and errors["conv"] == pytest.approx(1)
    assert combination_errors(one, [small])["conv"] == math.inf


def test_sixteen_bits_are_combined_in_float32_and_doubles_in_float64():
    for given, expected in (("float16", "float32"), ("float64", "float64")):
        ones = [Adapter({"fc": update(seed=seed, dtype=given)}) for seed in (1, 2)]
        for combination_type in ("cat", "svd", "linear"):
            x = combine_adapters(
                ones,
                [0.1, 3.0],
                combination_type,
                **({"rank": 4} if combination_type == "svd" else {}),
            ).layers["fc"]
            assert x.a.dtype == x.b.dtype == expected
            if combination_type != "linear":
                assert relative(matrix(x), true_sum(ones, [0.1, 3.0], "fc")) < 1e-6


# -- blocks ---------------------------------------------------------------------------------


def parts_update(seed, rank, width=3, chosen="qv"):
    """Query and value of a fused projection by themselves: a B with blocks."""
    rng = np.random.default_rng(seed)
    b = np.zeros((3 * width, rank * len(chosen)))
    for place, part in enumerate(chosen):
        at = "qkv".index(part) * width
        b[at : at + width, place * rank : (place + 1) * rank] = rng.normal(size=(width, rank))
    a = rng.normal(size=(rank * len(chosen), 4))
    return LayerUpdate(a, b, 0.5, "linear", (chosen, "qkv"))


def assert_blocks(x, width=3):
    """B of each chosen part is zero outside its rows, with the parts one after another."""
    chosen = x.qkv[0]
    for place, columns in enumerate(np.split(x.b, len(chosen), axis=1)):
        at = "qkv".index(chosen[place]) * width
        outside = np.delete(columns, np.s_[at : at + width], axis=0)
        assert not outside.any()


@pytest.mark.parametrize("combination_type", ["cat", "linear", "ties", "magnitude_prune"])
def test_parts_of_a_projection_stay_parts(combination_type):
    ranks = (2, 3) if combination_type == "cat" else (2, 2)
    adapters = [Adapter({"qkv": parts_update(i, rank)}) for i, rank in enumerate(ranks)]
    x = combine_adapters(adapters, [1.0, -2.0], **options_for(combination_type)).layers["qkv"]
    assert x.qkv == ("qv", "qkv")
    assert_blocks(x)
    if combination_type == "cat":
        assert x.rank == 10
        np.testing.assert_allclose(matrix(x), true_sum(adapters, [1.0, -2.0], "qkv"))


def test_parts_are_forgotten_where_the_result_has_others():
    parts, others = parts_update(0, 2), parts_update(1, 2, chosen="qk")
    plain = replace(parts_update(2, 2), qkv=None)
    for other in (others, plain):
        adapters = [Adapter({"qkv": parts}), Adapter({"qkv": other})]
        for combination_type in ("cat", "linear"):
            x = combine_adapters(adapters, [1.0, 1.0], combination_type).layers["qkv"]
            assert x.qkv is None
    both = [Adapter({"qkv": parts}), Adapter({"qkv": parts_update(1, 2)})]
    x = combine_adapters(both, combination_type="svd", rank=8).layers["qkv"]
    assert x.qkv is None
    np.testing.assert_allclose(matrix(x), true_sum(both, [1, 1], "qkv"), atol=1e-12)


def batched_update(seed, rank, positions=3):
    rng = np.random.default_rng(seed)
    b = np.zeros((positions * 2, positions * rank))
    for i in range(positions):
        b[2 * i : 2 * i + 2, rank * i : rank * (i + 1)] = rng.normal(size=(2, rank))
    return LayerUpdate(rng.normal(size=(positions * rank, 4)), b, 2.0, "batched")


@pytest.mark.parametrize("combination_type", ["cat", "linear", "ties", "dare_linear"])
def test_positions_of_a_batched_kernel_are_not_mixed(combination_type):
    ranks = (1, 2) if combination_type == "cat" else (2, 2)
    adapters = [Adapter({"fc": batched_update(i, rank)}) for i, rank in enumerate(ranks)]
    x = combine_adapters(adapters, [1.0, -2.0], **options_for(combination_type)).layers["fc"]
    assert x.kind == "batched"
    rank = x.rank // 3
    for i, j in itertools.permutations(range(3), 2):
        assert not x.b[2 * i : 2 * i + 2, rank * j : rank * (j + 1)].any()
    if combination_type == "cat":
        np.testing.assert_allclose(matrix(x), true_sum(adapters, [1.0, -2.0], "fc"))


# -- pruning --------------------------------------------------------------------------------


def plain_top(values, density):
    """The largest entries, by sorting."""
    flat = [float(v) for v in values.reshape(-1)]
    order = sorted(range(len(flat)), key=lambda i: -abs(flat[i]))[: int(density * len(flat))]
    return np.array([v if i in order else 0.0 for i, v in enumerate(flat)]).reshape(
        values.shape
    )


def plain_ties(arrays, weights, density, method):
    """TIES for each entry by itself, as in section 4 of the paper, with weights at the end."""
    trimmed = [plain_top(x, density) for x in arrays]
    out = np.zeros(arrays[0].shape)
    for at in np.ndindex(out.shape):
        values = [x[at] for x in trimmed]
        votes = values if method == "total" else [np.sign(v) for v in values]
        sign = 1 if sum(votes) >= 0 else -1
        chosen = [w * v for v, w in zip(values, weights) if v * sign > 0]
        out[at] = sum(chosen) / len(chosen) if chosen else 0.0
    return out


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_on_the_full_update(density, method):
    adapters, weights = mixed_adapters(), [0.7, 1.2, 3.0]
    combined = combine_adapters(
        adapters,
        weights,
        "ties_svd",
        density=density,
        majority_sign_method=method,
        rank=100,
    )
    for path, x in combined.layers.items():
        own = [(one.layers[path], w) for one, w in zip(adapters, weights) if path in one.layers]
        expected = plain_ties([matrix(u) for u, _ in own], [w for _, w in own], density, method)
        np.testing.assert_allclose(matrix(x), expected, atol=1e-5)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_magnitude_pruning_on_the_full_update(density):
    adapters, weights = mixed_adapters(), [0.7, -1.2, 3.0]
    combined = combine_adapters(
        adapters, weights, "magnitude_prune_svd", density=density, rank=100
    )
    for path, x in combined.layers.items():
        expected = sum(
            w * plain_top(matrix(one.layers[path]), density)
            for one, w in zip(adapters, weights)
            if path in one.layers
        )
        np.testing.assert_allclose(matrix(x), expected, atol=1e-5)


@pytest.mark.parametrize("combination_type", ["ties_svd", "magnitude_prune_svd"])
def test_svd_of_a_pruned_update_is_the_best_of_its_rank(combination_type):
    adapters, weights = mixed_adapters(), [0.7, 1.2, 3.0]
    full, small = (
        combine_adapters(adapters, weights, combination_type, density=0.5, rank=rank)
        for rank in (100, 2)
    )
    for path, x in small.layers.items():
        s = np.linalg.svd(matrix(full.layers[path]), compute_uv=False)
        error = np.linalg.norm(matrix(x) - matrix(full.layers[path]))
        assert error == pytest.approx(np.linalg.norm(s[2:]), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("combination_type", ["dare_linear", "dare_ties"])
def test_dare_without_dropping_is_the_rule_itself(combination_type):
    adapters, weights = [adapter(1), adapter(2)], [0.7, 0.4]
    plain = {"dare_linear": "linear", "dare_ties": "ties"}[combination_type]
    options = {"density": 1.0} if plain == "ties" else {}
    dare = combine_adapters(adapters, weights, combination_type, density=1.0)
    assert dare == combine_adapters(adapters, weights, plain, **options)


def test_dare_keeps_the_share_and_the_expected_value():
    values = np.random.default_rng(0).normal(size=(40, 50))
    kept = keep_random(values, 0.3, np.random.default_rng(1))
    held = kept != 0
    np.testing.assert_allclose(kept[held], values[held] / 0.3)
    assert held.mean() == pytest.approx(0.3, abs=0.04)  # four standard deviations
    draws = [keep_random(values, 0.3, np.random.default_rng(i)) for i in range(400)]
    # Standard error of the mean of entries: |v| sqrt(0.7 / 0.3 / 400) = 0.08 |v|.
    assert relative(np.mean(draws, axis=0), values) < 0.1


def test_dare_linear_is_the_sum_of_what_stays():
    arrays = [np.full((4, 5), 2.0), np.full((4, 5), 3.0)]
    out = mix(arrays, [1.0, -2.0], RULES["dare_linear"], 0.5, rng=np.random.default_rng(0))
    assert set(np.unique(out)) <= {0.0, 4.0, -12.0, -8.0} and len(np.unique(out)) > 2


def test_dare_depends_on_seed_and_layer_alone():
    adapters, options = [adapter(1), adapter(2)], {"density": 0.5}
    first = combine_adapters(adapters, None, "dare_linear", **options)
    other = combine_adapters(adapters, None, "dare_linear", seed=1, **options)
    assert first != other
    fewer = [Adapter({p: x.layers[p] for p in ("conv", "linear")}) for x in adapters]
    again = combine_adapters(fewer, None, "dare_linear", **options)
    assert all(again.layers[path] == first.layers[path] for path in again.layers)


def test_as_many_entries_stay_as_in_peft_but_never_none():
    values = np.random.default_rng(0).normal(size=(7, 9))
    for density in (0.01, 0.2, 0.29, 0.5, 0.999):
        kept = keep_largest(values, density)
        assert np.count_nonzero(kept) == max(1, int(density * 63))
        assert np.abs(kept[kept != 0]).min() >= np.abs(values[kept == 0]).max()
    assert np.count_nonzero(keep_largest(np.ones((4, 4)), 0.5)) == 8
    np.testing.assert_array_equal(keep_largest(values, 1.0), values)


# -- what goes with the layers --------------------------------------------------------------


def with_head(seed, **fields):
    head = np.random.default_rng(seed).normal(size=(3, 6)).astype("float32")
    weights = {"head.weight": head, "linear.bias": head[0]}
    fields = {"modules": ("head",), "bias": "lora_only", **fields}
    return adapter(seed, weights=weights, **fields)


def test_identical_fully_trained_weights_are_kept():
    one = with_head(1)
    two = replace(adapter(2), weights=one.weights, modules=("head",), bias="lora_only")
    combined = combine_adapters([one, two], [1.0, 5.0])
    np.testing.assert_array_equal(combined.weights["head.weight"], one.weights["head.weight"])
    assert (combined.modules, combined.bias) == (("head",), "lora_only")


def test_different_fully_trained_weights_need_a_choice():
    one, two, none = with_head(1), with_head(2), adapter(3)
    with pytest.raises(ValueError, match=r"head\.weight, linear\.bias.*trained_whole=0.*'aver"):
        combine_adapters([one, two])
    with pytest.raises(ValueError, match=r"head\.weight.*module head"):
        combine_adapters([one, none])
    kept = combine_adapters([one, two], trained_whole=1)
    np.testing.assert_array_equal(kept.weights["head.weight"], two.weights["head.weight"])
    without = combine_adapters([one, none], trained_whole=1)
    assert (dict(without.weights), without.modules, without.bias) == ({}, (), "none")


def test_fully_trained_weights_are_averaged_on_request():
    one, two = with_head(1), with_head(2)
    combined = combine_adapters([one, two], [3.0, 1.0], trained_whole="average")
    for key in one.weights:
        expected = 0.75 * one.weights[key] + 0.25 * two.weights[key]
        np.testing.assert_allclose(combined.weights[key], expected, rtol=1e-6)
        assert combined.weights[key].dtype == "float32"
    with pytest.raises(ValueError, match="sum is 0"):
        combine_adapters([one, two], [1.0, -1.0], trained_whole="average")
    other = replace(two, weights={**two.weights, "head.weight": np.zeros((4, 6))})
    with pytest.raises(ValueError, match=r"names or shapes: head\.weight"):
        combine_adapters([one, other], trained_whole="average")


def test_counters_stay_whole_numbers_in_the_average():
    ones = [
        adapter(i, weights={"bn.num_batches_tracked": np.array(n)}) for i, n in ((1, 3), (2, 8))
    ]
    value = combine_adapters(ones, trained_whole="average").weights["bn.num_batches_tracked"]
    assert value.dtype == np.array(3).dtype and value == 6


def test_a_layer_is_not_both_adapted_and_fully_trained():
    one = adapter(1, weights={"linear.weight": np.ones((5, 6))}, kinds=("conv",))
    with pytest.raises(ValueError, match="fully trained linear"):
        combine_adapters([one, adapter(2)], trained_whole=0)
    assert not combine_adapters([one, adapter(2)], trained_whole=1).weights


@pytest.mark.parametrize("choice", [2, -1, "mean", True, 0.5])
def test_choice_of_fully_trained_weights_is_checked(choice):
    with pytest.raises(ValueError, match="Received trained_whole="):
        combine_adapters([with_head(1), with_head(2)], trained_whole=choice)


def test_base_model_and_dropout():
    one, two = adapter(1, base_model="vit", dropout=0.1), adapter(2, dropout=0.1)
    combined = combine_adapters([one, two])
    assert (combined.base_model, combined.dropout) == ("vit", 0.1)
    assert combine_adapters([one, replace(two, dropout=0.2)]).dropout == 0
    with pytest.raises(ValueError, match="different models, vit, deit"):
        combine_adapters([one, replace(two, base_model="deit")])


# -- errors ---------------------------------------------------------------------------------


def test_all_layers_that_do_not_fit_are_named():
    one = adapter(1)
    layers = dict(one.layers)
    layers["linear"] = LayerUpdate(np.ones((2, 7)), np.ones((5, 2)))
    layers["conv"] = replace(layers["conv"], kind="standardised")
    with pytest.raises(ValueError) as error:
        combine_adapters([one, Adapter(layers)])
    text = str(error.value)
    assert "'linear' has the shapes (5, 6), (5, 7)" in text
    assert "'conv' has the kinds conv, standardised" in text
    assert "grouped" not in text


@pytest.mark.parametrize("name", RULES)
def test_mixing_factors_needs_equal_ranks_and_says_what_does_not(name):
    ones = [adapter(1), adapter(2, rank=3, kinds=("conv", "linear"))]
    remedy = "'svd'" if name == "linear" else f"'{name}_svd'"
    with pytest.raises(ValueError, match=rf"'conv' has the ranks 2, 3\n[^$]*{remedy}"):
        combine_adapters(ones, **options_for(name))
    # Where the ranks agree in each layer, it does not matter that those of layers differ.
    ones = [Adapter({"x": update(rank=2), "y": update(rank=3)}) for _ in range(2)]
    combine_adapters(ones, **options_for(name))


def test_batched_kernels_have_no_decomposition():
    ones = [Adapter({"fc": batched_update(i, 1)}) for i in range(2)]
    with pytest.raises(ValueError, match="'fc' is of the kind 'batched'.*'cat'"):
        combine_adapters(ones, combination_type="svd")


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"adapters": []}, ValueError, "no adapters; expected"),
        ({"adapters": adapter(1)}, TypeError, "expected a list"),
        ({"adapters": "folder"}, TypeError, "Adapter.load"),
        ({"adapters": [adapter(1), "folder"]}, TypeError, "Adapter.load"),
        ({"weights": [1.0]}, ValueError, "1 weights for 2 adapters"),
        ({"weights": [1.0, math.nan]}, ValueError, "finite"),
        ({"weights": [1.0, math.inf]}, ValueError, "finite"),
        ({"weights": [1.0, "2"]}, TypeError, r"weights\[1\]='2'; expected a finite number"),
        ({"combination_type": "tie"}, ValueError, "cat, svd, linear.*did you mean ties"),
        ({"combination_type": None}, ValueError, "expected one of cat"),
        ({"combination_type": "linear_svd"}, ValueError, "expected one of cat"),
        (
            {"combination_type": "svd", "rank": 0},
            ValueError,
            "rank=0; expected an integer of at least 1",
        ),
        ({"combination_type": "svd", "rank": 2.0}, TypeError, "rank=2.0"),
        ({"rank": 4}, ValueError, "rank=4 with combination_type='cat'.*'svd'"),
        ({"density": 0.5}, ValueError, "density=0.5 with .*does not prune"),
        ({"combination_type": "ties"}, ValueError, "no density.*density=0.2"),
        (
            {"combination_type": "ties", "density": 0},
            ValueError,
            "density=0; .*above 0 and at most 1",
        ),
        ({"combination_type": "ties", "density": 1.5}, ValueError, "density=1.5"),
        ({"combination_type": "ties", "density": math.nan}, ValueError, "density=nan"),
        ({"combination_type": "ties", "density": "1"}, TypeError, "density='1'"),
        ({"majority_sign_method": "sum"}, ValueError, "total, frequency"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"seed": 0.5}, TypeError, "seed=0.5"),
    ],
)
def test_arguments_are_checked(changes, error, message):
    arguments = {"adapters": [adapter(1), adapter(2)], **changes}
    with pytest.raises(error, match=message):
        combine_adapters(**arguments)


def test_errors_of_a_combination_check_their_arguments():
    with pytest.raises(TypeError, match=r"Adapter\.load"):
        combination_errors("folder", [adapter(1)])
    with pytest.raises(ValueError, match="'linear' has the shapes"):
        combination_errors(
            Adapter({"linear": LayerUpdate(np.ones((2, 7)), np.ones((5, 2)))}), [adapter(1)]
        )


# -- extraction -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
def test_a_planted_update_is_found_again(kind):
    planted = update(kind, rank=3, scale=0.7, dtype="float64")
    for choice in ({"rank": 3}, {"energy": 1.0}):
        found = extract_update(planted.delta(), **choice, kind=kind)
        assert (found.rank, found.kind, found.scale) == (3, kind, 1.0)
        assert found.a.shape == planted.a.shape and found.b.shape == planted.b.shape
        np.testing.assert_allclose(found.delta(), planted.delta(), atol=1e-10)


def spectrum(*values, shape=(7, 12), seed=0):
    """A matrix with these singular values."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.normal(size=(shape[0], len(values))))[0]
    v = np.linalg.qr(rng.normal(size=(shape[1], len(values))))[0]
    return u @ np.diag(values) @ v.T


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (7, 7)])
def test_extraction_is_the_best_of_its_rank(shape):
    values = [5.0, 3.0, 1.0, 0.1, 1e-3, 1e-5]
    difference = spectrum(*values, shape=shape)
    for rank in range(1, 7):
        found = extract_update(difference, rank=rank)
        error = np.linalg.norm(found.delta() - difference)
        assert error == pytest.approx(np.linalg.norm(values[rank:]), abs=1e-7)
        np.testing.assert_allclose(found.singular_values(), values[:rank], atol=1e-7)
        a, b = found.matrices()
        np.testing.assert_allclose(a @ a.T, b.T @ b, atol=1e-7)


@pytest.mark.parametrize(
    "energy, rank", [(0.1, 1), (25 / 35, 1), (0.72, 2), (0.97, 2), (0.98, 3), (1.0, 3)]
)
def test_energy_gives_the_smallest_rank_that_keeps_it(energy, rank):
    difference = spectrum(5.0, 3.0, 1.0)
    found = extract_update(difference, energy=energy - 1e-9 if energy < 1 else energy)
    assert found.rank == rank
    assert relative(found.delta(), difference) <= math.sqrt(1 - energy) + 1e-7


def test_rank_is_at_most_what_the_shape_allows():
    difference = np.random.default_rng(0).normal(size=(3, 2, 3, 3)).astype("float32")
    found = extract_update(difference, rank=64)
    assert found.rank == 3 and found.kind == "conv"
    np.testing.assert_allclose(found.delta(), difference, atol=1e-6)
    assert found.a.dtype == "float32"


def test_extraction_leaves_out_what_did_not_change():
    differences = {
        "fc": spectrum(2.0, 1.0),
        "same": np.zeros((3, 4)),
        "conv": np.random.default_rng(0).normal(size=(4, 1, 3, 3)),
    }
    before = {path: value.copy() for path, value in differences.items()}
    found = extract_updates(differences, energy=0.9, kinds={"conv": "depthwise"})
    assert list(found) == ["fc", "conv"]
    assert (found["fc"].kind, found["conv"].kind) == ("linear", "depthwise")
    assert found["fc"] == extract_update(differences["fc"], energy=0.9)
    assert all(np.array_equal(before[p], differences[p]) for p in before)
    assert extract_updates({"same": np.zeros((3, 4))}, rank=2) == {}
    assert extract_update(np.zeros((3, 4)), energy=0.5).rank == 1


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, ValueError, "exactly one"),
        ({"rank": 2, "energy": 0.5}, ValueError, "exactly one"),
        ({"rank": 0}, ValueError, "rank=0"),
        ({"rank": True}, TypeError, "rank=True"),
        ({"energy": 0.0}, ValueError, r"energy=0\.0"),
        ({"energy": 1.1}, ValueError, r"energy=1\.1"),
        ({"energy": math.nan}, ValueError, "energy=nan"),
        ({"energy": "all"}, TypeError, "energy='all'"),
        ({"rank": 2, "kind": "batched"}, ValueError, "each position"),
        ({"rank": 2, "kind": "dense"}, ValueError, "kind='dense'"),
    ],
)
def test_extraction_checks_its_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        extract_update(np.ones((3, 4)), **arguments)


def test_extraction_names_every_layer_at_fault():
    differences = {"bias": np.ones(3), "nan": np.full((2, 2), np.nan), "fine": np.ones((2, 2))}
    with pytest.raises(ValueError) as error:
        extract_updates(differences, rank=1)
    text = str(error.value)
    assert "'bias' of shape (3,)" in text and "'nan' with NaN" in text and "fine" not in text


def test_extraction_undoes_a_combination():
    adapters, weights = mixed_adapters(), [0.7, -1.2, 3.0]
    combined = combine_adapters(adapters, weights)
    differences = {path: x.delta() for path, x in combined.layers.items()}
    kinds = {path: x.kind for path, x in combined.layers.items()}
    found = Adapter(extract_updates(differences, rank=6, kinds=kinds))
    assert max(combination_errors(found, adapters, weights).values()) < 1e-6
