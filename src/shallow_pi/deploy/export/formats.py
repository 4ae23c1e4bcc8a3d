"""The formats of exports by name; a new one is a file beside this one, and a line in the table."""

import difflib
import pathlib
from collections.abc import Mapping
from typing import Protocol

from shallow_pi.deploy.export import lerobot, openpi, openpi_padded, openpi_pytorch
from shallow_pi.deploy.export import student as students


class Format(Protocol):
    """The functions that a format's file defines."""

    def prepare(self, student: students.Student, origin: students.Origin) -> students.Student:
        """The student as this format holds it: the same function of the same observations."""

    def write(self, folder: pathlib.Path, student: students.Student) -> None:
        """Write everything but `assets/` into a new folder that `Policy.from_checkpoint` reads."""

    def usage(self, folder: str, student: students.Student, origin: students.Origin) -> str:
        """Instructions for running the folder of that name, in Markdown."""


FORMATS: Mapping[str, Format] = {
    "openpi": openpi,
    "openpi-padded": openpi_padded,
    "openpi-pytorch": openpi_pytorch,
    "lerobot": lerobot,
}


def find(name: str) -> Format:
    """The format of that name.

    Raises:
      ValueError: there is none; lists them.
    """
    if name not in FORMATS:
        close = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown --format {name!r}: there are {', '.join(FORMATS)}{hint}")
    return FORMATS[name]
