"""The command line, in this process and in others that are killed."""

import os
import signal
import subprocess
import sys

from tests.helpers.recipes import assert_same_run
from tfimm_lora.cli import main


def ask(capsys, *words, expect=0):
    """Run a command in this process; return what it prints and what it reports."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert code == expect, err
    return out, err


def assert_resumes_after_kill(folder, words):
    """Kill ``finetune`` after the first of three epochs: resumed, it learns the same.

    Args:
        folder: Where the runs "whole" and "run" are written.
        words: The command without ``--out`` and ``--resume``.

    Returns:
        What the run that was not killed printed.
    """

    def start(out):
        command = [sys.executable, "-m", "tfimm_lora", *map(str, words)]
        return subprocess.Popen(
            [*command, "--out", str(folder / out), "--resume"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    whole = start("whole")
    said, errors = whole.communicate()
    assert whole.returncode == 0, errors[-2000:]
    child = start("run")
    for line in child.stderr:
        if line.startswith("epoch 1/3"):
            os.kill(child.pid, signal.SIGKILL)
            break
    child.wait()
    assert child.returncode == -signal.SIGKILL
    again = start("run")
    _, errors = again.communicate()
    assert again.returncode == 0 and "resuming the run" in errors, errors[-2000:]
    assert_same_run(folder / "run", folder / "whole")
    return said
