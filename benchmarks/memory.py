"""What a process holds: its resident size now and at its highest, in MB."""

import contextlib
import ctypes
import gc
import os
import resource
import sys
from pathlib import Path

_CLEAR = Path("/proc/self/clear_refs")


def settled():
    """The resident size now, after what can be given back was given back."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return _highest_ever()
    return pages * resource.getpagesize() / 1e6


def start_over():
    """Let the highest size be counted from now on, where the system can do that; elsewhere
    it is that of the whole life of the process."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


def highest():
    """The highest resident size since ``start_over``."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return _highest_ever()
    sizes = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(sizes[0]) * 1024 / 1e6 if sizes else _highest_ever()


def extra(function):
    """What a call takes at its highest over what was held before it, and what it returns."""
    before = settled()
    start_over()
    result = function()
    return max(0.0, highest() - before), result


def _highest_ever():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def threads():
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
