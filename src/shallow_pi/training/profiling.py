"""A trace of device and host over a few steps, for XProf, TensorBoard and Perfetto.

`--profile 10:15` traces steps 10 to 14, like a Python range. The device is idle when a trace begins
and has finished the last step when it ends, so the trace holds exactly these steps, each named
`train` with its number. Only process 0 traces, and only its own devices.
"""

import contextlib
import pathlib
import re
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax

from shallow_pi import progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.parallel import processes

# The event that encloses a step; its argument `step_num` is the step's number.
EVENT = "train"


def parse(text: str, last_step: int | None = None) -> range:
    """The steps to trace; an empty range for an empty text.

    Args:
      text: "FIRST:END"; END is the first step that is not traced.
      last_step: last step of the run, if known.

    Raises:
      ValueError: not a range, or steps that the run does not have.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(int(found[1]), int(found[2])) if found else range(0)
    if not steps or steps[0] < 1:
        raise ValueError(
            f"--profile must be FIRST:END with 1 <= FIRST < END, got {text!r}; END is not traced: "
            "10:15 traces steps 10 to 14"
        )
    if last_step is not None and steps[-1] > last_step:
        raise ValueError(
            f"--profile {text} traces step {steps[-1]}, and the last one is {last_step} "
            f"(--num-train-steps): END may be {last_step + 1} at most"
        )
    return steps


@contextlib.contextmanager
def traced(
    first: int, last: int, text: str, folder: pathlib.Path, wait: Callable[[], object]
) -> Iterator[Iterator[int]]:
    """An iterator over the steps `first` to `last` that traces those in the range `text`.

    Leaving the context in mid-range ends the trace and keeps it. An existing trace is not repeated,
    so that the same command can resume a run.

    Args:
      first: the first step, or the first after a resume.
      last: the last step.
      text: see `parse`.
      folder: the run's folder.
      wait: returns when the device has finished all dispatched steps.

    Raises:
      ValueError: the range begins before `first`.
    """
    steps = parse(text, last)
    place = folder / run_folder.PROFILE_FOLDER / f"steps-{steps.start}-{steps.stop - 1}"
    if steps and steps[0] < first and not place.exists():
        raise ValueError(
            f"--profile {text} begins before step {first}, where this run resumes: give a later "
            "range, or leave out --profile"
        )
    if not steps or place.exists() or not processes.is_main():
        yield iter(range(first, last + 1))
        return
    with contextlib.closing(_traced(first, last, steps, place, wait)) as numbers:
        yield numbers


def _traced(
    first: int, last: int, steps: range, place: pathlib.Path, wait: Callable[[], object]
) -> Generator[int, None, None]:
    yield from range(first, steps.start)
    wait()
    with run_folder.writing(place):
        place.mkdir(parents=True)
    jax.profiler.start_trace(place, create_perfetto_trace=True, **_options())
    try:
        for number in steps:
            with jax.profiler.StepTraceAnnotation(EVENT, step_num=number):
                yield number
        wait()
    finally:
        _stop(place)
    yield from range(steps.stop, last + 1)


def _options() -> dict[str, Any]:
    """Options that leave out Python calls, which crowd out the rest; JAX has them from 0.7 on."""
    if not hasattr(jax.profiler, "ProfileOptions"):
        return {}
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return {"profiler_options": options}


def _stop(place: pathlib.Path) -> None:
    try:
        jax.profiler.stop_trace()
    except Exception as error:  # No error of the profiler shall end a run.
        problem = f"{type(error).__name__}: {error}"
        progress.console.print(f"The trace in {place} could not be written: {problem}")
        return
    written = max(place.rglob("perfetto_trace.json.gz"), default=place)
    progress.console.print(
        f"Trace: tensorboard --logdir {place.parent} (needs the package xprof), or drop {written} "
        "on https://ui.perfetto.dev",
        highlight=False,
        soft_wrap=True,
    )
