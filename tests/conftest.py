"""Settings for every test: no network, and no threads that spin against each other on a small machine. And the command line as a call."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once by OpenMP, so before torch or llama.cpp load; children inherit it

import signal
import sys

import pytest


@pytest.fixture
def run(monkeypatch, capfd):
    """edgeq ARGUMENTS -> (exit status, stdout, stderr), in this process."""
    from edgeq import cli

    def call(*arguments):
        before = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(sys, "argv", ["edgeq", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        signal.signal(signal.SIGTERM, before)
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return call
