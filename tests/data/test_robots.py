"""The robots are openpi's, one's own is a small file, and what cannot be is refused."""

import dataclasses
import json
import textwrap

import numpy as np
import pytest

from shallow_pi.data.robots import conversions
from shallow_pi.data.robots import robot as robots


def test_masks_are_written_as_groups() -> None:
    assert robots.mask(2, -1, 1) == (True, True, False, True)
    assert robots.ALOHA.delta == ((True,) * 6 + (False,)) * 2


def test_aloha_maps_its_three_cameras() -> None:
    keys = {
        camera: key.removeprefix("observation.images.")
        for camera, key in robots.find("aloha").cameras.items()
    }
    assert keys == {
        "base_0_rgb": "cam_high",
        "left_wrist_0_rgb": "cam_left_wrist",
        "right_wrist_0_rgb": "cam_right_wrist",
    }


def test_rby1_records_two_arms_then_two_grippers():
    robot = robots.find("rby1")
    assert robot.delta == (True,) * 14 + (False,) * 2
    spanned = [limits is not None and limits.is_spanned for limits in robot.state_limits]
    assert spanned == [not delta for delta in robot.delta]


@pytest.mark.parametrize(
    ("name", "dims", "fps", "deltas"),
    [
        ("turntable", (3, 3), 20, 3),
        ("aloha", (14, 14), 50, 12),
        ("aloha_sim", (14, 14), 50, 0),
        ("libero", (8, 7), 10, 0),
        ("libero_delta", (8, 7), 10, 6),
        ("droid", (8, 8), 15, 0),
        ("droid_position", (8, 8), 15, 7),
        ("ur5", (7, 7), 20, 6),
    ],
)
def test_sizes_are_openpis(name, dims, fps, deltas) -> None:
    robot = robots.find(name)
    assert (robot.state_dim, robot.action_dim) == dims
    assert robot.fps == fps
    assert sum(robot.delta) == deltas


def test_every_robot_survives_json() -> None:
    for robot in robots.ROBOTS.values():
        content = json.loads(json.dumps(dataclasses.asdict(robot)))
        assert robots.from_dict(content) == robot


@pytest.mark.parametrize("robot", [robots.DROID, robots.DROID_POSITION])
def test_roboarenas_client_is_told_what_an_action_of_droid_means(robot) -> None:
    told = robot.metadata
    assert told["action_space"] == robot.groups[0].name
    outside = [key for key in robot.cameras.values() if key.startswith("exterior_image")]
    assert told["n_external_cameras"] == len(outside) == 1
    assert told["needs_wrist_camera"] == ("wrist_image_left" in robot.cameras.values())
    assert not told["needs_stereo_camera"]
    assert not told["needs_session_id"]
    assert told["image_resolution"] is None


def test_limits_are_those_of_each_dimension() -> None:
    aloha = robots.ALOHA.state_limits
    assert [limits.is_spanned for limits in aloha] == [*[False] * 6, True] * 2
    for robot in robots.ROBOTS.values():
        assert len(robot.state_limits) in (0, robot.state_dim)
        assert len(robot.action_limits) in (0, robot.action_dim)
    with pytest.raises(ValueError, match="state_limits has 13 entries, state_dim is 14"):
        dataclasses.replace(robots.ALOHA, state_limits=aloha[1:])
    with pytest.raises(ValueError, match="low < high, got 1 and 0"):
        robots.Limits(1, 0)
    some = dataclasses.replace(robots.UR5, action_limits=(*[None] * 6, robots.Limits(0, 1)))
    assert robots.from_dict(json.loads(json.dumps(dataclasses.asdict(some)))) == some


def test_a_robot_saved_without_groups_loads_as_one_group() -> None:
    content = dataclasses.asdict(robots.UR5)
    del content["groups"]
    robot = robots.from_dict(content)
    assert robot == dataclasses.replace(robots.UR5, groups=())
    assert robot.action_groups == (robots.Group("action", 7),)


def test_every_robot_names_the_groups_of_its_actions() -> None:
    for robot in robots.ROBOTS.values():
        assert robot.action_groups == robot.groups
        assert sum(group.size for group in robot.groups) == robot.action_dim
    assert [(g.name, g.size, g.unit) for g in robots.ALOHA.groups[:2]] == [
        ("left_arm", 6, "rad"),
        ("left_gripper", 1, ""),
    ]


def test_a_robot_can_be_a_file(tmp_path) -> None:
    path = tmp_path / "my_arm.py"
    path.write_text(
        textwrap.dedent(
            """
            import dataclasses

            from shallow_pi.data import robots

            ROBOT = dataclasses.replace(robots.UR5, name="ur5_slow", fps=10)
            """
        )
    )
    robot = robots.find(str(path))
    assert (robot.name, robot.fps, robot.delta) == ("ur5_slow", 10, robots.UR5.delta)
    path.write_text("robot = 3")
    with pytest.raises(ValueError, match=r"must define ROBOT = .* got nothing of that name"):
        robots.find(str(path))
    path.write_text("ROBOT = 'ur5'")
    with pytest.raises(ValueError, match=r"must define ROBOT = .* got str"):
        robots.find(str(path))
    path.write_text(
        "from shallow_pi.data import robots\nimport dataclasses\n"
        "ROBOT = dataclasses.replace(robots.UR5, fps=3)"
    )
    with pytest.raises(ValueError, match="names its robot 'ur5', which is another: rename it"):
        robots.find(str(path))
    path.write_text("from shallow_pi.data import robots\n\nROBOT = robots.Robot(state_dims=3)")
    with pytest.raises(ValueError, match=r"my_arm\.py, line 3: TypeError.*state_dims.*state_dim,"):
        robots.find(str(path))
    path.write_text("ROBOT = (")
    with pytest.raises(ValueError, match=r"my_arm\.py: SyntaxError: .*was never closed"):
        robots.find(str(path))
    with pytest.raises(FileNotFoundError, match=r"no robot file .*other\.py"):
        robots.find(str(tmp_path / "other.py"))


def test_the_example_of_the_docstring_runs(tmp_path) -> None:
    text = robots.__doc__
    example = text[text.index("    from shallow_pi") : text.index("or a variant")]
    (tmp_path / "example.py").write_text(textwrap.dedent(example))
    assert robots.find(str(tmp_path / "example.py")).delta == (True,) * 6 + (False,)


def test_keys_that_repeat_or_are_empty_are_refused() -> None:
    with pytest.raises(ValueError, match=r"names that differ, got \['joints', 'joints'\]"):
        dataclasses.replace(robots.UR5, state_more=("joints",))
    with pytest.raises(ValueError, match=r"names that differ, got \['actions', ''\]"):
        dataclasses.replace(robots.UR5, action_more=("",))


def test_parts_that_only_add_up_are_refused() -> None:
    joints, gripper = np.zeros(6), np.zeros(1)
    assert robots.UR5.state({"joints": joints, "gripper": gripper}).shape == (7,)
    assert robots.UR5.state({"joints": joints, "gripper": 0.5}).shape == (7,)
    with pytest.raises(ValueError, match=r"'joints' \(5\) \+ 'gripper' \(2\), robot ur5 exp"):
        robots.UR5.state({"joints": np.zeros(5), "gripper": np.zeros(2)})
    for sizes in ((7,), (7, 0), (7, 1)):
        with pytest.raises(ValueError, match=r"state_sizes are \[7.*'gripper'.* state_dim, 7"):
            dataclasses.replace(robots.UR5, state_sizes=sizes)
    # Actions in parts: by their groups, or by sizes of their own.
    parted = dataclasses.replace(robots.UR5, action_more=("grip",))
    for robot in (parted, dataclasses.replace(parted, groups=(), action_sizes=(6, 1))):
        assert robot.actions({"actions": joints, "grip": gripper}).shape == (7,)
        with pytest.raises(ValueError, match=r"'actions' \(5\) \+ 'grip' \(2\), robot ur5 expects"):
            robot.actions({"actions": np.zeros((9, 5)), "grip": np.zeros((9, 2))})


def test_unknown_robots_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown robot 'turntabel'.*did you mean 'turntable'"):
        robots.find("turntabel")
    with pytest.raises(ValueError, match=r"unknown robot 'crane'.*name a file"):
        robots.find("crane")
    with pytest.raises(ValueError, match=r"'openpi:my_arm' is known .* with --data\.robot"):
        robots.find("openpi:my_arm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": ["top"]}, r"cameras must be Mapping\[str, str\], got \['top'\]"),
        ({"cameras": {"base_0_rgb": ("top",)}}, r"cameras must be Mapping\[str, str\], got"),
        ({"state_key": ("state",)}, r"state_key must be str, got \('state',\)"),
        ({"action_dim": "7"}, "action_dim must be int, got '7'"),
        ({"fps": "30"}, "fps must be int \\| float, got '30'"),
        # Not the numbers that `mask` takes.
        ({"delta": (6, -1)}, r"delta must be tuple\[bool, \.\.\.\], got \(6, -1\)"),
        ({"state_limits": ((0, 1),) * 14}, r"state_limits must be tuple\[Limits \| None"),
    ],
)
def test_a_field_of_another_type_is_refused(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(robots.ALOHA, **change)


def test_robots_that_do_not_fit_together_are_refused() -> None:
    changes = {
        "has no cameras": {"cameras": {}},
        "positive state_dim, action_dim and fps, got 14, 0 and 50": {"action_dim": 0},
        "delta names 15 dimensions, state and actions have 14 and 14": {"delta": (True,) * 15},
        "action_conversion has 2 dimensions, action_dim is 14": {
            "action_conversion": conversions.Conversion((1, 1))
        },
        r"its groups have 6 \+ 1 dimensions, action_dim is 14": {"groups": robots.UR5.groups},
        r"groups need names that differ, without slashes, got \['a', 'a'\]": {
            "groups": (robots.Group("a", 7), robots.Group("a", 7))
        },
        r"without slashes, got \['arm/left'\]": {"groups": (robots.Group("arm/left", 14),)},
    }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(robots.ALOHA, **change)
