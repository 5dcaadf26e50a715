"""How a batch is divided into parts."""

import numpy as np
import pytest

from tfimm_lora.bank.functions import OWN_BATCH, batch_plan

pytestmark = pytest.mark.once


@pytest.mark.parametrize("seed", range(20))
def test_every_example_is_in_one_part_that_fits(seed):
    rng = np.random.default_rng(seed)
    capacity, different = int(rng.integers(1, 9)), int(rng.integers(1, 20))
    names = [[None, *map(str, range(different))][i] for i in rng.integers(0, different + 1, 50)]
    names = names[: rng.integers(1, 51)]
    parts = batch_plan(names, capacity)
    assert sorted(i for indices, _ in parts for i in indices) == [*range(len(names))]
    for indices, uniform in parts:
        found = {names[i] for i in indices}
        assert indices == sorted(indices)
        assert uniform == (len(found) == 1)
        assert len(found) <= capacity
        if not uniform:
            assert all([names[i] for i in indices].count(n) < OWN_BATCH for n in found)
    mixed = [len({names[i] for i in indices}) for indices, _ in parts if len(indices) < 8]
    # No more parts than needed: all but the last are full.
    assert len([count for count in mixed if count < capacity]) <= 1 or len(parts) == 1


@pytest.mark.parametrize(
    ("names", "capacity", "parts"),
    [
        ([], 3, []),
        (["a"] * 3, 3, [([0, 1, 2], True)]),
        ([None] * 9 + ["a"], 3, [([*range(9)], True), ([9], True)]),
        (["a", "b", "a"], 1, [([0, 2], True), ([1], True)]),
        (["a", None, "b"], 2, [([0, 1], False), ([2], True)]),
        (["a"] * 7 + ["b"], 2, [([*range(8)], False)]),
        (["b", *["a"] * 8, "c"], 2, [([*range(1, 9)], True), ([0, 9], False)]),
    ],
)
def test_parts(names, capacity, parts):
    assert batch_plan(names, capacity) == parts
