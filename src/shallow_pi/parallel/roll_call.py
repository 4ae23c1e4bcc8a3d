"""A roll call of the processes of a job, over plain sockets, before JAX connects them.

JAX ends a process that waits too long with an abort in C++, which names neither the address nor the
missing processes. So process 0 first listens at the coordinator's port until every other process
has sent its index and the number of processes it expects, and then answers all of them at once: go
on, or the problem.
"""

import json
import socket
import time
from collections.abc import Mapping

from shallow_pi import progress

# Longest line to read.
_LINE_BYTES = 4096
# Seconds a connection may take to open or to send its line; seconds between attempts.
_PATIENCE, _PAUSE = 5.0, 0.5
# Seconds beyond the timeout in which the answer of process 0 must arrive.
_GRACE = 10.0


def parse(address: str) -> tuple[str, int]:
    """Host and port of `host:port` (an IPv6 host in brackets)."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"the coordinator's address must be host:port, such as 10.0.0.1:8476, got {address!r}"
        )
    return host.strip("[]"), int(port)


def meet(address: str, processes: int, index: int, timeout: float) -> None:
    """Return when all processes of the job have reported.

    The address is `host:port` of process 0, whose port is free again afterwards; `timeout` is in
    seconds.

    Raises:
      ValueError: a malformed address, or processes that disagree on their number or indices.
      TimeoutError: process 0 did not answer, or others did not report; names them, and says what
        to check.
      OSError: process 0 cannot listen there.
    """
    parse(address)
    if index:
        _report(address, processes, index, timeout)
    else:
        _take(address, processes, timeout)


def _take(address: str, processes: int, timeout: float) -> None:
    port = parse(address)[1]
    deadline = time.monotonic() + timeout
    present: dict[int, socket.socket] = {}
    waiting: list[socket.socket] = []
    problem = ""
    with _listen(port) as server, progress.bar("Processes", processes, done=1) as advance:
        while not problem:
            if len(present) == processes - 1:
                gone = [index for index, connection in present.items() if _is_closed(connection)]
                if not gone:
                    break
                for index in gone:  # It reported and ended; started again, it reports anew.
                    del present[index]
                    advance(-1)
            left = deadline - time.monotonic()
            if left <= 0:
                break
            server.settimeout(left)
            try:
                connection, (peer, *_) = server.accept()
                said = _hear(connection)
            except TimeoutError:
                continue
            if said is None:  # Not one of ours, or closed already.
                connection.close()
                continue
            index, expected = said
            waiting.append(connection)
            old = present.get(index)
            if expected != processes:
                problem = (
                    f"process 0 expects {processes} processes, process {index} ({peer}) expects "
                    f"{expected}: start all with the same number"
                )
            elif not 0 < index < processes:
                problem = f"{peer} says it is process {index}, expected 1…{processes - 1}"
            elif old is not None and not _is_closed(old):
                problem = f"two processes, one of them {peer}, say they are process {index}"
            elif old is None:
                advance(1)
            present[index] = connection
        missing = [n for n in range(1, processes) if n not in present]
        late = bool(missing) and not problem
        if late:
            problem = (
                f"after {timeout:.0f} s, process {', '.join(map(str, missing))} of {processes} has "
                f"not reached process 0 at {address}: look at its log; if it waits too, its host "
                "does not reach that address (name, port, firewall)"
            )
        for connection in waiting:
            _tell(connection, {"problem": problem, "late": late})
            connection.close()
    if problem:
        raise TimeoutError(problem) if late else ValueError(problem)


def _report(address: str, processes: int, index: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    reason = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(parse(address), min(left, _PATIENCE)) as connection:
                _tell(connection, {"process": index, "processes": processes})
                connection.settimeout(left + _GRACE)
                answer = _line(connection)
        except socket.gaierror as error:
            reason = f"its name cannot be resolved ({error.strerror})"
        except ConnectionRefusedError:
            reason = "nothing listens there: process 0 has not started, or uses another port"
        except OSError as error:
            reason = f"no connection ({error}): a firewall, or the host is down"
        else:
            if "problem" in answer:
                if answer["problem"]:
                    raise (TimeoutError if answer["late"] else ValueError)(answer["problem"])
                return
            reason = "something answers, but it is no process 0 of ours: choose another port"
        time.sleep(_PAUSE)
    raise TimeoutError(
        f"process {index} of {processes} found no coordinator at {address} in {timeout:.0f} s: "
        f"{reason}\n"
        "check that process 0 runs there and has not failed, that name and port are reachable "
        "from here, and that all processes are given the same number of them"
    )


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise OSError(
            f"process 0 cannot listen on port {port}: {error.strerror}; another job may use it, "
            "choose another port for all processes"
        ) from error


def _hear(connection: socket.socket) -> tuple[int, int] | None:
    connection.settimeout(_PATIENCE)
    try:
        said = _line(connection)
        return int(said["process"]), int(said["processes"])
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _tell(connection: socket.socket, message: Mapping[str, object]) -> None:
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:  # Gone; the other side says so itself.
        return


def _line(connection: socket.socket) -> dict:
    """The next line, a JSON object; empty if there is none."""
    data = b""
    while not data.endswith(b"\n") and len(data) < _LINE_BYTES:
        part = connection.recv(_LINE_BYTES)
        if not part:
            break
        data += part
    try:
        message = json.loads(data)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(_PATIENCE)
