"""Start and end of a job of one or several processes, and communication between them.

`SHALLOW_PI_COORDINATOR` (host:port of process 0) starts a job of several processes.
`SHALLOW_PI_NUM_PROCESSES` and `SHALLOW_PI_PROCESS_ID` give their number and the index of this one;
SLURM, Open MPI and indexed Kubernetes jobs set them in variables of their own. Under SLURM and Open
MPI 4 the coordinator is derived too; on TPU slices of several hosts together, or with
`SHALLOW_PI_MULTIHOST=1`, JAX detects everything itself. Call `initialize` before anything touches a
device.
"""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import threading
import traceback
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from shallow_pi import progress, user_cache
from shallow_pi.parallel import roll_call

T = TypeVar("T")

COORDINATOR = "SHALLOW_PI_COORDINATOR"
NUM_PROCESSES = "SHALLOW_PI_NUM_PROCESSES"
PROCESS_ID = "SHALLOW_PI_PROCESS_ID"
MULTIHOST = "SHALLOW_PI_MULTIHOST"
# Number of TPU slices that train together, as JobSet sets it.
NUM_SLICES = "MEGASCALE_NUM_SLICES"
# Seconds to wait for all processes at the start, and for the heartbeat of a running one.
INITIALIZATION_TIMEOUT = "SHALLOW_PI_INITIALIZATION_TIMEOUT"
HEARTBEAT_TIMEOUT = "SHALLOW_PI_HEARTBEAT_TIMEOUT"
# Seconds a finished process waits for process 0, which may still write a report.
SHUTDOWN_SECONDS = 24 * 3600
# Seconds a failed process waits for others that fail with the same error.
LEAVE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of this job, seen from one of them."""

    # host:port of process 0; empty if JAX detects it.
    coordinator: str
    count: int
    index: int
    # Accelerators of this host that this process uses; None for all.
    local_devices: tuple[int, ...] | None = None


# Set once, by `initialize`: asking JAX may block on processes that have ended.
_joined: Processes | None = None


def uses_shardy() -> bool:
    """True if JAX shards with Shardy, its only correct partitioner for our meshes.

    GSPMD, the default of JAX 0.6 and older, could swap the batch rows of two devices, and gave
    `action_in_proj` a wrong gradient on a 2 × 2 × 2 mesh.
    """
    return jax.__version_info__ >= (0, 7) or getattr(
        jax.config, "jax_use_shardy_partitioner", False
    )


def use_shardy() -> None:
    """Make JAX shard with Shardy from now on, if it does not by default."""
    if not uses_shardy():
        jax.config.update("jax_use_shardy_partitioner", True)


def initialize() -> None:
    """Choose the partitioner, and connect to the other processes of the job, if there are any.

    Raises:
      ValueError: the environment is incomplete, or processes contradict each other.
      TimeoutError: not all processes came in time; names those missing, and what to check.
      OSError: the coordinator's port is taken.
    """
    global _joined
    use_shardy()
    found = find(os.environ)
    if found is None or (found.coordinator and found.count == 1):
        return
    if getattr(jax.config, "jax_platforms", None) == "cpu":  # A field mypy does not know.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    patience = _seconds(INITIALIZATION_TIMEOUT, 300)
    limits: dict[str, Any] = {
        "initialization_timeout": patience,
        "heartbeat_timeout_seconds": _seconds(HEARTBEAT_TIMEOUT, 100),
        "shutdown_timeout_seconds": SHUTDOWN_SECONDS,
    }
    known = inspect.signature(jax.distributed.initialize).parameters
    limits = {name: value for name, value in limits.items() if name in known}
    if found.coordinator:
        progress.console.quiet = found.index != 0
        _joined = found
        roll_call.meet(found.coordinator, found.count, found.index, patience)
        jax.distributed.initialize(
            found.coordinator,
            found.count,
            found.index,
            found.local_devices,
            cluster_detection_method="deactivate",
            **limits,
        )
    else:
        jax.distributed.initialize(**limits)
        _joined = Processes("", jax.process_count(), jax.process_index())
        progress.console.quiet = _joined.index != 0


def find(environment: Mapping[str, str]) -> Processes | None:
    """The processes described by environment variables.

    Returns:
      None for a job of one process; `count` 0 if JAX shall detect the processes.

    Raises:
      ValueError: only some of the variables are set, or their values contradict each other.
    """
    given = {name: value for name, value in environment.items() if value}
    launched = _slurm(given) or _open_mpi(given)
    by_hand = [name for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if name in given]
    if by_hand:
        values = {
            COORDINATOR: launched.coordinator if launched else "",
            NUM_PROCESSES: str(launched.count) if launched else "",
            PROCESS_ID: str(launched.index) if launched else given.get("JOB_COMPLETION_INDEX", ""),
        } | {name: given[name] for name in by_hand}
        if missing := [name for name, value in values.items() if not value]:
            raise ValueError(
                f"{', '.join(by_hand)} without {', '.join(missing)}: set all three, or none in a "
                "job of one process"
            )
        found = Processes(
            values[COORDINATOR],
            _whole(NUM_PROCESSES, values[NUM_PROCESSES]),
            _whole(PROCESS_ID, values[PROCESS_ID]),
            launched.local_devices if launched else None,
        )
        roll_call.parse(found.coordinator)
        if not 0 <= found.index < found.count:
            raise ValueError(
                f"{PROCESS_ID} must lie in 0…{found.count - 1}, as there are {found.count} "
                f"processes, got {found.index}"
            )
        return found
    if launched is None:
        asked = given.get(MULTIHOST, "0")
        if asked not in ("0", "1"):
            raise ValueError(
                f"{MULTIHOST} must be 1 (JAX detects the processes) or 0, got {asked!r}"
            )
        # Those of this slice, which may be one of several.
        hosts = given.get("TPU_WORKER_HOSTNAMES", "").split(",")
        slices = _whole(NUM_SLICES, given.get(NUM_SLICES, "1"))
        if asked == "1" or len(hosts) > 1 or slices > 1:
            return Processes("", 0, 0)
        if "RANK" in given and given.get("WORLD_SIZE", "1") != "1":
            raise ValueError(
                f"RANK and WORLD_SIZE={given['WORLD_SIZE']} are set, as by torchrun, accelerate or "
                "a PyTorchJob, and each of these processes would train by itself: start one "
                "process on a host, which uses all of its devices; processes on several hosts "
                f"need {COORDINATOR}, {NUM_PROCESSES} and {PROCESS_ID}"
            )
        return None
    if not launched.coordinator:
        raise ValueError(
            f"{launched.count} processes of Open MPI, which does not give the address of rank 0: "
            f"set {COORDINATOR}=HOST:PORT, the host of rank 0 and a free port"
        )
    return launched


def _slurm(given: Mapping[str, str]) -> Processes | None:
    # A shell inside an allocation has SLURM_NTASKS too, but srun alone sets a step's nodes.
    if not {"SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"} <= given.keys():
        return None
    count = int(given.get("SLURM_STEP_NUM_TASKS") or given.get("SLURM_NTASKS") or 1)
    if count == 1:
        return None
    # The first of "node7,node9", "node[7-9]" or "node[07,9]".
    first = re.match(r"([^,\[]+)(?:\[([^],-]+))?", given["SLURM_STEP_NODELIST"])
    assert first is not None, "a list of nodes starts with a name"
    port = 61440 + int(given["SLURM_JOB_ID"]) % 4096
    on_host = re.match(r"\d+", given.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    local = None
    if on_host is not None and int(on_host[0]) > 1:
        local = _one_device(given, int(given["SLURM_LOCALID"]))
    coordinator = f"{first[1]}{first[2] or ''}:{port}"
    return Processes(coordinator, count, int(given["SLURM_PROCID"]), local)


def _open_mpi(given: Mapping[str, str]) -> Processes | None:
    count = int(given.get("OMPI_COMM_WORLD_SIZE", "1"))
    if count == 1:
        return None
    # Version 4 gives the host of mpirun, "<job × 4096>.0;tcp://10.0.0.1,…:port"; 5 does not.
    caller = re.match(r"(\d+)\..*?tcp://([^,:]+)", given.get("OMPI_MCA_orte_hnp_uri", ""))
    coordinator = f"{caller[2]}:{61440 + int(caller[1]) // 4096 % 4096}" if caller else ""
    local = None
    if int(given.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")) > 1:
        local = _one_device(given, int(given["OMPI_COMM_WORLD_LOCAL_RANK"]))
    return Processes(coordinator, count, int(given["OMPI_COMM_WORLD_RANK"]), local)


def _one_device(given: Mapping[str, str], local_index: int) -> tuple[int, ...] | None:
    """The one device of each of several processes on a host; None if only one is visible."""
    shown = given.get("CUDA_VISIBLE_DEVICES", given.get("ROCR_VISIBLE_DEVICES", ","))
    return (local_index,) if "," in shown else None


def _whole(name: str, text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"expected a whole number in {name}, got {text!r}")
    return int(text)


def _seconds(name: str, default: int) -> int:
    seconds = _whole(name, os.environ.get(name) or str(default))
    if seconds < 1:
        raise ValueError(f"{name} must be at least 1 second, got {seconds}")
    return seconds


def split_cpu(*rows: int) -> None:
    """Give JAX one CPU device per core, so that the batch is split over all cores.

    XLA runs the small operations of a small model on one core only. `JAX_NUM_CPU_DEVICES` sets
    another number. Accelerators are not affected.

    `rows` are the observations of a microbatch, over all processes, of each training of this
    process: multiples of the number of devices.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ or (_joined is not None and not _joined.coordinator):
        return
    shared = math.gcd(*rows) // (1 if _joined is None else _joined.count)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = max(n for n in range(1, (cores or 1) + 1) if shared % n == 0)
    jax.config.update("jax_num_cpu_devices", devices)


def cache_compilations() -> None:
    """Keep compiled programs in the user's cache folder, so that the next run starts faster.

    `JAX_COMPILATION_CACHE_DIR` names another folder; set and empty, it turns the cache off. With
    JAX before 0.7 the cache stays off by default: there a cached program for several CPU devices
    hangs or crashes.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.__version_info__ < (0, 7):
        return
    try:
        folder = user_cache.folder("compiled")
    except ValueError as error:
        progress.warn(f"compiled programs are not kept: {error}")
    else:
        jax.config.update("jax_compilation_cache_dir", str(folder))


def is_main() -> bool:
    """True for the process that prints, logs and writes plain files."""
    return jax.process_index() == 0


def bar(
    label: str, total: int, done: int = 0
) -> contextlib.AbstractContextManager[progress.Advance]:
    """`progress.bar` in the process that prints, nothing in the others."""
    if is_main():
        return progress.bar(label, total, done)
    return contextlib.nullcontext(lambda amount=1, note="": None)


def sync(name: str) -> None:
    """Wait until every process of the job has reached the point of that name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(value: T) -> list[T]:
    """The values of all processes in their order, as plain JSON; every process must call it."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(data.size, np.int32))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded), np.uint8)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def of_main(value: T) -> T:
    """Process 0's value in every process, for what all must decide alike; all must call it.

    A network file system may show another host a folder as it was.
    """
    return gather(value)[0]


def prefix() -> str:
    """Text before an error message of this process; empty in a job of one."""
    return "" if _joined is None else f"process {_joined.index} of {_joined.count}: "


def device_fault(error: Exception) -> str:
    """The reason and remedy of an error of JAX that found no device to run on; "" of any other."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or os.path.basename(frames[-1].filename) != "xla_bridge.py":
        return ""
    wanted = os.environ.get("JAX_PLATFORMS")
    reason = str(error) or "no device is there"  # An assertion of JAX says nothing.
    return (
        f"JAX cannot start{f' JAX_PLATFORMS={wanted}' if wanted else ''}: {reason}; unset "
        "JAX_PLATFORMS, or install the extra of your accelerator (uv sync --extra cuda, cuda13 or "
        "tpu)"
    )


def leave(status: int) -> None:
    """End this process because of an error; returns only in a job of one.

    Others may wait in a collective for this process, and JAX's shutdown would wait for them in
    turn. So it gets only a few seconds, in case all fail with the same error. The collectives of
    the others then fail, at the latest when the heartbeat of this process is missed.
    """
    if _joined is None:
        return
    progress.Output("stdout").flush()
    progress.Output("stderr").flush()
    shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    shutdown.start()
    shutdown.join(LEAVE_SECONDS)
    os._exit(status)


def report_crash() -> None:
    """Print the current error's traceback and end this process; does nothing in a job of one."""
    if _joined is not None:
        lines = traceback.format_exc().splitlines()
        print("\n".join(f"{prefix()}{line}" for line in lines), file=progress.Output("stderr"))
        leave(1)


def stops_here(step: int) -> bool:
    """True if the processes stop after this step, because one of them received SIGTERM.

    In a job of several processes JAX handles the signal, and the coordinator picks a step that none
    has passed; all processes must call this after every step. False in a job of one.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)
