"""The one command of a wheel: it lists the others, runs the one that is named, and speaks as it."""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import jax
import pytest

from shallow_pi.commands import exits, export_student, main
from shallow_pi.parallel import processes
from shallow_pi.training import command_line

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = {path.stem for path in (ROOT / "scripts").glob("*.py")}


def test_every_command_is_listed_with_its_first_line(command):
    status, out, _ = command(main)
    assert status == 2
    for name, module in main.COMMANDS.items():
        path = ROOT / "src/shallow_pi/commands" / f"{module}.py"
        first = ast.get_docstring(ast.parse(path.read_text())).partition("\n")[0]
        assert f"    {name:<18}{first}" in out.splitlines()


def test_a_command_helps_under_the_name_it_was_called_by(command):
    status, out, _ = command(main, "export", "--help")
    assert status == 0
    assert "usage: shallow-pi export " in out
    assert "shallow-pi export SOURCE --format FORMAT" in out
    assert "scripts/" not in out
    # The process keeps nothing of it: the script of a clone still helps under its own name.
    assert "uv run scripts/export_student.py SOURCE" in export_student.__doc__
    assert sys.argv == ["main", "export", "--help"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("calibrate", "POLICY"),
        ("convert", "SOURCE TARGET"),
        ("evaluate", "POLICY ..."),
        ("export", "SOURCE"),
        ("predict", "RUN"),
        ("reproduce", "[CLAIM ...]"),
    ],
)
def test_help_names_the_arguments_that_have_no_flag(command, name, expected):
    _, out, _ = command(main, name, "--help")
    assert re.search(
        rf"^usage: shallow-pi {name} .* {re.escape(expected)}( .*)?$", out, re.MULTILINE
    )


def test_an_unknown_command_names_the_closest(command):
    status, _, err = command(main, "exprot", "--help")
    assert status == 2
    assert "unknown command 'exprot'" in err
    assert "did you mean 'export'?" in err


def test_a_job_of_several_processes_is_told_that_one_packages_a_teacher(command, monkeypatch):
    for name in ("initialize", "split_cpu"):
        monkeypatch.setattr(processes, name, lambda *_: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    status, _, err = command(main, "teacher", "pi0_turntable")
    assert status == 1
    assert "train it with scripts/train_distill.py pi0_turntable" in err


def test_every_script_of_a_clone_is_a_command():
    assert set(main.COMMANDS.values()) == SCRIPTS


def test_a_wheel_carries_what_its_commands_look_for(tmp_path, monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"shallow-pi": "shallow_pi.commands.main:main"}
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"train_configs": "shallow_pi/train_configs", "assets": "shallow_pi/assets"}
    assert command_line.configs() == ROOT / "train_configs"
    monkeypatch.setattr(command_line, "__file__", str(tmp_path / "shallow_pi/training/x.py"))
    shutil.copytree(ROOT / "train_configs", tmp_path / "shallow_pi/train_configs")
    assert command_line.configs() == tmp_path / "shallow_pi/train_configs"
    experiment = command_line.load(command_line.configs(), "pi0_turntable_l6")
    assert experiment.teacher.path == str(tmp_path / "shallow_pi/assets/pi0_turntable")


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("bad"), 1), (FileNotFoundError("bad"), 1), (KeyError("bad"), 1)],
    ids=lambda value: type(value).__name__,
)
def test_a_script_ends_with_one_line(capsys, error, status):
    with pytest.raises(SystemExit) as exit_, exits.exit_on(KeyError):
        raise error
    assert exit_.value.code == status
    assert re.fullmatch(r"error: '?bad'?\n", capsys.readouterr().err)


@pytest.mark.parametrize("said", ["", "interrupted; go on with --resume"])
def test_an_interruption_ends_with_what_it_says(capsys, said):
    with pytest.raises(SystemExit) as exit_, exits.exit_on():
        raise KeyboardInterrupt(*[said] * bool(said))
    assert exit_.value.code == 130
    assert capsys.readouterr().err == f"error: {said or 'interrupted'}\n"


def test_a_platform_that_is_not_there_is_named():
    code = (
        "import jax; from shallow_pi.commands import exits\n"
        "with exits.exit_on(): jax.process_count()"
    )
    asked = [sys.executable, "-c", code]
    found = subprocess.run(
        asked, env={**os.environ, "JAX_PLATFORMS": "rocm"}, capture_output=True, text=True
    )
    assert found.returncode == 1
    assert re.search(r"^error: JAX cannot start JAX_PLATFORMS=rocm: .*; unset ", found.stderr, re.M)
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    "words",
    [
        "demonstrations --sim turntable --output OUT",
        "convert nowhere OUT",
        "export pi0_nowhere --format openpi --output OUT",
        "evaluate nowhere --sim turntable --output OUT",
        "benchmark --model small --output OUT",
        "benchmark-step debug --output OUT",
        "benchmark-all --tiny --output OUT",
        "benchmark-loader --output OUT/file.json",
        "compile debug --devices 1 --output OUT",
        "stats --data.path nowhere --output OUT",
        "inspect debug --output OUT",
        "reproduce rivals --runs OUT",
        "reproduce rivals --results OUT",
        "reproduce rivals --episodes 0 --page OUT/page.md",
        "serve --policy.dir nowhere --port 0 --record OUT",
    ],
)
def test_where_nothing_can_be_written_is_known_first(command, words, tmp_path, monkeypatch):
    """Before a policy or dataset is looked for, which here there is none of."""
    (tmp_path / "file").write_text("in the way")
    target = str(tmp_path / "file" / "new")
    monkeypatch.chdir(tmp_path)
    # In this process JAX may have started.
    monkeypatch.setattr(processes, "split_cpu", lambda rows: None)
    status, _, err = command(main, *words.replace("OUT", target).split())
    assert status == 1
    said = f"{tmp_path / 'file'} is a file, expected a folder: move it away, or give another "
    assert f"error: {said}" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_programming_error_keeps_its_traceback():
    with pytest.raises(TypeError), exits.exit_on(KeyError):
        raise TypeError
