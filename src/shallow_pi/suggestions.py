"""The end of an error about an unknown name: the name that was probably meant."""

import difflib
from collections.abc import Iterable


def closest(name: str, names: Iterable[str], otherwise: str = "") -> str:
    """`; did you mean 'turntable'?` if one of `names` is close in any case, else `otherwise`."""
    spelled = {one.lower(): one for one in names}
    close = difflib.get_close_matches(name.lower(), spelled, n=1)
    return f"; did you mean {spelled[close[0]]!r}?" if close else otherwise
