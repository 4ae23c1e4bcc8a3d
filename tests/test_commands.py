"""The one command of a wheel: it lists the others, runs the one that is named, and speaks as it."""

import ast
import pathlib
import sys

import pytest

from shallow_pi.commands import main

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = {path.stem for path in (ROOT / "scripts").glob("*.py")}


@pytest.fixture
def command(capsys, monkeypatch):
    """Calls `shallow-pi` in this process: (exit status, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["shallow-pi", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main.main()
        said = capsys.readouterr()
        return exit_.value.code, said.out, said.err

    return call


def test_every_command_is_listed_with_its_first_line(command):
    status, out, _ = command()
    assert status == 2
    for name, module in main.COMMANDS.items():
        path = ROOT / "src/shallow_pi/commands" / f"{module}.py"
        first = ast.get_docstring(ast.parse(path.read_text())).partition("\n")[0]
        assert f"    {name:<18}{first}" in out.splitlines()


def test_a_command_helps_under_the_name_it_was_called_by(command):
    status, out, _ = command("export", "--help")
    assert status == 0
    assert "usage: shallow-pi export " in out
    assert "shallow-pi export SOURCE --format FORMAT" in out
    assert "scripts/" not in out


def test_an_unknown_command_names_the_closest(command):
    status, _, err = command("exprot", "--help")
    assert status == 2
    assert "unknown command 'exprot'" in err
    assert "did you mean 'export'?" in err
