"""The export formats by name; a new one is a file in this folder and a line in the table."""

import pathlib
from collections.abc import Mapping
from typing import Protocol

from shallow_pi import suggestions
from shallow_pi.deploy.export import (
    lerobot,
    onnx,
    openpi,
    openpi_padded,
    openpi_pytorch,
    stablehlo,
)
from shallow_pi.deploy.export import student as students
from shallow_pi.inference import quantize


class Format(Protocol):
    """The functions that a format's file defines."""

    # Dtypes of a graph, the default first; empty if other projects' classes load the parameters.
    DTYPES: tuple[str, ...]
    # Sizes of a model that the classes that load it have built in; empty for graphs.
    BUILT_IN: frozenset[str]

    def check(self, student: students.Student) -> None:
        """Raise before the parameters of a student are read, which are shapes alone here.

        Raises:
          ValueError: the format cannot represent it, or needs a package that is missing.
        """

    def prepare(self, student: students.Student) -> students.Student:
        """The student as represented in this format: the same function of observations."""

    def write(self, folder: pathlib.Path, student: students.Student) -> None:
        """Write everything but `assets/` into a new folder."""

    def usage(self, folder: str, student: students.Student) -> str:
        """Instructions for running the folder of that name, in Markdown."""

    def verify(
        self, folder: pathlib.Path, exported: students.Student, student: students.Student
    ) -> str:
        """Read the folder, compare it with the student, and return a description of the result.

        Raises:
          ValueError: it computes another function than the student.
        """


FORMATS: Mapping[str, Format] = {
    "openpi": openpi,
    "openpi-padded": openpi_padded,
    "openpi-pytorch": openpi_pytorch,
    "lerobot": lerobot,
    "onnx": onnx,
    "stablehlo": stablehlo,
}


# Schemes of products in 8 bits (`inference.quantize`) that a format can hold; the others hold float
# weights alone.
SCHEMES: Mapping[str, tuple[quantize.Scheme, ...]] = {
    "onnx": ("int8",),
    "stablehlo": ("int8", "w8"),
}


def check_scheme(name: str, scheme: quantize.Scheme) -> None:
    """Raise ValueError if a format has no products in 8 bits of that scheme."""
    quantize.check(scheme)
    if scheme != "none" and scheme not in SCHEMES.get(name, ()):
        there = "; ".join(f"{format}: {', '.join(found)}" for format, found in SCHEMES.items())
        own = SCHEMES.get(name)
        holds = f"has --quantize {', '.join(own)}" if own else "holds float weights alone"
        raise ValueError(f"--quantize {scheme}: --format {name} {holds} (there are {there})")


def find(name: str) -> Format:
    """The format of that name.

    Raises:
      ValueError: an unknown name; lists the formats.
    """
    if name not in FORMATS:
        hint = suggestions.closest(name, FORMATS)
        raise ValueError(f"unknown --format {name!r}: there are {', '.join(FORMATS)}{hint}")
    return FORMATS[name]
