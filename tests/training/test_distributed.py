"""A single process stays single; processes named by hand reach JAX as they were named."""

import pathlib

import jax
import pytest

from shallow_pi.training import distributed

CLUSTER = (
    "SHALLOW_PI_COORDINATOR",
    "SHALLOW_PI_NUM_PROCESSES",
    "SHALLOW_PI_PROCESS_ID",
    "SHALLOW_PI_MULTIHOST",
    "SLURM_PROCID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE",
    "TPU_WORKER_HOSTNAMES",
)


@pytest.fixture
def joined(monkeypatch):
    """What jax.distributed.initialize was called with, in an environment of one process."""
    calls = []
    for name in CLUSTER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    return calls


def test_one_process_joins_nothing(joined):
    distributed.initialize()
    assert joined == []
    assert distributed.is_main()


def test_processes_named_by_hand_are_joined(joined, monkeypatch):
    monkeypatch.setenv("SHALLOW_PI_COORDINATOR", "10.0.0.1:1234")
    monkeypatch.setenv("SHALLOW_PI_NUM_PROCESSES", "4")
    monkeypatch.setenv("SHALLOW_PI_PROCESS_ID", "3")
    distributed.initialize()
    assert joined == [("10.0.0.1:1234", 4, 3)]


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({"SHALLOW_PI_MULTIHOST": "1"}, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, False),
        # A batch script itself: its allocation has two tasks, it is one process.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)
def test_jax_finds_the_cluster_only_where_there_is_one(joined, monkeypatch, environment, joins):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert joined == ([()] if joins else [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("host:1", None, "0"), "without SHALLOW_PI_NUM_PROCESSES: set all three or none"),
        (("host:1", "two", "0"), "expected whole numbers"),
        (("host:1", "2", "2"), "SHALLOW_PI_PROCESS_ID must lie in 0…1, got 2"),
    ],
)
def test_half_an_environment_is_an_error(joined, monkeypatch, values, message):
    for name, value in zip(CLUSTER, values, strict=False):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.initialize()
    assert joined == []


@pytest.mark.parametrize(
    ("named", "version", "expected"),
    [
        (None, (0, 7, 0), "compiled"),
        (None, (0, 6, 2), None),  # Hangs on what it reads back.
        ("elsewhere", (0, 7, 0), None),  # JAX reads the variable itself.
        ("", (0, 7, 0), None),
    ],
)
def test_compiled_programs_are_kept_unless_told_otherwise(monkeypatch, named, version, expected):
    said = {}
    monkeypatch.setattr(distributed.jax.config, "update", said.__setitem__)
    monkeypatch.setattr(distributed.jax, "__version_info__", version)
    if named is None:
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    else:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", named)
    distributed.cache_compilations()
    folders = {name: pathlib.Path(value).name for name, value in said.items()}
    assert folders == ({"jax_compilation_cache_dir": expected} if expected else {})
