"""Exit status and message of a command that fails."""

import contextlib
from collections.abc import Iterator

from shallow_pi import progress
from shallow_pi.parallel import processes


@contextlib.contextmanager
def exit_on(*errors: type[Exception]) -> Iterator[None]:
    """Exit with an error's message and status 1 instead of a traceback.

    Covers the errors a user can cause (`ValueError`, `OSError`, a platform that JAX cannot start),
    and `errors`; Ctrl-C exits with status 130. In a job of several processes every error, a crash
    too, is prefixed with its process and ends that process (`processes.leave`).
    """
    caught: tuple[type[Exception], ...] = (ValueError, OSError, *errors)
    try:
        yield
    except KeyboardInterrupt as error:
        raise _leave(str(error) or "interrupted", 130) from error
    except caught as error:
        raise _leave(str(error), 1) from error
    except Exception as error:
        if fault := processes.device_fault(error):
            raise _leave(fault, 1) from error
        processes.report_crash()
        raise


def _leave(message: str, status: int) -> SystemExit:
    print(f"{processes.prefix()}error: {message}", file=progress.Output("stderr"))
    processes.leave(status)
    return SystemExit(status)
