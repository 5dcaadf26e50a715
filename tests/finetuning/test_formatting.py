"""Numbers are shown as they are: nothing rounds to 0 %, 100 % or zero that is not."""

import re

import numpy as np
import pytest
from scipy.stats import binomtest

from tfimm_lora.finetuning.metrics import Evaluation
from tfimm_lora.finetuning.report.formatting import (
    byte_text,
    decimal,
    duration,
    interval,
    percent,
    probability,
)

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    "share, expected",
    [
        (0, "0 %"),
        (3.5e-8, "<0.1 %"),
        (0.0004999, "<0.1 %"),
        (0.0006, "0.1 %"),
        (0.12345, "12.3 %"),
        (0.9994, "99.9 %"),
        (0.99951, ">99.9 %"),
        (0.9999999, ">99.9 %"),
        (1, "100 %"),
        (1.0004, "100.0 %"),
        (3.2, "320.0 %"),  # the rank of an update may be larger than that of its kernel
    ],
)
def test_a_share_in_percent(share, expected):
    assert percent(share) == expected


def test_more_digits_have_smaller_bounds():
    assert percent(0.00004, 2) == "<0.01 %" and percent(0.99996, 2) == ">99.99 %"
    assert percent(0.0004, 2) == "0.04 %"
    assert percent(0.004, 0) == "<1 %" and percent(0.996, 0) == ">99 %"


def test_a_probability_is_never_shown_as_certain():
    assert [probability(p) for p in (0.0, 3.5e-8, 0.5, 1.0)] == [
        "<0.1 %",
        "<0.1 %",
        "50.0 %",
        ">99.9 %",
    ]


def _wilson(k, n):
    """The bounds p with |k / n - p| = z sqrt(p (1 - p) / n), as roots of the quadratic."""
    z2 = 1.959963984540054**2
    p = k / n
    roots = np.roots([1 + z2 / n, -(2 * p + z2 / n), p * p])
    return sorted(float(np.real(root)) for root in roots)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 97, 1000, 9999])
def test_an_interval_contains_its_value_also_as_shown(n):
    for k in sorted({0, 1, n // 3, n // 2, n - 1, n}):
        true = np.zeros(n, int)
        logits = np.zeros((n, 2))
        logits[:k, 0] = logits[k:, 1] = 3
        value = Evaluation.of(logits, true)
        low, high = value.accuracy_interval()
        assert 0 <= low <= value.accuracy <= high <= 1
        expected = tuple(binomtest(k, n).proportion_ci(method="wilson"))
        np.testing.assert_allclose((low, high), expected, atol=1e-12)
        np.testing.assert_allclose((low, high), _wilson(k, n), atol=1e-7)
        for digits in (0, 1, 2):
            first, last = interval(low, high, digits).split(" to ")
            shown = _number(percent(value.accuracy, digits))
            # As shown, it contains the shown and the exact value.
            assert _number(first) <= shown <= _number(last)
            assert _number(first) / 100 <= value.accuracy <= _number(last) / 100 or (
                last.startswith(">") or first.startswith("<")
            )


def _number(text):
    """The number in a percentage; ">99.9 %" is a little more than 99.9."""
    sign, digits = re.fullmatch(r"([<>]?)([\d.]+) %", text).groups()
    return float(digits) + {"": 0, ">": 1e-9, "<": -1e-9}[sign]


def test_bounds_are_rounded_outwards_but_not_by_rounding_errors():
    assert interval(0.33333, 0.33341) == "33.3 % to 33.4 %"
    assert interval(0.29, 0.57) == "29.0 % to 57.0 %"  # 100 * 0.29 < 29, 100 * 0.57 < 57
    assert interval(0.00001, 0.99999) == "<0.1 % to >99.9 %"
    assert interval(0, 1) == "0 % to 100 %"


def test_small_numbers_are_not_zero():
    assert [decimal(x) for x in (0.0, 1.23456, 0.00004, 3.5e-8)] == [
        "0.0000",
        "1.2346",
        "4e-05",
        "3.5e-08",
    ]
    assert decimal(0.0004, 3) == "0.0004" and decimal(0.0006, 3) == "0.001"
    assert [duration(x) for x in (0, 0.01, 59.94, 59.96, 3599.7)] == [
        "0.0 s",
        "<0.1 s",
        "59.9 s",
        "1 min 0 s",
        "1 h 0 min",
    ]
    assert [byte_text(x) for x in (0, 999, 1000, 999_949, 999_950, 10**15)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "999.9 kB",
        "1.0 MB",
        "1000.0 TB",
    ]
