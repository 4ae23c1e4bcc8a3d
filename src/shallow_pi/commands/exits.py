"""Exit status and message of a command that fails."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from shallow_pi.parallel import processes


@contextlib.contextmanager
def exit_on(
    *errors: type[Exception], interrupted: Callable[[], str] = lambda: "interrupted"
) -> Iterator[None]:
    """Exit with an error's message and status 1 instead of a traceback.

    Covers the errors a user can cause (`ValueError`, `OSError`), and `errors`; Ctrl-C exits with
    status 130 and the message of `interrupted`. In a job of several processes every error, a crash
    too, is prefixed with its process and ends that process (`processes.leave`).
    """
    caught: tuple[type[Exception], ...] = (ValueError, OSError, *errors)
    try:
        yield
    except KeyboardInterrupt as error:
        print(f"{processes.prefix()}error: {interrupted()}", file=sys.stderr)
        processes.leave(130)
        raise SystemExit(130) from error
    except caught as error:
        print(f"{processes.prefix()}error: {error}", file=sys.stderr)
        processes.leave(1)
        raise SystemExit(1) from error
    except Exception:
        processes.report_crash()
        raise
