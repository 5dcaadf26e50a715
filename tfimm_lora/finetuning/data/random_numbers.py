"""TensorFlow's stateless random numbers (Philox), computed with numpy.

So a run without TensorFlow has the same order of pictures and the same augmentation as one with
it.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
#: The key with which TensorFlow mixes the bits of a seed.
_SCRAMBLING = (0x3EC8F720, 0x02461E29)
_LOW = 0xFFFFFFFF

Seed = tuple[int, int]


def uniform(seed: Seed, count: int) -> np.ndarray:
    """Return float32 numbers in [0, 1): ``tf.random.stateless_uniform((count,), seed)``.

    Example:
        >>> from tfimm_lora.finetuning.data.random_numbers import uniform
        >>> [round(float(x), 4) for x in uniform((1, 2), 2)]
        [0.8441, 0.192]
    """
    mantissa = _bits(seed, count) & np.uint32(0x7FFFFF)
    numbers: np.ndarray = (mantissa | np.uint32(127 << 23)).view(np.float32) - np.float32(1)
    return numbers


def fold_in(seed: Seed, number: int, bits: int = 64) -> Seed:
    """Return a new seed: ``tf.random.fold_in(seed, number)`` for an integer of these bits."""
    words = _bits(seed, bits // 32).tolist()
    first = sum(word << 32 * i for i, word in enumerate(words))
    return first - (1 << bits) if first >> bits - 1 else first, number


def shuffled(seed: Seed, count: int) -> np.ndarray:
    """Return a permutation: ``tf.random.experimental.stateless_shuffle(range(count), seed)``.

    Example:
        >>> from tfimm_lora.finetuning.data.random_numbers import shuffled
        >>> sorted(shuffled((1, 2), 4).tolist())
        [0, 1, 2, 3]
    """
    order = list(range(count))
    left = np.arange(count, 1, -1, dtype=np.uint32)
    for i, offset in enumerate((_bits(seed, len(left)) % left).tolist()):
        order[i], order[i + offset] = order[i + offset], order[i]
    return np.array(order, np.int64)


def _bits(seed: Seed, count: int) -> np.ndarray:
    """Return random uint32."""
    words = [word for value in seed for word in (value & _LOW, value >> 32 & _LOW)]
    mixed = [int(word) for word in _philox(np.array([words], np.uint64), _SCRAMBLING)[0]]
    counters = np.zeros((-(-count // 4), 4), np.uint64)
    counters[:, 0] = np.arange(len(counters))
    counters[:, 2:] = mixed[2:]
    return _philox(counters, (mixed[0], mixed[1])).astype(np.uint32).ravel()[:count]


def _philox(counters: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Return the Philox 4x32 blocks of counters (n, 4) of 32 bits, as uint64 (n, 4).

    Reference: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
    """
    low, half = np.uint64(_LOW), np.uint64(32)
    a, b, c, d = counters.T
    first, second = key
    for _ in range(_ROUNDS):
        left, right = (x * np.uint64(m) for x, m in zip((a, c), _MULTIPLIERS))
        a = (right >> half) ^ b ^ np.uint64(first)
        c = (left >> half) ^ d ^ np.uint64(second)
        b, d = right & low, left & low
        first, second = (first + _WEYL[0]) & _LOW, (second + _WEYL[1]) & _LOW
    return np.stack([a, b, c, d], 1)
