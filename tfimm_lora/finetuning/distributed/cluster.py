"""``Cluster``: the workers of a training on several machines, and their addresses."""

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

#: The environment variable with the cluster, which TensorFlow reads.
VARIABLE = "TF_CONFIG"

EXAMPLE = (
    '{"cluster": {"worker": ["10.0.0.1:12345", "10.0.0.2:12345"]}, '
    '"task": {"type": "worker", "index": 0}}'
)

#: The jobs that train. Without a chief job, the first worker is the chief.
_JOBS = ("chief", "worker")
_TASK = re.compile(r"/job:(\w+)/(?:replica:\d+/)?task:(\d+)")


@dataclass(frozen=True)
class Cluster:
    """The workers that train together, as listed in ``TF_CONFIG``.

    Args:
        tasks: (job, index in the job, "host:port") of each worker, the chief first.
        index: The index of this process among them.

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
            ValueError: if it is not set or not valid.
        """
        text = environ.get(VARIABLE, "")
        if not text:
            raise ValueError(
                f"Received strategy='multiworker' without {VARIABLE} in the environment; "
                f"expected the workers and the task of this process, such as {EXAMPLE}."
            )
        try:
            read = json.loads(text)
            return cls.of(read["cluster"], read["task"]["type"], read["task"]["index"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Received {VARIABLE}={text}; expected the addresses of workers (and a chief), "
                f"and the task of this process, such as {EXAMPLE}."
            ) from error

    @classmethod
    def of(cls, jobs: Mapping[str, Any], job: str, number: int) -> Cluster:
        """Create the cluster from a mapping from job to addresses, for one of its workers."""
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
        """Listen at the address of this worker until all other workers listen at theirs.

        TensorFlow also waits for the workers, but without a timeout, and it cannot be
        interrupted.

        Args:
            patience: The timeout in seconds.

        Raises:
            TimeoutError: if a worker does not start in time.
            OSError: if the address of this worker is in use.
        """
        end = time.monotonic() + patience
        with _listening(self.addresses[self.index]):
            missing = [a for i, a in enumerate(self.addresses) if i != self.index]
            while missing := [address for address in missing if not _answers(address)]:
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"Worker {self.index} of {len(self.tasks)} has waited {patience:g} "
                        f"seconds for {', '.join(missing)}. Start all workers, each with the "
                        f"same cluster in {VARIABLE} and its own index."
                    )
                time.sleep(0.1)

    def named_in(self, message: str) -> str:
        """The other worker that an error message of TensorFlow names."""
        for job, number in _TASK.findall(message):
            for index, (*task, address) in enumerate(self.tasks):
                if task == [job, int(number)] and index != self.index:
                    return f"worker {index} ({address})"
        return "another worker"


def _answers(address: str) -> bool:
    """Whether a process listens at an address."""
    with contextlib.suppress(OSError), socket.create_connection(_split(address), timeout=1):
        return True
    return False


def _listening(address: str) -> socket.socket:
    """A socket that listens on the port of an address."""
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", _split(address)[1]),
            family=socket.AF_INET6 if both else socket.AF_INET,
            dualstack_ipv6=both,
        )
    except OSError as error:
        raise OSError(
            f"This worker cannot listen at {address}, its address in {VARIABLE}: {error}. Stop "
            "the process that uses this port, or change the address."
        ) from error


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
