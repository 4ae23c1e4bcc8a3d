"""Compare a dataset with the robot it is to train: errors, and warnings for a person to read.

Only what the robot uses is looked at: other columns and cameras may be of any kind, or damaged.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from shallow_pi import progress
from shallow_pi.data.lerobot import columns, layout, reader
from shallow_pi.data.robots import pipelines, tokenizer, vector
from shallow_pi.data.robots import robot as robots

# Episodes named in a warning.
_NAMED = 10
# Frame rates this close are one: cameras run at 29.97 Hz where 30 is said.
_SAME_FPS = 0.005
# The rate of an episode's recorded times may differ from info.json's by this share, and about so
# many episodes are looked at.
_SAME_PACE, _TIMED = 0.05, 200
# Share by which a jump, and the span of an angle that makes it, may differ from a full turn; and
# difference of a quaternion's length from 1.
_SAME_TURN, _UNIT = 0.1, 0.01


def keys(robot: robots.Robot, found: layout.Layout) -> list[str]:
    """The columns that training the robot reads."""
    prompt = [] if robot.prompt else [prompt_key(robot, found)]
    return list(dict.fromkeys([*robot.state_keys, *robot.action_keys, *prompt]))


def prompt_key(robot: robots.Robot, found: layout.Layout) -> str:
    """The column of the prompts: the robot's own if there, as text or as numbers of texts.

    `subtask` is also found as `subtask_index`. Otherwise it is LeRobot's, the task's number.
    """
    features = found.info["features"]
    feature = features.get(robot.prompt_key)
    if feature is None and f"{robot.prompt_key}_index" in features:
        return f"{robot.prompt_key}_index"
    if feature is not None and columns.is_text(feature):
        return robot.prompt_key
    # GR00T's datasets have several such columns.
    is_number = feature is not None and feature["dtype"].startswith(("int", "uint"))
    is_chosen = robot.prompt_key not in _USUAL_PROMPTS
    return robot.prompt_key if is_number and is_chosen else "task_index"


def prompt(dataset: reader.Dataset, robot: robots.Robot, i: int) -> str:
    """The prompt of frame `i`: the robot's own, else that of the recording, "" if it has none."""
    if robot.prompt:
        return robot.prompt
    key = prompt_key(robot, dataset.layout)
    value = dataset.columns[key][i]
    text = value if isinstance(value, str) else dataset.task(i, key)
    return "" if tokenizer.is_absent(text) else text


def check(dataset: reader.Dataset, robot: robots.Robot, *, images: bool = True) -> None:
    """Raise unless the dataset can train a policy of the robot.

    Without `images` no image or video is looked at: statistics need none.
    """
    dataset.require(keys(robot, dataset.layout), tuple(robot.cameras.values()))
    for camera, key in robot.cameras.items() if images else ():
        if reason := dataset.depth(key):
            raise ValueError(
                f"camera {key!r} (for {camera}) of dataset {dataset.path} records depth "
                f"({reason}): name a camera of 8-bit colour in the robot's cameras"
            )
    for read in (robot.state_vector, robot.action_vector):
        for key in read.keys:
            _check_vector(dataset, key)
        try:
            column = read.read(dataset.columns)
        except ValueError as error:
            raise ValueError(f"dataset {dataset.path}: {error}{parts(dataset, read)}") from error
        if column.shape[1:] != (read.dim,):
            raise ValueError(
                f"{read.named} of {dataset.path} has shape {column.shape[1:]}, robot {robot.name} "
                f"expects ({read.dim},){parts(dataset, read)}"
            )
        bad = np.flatnonzero(~np.isfinite(column).all(axis=1))
        if len(bad):
            raise ValueError(
                f"{read.named} of {dataset.path} is not finite in {dataset.where(int(bad[0]))}: "
                f"{column[bad[0]].tolist()} ({len(bad)} such frames); repair it, or give "
                "--data.exclude-episodes"
            )
    if abs(dataset.fps / robot.fps - 1) > _SAME_FPS:
        raise ValueError(
            f"dataset {dataset.path} is recorded at {dataset.fps:g} fps, robot {robot.name} runs "
            f"at {robot.fps:g}; resample the recording or set the robot's fps"
        )
    if not robot.prompt:
        for i in _first_of_each_task(dataset, robot):
            prompt(dataset, robot, i)  # Raises if there is no such task.


def _check_vector(dataset: reader.Dataset, key: str) -> None:
    """Raise unless a column has a vector of numbers in every frame."""
    shape = dataset.columns[key].shape[1:]
    if columns.is_text(dataset.features.get(key, {"dtype": ""})) or not shape:
        raise ValueError(f"{key!r} of {dataset.path} is no vector: name another key in the robot")
    if len(shape) > 1:
        raise ValueError(
            f"{key!r} of {dataset.path} has shape {shape}, expected a vector; shape "
            f"[{math.prod(shape)}] in meta/info.json reads it so"
        )


def check_sizes(dataset: reader.Dataset, robot: robots.Robot, action_dim: int) -> None:
    """Raise if the robot's vectors are too long for the model's; names their parts."""
    for of in (robot.state_vector, robot.action_vector):
        pipelines.check_size(of, action_dim, parts(dataset, of))


def parts(dataset: reader.Dataset, of: vector.Vector) -> str:
    """Lines for an error about sizes: the parts of a vector's columns to take with its indices.

    They are the slices of GR00T's `meta/modality.json`, else the columns' names of dimensions;
    empty where the dataset has neither.
    """
    slices = dataset.layout.slices(of.what)
    lines, start = [], 0
    for key in of.keys:
        for name, (first, last) in slices.get(key, {}).items():
            lines.append(f"*range({start + first}, {start + last}),  # {name}")
        if key not in slices:
            lines += [f"{start + i},  # {name}" for i, name in enumerate(dataset.names(key))]
        start += math.prod(dataset.columns[key].shape[1:])
    if not lines:
        return ""
    head = f"\nto take a part of {of.named}, copy it from these into the robot's {of.what}_indices"
    return "\n    ".join([f"{head} (docs/robots.md):", *lines])


def with_sizes(robot: robots.Robot, dataset: reader.Dataset) -> robots.Robot:
    """The robot with the sizes of its columns as this dataset has them, where it gives none."""

    def sizes(of: vector.Vector, given: tuple[int, ...]) -> tuple[int, ...]:
        if given or (len(of.keys) == 1 and not of.indices):
            return given
        return tuple(math.prod(dataset.columns[key].shape[1:]) for key in of.keys)

    return dataclasses.replace(
        robot,
        state_sizes=sizes(robot.state_vector, robot.state_sizes),
        action_sizes=sizes(robot.action_vector, robot.action_sizes),
    )


def warn(dataset: reader.Dataset, robot: robots.Robot) -> None:
    """Warn, once, of what is not used, and of episodes without an instruction."""
    needed = {*robot.cameras.values(), *keys(robot, dataset.layout), *columns.BOOKKEEPING}
    unused = sorted(set(dataset.features) - needed - _FLAGS)
    if unused:
        progress.warn(
            f"robot {robot.name} does not use these of dataset {dataset.path}: {', '.join(unused)}"
        )
    key = prompt_key(robot, dataset.layout)
    known = (key, key.removesuffix("_index"), *_USUAL_PROMPTS)
    if robot.prompt_key not in known and not robot.prompt:
        texts = sorted(key for key, found in dataset.features.items() if columns.is_text(found))
        progress.warn(
            f"dataset {dataset.path} has no {robot.prompt_key!r} (prompt_key of robot "
            f"{robot.name}): its tasks are the prompts; its text columns are "
            f"{texts}{columns.closest(robot.prompt_key, texts)}"
        )
    splits = dataset.info.get("splits")
    if isinstance(splits, dict) and set(splits) - {"train"}:
        progress.warn(
            f"dataset {dataset.path} declares splits {splits}, which are not used: choose episodes "
            "with --data.episodes, hold some out with --data.held-out"
        )
    empty = [] if robot.prompt else _without_prompt(dataset, robot)
    if empty:
        shown = " ".join(map(str, empty[:_NAMED])) + (" ..." if len(empty) > _NAMED else "")
        progress.warn(
            f"{len(empty)} of {dataset.num_episodes} episodes of {dataset.path} have frames with "
            f"an empty prompt ({shown}): give --data.exclude-episodes, or the robot a prompt"
        )
    if key == "task_index" and not robot.prompt:
        _warn_of_other_tasks(dataset)
    _warn_of_pace(dataset)
    _warn_of_turns(dataset, robot)


def _warn_of_turns(dataset: reader.Dataset, robot: robots.Robot) -> None:
    """Warn of angles that jump by a full turn, and of quaternions that change their sign.

    Either is one pose under two descriptions, between which a policy learns to answer.
    """
    within = np.flatnonzero(dataset.ends[1:] == dataset.ends[:-1])
    for name, of in (("state", robot.state_vector), ("actions", robot.action_vector)):
        values = of.read(dataset.columns)
        before, after = values[within], values[within + 1]
        steps, span = np.abs(after - before), np.ptp(values, axis=0)
        turns = np.zeros(steps.shape, bool)
        for turn in (2 * np.pi, 360):
            # Angles that wrap span a turn; other values may go as far at once, in a wider range.
            is_angle = np.abs(span / turn - 1) < _SAME_TURN
            turns |= (np.abs(steps / turn - 1) < _SAME_TURN) & is_angle
        found = {f"[{dim}] jumps by a full turn": jumps for dim, jumps in enumerate(turns.T)}
        for dim in range(of.dim - 3):
            part = slice(dim, dim + 4)
            if np.allclose(np.linalg.norm(values[:, part], axis=1), 1, atol=_UNIT):
                opposite = np.sum(before[:, part] * after[:, part], axis=1) < -0.5
                found[f"[{dim}] to [{dim + 3}], a quaternion, changes its sign"] = opposite
        for what, jumps in found.items():
            if jumps.any():
                first = dataset.where(int(within[np.argmax(jumps)]))
                more = f" and {jumps.sum() - 1} more" if jumps.sum() > 1 else ""
                progress.warn(
                    f"{name}{what}: dataset {dataset.path}, after {first}{more}; policies learn "
                    "values between the two, which are another pose: record it without jumps, and "
                    "fine-tune the teacher on that"
                )


def _warn_of_pace(dataset: reader.Dataset) -> None:
    """Warn of episodes whose recorded times say another frame rate than `info.json`.

    The actions of a chunk are learned as one frame apart, and executed at the robot's rate.
    """
    if "timestamp" not in dataset.columns:
        return
    every = -(-dataset.num_episodes // _TIMED)
    part = dataset if every == 1 else dataset.select(dataset.episodes[::every])
    try:
        times = part.columns["timestamp"].astype(np.float64)
    except ValueError:  # Nothing but this needs them: videos, which do, have been checked.
        return
    first = np.flatnonzero(np.diff(part.ends, prepend=0))
    last = part.ends[first] - 1
    seconds, steps = times[last] - times[first], last - first
    wrong = np.flatnonzero(~(np.abs(seconds * dataset.fps - steps) <= _SAME_PACE * steps))
    if len(wrong):
        one = int(wrong[0])
        episode = int(part.columns["episode_index"][first[one]])
        progress.warn(
            f"recorded times of {len(wrong)} of {len(first)} episodes of {dataset.path} contradict "
            f"its {dataset.fps:g} fps (meta/info.json): episode {episode} has {steps[one] + 1} "
            f"frames in {seconds[one]:.4g} s; actions are learned as 1/{dataset.fps:g} s apart: "
            "correct fps, or the episodes that lack frames"
        )


def _warn_of_other_tasks(dataset: reader.Dataset) -> None:
    """Warn of frames whose task is none of those that the meta files list for their episode.

    Merges that number tasks or episodes anew in one of the two places alone leave such datasets.
    Texts that are no task's any more were worded anew in the file of tasks, and tell nothing.
    """
    known = {text.strip() for text in dataset.tasks.values()}
    episodes = dataset.columns["episode_index"]
    tasks = dataset.columns["task_index"].reshape(len(dataset))
    changes = (np.diff(episodes, prepend=-1) != 0) | (np.diff(tasks, prepend=-1) != 0)
    wrong: dict[int, str] = {}
    for i in np.flatnonzero(changes).tolist():
        episode, text = int(episodes[i]), dataset.task(i).strip()
        listed = {other.strip() for other in dataset.layout.listed.get(episode, ())} & known
        if listed and text not in listed and not tokenizer.is_absent(text):
            wrong.setdefault(episode, f"frames of {text!r}, their meta files list {sorted(listed)}")
    if wrong:
        first, what = next(iter(wrong.items()))
        progress.warn(
            f"{len(wrong)} of {dataset.num_episodes} episodes of {dataset.path} have another task "
            f"than their meta files list; episode {first} has {what}: the frames' (task_index) are "
            "the prompts, compare some with their images (scripts/inspect_data.py)"
        )


# Columns that LeRobot and its tools write beside a recording, of which no robot makes use.
_FLAGS = {"next.done", "next.reward", "next.success"}
# Names of an observation's instruction, for which a recording has its tasks.
_USUAL_PROMPTS = ("task", "prompt")


def _first_of_each_task(dataset: reader.Dataset, robot: robots.Robot) -> list[int]:
    """A frame of every different prompt."""
    return np.unique(_prompts(dataset, robot), return_index=True)[1].tolist()


def _prompts(dataset: reader.Dataset, robot: robots.Robot) -> np.ndarray:
    """The prompt of every frame, or its number."""
    return dataset.columns[prompt_key(robot, dataset.layout)].reshape(len(dataset))


def _without_prompt(dataset: reader.Dataset, robot: robots.Robot) -> Sequence[int]:
    column = _prompts(dataset, robot)
    firsts = _first_of_each_task(dataset, robot)
    empty = [column[i] for i in firsts if not prompt(dataset, robot, i).strip()]
    chosen = np.isin(column, np.array(empty, column.dtype))
    return np.unique(dataset.columns["episode_index"][chosen]).tolist()
