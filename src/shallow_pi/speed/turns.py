"""Run processes that compile side by side and then have the device to themselves, in turn.

A process says that it is compiled by making a file, then waits for a line on its standard input
(see `commands.benchmark_variant`). The first process compiles and runs alone, so that its programs
are tuned undisturbed and the others find what was tuned in the cache they share. The others come in
waves: a wave compiles together, and when the last one is ready, each gets its turn, in order.
"""

import contextlib
import dataclasses
import functools
import pathlib
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

# Suffix of the file that a process makes, beside the file it is to write.
READY = ".ready"
POLL_SECONDS = 0.05
# Usual length of a turn: so much time is left for each that is compiled, whatever else is not.
TURN_SECONDS = 8.0
# Lines of a failed process's log that are shown.
TAIL = 4


@dataclasses.dataclass(frozen=True)
class Job:
    """A process to run."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    # The file it writes; its log lies beside it.
    output: pathlib.Path

    @property
    def log(self) -> pathlib.Path:
        """Standard output and standard error."""
        return self.output.with_suffix(".log")

    @property
    def ready(self) -> pathlib.Path:
        """The file it makes when it is compiled."""
        return self.output.with_suffix(READY)

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process."""
        self.output.unlink(missing_ok=True)
        self.ready.unlink(missing_ok=True)
        with self.log.open("wb") as log:
            return subprocess.Popen(
                self.command,
                env=dict(self.environment),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def outcome(self, code: int) -> str:
        """Empty if it has written its file; else the end of its log."""
        self.ready.unlink(missing_ok=True)
        if code == 0 and self.output.exists():
            return ""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"exit status {code}: " + " | ".join(lines[-TAIL:])


def run(
    jobs: Sequence[Job],
    *,
    together: int,
    budget_s: float,
    ended: Callable[[Job, str], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run every job, in waves.

    Args:
      jobs: the most important first.
      together: processes that compile at once.
      budget_s: seconds after which no process is started and none gets a turn; one that has it by
        then may take a tenth longer.
      ended: called with each job as it ends and the reason why it gave nothing, or "".
      clock: seconds.
    """
    began = clock()

    def left() -> float:
        return began + budget_s - clock()

    for wave in _waves(jobs, together):
        if left() <= 0:
            for job in wave:
                ended(job, f"not started: the budget of {budget_s:.0f} s was used up")
            continue
        running = {job.name: job.start() for job in wave}
        try:
            _turns(wave, running, left, budget_s / 10, ended)
        finally:
            for process in running.values():
                _end(process)


def _waves(jobs: Sequence[Job], together: int) -> Iterator[Sequence[Job]]:
    if jobs:
        yield jobs[:1]
    for first in range(1, len(jobs), together):
        yield jobs[first : first + together]


def _turns(
    wave: Sequence[Job],
    running: Mapping[str, subprocess.Popen[bytes]],
    left: Callable[[], float],
    grace_s: float,
    ended: Callable[[Job, str], None],
) -> None:
    waiting = list(wave)
    while waiting and left() > 0:
        _wait(
            lambda: all(_compiled(job, running[job.name]) for job in waiting),
            lambda: left() - TURN_SECONDS * len(waiting),
        )
        # All are compiled, or time is running out for those that are, or none is.
        _wait(lambda: any(_compiled(job, running[job.name]) for job in waiting), left)
        turn = next((job for job in waiting if _compiled(job, running[job.name])), None)
        if turn is None:
            break
        waiting.remove(turn)
        process = running[turn.name]
        _give(process)
        _wait(functools.partial(_over, process), lambda: left() + grace_s)
        code = process.poll()
        if code is None:
            _end(process)
        ended(
            turn,
            "stopped while it was measured: the time was up"
            if code is None
            else turn.outcome(code),
        )
    for job in waiting:
        _end(running[job.name])
        job.ready.unlink(missing_ok=True)
        ended(job, "not compiled or not measured when the time was up")


def _compiled(job: Job, process: subprocess.Popen[bytes]) -> bool:
    return job.ready.exists() or _over(process)


def _over(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is not None


def _wait(done: Callable[[], bool], left: Callable[[], float]) -> None:
    while not done() and left() > 0:
        time.sleep(POLL_SECONDS)


def _give(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None, "started with a pipe"
    with contextlib.suppress(BrokenPipeError):  # It may have ended already.
        process.stdin.write(b"\n")
        process.stdin.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    if process.stdin is not None and not process.stdin.closed:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
