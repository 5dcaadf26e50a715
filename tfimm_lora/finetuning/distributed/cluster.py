"""``Cluster``: the workers of a training on several machines, and how they find each other."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Where TensorFlow looks for the cluster.
VARIABLE = "TF_CONFIG"

EXAMPLE = (
    '{"cluster": {"worker": ["10.0.0.1:12345", "10.0.0.2:12345"]}, '
    '"task": {"type": "worker", "index": 0}}'
)

#: Those that train; the chief is the first worker where there is none of its own.
_JOBS = ("chief", "worker")
_TASK = re.compile(r"/job:(\w+)/(?:replica:\d+/)?task:(\d+)")


@dataclass(frozen=True)
class Cluster:
    """The workers that train together, as ``TF_CONFIG`` names them.

    Args:
        tasks: (job, number in the job, "host:port") of each worker, the chief first.
        index: Which of them this process is.

    Example:
        >>> from tfimm_lora.finetuning.distributed.cluster import EXAMPLE, Cluster
        >>> cluster = Cluster.from_environment({"TF_CONFIG": EXAMPLE})
        >>> cluster.addresses, cluster.index
        (('10.0.0.1:12345', '10.0.0.2:12345'), 0)
    """

    tasks: tuple[tuple[str, int, str], ...]
    index: int

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Cluster:
        """Read ``TF_CONFIG``.

        Raises:
            ValueError: if it is not there, or does not name the workers and this one.
        """
        text = environ.get(VARIABLE, "")
        if not text:
            raise ValueError(
                f"Received strategy='multiworker' without {VARIABLE} in the environment; "
                f"expected the workers and which of them this one is, such as {EXAMPLE}."
            )
        try:
            read = json.loads(text)
            return cls.of(read["cluster"], read["task"]["type"], read["task"]["index"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Received {VARIABLE}={text}; expected addresses of workers (and a chief), and "
                f"which of them this one is, such as {EXAMPLE}."
            ) from error

    @classmethod
    def of(cls, jobs: Mapping[str, Any], job: str, number: int) -> Cluster:
        """The cluster of a mapping from job to addresses, seen from one of its workers."""
        unknown = set(jobs) - set(_JOBS)
        if unknown:
            raise ValueError(f"jobs that do not train: {', '.join(sorted(unknown))}")
        tasks = tuple(
            (job, number, str(address))
            for job in _JOBS
            for number, address in enumerate(jobs.get(job, ()))
        )
        for _, _, address in tasks:
            _split(address)
        return cls(tasks, [task[:2] for task in tasks].index((job, number)))

    @property
    def addresses(self) -> tuple[str, ...]:
        """ "host:port" of each worker."""
        return tuple(address for _, _, address in self.tasks)

    def meet(self, patience: float) -> None:
        """Wait until every worker listens at its address, as this one does meanwhile.

        TensorFlow waits for them too, but for ever, and nothing can interrupt it.

        Args:
            patience: For how many seconds.

        Raises:
            TimeoutError: if one has not come by then.
            OSError: if the address of this worker is not free.
        """
        end = time.monotonic() + patience
        with _listening(self.addresses[self.index]):
            missing = [a for i, a in enumerate(self.addresses) if i != self.index]
            while missing := [address for address in missing if not _answers(address)]:
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"Worker {self.index} of {len(self.tasks)} has waited {patience:g} "
                        f"seconds for {', '.join(missing)}. Start all workers, each with the "
                        f"same cluster in {VARIABLE} and a number of its own."
                    )
                time.sleep(0.1)

    def named_in(self, message: str) -> str:
        """The other worker that an error of TensorFlow tells of."""
        for job, number in _TASK.findall(message):
            for index, (*task, address) in enumerate(self.tasks):
                if task == [job, int(number)] and index != self.index:
                    return f"worker {index} ({address})"
        return "another worker"


def _answers(address: str) -> bool:
    """Whether somebody listens at an address."""
    with contextlib.suppress(OSError), socket.create_connection(_split(address), timeout=1):
        return True
    return False


def _listening(address: str) -> socket.socket:
    """A socket that listens at the port of an address."""
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", _split(address)[1]),
            family=socket.AF_INET6 if both else socket.AF_INET,
            dualstack_ipv6=both,
        )
    except OSError as error:
        raise OSError(
            f"This worker cannot listen at {address}, its address in {VARIABLE}: {error}. Is "
            "another one running there?"
        ) from error


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
