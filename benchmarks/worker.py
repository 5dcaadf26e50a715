"""A contender in a process of its own, which does one round of work when it is told to.

Frameworks do not share a process: each contender gets one, builds its model, and waits on a
pipe. So the rounds of all can take turns, and the peak memory of each is its own. ``Worker``
is the side that tells, ``main`` the one that works.

Lines on the pipe are JSON: {"do": "step"} is answered by
{"wall": 0.8, "processor": 1.5}.
"""

import dataclasses
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import entrants
import memory

#: A call that is shorter is repeated, in seconds.
SHORT = 0.4


class Failed(Exception):
    """A worker that could not do its work; the message is the last line of its error."""


@dataclasses.dataclass
class Built:
    """A contender's model with a batch, ready to work.

    Attributes:
        trained: how many numbers are trained.
        prepare: makes the optimizer's state.
        trace: makes the graph of the step without running it.
        actions: what it can be told to do: "step", "forward", ...
    """

    trained: int
    prepare: Callable
    trace: Callable
    actions: dict


class Worker:
    """A process that works on a task: contender, model, batch, rank, threads, small."""

    def __init__(self, task):
        self.task = task
        here = Path(__file__).resolve()
        self.process = subprocess.Popen(
            [sys.executable, str(here), json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(task),
            cwd=here.parent.parent,
        )

    def start(self):
        """Wait until it is ready; what it says of itself: trained, memory, actions."""
        self.about = self._answer()
        return self

    def do(self, action):
        """How long one call of an action took; see ``timed``."""
        print(json.dumps({"do": action}), file=self.process.stdin, flush=True)
        return self._answer()

    def end(self):
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _answer(self):
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"failed": "the process ended"}
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer


def environment(task):
    """The environment of a worker: which Keras, and how many threads."""
    threads = str(task["threads"])
    return {
        **os.environ,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_USE_LEGACY_KERAS": str(int(entrants.legacy(task["contender"]))),
        "KERAS_BACKEND": "tensorflow",
        "OMP_NUM_THREADS": threads,
        "TF_NUM_INTRAOP_THREADS": threads,
        "TF_NUM_INTEROP_THREADS": threads,
        "CUDA_VISIBLE_DEVICES": "",
    }


def measured_memory(built):
    """What training takes, in MB over what the model and the batch hold: ``peak``, the
    optimizer's state and the highest point of the first steps; ``trace``, the graph, which
    is made before. The first steps are also those that are not counted in the times."""
    before = memory.settled()
    built.prepare()
    state = max(0.0, memory.settled() - before)
    traced, _ = memory.extra(built.trace)
    peak, _ = memory.extra(lambda: [built.actions["step"]() for _ in range(2)])
    return {"peak": state + peak, "trace": traced}


def timed(function):
    """How long a call takes, in seconds: the median of three if it is short. On the wall's
    clock, and in time of all processors together, which waiting for them does not lengthen."""
    times, used = [], []
    while not times or (len(times) < 3 and times[0] < SHORT):
        start, before = time.perf_counter(), time.process_time()
        function()
        times.append(time.perf_counter() - start)
        used.append(time.process_time() - before)
    return {"wall": statistics.median(times), "processor": statistics.median(used)}


def main():
    # What libraries print must not come between the answers.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values):
        print(json.dumps(values), file=pipe, flush=True)

    try:
        task = json.loads(sys.argv[1])
        module = importlib.import_module(entrants.CONTENDERS[task["contender"]][0])
        built = module.build(task, entrants.MODELS[task["model"]])
        used = measured_memory(built)
        for name, action in built.actions.items():
            if name != "step":
                action()
        answer(trained=built.trained, memory=used, actions=list(built.actions))
        for line in sys.stdin:
            answer(**timed(built.actions[json.loads(line)["do"]]))
    except Exception as error:
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        answer(failed=text[:200])
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
