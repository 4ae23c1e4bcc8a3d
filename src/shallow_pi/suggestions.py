"""The end of an error about an unknown name: the name that was probably meant."""

import difflib
from collections.abc import Iterable


def closest(name: str, names: Iterable[str], otherwise: str = "") -> str:
    """`; did you mean 'turntable'?` if one of `names` is close, else `otherwise`."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else otherwise
