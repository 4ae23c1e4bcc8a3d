"""The script that serves with openpi, where there is none; with it, see tests/interop."""

import dataclasses
import importlib.util

import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.commands import serve_openpi
from shallow_pi.interop import openpi as interop
from shallow_pi.interop import openpi_configs

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openpi") is not None, reason="openpi is installed here"
)


def test_without_openpi_the_error_says_where_to_run_it(command):
    arguments = "policy:checkpoint", "--policy.config=pi0_aloha_l6", "--policy.dir=nowhere"
    status, _, said = command(serve_openpi, *arguments)
    assert status == 1
    assert said.startswith("error: openpi is not installed here")
    assert "run this with its .venv/bin/python" in said


def test_help_teaches_even_without_openpi(command):
    status, out, err = command(serve_openpi, "--help")
    assert (status, err) == (0, "")
    assert "policy:checkpoint --policy.config=NAME --policy.dir=STEP" in out


def test_what_openpi_computes_otherwise_is_told(own, params, tmp_path, monkeypatch, capsys):
    """Its classes have one tokenizer, and no products in 8 bits."""
    for name in ("require", "train_config", "register", "_sample_in"):
        monkeypatch.setattr(interop, name, lambda *_: "")
    weights.save_params(tmp_path / "2" / "params", params)
    dataclasses.replace(own, quantize="int8").save(tmp_path / "2" / "assets")
    interop.register_checkpoint("student", tmp_path / "2")
    told = " ".join(capsys.readouterr().err.split())
    assert "trained for products in 8 bits (int8), and openpi multiplies its unrounded" in told
    assert "PaliGemma's tokenizer, and the student's has 320 pieces, not 257152" in told


def test_an_experiment_of_openpis_needs_openpi():
    with pytest.raises(ModuleNotFoundError, match="openpi is not installed here"):
        openpi_configs.experiment("pi05_libero")
