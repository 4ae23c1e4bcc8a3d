"""Two real processes train as one does, agree, and survive what can happen to one of them.

Everything goes through the real command. The reference is one undisturbed run of two processes with
two CPU devices each.
"""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.training import checkpoint, metrics

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train_distill.py"
STEPS, SAVE = 24, 8
# What is not a matter of the clock.
LOSSES = ("loss", "task_loss", "velocity_loss", "attention_loss", "grad_norm")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


# Process 0 reads parameters while the other one has ended.
READER = """
import sys
import jax
from shallow_pi.checkpoints import weights
from shallow_pi.parallel import processes

processes.initialize()
if processes.is_main():
    shape = jax.ShapeDtypeStruct((2,), "float32")
    print(weights.load_params(sys.argv[1], {"a": shape})["a"].tolist())
"""


class Job:
    """The processes of one call of the command, or a program; their output in files."""

    def __init__(
        self, runs, *arguments, processes=2, devices=2, each=((), ()), only=None, program=()
    ):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "SHALLOW_PI_NUM_PROCESSES": str(processes),
            "SHALLOW_PI_COORDINATOR": f"127.0.0.1:{port}",
            "SHALLOW_PI_HEARTBEAT_TIMEOUT": "15",
        }
        indices = range(processes) if only is None else [only]
        fields = {"num-train-steps": STEPS, "save-interval": SAVE, "log-interval": 1, "keep": 9}
        command = [sys.executable, str(SCRIPT), "debug", "--checkpoint-dir", str(runs)]
        command += [f"--{name}={value}" for name, value in fields.items()]
        command += ["--no-tensorboard", *arguments]
        command = [sys.executable, *program] if program else command
        self.folder = runs / "debug" / "first"
        self.logs = [runs.with_name(f"{runs.name}-{port}-{n}.log") for n in indices]
        self.processes = []
        for index, log in zip(indices, self.logs, strict=True):
            with log.open("w") as output:
                process = subprocess.Popen(
                    [*command, *each[index]],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment | {"SHALLOW_PI_PROCESS_ID": str(index)},
                )
            self.processes.append(process)

    def said(self):
        return [log.read_text() for log in self.logs]

    def wait(self, seconds=300):
        """Exit statuses; what does not end in time is killed, and has none."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(p.poll() is None for p in self.processes):
            time.sleep(0.05)
        found = [process.poll() for process in self.processes]
        for process in self.processes:
            process.kill()
            process.wait()
        return found

    def when(self, condition):
        """Return once `condition` holds; the job must not have ended before."""
        while not condition():
            assert all(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.001)


def _rows(folder, first=1):
    found = {int(row["step"]): row for row in metrics.read(folder)}
    return np.array([[found[n][name] for name in LOSSES] for n in range(first, STEPS + 1)])


def _steps(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("two") / "runs")
    assert job.wait() == [0, 0], job.said()
    return job


def test_two_processes_train_as_one_with_as_many_devices(whole, tmp_path):
    alone = Job(tmp_path / "runs", processes=1, devices=4)
    assert alone.wait() == [0], alone.said()
    np.testing.assert_allclose(_rows(whole.folder), _rows(alone.folder), rtol=1e-4, atol=1e-5)
    assert _steps(whole.folder) == [8, 16, 24]


def test_only_process_0_speaks(whole):
    first, second = whole.said()
    assert f"Distil: {STEPS}/{STEPS}" in first
    assert "Distil" not in second
    assert "Written" not in second


def test_a_process_reads_a_policy_alone(tmp_path):
    weights.save_params(tmp_path / "params", {"a": np.float32([1, 2])})
    job = Job(tmp_path / "runs", program=("-c", READER, str(tmp_path)))
    assert job.wait() == [0, 0], job.said()
    assert "[1.0, 2.0]" in job.said()[0]


def test_a_process_killed_while_saving_leaves_the_last_checkpoint_and_the_same_curve(
    whole, tmp_path
):
    job = Job(tmp_path / "runs")
    job.when(lambda: list(job.folder.glob("16.orbax-checkpoint-tmp*")))
    job.processes[1].send_signal(signal.SIGKILL)
    statuses = job.wait(90 if jax.__version_info__ >= (0, 7) else 20)
    assert statuses[1] == -signal.SIGKILL
    if jax.__version_info__ >= (0, 7):  # Before, nobody misses a heartbeat for 100 seconds.
        assert statuses[0] not in (0, None), job.said()
    assert _steps(job.folder) == [8]
    assert list(job.folder.glob("16.orbax-checkpoint-tmp*"))
    assert checkpoint.Checkpoints(shutil.copytree(job.folder, tmp_path / "seen")).latest_step() == 8

    copied = shutil.copytree(tmp_path / "runs", tmp_path / "alone")
    again = Job(tmp_path / "runs", "--resume")
    assert again.wait() == [0, 0], again.said()
    np.testing.assert_array_equal(_rows(again.folder), _rows(whole.folder))
    assert _steps(again.folder) == [8, 16, 24]
    assert not list(again.folder.glob("*tmp*"))

    alone = Job(copied, "--resume", processes=1, devices=4)
    assert alone.wait() == [0], alone.said()
    np.testing.assert_allclose(_rows(alone.folder, 9), _rows(whole.folder, 9), rtol=1e-4, atol=1e-5)


def test_a_signal_to_one_process_saves_and_stops_both_at_the_same_step(tmp_path):
    """Ctrl-C, which becomes the SIGTERM of schedulers."""
    job = Job(tmp_path / "runs", "--num-train-steps=100000", "--save-interval=100000")
    job.when(lambda: (job.folder / "metrics.jsonl").exists() and metrics.read(job.folder))
    job.processes[1].send_signal(signal.SIGINT)
    assert job.wait(120) == [1, 1], job.said()
    (step,) = _steps(job.folder)
    for index, said in enumerate(job.said()):
        last = f"process {index} of 2: error: stopped by SIGTERM after step {step}, which is saved"
        assert last in said
    assert metrics.read(job.folder)[-1]["step"] == step


def test_processes_with_other_configs_name_the_field_and_who(tmp_path):
    job = Job(tmp_path / "runs", each=((), ("--schedule.peak-lr=0.5", "--seed=7")))
    assert job.wait(120) == [1, 1]
    for index, said in enumerate(job.said()):
        assert f"process {index} of 2: error: the processes of this job differ in" in said
        assert "--seed: 42 in process 0; 7 in process 1" in said
        assert "--schedule.peak-lr: 0.001 in process 0; 0.5 in process 1" in said
        assert "Traceback" not in said
    assert not (job.folder / "config.json").exists()


def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    job = Job(tmp_path / "runs", each=((), (f"--checkpoint-dir={tmp_path / 'elsewhere'}",)))
    assert job.wait(200) == [1, 1]
    for said in job.said():
        assert "must be one folder for all processes: process 0 does not see the files of" in said
        assert "--checkpoint-dir on a file system that all hosts share" in said


def test_an_error_of_one_process_ends_the_other_too(tmp_path):
    job = Job(tmp_path / "runs", each=((), ("--data.source=nowhere:open_data",)))
    statuses = job.wait(200)
    assert statuses[1] == 1
    assert statuses[0] not in (0, None), job.said()
    assert "process 1 of 2: " in job.said()[1]
    assert "No module named 'nowhere'" in job.said()[1]


def test_a_process_whose_partner_never_comes_ends_with_one_error(tmp_path, monkeypatch):
    monkeypatch.setenv("SHALLOW_PI_INITIALIZATION_TIMEOUT", "3")
    for index, message in enumerate(
        ("after 3 s, process 1 of 2 has not reached process 0 at", "found no coordinator at")
    ):
        job = Job(tmp_path / "runs", only=index)
        assert job.wait(120) == [1]
        (said,) = job.said()
        assert f"process {index} of 2: error: " in said
        assert message in said
        assert "Traceback" not in said
        assert not job.folder.exists()


def test_a_mesh_that_does_not_fit_the_processes_is_refused(tmp_path):
    job = Job(tmp_path / "runs", "--mesh.tensor=4")
    assert job.wait(120) == [1, 1]
    for said in job.said():
        assert "mesh.tensor 4 spans processes, each of which reads its own rows" in said
        assert "Traceback" not in said
    assert not (job.folder / "config.json").exists()
