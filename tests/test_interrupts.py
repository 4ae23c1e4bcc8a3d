"""Ctrl-C in processes that another one starts."""

import subprocess
import sys

from shallow_pi import interrupts

CODE = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('went on')"


def test_a_process_started_while_ctrl_c_is_held_ignores_it():
    with interrupts.held():
        child = subprocess.Popen(
            [sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    assert child.communicate(timeout=60) == ("went on\n", "")
    alone = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert alone.stdout == ""
