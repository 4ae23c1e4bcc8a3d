"""Rivals by name: `efficientvla:layers=6,tokens=16,cache=2`, the fields of a rival's dataclass."""

import dataclasses

from shallow_pi import suggestions
from shallow_pi.evaluation.rivals import cogvla, early_exit, efficientvla, mole, rival, skipping

RIVALS: dict[str, type[rival.Rival]] = {
    "teacher": skipping.Teacher,
    "skip": skipping.Skip,
    "efficientvla": efficientvla.EfficientVLA,
    "mole": mole.MoLE,
    "cogvla": cogvla.CogVLA,
    "earlyexit": early_exit.EarlyExit,
}


def find(name: str) -> rival.Rival:
    """The rival of a name, its options at their defaults where the name gives none.

    Raises:
      ValueError: an unknown rival or option, or a value of another type.
    """
    kind, _, given = name.partition(":")
    if kind not in RIVALS:
        hint = suggestions.closest(kind, RIVALS)
        raise ValueError(f"rival {kind!r} is none of {', '.join(RIVALS)}{hint}")
    made = RIVALS[kind]
    assert dataclasses.is_dataclass(made), "a rival is a dataclass of its options"
    fields = {field.name: field for field in dataclasses.fields(made)}
    options: dict[str, object] = {}
    for part in filter(None, given.split(",")):
        key, equals, text = part.partition("=")
        if key not in fields or not equals:
            known = ", ".join(f"{field.name}={field.default}" for field in fields.values())
            raise ValueError(f"rival {kind} has the options {known or '(none)'}, got {part!r}")
        like = type(fields[key].default)
        try:
            options[key] = like(text)
        except ValueError as error:
            raise ValueError(
                f"rival {kind}: {key} is of type {like.__name__}, got {text!r}"
            ) from error
    return made(**options)
