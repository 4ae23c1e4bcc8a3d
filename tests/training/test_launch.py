"""The launch files can be read by what they are for, and call what there is."""

import pathlib
import re
import shlex
import subprocess

import pytest

from shallow_pi.parallel import processes
from shallow_pi.training import command_line

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "scripts" / "launch"
CONFIGS = ROOT / "train_configs"
yaml = pytest.importorskip("yaml", reason="comes with JAX's companions, is not asked for")


def _scripts():
    """Each file's shell code, by name."""
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    shell, flag, code = job["template"]["spec"]["containers"][0]["command"]
    assert (shell, flag) == ("bash", "-c")
    sky = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    return {
        "jobset.yaml": code,
        "skypilot.yaml": sky["setup"] + sky["run"],
        "slurm.sbatch": (LAUNCH / "slurm.sbatch").read_text(),
        "tpu_pod.sh": (LAUNCH / "tpu_pod.sh").read_text(),
    }


NAMES = ("jobset.yaml", "skypilot.yaml", "slurm.sbatch", "tpu_pod.sh")


def test_every_launch_file_is_looked_at():
    assert sorted(path.name for path in LAUNCH.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_shell_can_read_it(name):
    done = subprocess.run(["bash", "-n"], input=_scripts()[name], text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", NAMES)
def test_its_command_line_is_one_of_train_distill(name):
    """As written, or as the comment at the top of a file that hands arguments on gives it."""
    text = _scripts()[name]
    if '"$@"' in text:
        text = "\n".join(line.removeprefix("#") for line in text.splitlines()[:12])
        found = re.search(r"launch/[\w.]+ (pi0_\w+.*?)\n\n", text.replace("\\\n", " "), re.DOTALL)
    else:
        found = re.search(r"train_distill\.py (.*)", text.replace("\\\n", " "))
    arguments = shlex.split(found[1].partition("\n \n")[0])
    experiment = command_line.cli(CONFIGS, "", [*arguments, "--resume"])
    assert experiment.name == "pi0_aloha_l6"
    assert experiment.checkpoint_dir.startswith("/shared/")
    assert experiment.data.path.startswith("/shared/")
    assert experiment.mesh.fsdp == 16


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_run_resumes(name):
    assert re.search(r"train_distill\.py.*--resume", _scripts()[name].replace("\\\n", " "))


@pytest.mark.parametrize("name", [*NAMES, "../../docs/launch.md"])
def test_it_sets_no_variable_that_nobody_reads(name):
    read = {value for value in vars(processes).values() if isinstance(value, str)}
    assert set(re.findall(r"SHALLOW_PI_\w+", (LAUNCH / name).read_text())) <= read


def test_the_pods_of_the_jobset_find_each_other():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    found = processes.find(given | {"JOB_COMPLETION_INDEX": "1"})
    name = jobset["metadata"]["name"]
    assert found.coordinator == f"{name}-{replicated['name']}-0-0.{name}:8476"
    assert found.count == job["completions"] == job["parallelism"]
    assert job["completionMode"] == "Indexed"


def test_slurm_gets_one_process_a_node_and_signals_it_to_save():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    assert options["ntasks-per-node"] == "1"
    assert re.fullmatch(r"TERM@\d+", options["signal"])  # With "B:" the script alone would get it.
