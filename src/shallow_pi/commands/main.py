"""`shallow-pi NAME ...`: every command of this package, without a clone.

A command is a module of this folder, and its docstring is the help text; only the requested command
is imported.
"""

import ast
import importlib
import importlib.metadata
import pathlib
import sys
from collections.abc import Sequence

from shallow_pi import suggestions

# Name → module of this folder; the script in a clone has the module's name.
COMMANDS = {
    "train": "train_distill",
    "teacher": "train_teacher",
    "serve": "serve_policy",
    "load-test": "load_test",
    "export": "export_student",
    "calibrate": "calibrate",
    "serve-openpi": "serve_openpi",
    "inspect": "inspect_data",
    "stats": "compute_norm_stats",
    "convert": "convert_dataset",
    "demonstrations": "make_demonstrations",
    "evaluate": "evaluate",
    "estimate": "estimate_memory",
    "compile": "compile_ahead",
    "predict": "predict_latency",
    "benchmark": "benchmark",
    "benchmark-all": "benchmark_all",
    "benchmark-step": "benchmark_step",
    "benchmark-loader": "benchmark_loader",
    "reproduce": "reproduce",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command named by the first argument; without one, list the commands."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        print(importlib.metadata.version("shallow-pi"))
        return
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        raise SystemExit(0 if words else 2)
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        hint = suggestions.closest(name, COMMANDS)
        print(f"error: unknown command {name!r}: {', '.join(COMMANDS)}{hint}", file=sys.stderr)
        raise SystemExit(2)
    module = importlib.import_module(f"shallow_pi.commands.{COMMANDS[name]}")
    own_text, own_arguments = module.__doc__, sys.argv
    # Help names commands as they are typed here.
    module.__doc__ = as_typed(module.__doc__ or "")
    # Arguments of the command's parser, its name first.
    sys.argv = [f"shallow-pi {name}", *rest]
    try:
        module.main()
    finally:
        module.__doc__, sys.argv = own_text, own_arguments


def overview() -> str:
    """The list of commands, from the first line of each one's docstring."""
    lines = ["shallow-pi COMMAND ...; shallow-pi COMMAND --help shows its options.", ""]
    for name, module in COMMANDS.items():
        path = pathlib.Path(__file__).with_name(f"{module}.py")
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"    {name:<18}{docstring.partition(chr(10))[0]}")
    return "\n".join(lines)


def as_typed(text: str) -> str:
    """A help text with `shallow-pi NAME` in place of each script of the clone."""
    for name, module in COMMANDS.items():
        for script in (f"uv run scripts/{module}.py", f"python scripts/{module}.py"):
            text = text.replace(script, f"shallow-pi {name}")
    return text


if __name__ == "__main__":
    main()
