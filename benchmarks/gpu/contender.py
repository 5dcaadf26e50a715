"""One contender of ``measure.py``: builds its model, measures, and prints a line of JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from measure import Entry

ROUNDS, STEPS, WARMUP = 7, 10, 3
SMALL_ROUNDS, SMALL_STEPS = 2, 1


class Contender(NamedTuple):
    """A model with a batch, ready to work.

    Attributes:
        run: Starts one step, or one forward pass of a mixed batch.
        wait: Waits until all that was started is done.
        peak: The largest memory so far, in bytes; None on a CPU.
        device: The name of the device.
        trained: The number of trained parameters.
        plain: Starts one forward pass of the plain model, for mixed batches.
    """

    run: Callable[[], Any]
    wait: Callable[[], None]
    peak: Callable[[], int | None]
    device: str
    trained: int
    plain: Callable[[], Any] | None = None


def build(entry: Entry, small: bool) -> Contender:
    if entry.contender.startswith("peft"):
        import peft_contenders

        return peft_contenders.build(entry, small)
    import keras_contenders

    return keras_contenders.build(entry, small)


def milliseconds(run: Callable[[], Any], wait: Callable[[], None], small: bool) -> list[float]:
    """The time of a call, once for each round of several."""
    rounds, steps = (SMALL_ROUNDS, SMALL_STEPS) if small else (ROUNDS, STEPS)
    for _ in range(1 if small else WARMUP):
        run()
    wait()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(steps):
            run()
        wait()
        times.append(1e3 * (time.perf_counter() - started) / steps)
    return times


def step(entry: Entry, small: bool) -> dict[str, Any]:
    """Time and memory of a training step."""
    started = time.perf_counter()
    made = build(entry, small)
    made.run()
    made.wait()
    first = time.perf_counter() - started
    times = milliseconds(made.run, made.wait, small)
    peak = made.peak()
    return {
        "ms": round(statistics.median(times), 2),
        "low": round(min(times), 2),
        "high": round(max(times), 2),
        "peak_mb": None if peak is None else round(peak / 2**20),
        "first_step_s": round(first, 1),
        "trained": made.trained,
        "device": made.device,
    }


def mixed_batch(entry: Entry, small: bool) -> dict[str, Any]:
    """A batch in which every row has another adapter, and the plain model, in turn."""
    made = build(entry, small)
    assert made.plain is not None
    plain = milliseconds(made.plain, made.wait, small)
    mixed = milliseconds(made.run, made.wait, small)
    throughput = statistics.median(plain) / statistics.median(mixed)
    return {
        "ms": round(statistics.median(mixed), 2),
        "plain_ms": round(statistics.median(plain), 2),
        "throughput": round(throughput, 3),
        "device": made.device,
    }


def largest_batch(entry: Entry, small: bool) -> dict[str, Any]:
    """The largest batch that fits, by doubling; printed as it grows."""
    fits, device = 0, ""
    batch = entry.batch
    while not (small and fits):
        try:
            made = build(entry._replace(batch=batch), small)
            made.run()
            made.wait()
        except Exception as error:
            if "memory" not in f"{type(error).__name__} {error}".lower():
                raise
            break
        fits, device = batch, made.device
        print(json.dumps({"batch": fits, "at_least": True, "device": device}), flush=True)
        del made
        batch *= 2
    return {"batch": fits, "device": device}


MEASUREMENTS = {"step": step, "mixed batch": mixed_batch, "largest batch": largest_batch}


def main() -> None:
    entry = Entry(**json.loads(sys.argv[1]))
    small = "--small" in sys.argv
    print(json.dumps(MEASUREMENTS[entry.measurement](entry, small)))


if __name__ == "__main__":
    main()
