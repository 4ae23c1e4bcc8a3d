"""The terminal's signals in processes that another one starts."""

import subprocess
import sys

import pytest

from shallow_pi import interrupts

CODE = "import os, signal; os.kill(os.getpid(), signal.{}); print('went on')"


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_process_started_while_the_terminals_signals_are_held_ignores_them(name):
    words = [sys.executable, "-c", CODE.format(name)]
    with interrupts.held():
        child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.communicate(timeout=60) == ("went on\n", "")
    alone = subprocess.run(words, capture_output=True, text=True)
    assert alone.stdout == ""
