"""A warning is told once, and is an error where that was asked for."""

import pytest

from shallow_pi import progress


def test_a_warning_is_printed_once_in_one_line(capsys):
    text = "camera [front] is not used " + "x" * 120
    progress.warn(text)
    progress.warn(text)
    progress.warn("another")
    assert capsys.readouterr().err == f"warning: {text}\nwarning: another\n"


def test_strict_makes_a_warning_an_error():
    progress.be_strict()
    with pytest.raises(ValueError, match=r"a key is not used \(--strict makes this"):
        progress.warn("a key is not used")
