"""A dataset is compared with its robot: what the robot uses is checked, the rest is only named."""

import dataclasses
import json
import pathlib
import re
import shutil

import numpy as np
import polars as pl
import pusht
import pytest

from shallow_pi import progress
from shallow_pi.data import fit, sources
from shallow_pi.data.lerobot import reader


def _edit_features(path: pathlib.Path, **features) -> None:
    info = json.loads((path / "meta" / "info.json").read_text())
    pusht.edit_info(path, features=info["features"] | features)


def _edit_tasks(path: pathlib.Path, texts: list[str | None]) -> None:
    table = pl.DataFrame({"task_index": range(len(texts)), "task": texts})
    table.write_parquet(path / "meta" / "tasks.parquet")


def test_statistics_are_those_of_the_columns() -> None:
    dataset = reader.Dataset(pusht.VIDEO)
    stats = sources.norm_stats([dataset], pusht.ROBOT, horizon=1)
    np.testing.assert_allclose(stats["actions"].mean, dataset.columns["action"].mean(0), rtol=1e-5)
    expected = np.quantile(dataset.columns["observation.state"].astype(float), 0.99, axis=0)
    np.testing.assert_array_equal(stats["state"].q99, expected)


def test_statistics_of_delta_actions_are_those_of_what_the_model_sees() -> None:
    dataset = reader.Dataset(pusht.VIDEO)
    robot = dataclasses.replace(pusht.ROBOT, delta=(True, False))
    seen = np.concatenate([dataset.chunk(i, 4)[0] for i in range(len(dataset))])
    seen = seen.reshape(-1, 4, 2).astype(float)
    seen[:, :, 0] -= dataset.columns["observation.state"][:, None, 0]
    stats = sources.norm_stats([dataset], robot, horizon=4)["actions"]
    np.testing.assert_allclose(stats.std, seen.reshape(-1, 2).std(0), rtol=1e-5)


def test_a_dataset_that_fits_passes_without_a_word(capsys) -> None:
    for path in (pusht.IMAGE, pusht.VIDEO):
        dataset = reader.Dataset(path)
        fit.check(dataset, pusht.ROBOT)
        fit.warn(dataset, pusht.ROBOT)
        fit.check(dataset, dataclasses.replace(pusht.ROBOT, fps=9.99))  # As 29.97 is 30.
    assert capsys.readouterr().err == ""


def test_recorded_times_that_contradict_the_frame_rate_are_told(copy, capsys) -> None:
    frame, time = pl.col("frame_index"), pl.col("timestamp")
    late = ((pl.col("episode_index") == 0) & (frame > 9)).cast(pl.Float32)
    keys = fit.keys(pusht.ROBOT, reader.Dataset(copy).layout)
    for times, told in (
        (time + 0.02 * (frame % 3), ""),  # A clock that trembles.
        (2 * time, r"of 4 of 4 .*its 10 fps .*: episode 0 has 20 frames in 3\.8 s"),
        # The robot's computer was busy for five seconds.
        (time + 5 * late, r"of 1 of 4 .*: episode 0 has 20 frames in 6\.9 s"),
        (pl.lit("noon"), ""),
    ):
        pusht.edit_data(copy, times.alias("timestamp"))
        fit.warn(reader.Dataset(copy, keys=keys), pusht.ROBOT)
        err = capsys.readouterr().err
        assert re.search(told, err) if told else not err
        pusht.edit_data(copy, (frame / 10).cast(pl.Float32).alias("timestamp"))


def test_jumps_between_two_descriptions_of_one_pose_are_told(copy, capsys) -> None:
    file = copy / "data" / "chunk-000" / "file-000.parquet"
    turn = np.linspace(0, 7, len(pl.read_parquet(file)))
    half = np.stack([np.cos(turn / 2), *[np.sin(turn / 2) / np.sqrt(3)] * 3], axis=1)
    wrapped = (turn + np.pi) % (2 * np.pi) - np.pi
    flipped = half * np.where(half[:, 1:2] < 0, -1, 1)

    def told(*columns: np.ndarray) -> str:
        values = np.concatenate([np.reshape(c, (len(turn), -1)) for c in columns], axis=1)
        pusht.edit_data(copy, pl.Series("pose", values.astype(np.float32).tolist()))
        size = values.shape[1]
        _edit_features(copy, pose={"dtype": "float32", "shape": [size]})
        robot = dataclasses.replace(pusht.ROBOT, state_key="pose", state_dim=size)
        fit.warn(reader.Dataset(copy), robot)
        return capsys.readouterr().err.replace("\n", " ")

    assert "another pose" not in told(turn, np.sin(turn), half)
    # A gripper in millimetres goes as far as a turn has degrees, within another range.
    assert "another pose" not in told(np.select([turn < 2, turn < 5], [0, 360], 1000))
    found = told(turn, wrapped)
    assert re.search(r"state\[1\] jumps by a full turn: .*set, after episode \d+, frame \d+", found)
    assert "state[0] jumps by a full turn" in told(np.degrees(wrapped))
    assert "state[1] to [4], a quaternion, changes its sign" in told(turn, flipped)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"cameras": {"base_0_rgb": "observation.images.side"}},
            r"lacks camera 'observation.images.side'; it has \['observation.images.top', ",
        ),
        ({"cameras": {"base_0_rgb": "observation.image.wrist"}}, "mean 'observation.images.wrist'"),
        ({"state_key": "joints"}, r"lacks 'joints'; it has \['action', 'observation.state'"),
        (
            {"action_key": "actions"},
            r"lacks 'actions'; .*--data.robot.*\); did you mean 'action'\?$",
        ),
        ({"cameras": {"base_0_rgb": "observation.images.cam_high"}}, r"docs/robots\.md\)$"),
        ({"action_dim": 3}, r"'action' of .* has shape \(2,\), robot pusht expects \(3,\)"),
        ({"fps": 50}, "recorded at 10 fps, robot pusht runs at 50"),
    ],
)
def test_a_misfit_is_named_with_the_closest_name(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        fit.check(reader.Dataset(pusht.IMAGE), dataclasses.replace(pusht.ROBOT, **changes))


def test_columns_that_are_no_vectors_are_told(copy) -> None:
    robot = dataclasses.replace(pusht.ROBOT, state_more=("timestamp",), state_dim=3)
    with pytest.raises(ValueError, match=r"'timestamp' of .* is no vector: name another key"):
        fit.check(reader.Dataset(copy), robot)
    pusht.edit_data(copy, pl.lit("push").alias("words"))
    shape = {"dtype": "float32", "shape": [1, 2]}
    _edit_features(copy, words={"dtype": "string", "shape": [1]}, action=shape)
    with pytest.raises(ValueError, match=r"'action' of .* is declared as 'float32', a camera as"):
        reader.Dataset(copy, cameras=["action"])
    with pytest.raises(ValueError, match=r"'words' of .* is no vector"):
        fit.check(reader.Dataset(copy), dataclasses.replace(pusht.ROBOT, state_key="words"))
    with pytest.raises(ValueError, match=r"has shape \(1, 2\), .*; shape \[2\] in meta/info.json"):
        fit.check(reader.Dataset(copy), pusht.ROBOT)


def test_parts_have_the_sizes_given_or_those_of_the_first_dataset() -> None:
    dataset = reader.Dataset(pusht.IMAGE)
    parts = dataclasses.replace(pusht.ROBOT, state_more=("action",), state_dim=4)
    fit.check(dataset, parts)
    assert fit.with_sizes(parts, dataset).state_sizes == (2, 2)
    assert fit.with_sizes(pusht.ROBOT, dataset) == pusht.ROBOT
    wrong = dataclasses.replace(parts, state_sizes=(3, 1))
    assert fit.with_sizes(wrong, dataset) == wrong
    with pytest.raises(ValueError, match=r"dataset .*: got 'observation.state' \(2\) \+ 'action'"):
        fit.check(dataset, wrong)


def test_nan_names_episode_and_frame(copy) -> None:
    bad = pl.when(pl.col("index") == 27).then(float("nan")).otherwise(1.0).cast(pl.Float32)
    pusht.edit_data(copy, pl.concat_arr(bad, bad).alias("observation.state"))
    with pytest.raises(ValueError, match=r"'observation.state' .* in episode 1, frame 7: \[nan"):
        fit.check(reader.Dataset(copy), pusht.ROBOT)


def test_what_the_robot_does_not_use_stops_nothing_and_is_named_once(copy, capsys) -> None:
    pusht.edit_data(
        copy,
        pl.lit(float("nan")).alias("effort"),
        pl.lit([[1.0], [2.0, 3.0]]).alias("ragged"),
        pl.lit("push").alias("subtask"),
        pl.lit(b"junk").alias("observation.images.side"),
    )
    kind = {"dtype": "float32", "shape": [3], "names": None}
    _edit_features(
        copy,
        effort=kind,
        ragged=kind,
        absent=kind,
        strange={"dtype": "point_cloud"},
        subtask={"dtype": "string", "shape": [1]},
        **{"observation.images.side": {"dtype": "image", "shape": [9, 9, 3]}},
    )
    dataset = reader.Dataset(copy, keys=fit.keys(pusht.ROBOT, reader.Dataset(copy).layout))
    fit.check(dataset, pusht.ROBOT)
    for _ in range(2):
        fit.warn(dataset, pusht.ROBOT)
    assert capsys.readouterr().err.splitlines() == [
        f"warning: robot pusht does not use these of dataset {copy}: absent, effort, "
        "observation.images.side, ragged, strange, subtask"
    ]
    progress.be_strict()
    with pytest.raises(ValueError, match=r"does not use these .*--strict makes this warning an er"):
        fit.warn(dataset, pusht.ROBOT)


@pytest.mark.parametrize("text", ["", " ", None, "None", "nan"])
def test_an_absent_instruction_is_an_empty_prompt_and_told(copy, capsys, text) -> None:
    _edit_tasks(copy, ["push it", text])
    dataset = reader.Dataset(copy)
    assert [fit.prompt(dataset, pusht.ROBOT, i).strip() for i in (0, 20)] == ["push it", ""]
    fit.warn(dataset, pusht.ROBOT)
    assert "2 of 4 episodes of " in (err := capsys.readouterr().err)
    assert "have frames with an empty prompt (1 3): give" in err
    fit.warn(dataset, dataclasses.replace(pusht.ROBOT, prompt="push it"))
    assert capsys.readouterr().err == ""


def test_splits_that_are_not_used_are_told(copy, capsys) -> None:
    file = copy / "meta" / "info.json"
    info = json.loads(file.read_text()) | {"splits": {"train": "0:3", "val": "3:4"}}
    file.write_text(json.dumps(info))
    fit.warn(reader.Dataset(copy), pusht.ROBOT)
    assert "declares splits {'train': '0:3', 'val': '3:4'}, which" in capsys.readouterr().err


def test_a_column_of_text_can_be_the_prompt(copy) -> None:
    text = pl.when(pl.col("episode_index") == 2).then(pl.lit("lift")).otherwise(pl.lit("push"))
    pusht.edit_data(copy, text.cast(pl.Categorical).alias("instruction"))
    _edit_features(copy, instruction={"dtype": "string", "shape": [1]})
    (copy / "meta" / "tasks.parquet").unlink()
    dataset = reader.Dataset(copy)
    robot = dataclasses.replace(pusht.ROBOT, prompt_key="instruction")
    fit.check(dataset, robot)
    first = int(np.flatnonzero(dataset.columns["episode_index"] == 2)[0])
    assert (fit.prompt(dataset, robot, 0), fit.prompt(dataset, robot, first)) == ("push", "lift")
    with pytest.raises(
        ValueError, match=r"episode 0, frame 0 .* has task_index 0, its meta files have \[\]"
    ):
        fit.check(dataset, pusht.ROBOT)
    fit.check(dataset, dataclasses.replace(pusht.ROBOT, prompt="push it"))


def test_a_column_of_numbers_of_tasks_can_be_the_prompt(copy, capsys) -> None:
    """GR00T's datasets have several."""
    key = "annotation.human.action.task_description"
    pusht.edit_data(copy, (1 - pl.col("task_index")).alias(key))
    _edit_features(copy, **{key: {"dtype": "int64", "shape": [1]}})
    dataset = reader.Dataset(copy)
    robot = dataclasses.replace(pusht.ROBOT, prompt_key=key)
    assert key in fit.keys(robot, dataset.layout)
    fit.check(dataset, robot)
    fit.warn(dataset, robot)
    assert key not in capsys.readouterr().err
    tasks = [dataset.columns["task_index"][i] for i in range(len(dataset))]
    assert sorted(set(tasks)) == [0, 1]
    assert [fit.prompt(dataset, robot, i) for i in range(len(dataset))] == [
        dataset.tasks[1 - task] for task in tasks
    ]


@pytest.mark.parametrize("key", ["subtask", "subtask_index"])
def test_subtasks_have_a_table_of_their_own(copy, capsys, key) -> None:
    """LeRobot's annotations: -1 where no subtask was given."""
    pusht.edit_data(copy, (pl.col("frame_index") // 10 - 1).clip(-1, 1).alias("subtask_index"))
    _edit_features(copy, subtask_index={"dtype": "int64", "shape": [1]})
    robot = dataclasses.replace(pusht.ROBOT, prompt_key=key)
    with pytest.raises(FileNotFoundError, match=r"meta/subtasks\.parquet is missing"):
        fit.check(reader.Dataset(copy), robot)
    texts = pl.DataFrame({"subtask_index": [1, 0], "subtask": ["grasp it", "reach it"]})
    texts.write_parquet(copy / "meta" / "subtasks.parquet")
    dataset = reader.Dataset(copy)
    assert "subtask_index" in fit.keys(robot, dataset.layout)
    fit.check(dataset, robot)
    assert [fit.prompt(dataset, robot, i) for i in (9, 10, 30)] == ["", "reach it", "reach it"]
    assert fit.prompt(dataset, robot, 42) == "grasp it"
    fit.warn(dataset, robot)
    err = capsys.readouterr().err
    assert f"4 of 4 episodes of {copy} have frames with an empty prompt" in err
    assert "prompt_key" not in err
    texts[:1].write_parquet(copy / "meta" / "subtasks.parquet")
    with pytest.raises(ValueError, match=r"has subtask_index 0, .*\[1\]: add .* meta/subtasks"):
        fit.check(reader.Dataset(copy), robot)


@pytest.mark.parametrize("version", [2, 3])
def test_tasks_other_than_those_listed_for_their_episode_are_told(tmp_path, capsys, version):
    source = {2: pusht.OLD, 3: pusht.VIDEO}[version]
    copy = shutil.copytree(source, tmp_path / "dataset")
    for file in sorted(copy.glob("data/*/*.parquet"))[:1]:
        swapped = (1 - pl.col("task_index")).alias("task_index")
        pl.read_parquet(file).with_columns(swapped).write_parquet(file)
    dataset = reader.Dataset(copy)
    wrong = {2: 1, 3: 4}[version]
    fit.warn(dataset, pusht.ROBOT)
    told = capsys.readouterr().err
    assert f"warning: {wrong} of 4 episodes of {copy} have another task than their meta" in told
    first, other = dataset.tasks[1], dataset.tasks[0]
    assert f"episode 0 has frames of {first!r}, their meta files list [{other!r}]: the" in told
    fit.warn(dataset, dataclasses.replace(pusht.ROBOT, prompt="push it"))
    assert capsys.readouterr().err == ""


def test_a_task_that_was_worded_anew_is_no_other_one(copy, capsys) -> None:
    _edit_tasks(copy, ["push it", "pull it"])
    fit.warn(reader.Dataset(copy), pusht.ROBOT)
    assert capsys.readouterr().err == ""


def test_a_missing_column_of_prompts_is_reported(copy, capsys) -> None:
    pusht.edit_data(copy, pl.lit("lift").alias("instruction"))
    _edit_features(copy, instruction={"dtype": "string", "shape": [1]})
    dataset = reader.Dataset(copy)
    fit.warn(dataset, dataclasses.replace(pusht.ROBOT, prompt_key="instructoin"))
    told = capsys.readouterr().err
    assert f"{copy} has no 'instructoin' (prompt_key of robot pusht): its tasks are" in told
    assert "['instruction']; did you mean 'instruction'?" in told
    fit.warn(dataset, dataclasses.replace(pusht.ROBOT, prompt_key="action"))
    assert "has no 'action'" in capsys.readouterr().err
    for key in ("task", "prompt", "instruction"):
        fit.warn(dataset, dataclasses.replace(pusht.ROBOT, prompt_key=key))
    assert "prompt_key" not in capsys.readouterr().err
