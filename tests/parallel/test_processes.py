"""A single process stays single; processes named by hand reach JAX as they were named."""

import pathlib
import pwd
import re

import jax
import pytest

from shallow_pi import progress
from shallow_pi.parallel import processes as distributed
from shallow_pi.parallel import roll_call

SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "4099",
    "SLURM_STEP_NODELIST": "gpu-[07-09,12]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
OPEN_MPI_4 = {"OMPI_MCA_orte_hnp_uri": "8192.0;tcp://10.0.0.1,10.1.0.1:34911"}
BY_HAND = {
    "SHALLOW_PI_COORDINATOR": "10.0.0.1:1234",
    "SHALLOW_PI_NUM_PROCESSES": "4",
    "SHALLOW_PI_PROCESS_ID": "3",
}
TWO = BY_HAND | {"SHALLOW_PI_NUM_PROCESSES": "2", "SHALLOW_PI_PROCESS_ID": "1"}
COORDINATOR_AND_COUNT = {name: TWO[name] for name in list(TWO)[:2]}


@pytest.fixture
def joined(monkeypatch):
    """The arguments of jax.distributed.initialize, in an environment of one process."""
    calls = []
    for name in {*SLURM, *MPI, *OPEN_MPI_4, *BY_HAND, "JOB_COMPLETION_INDEX"}:
        monkeypatch.delenv(name, raising=False)

    def initialize(*args, initialization_timeout=0, **more):
        calls.append((args, initialization_timeout))

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(distributed, "_joined", None)
    monkeypatch.setattr(progress.console, "quiet", False)
    monkeypatch.setattr(roll_call, "meet", lambda *args: calls.append(args))
    return calls


def test_one_process_joins_nothing(joined):
    distributed.initialize()
    assert joined == []
    assert distributed.is_main()
    assert distributed.prefix() == ""
    assert distributed.leave(1) is None
    assert not distributed.stops_here(1)
    assert distributed.gather({"a": 1}) == [{"a": 1}]


def test_processes_named_by_hand_meet_and_then_join(joined, monkeypatch):
    for name, value in BY_HAND.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SHALLOW_PI_INITIALIZATION_TIMEOUT", "17")
    distributed.initialize()
    assert joined == [("10.0.0.1:1234", 4, 3, 17), (("10.0.0.1:1234", 4, 3, None), 17)]
    assert distributed.prefix() == "process 3 of 4: "
    assert progress.console.quiet


def test_a_job_of_one_process_named_by_hand_needs_no_address(joined, monkeypatch):
    for name, value in (BY_HAND | dict(zip(list(BY_HAND)[1:], "10", strict=True))).items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert joined == []


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (BY_HAND, ("10.0.0.1:1234", 4, 3, None)),
        (COORDINATOR_AND_COUNT | {"JOB_COMPLETION_INDEX": "1"}, ("10.0.0.1:1234", 2, 1, None)),
        # Launchers of PyTorch.
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        (BY_HAND | {"RANK": "0", "WORLD_SIZE": "2"}, ("10.0.0.1:1234", 4, 3, None)),
        # Kubernetes numbers the pods of any indexed job.
        ({"JOB_COMPLETION_INDEX": "1"}, None),
        (SLURM, ("gpu-07:61443", 4, 3, None)),
        (SLURM | {"SLURM_STEP_NODELIST": "a1,b2"}, ("a1:61443", 4, 3, None)),
        (SLURM | {"SLURM_STEP_NODELIST": "a1"}, ("a1:61443", 4, 3, None)),
        # A process for each GPU: its own, whether SLURM shows it all or one.
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, ("gpu-07:61443", 4, 3, (1,))),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "CUDA_VISIBLE_DEVICES": "1"},
            ("gpu-07:61443", 4, 3, None),
        ),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        (SLURM | {"SHALLOW_PI_COORDINATOR": "h:5"}, ("h:5", 4, 3, None)),
        # A batch script itself: its allocation has two tasks, it is one process.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}, None),
        (MPI | OPEN_MPI_4, ("10.0.0.1:61442", 2, 1, None)),
        (MPI | {"SHALLOW_PI_COORDINATOR": "h:5"}, ("h:5", 2, 1, None)),
        (MPI | OPEN_MPI_4 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, ("10.0.0.1:61442", 2, 1, (0,))),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, ("", 0, 0, None)),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        # Slices of one host each: GKE names none but the own.
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, ("", 0, 0, None)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "1"}, None),
        ({"SHALLOW_PI_MULTIHOST": "1"}, ("", 0, 0, None)),
    ],
)
def test_processes_are_found_where_there_are_several(environment, found):
    expected = None if found is None else distributed.Processes(*found)
    assert distributed.find(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SHALLOW_PI_COORDINATOR": "h:1"}, "without SHALLOW_PI_NUM_PROCESSES, SHALLOW_PI_PROCESS"),
        (COORDINATOR_AND_COUNT, "without SHALLOW_PI_PROCESS_ID: set all three"),
        ({"SHALLOW_PI_PROCESS_ID": "0"}, "without SHALLOW_PI_COORDINATOR"),
        (TWO | {"SHALLOW_PI_NUM_PROCESSES": "two"}, "whole number in SHALLOW_PI_NUM_PROCESSES"),
        (TWO | {"SHALLOW_PI_PROCESS_ID": "2"}, "must lie in 0…1, as there are 2 processes, got 2"),
        (TWO | {"SHALLOW_PI_COORDINATOR": "h"}, "must be host:port, such as 10.0.0.1:8476, got"),
        (MPI, "set SHALLOW_PI_COORDINATOR=HOST:PORT"),
        ({"RANK": "0", "WORLD_SIZE": "8"}, "as by torchrun, .*: start one process on a host"),
        ({"MEGASCALE_NUM_SLICES": "two"}, "whole number in MEGASCALE_NUM_SLICES, got 'two'"),
        (
            {"SHALLOW_PI_MULTIHOST": "true"},
            r"SHALLOW_PI_MULTIHOST must be 1 \(.*\) or 0, got 'true'",
        ),
    ],
)
def test_half_an_environment_is_an_error(environment, message):
    with pytest.raises(ValueError, match=message):
        distributed.find(environment)


@pytest.mark.parametrize(("text", "message"), [("soon", "whole number"), ("0", "at least 1 sec")])
def test_a_time_out_is_whole_seconds(joined, monkeypatch, text, message):
    for name, value in (TWO | {"SHALLOW_PI_INITIALIZATION_TIMEOUT": text}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.initialize()
    assert joined == []


@pytest.mark.parametrize(
    ("processes", "rows", "devices"),
    [
        *[(None, (8,), 4), (None, (6,), 3), (2, (8,), 4), (2, (6,), 3), (3, (6,), 2)],
        (None, (8, 6), 2),  # Two trainings.
    ],
)
def test_the_devices_of_all_processes_divide_the_rows(monkeypatch, processes, rows, devices):
    said = {}
    joined = None if processes is None else distributed.Processes("h:1", processes, 0)
    monkeypatch.setattr(distributed, "_joined", joined)
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda _: range(5), raising=False)
    monkeypatch.setattr(jax.config, "update", said.__setitem__)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    distributed.split_cpu(*rows)
    assert said == {"jax_num_cpu_devices": devices}


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


def test_a_user_without_a_home_is_told_that_programs_are_not_kept(monkeypatch, capsys):
    for name in ("HOME", "SHALLOW_PI_CACHE", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}["no such user"])
    monkeypatch.setattr(distributed.jax.config, "update", lambda *_: pytest.fail("a cache"))
    monkeypatch.setattr(distributed.jax, "__version_info__", (0, 7, 0))
    distributed.cache_compilations()
    told = capsys.readouterr().err.replace("\n", " ")
    assert re.search(r"programs are not kept: .*: set SHALLOW_PI_CACHE to a folder", told)
