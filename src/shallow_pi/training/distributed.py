"""Multi-host start-up: one process per host, found from the environment or named in it.

`SHALLOW_PI_COORDINATOR` (host:port), `SHALLOW_PI_NUM_PROCESSES` and `SHALLOW_PI_PROCESS_ID` name
the processes by hand; under SLURM and Open MPI, and on TPU hosts that list their peers, JAX finds
them itself; `SHALLOW_PI_MULTIHOST=1` asks it to look anywhere else it knows. Call `initialize`
before anything touches a device.
"""

import os
import pathlib

import jax
from jax.experimental import multihost_utils

_BY_HAND = ("SHALLOW_PI_COORDINATOR", "SHALLOW_PI_NUM_PROCESSES", "SHALLOW_PI_PROCESS_ID")


def initialize() -> None:
    """Join the other processes of this job; does nothing in a job of one process."""
    given = {name: os.environ[name] for name in _BY_HAND if os.environ.get(name)}
    if not given and not _is_cluster():
        return
    if getattr(jax.config, "jax_platforms", None) == "cpu":  # A field mypy does not know.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if not given:
        jax.distributed.initialize()
        return
    if len(given) < len(_BY_HAND):
        missing = [name for name in _BY_HAND if name not in given]
        raise ValueError(f"{', '.join(given)} without {', '.join(missing)}: set all three or none")
    try:
        processes, index = (int(given[name]) for name in _BY_HAND[1:])
    except ValueError as error:
        raise ValueError(f"expected whole numbers in {_BY_HAND[1:]}, got {given}") from error
    if not 0 <= index < processes:
        raise ValueError(f"{_BY_HAND[2]} must lie in 0…{processes - 1}, got {index}")
    jax.distributed.initialize(given[_BY_HAND[0]], processes, index)


def split_cpu(rows: int) -> None:
    """Where there are CPUs alone, show JAX as many devices as there are cores.

    XLA runs the small operations of a small model on one core; split over the batch it uses all.
    `JAX_NUM_CPU_DEVICES` sets another number. Accelerators are not affected.

    Args:
      rows: of a microbatch; the number of devices divides them.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = max(n for n in range(1, (cores or 1) + 1) if rows % n == 0)
    jax.config.update("jax_num_cpu_devices", devices)


def cache_compilations() -> None:
    """Keep compiled programs in `~/.cache/shallow_pi`, so that the next run starts at once.

    `JAX_COMPILATION_CACHE_DIR` names another folder; set and empty, it turns the cache off. JAX
    before 0.7 keeps none of its own accord: a program for several CPU devices that is read back
    hangs or crashes there.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and jax.__version_info__ >= (0, 7):
        folder = pathlib.Path("~/.cache/shallow_pi/compiled").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))


def is_main() -> bool:
    """Whether this process prints, logs and writes plain files."""
    return jax.process_index() == 0


def sync(name: str) -> None:
    """Wait until every process of the job has come to the point of that name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _is_cluster() -> bool:
    """Whether the environment says that this job has more than one process."""
    env = os.environ
    counts = [env.get("SLURM_NTASKS", "1"), env.get("OMPI_COMM_WORLD_SIZE", "1")]
    return (
        env.get("SHALLOW_PI_MULTIHOST") == "1"
        # A shell inside an allocation has SLURM_NTASKS too, but srun alone sets a step's rank.
        or ("SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env and counts[0] not in ("", "1"))
        or counts[1] not in ("", "1")
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
    )
