"""Fixtures of the data's tests."""

import pathlib
import shutil

import pusht
import pytest


@pytest.fixture
def copy(tmp_path) -> pathlib.Path:
    """A copy of the recordings with images, to change."""
    return shutil.copytree(pusht.IMAGE, tmp_path / "dataset")
