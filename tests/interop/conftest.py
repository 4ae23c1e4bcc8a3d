"""The live suite: openpi together with our code, in the environment of the pyproject.toml here.

uv run --project tests/interop pytest tests/interop

Where openpi is not installed, as in the main environment, nothing of this folder is collected.
"""

import importlib.util
import os

import pytest

OPENPI = importlib.util.find_spec("openpi") is not None
collect_ignore_glob = [] if OPENPI else ["*.py"]

if OPENPI:
    # As in tests/conftest.py, but for one device, which openpi's restoring expects to fill.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def pytest_terminal_summary(terminalreporter):
    """Says why nothing is collected, where that is so."""
    if not OPENPI:
        terminalreporter.write_line(
            "tests/interop needs openpi: uv run --project tests/interop pytest tests/interop"
        )


@pytest.fixture(scope="session")
def data_home(tmp_path_factory):
    """openpi's cache folder, for child processes too, with a small tokenizer for PaliGemma's."""
    from shallow_pi.data.robots import tokenizer

    home = tmp_path_factory.mktemp("data_home")
    path = home / "big_vision" / "paligemma_tokenizer.model"
    tokenizer.train(["fold the towel", "touch the red block"], path, vocab_size=320)
    before = os.environ.get("OPENPI_DATA_HOME")
    os.environ["OPENPI_DATA_HOME"] = str(home)
    yield home
    os.environ.pop("OPENPI_DATA_HOME")
    if before is not None:
        os.environ["OPENPI_DATA_HOME"] = before
