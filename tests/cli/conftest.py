"""Run the command line in this process."""

import pytest

from tfimm_lora.cli import main


@pytest.fixture
def call(capsys):
    """Run the command line: its stdout and stderr, after a check of the exit code."""

    def call(*argv, expect=0):
        capsys.readouterr()
        code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert code == expect, err
        return out, err

    return call
