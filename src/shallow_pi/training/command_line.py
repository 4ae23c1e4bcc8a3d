"""Experiments on the command line: found by name, with every field as a flag.

`cli` lists the experiments of a folder, finds one by the name of its file, and lets every field be
overridden.
"""

import ast
import dataclasses
import importlib.util
import pathlib
import sys
import traceback
from collections.abc import Sequence

from shallow_pi import flags, progress, suggestions
from shallow_pi.checkpoints import run_folder
from shallow_pi.training import idle
from shallow_pi.training.config import DistillConfig


def configs() -> pathlib.Path:
    """The folder of the listed experiments, in the clone or in the installed package."""
    package = pathlib.Path(__file__).parents[1]
    inside = package / "train_configs"
    return inside if inside.is_dir() else package.parents[1] / "train_configs"


def names(folder: pathlib.Path) -> dict[str, str]:
    """Every experiment of a folder and the first line of its docstring, without importing any."""
    found = {}
    for path in sorted(folder.glob("[!_]*.py")):
        found[path.stem] = _docstring(path).partition("\n")[0]
    return found


def _docstring(path: pathlib.Path) -> str:
    try:
        return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"), path.name)) or ""
    except (SyntaxError, ValueError) as error:
        # The other experiments are still listed and found; `load` raises for this one.
        return f"(cannot be read: {error})"


def load(folder: pathlib.Path, name: str) -> DistillConfig:
    """The experiment of that name, or of the Python file at that path (`my_arm_l6.py`).

    Raises:
      ValueError: there is none of that name; lists them and the closest. Or the file has no config.
      FileNotFoundError: there is no such file.
    """
    path = find(folder, name)
    spec = importlib.util.spec_from_file_location(f"train_configs.{path.stem}", path)
    assert spec is not None, f"{path} is a Python file"
    assert spec.loader is not None, f"{path} is a Python file"
    module = importlib.util.module_from_spec(spec)
    # Variants import what they share from files beside them.
    paths, before = [str(path.parent), str(folder)], set(sys.modules)
    sys.path[:0] = paths
    try:
        spec.loader.exec_module(module)
        experiment = module.get_config()
    except Exception as error:  # Whatever the code in it raises.
        lines = traceback.extract_tb(error.__traceback__)
        where = [f", line {frame.lineno}" for frame in lines if frame.filename == str(path)]
        raise ValueError(
            f"config {path}{''.join(where[-1:])}: {type(error).__name__}: {error} (docs/configs.md "
            "has a whole example)"
        ) from error
    finally:
        for added in paths:
            sys.path.remove(added)
        # Another folder's config may import another file of the same name.
        for imported in set(sys.modules) - before:
            file = getattr(sys.modules[imported], "__file__", None)
            if file and str(pathlib.Path(file).parent) in paths:
                del sys.modules[imported]
    if not isinstance(experiment, DistillConfig):
        raise ValueError(
            f"get_config() of {path} must return a DistillConfig, got {type(experiment).__name__}"
        )
    student = experiment.student
    if student.layers and student.depth not in (type(student).depth, len(student.layers)):
        raise ValueError(
            f"config {path}: the student's depth {student.depth} and its layers "
            f"{' '.join(map(str, student.layers))} differ: give only one"
        )
    return dataclasses.replace(experiment, name=path.stem)


def find(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The file of an experiment."""
    if name.endswith(".py"):
        path = pathlib.Path(name).expanduser().absolute()
        if not path.is_file():
            raise FileNotFoundError(
                f"no config {path}: expected a Python file with get_config() (docs/configs.md)"
            )
        return path
    available = names(folder)
    if name.startswith("-"):
        raise ValueError(
            f"the name of a config, or a file of your own, *.py, comes first; got {name}. There "
            f"are {', '.join(available)}"
        )
    if name not in available:
        hint = suggestions.closest(name, available, "; or name a file of your own, *.py")
        if pathlib.Path(name).expanduser().is_dir():
            hint = f"; {name} is a folder: give a dataset after the name, as --data.path {name}"
        raise ValueError(f"unknown config {name!r}; there are {', '.join(available)}{hint}")
    return folder / f"{name}.py"


def cli(
    folder: pathlib.Path, usage: str, arguments: Sequence[str], default: DistillConfig | None = None
) -> DistillConfig:
    """Read `NAME [--field value ...]`; exits with 0 after --help, with 2 on anything wrong.

    Args:
      folder: the folder of the experiments.
      usage: the script's docstring, shown by --help.
      arguments: the command line.
      default: an experiment that is no file of `folder`; then every argument is a field.
    """
    if default is None and (not arguments or arguments[0] in ("-h", "--help")):
        print(f"{usage.strip()}\n\nconfigs:")
        listed = names(folder)
        width = max(map(len, listed))
        for name, line in listed.items():
            print(f"  {name:<{width}}  {line}")
        print("\nNAME, or a file of your own (docs/configs.md): NAME --help lists every field.")
        raise SystemExit(0 if arguments else 2)
    try:
        description = usage
        if default is None:
            name, arguments = arguments[0], arguments[1:]
            default, description = load(folder, name), _docstring(find(folder, name))
        command = pathlib.Path(sys.argv[0]).name
        experiment = flags.parse(
            DistillConfig,
            arguments,
            description,
            prog=f"{command} {default.name}",
            default=default,
            idle=idle.fields,
            conflicts=idle.conflicts,
        )
        return _fit_schedule(experiment, default, arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _fit_schedule(
    experiment: DistillConfig, default: DistillConfig, arguments: Sequence[str]
) -> DistillConfig:
    """Scale the schedule with --num-train-steps unless it is given; a resumed run keeps it."""
    if flags.named(arguments) & {"--schedule.warmup-steps", "--schedule.decay-steps"}:
        return experiment
    schedule, steps = experiment.schedule, experiment.num_train_steps
    saved = run_folder.read_config(experiment.folder) if experiment.resume else None
    began = run_folder.flatten(saved or {})
    match began.get("schedule.warmup_steps"), began.get("schedule.decay_steps"):
        case int(warmup), int(decay):
            why = "as the run began"
        case _:
            share = steps / default.num_train_steps
            warmup = round(share * schedule.warmup_steps)
            decay = max(warmup + 1, round(share * schedule.decay_steps))
            why = f"in proportion to --num-train-steps {steps}"
    fitted = dataclasses.replace(schedule, warmup_steps=warmup, decay_steps=decay)
    if fitted != schedule:
        progress.say(
            f"Schedule: --schedule.warmup-steps {warmup} --schedule.decay-steps {decay}, {why}"
        )
    return dataclasses.replace(experiment, schedule=fitted)


def teacher_experiment(folder: pathlib.Path, experiment: DistillConfig) -> DistillConfig:
    """The experiment that trains the teacher of another one, under the same run name."""
    assert experiment.teacher is not None, "asked for by teacher.train"
    if not experiment.teacher.config:
        raise ValueError(
            f"{experiment.name} names no config that trains its teacher (--teacher.config): leave "
            "out --teacher.train and give --teacher.path"
        )
    progress.say(
        f"The teacher is trained as {experiment.teacher.config} says, with this model, --exp-name, "
        "--checkpoint-dir, --resume and --overwrite; other flags are the student's"
    )
    return dataclasses.replace(
        load(folder, experiment.teacher.config),
        model=experiment.model,
        exp_name=experiment.exp_name,
        checkpoint_dir=experiment.checkpoint_dir,
        resume=experiment.resume,
        overwrite=experiment.overwrite,
    )
