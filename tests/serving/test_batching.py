"""Rows of several requests in one batch, their order, failures, timeouts and full queues."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("fastapi", reason='needs the extra "serve"')

from tests.helpers.served import expected, picture, write_adapter
from tests.serving.test_predict import ask, check_alive, check_error
from tfimm_lora.serving.batching import Batcher, BatcherClosed, BatchFailed

pytestmark = pytest.mark.once


def batcher(run, **settings):
    return Batcher(run, **{"max_batch": 4, "max_wait": 0.02, "max_waiting": 99, **settings})


def gather(run, rows, **settings):
    """The results or errors of rows that are submitted together."""

    async def submitted():
        async with batcher(run, **settings) as b:
            return await asyncio.gather(*map(b.submit, rows), return_exceptions=True)

    return asyncio.run(submitted())


def test_rows_are_run_in_order_in_batches_of_at_most_the_largest_size():
    batches = []

    def run(rows):
        batches.append(rows)
        return [10 * row for row in rows]

    assert gather(run, range(10)) == [10 * i for i in range(10)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_full_batch_does_not_wait():
    """With a wait of an hour only full batches start."""
    assert gather(lambda rows: rows, range(8), max_wait=3600.0) == list(range(8))


def test_a_failure_is_that_of_its_batch_only():
    def run(rows):
        if 1 in rows:
            raise RuntimeError("broken")
        return rows

    results = gather(run, range(10))
    assert all(isinstance(x, BatchFailed) for x in results[:4]) and results[4:] == [
        4,
        5,
        6,
        7,
        8,
        9,
    ]


def test_a_wrong_number_of_results_is_a_failure():
    assert all(isinstance(x, BatchFailed) for x in gather(lambda rows: rows[1:], range(3)))


def test_an_exception_as_a_result_is_that_of_its_row_only():
    results = gather(lambda rows: [KeyError() if row == 1 else row for row in rows], range(3))
    assert results[0] == 0 and isinstance(results[1], KeyError) and results[2] == 2


def test_rows_whose_callers_are_gone_are_left_out():
    batches, gate = [], threading.Event()

    def run(rows):
        batches.append(rows)
        gate.wait(30)
        return rows

    async def submitted():
        async with batcher(run, max_batch=1, max_wait=0.0) as b:
            first = asyncio.create_task(b.submit(0))
            while not batches:
                await asyncio.sleep(0.001)
            gone = asyncio.create_task(b.submit(1))
            last = asyncio.create_task(b.submit(2))
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.sleep(0)
            gate.set()
            return await asyncio.gather(first, last)

    assert asyncio.run(submitted()) == [0, 2]
    assert batches == [[0], [2]]


def test_closing_answers_the_batch_that_runs_and_no_others():
    started, gate = threading.Event(), threading.Event()

    def run(rows):
        started.set()
        gate.wait(30)
        return rows

    async def submitted():
        b = batcher(run, max_batch=1, max_wait=0.0)
        async with b:
            tasks = [asyncio.create_task(b.submit(i)) for i in range(2)]
            while not started.is_set():
                await asyncio.sleep(0.001)
            asyncio.get_running_loop().call_later(0.05, gate.set)
        tasks.append(asyncio.create_task(b.submit(2)))
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *others = asyncio.run(submitted())
    assert first == 0 and all(isinstance(x, BatcherClosed) for x in others)


# -- over HTTP -------------------------------------------------------------------------------


def at_once(client, requests):
    """Send requests in as many threads; their answers, in order."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return [x.result() for x in [pool.submit(ask, client, *r[0], **r[1]) for r in requests]]


def wait_for(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError


def metric(client, name):
    (line,) = [x for x in client.get("/metrics").text.splitlines() if x.startswith(f"{name} ")]
    return float(line.split()[1])


def test_requests_of_different_adapters_are_one_batch(serve, bank):
    client = serve(max_batch=6, max_wait_ms=10_000)
    pictures = [picture(i) for i in range(6)]
    names = ["rose", "oak", "rose", "bare", "oak", "rose"]
    answers = at_once(
        client, [((x,), {"adapter": n, "top": "9"}) for (x, _), n in zip(pictures, names)]
    )
    assert len(bank.calls) == 1 and sorted(bank.calls[0]) == sorted(names)
    seeds = {"rose": (1, 4), "oak": (2, 7), "bare": (3, 4)}
    for answer, (_, colour), name in zip(answers, pictures, names):
        p = {x["index"]: x["probability"] for x in answer.json()["top"]}
        wanted = expected(colour, *seeds[name])
        np.testing.assert_allclose([p[i] for i in range(len(p))], wanted, rtol=1e-5)
    assert metric(client, "tfimm_lora_batch_rows_sum") == 6


def test_a_batch_that_fails_answers_500_and_the_next_one_works(serve, adapters):
    write_adapter(adapters, "broken")
    client = serve(max_batch=2, max_wait_ms=10_000)
    answers = at_once(client, [((picture()[0],), {"adapter": n}) for n in ("broken", "rose")])
    for answer in answers:
        check_error(answer, 500, "failed in the model")
        assert "RuntimeError" not in answer.text
    answers = at_once(client, [((picture()[0],), {"adapter": n}) for n in ("oak", "rose")])
    assert [x.status_code for x in answers] == [200, 200]


def test_a_full_queue_and_a_timeout(serve, bank):
    """Two batches' places are taken by requests that the model does not answer in time."""
    client = serve(max_batch=1, timeout=0.5)
    bank.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(ask, client, picture()[0], adapter="rose") for _ in range(8)]
        wait_for(lambda: client.get("/health").json()["in_progress"] == 8)
        refused = ask(client, picture()[0], adapter="rose")
        check_error(refused, 503, "8 others")
        assert refused.headers["Retry-After"] == "1"
        for answer in waiting:
            check_error(answer.result(), 504, "0.5 s")
    bank.gate.set()
    check_alive(client)
    assert client.get("/health").json()["in_progress"] == 0
