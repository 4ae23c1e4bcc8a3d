"""Experiments by name: what the command line offers, refuses, and says while refusing."""

import dataclasses
import pathlib
import re

import pytest

from shallow_pi import flags, progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.commands import export_student
from shallow_pi.training import command_line, config, idle

CONFIGS = pathlib.Path(__file__).parents[2] / "train_configs"


def _cli(*arguments):
    return command_line.cli(CONFIGS, "Usage of the script.", arguments)


def _refused(capsys, *arguments):
    """The message, joined into one line, when arguments are refused with status 2."""
    with pytest.raises(SystemExit) as error:
        _cli(*arguments)
    assert error.value.code == 2
    written = capsys.readouterr()
    assert "Traceback" not in written.err
    assert not written.out
    return " ".join(re.sub(r"[╭╮╰╯│─]", " ", written.err).split())


def test_an_unknown_config_names_the_closest_and_all(capsys):
    said = _refused(capsys, "pi0_turntable_16")
    assert said.startswith("error: unknown config 'pi0_turntable_16'; there are debug, ")
    assert said.endswith("; did you mean 'pi0_turntable_l6'?")
    assert _refused(capsys, "nothing_like_it").endswith("; or name a file of your own, *.py")


def test_an_unknown_field_names_the_closest(capsys):
    said = _refused(capsys, "debug", "--bach-size", "8")
    assert "Unrecognized options: --bach-size" in said
    assert "--batch-size" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--student.depth", "5"],
            "--student.depth must lie in 1..4 (the teacher's layers), got 5",
        ),
        (["--student.depth", "0"], "--student.depth must be at least 1, got 0"),
        (["--student.layers", "0", "4"], "layers must lie in 0..3 (the teacher has 4), got [4]"),
        (["--student.layers", "2", "1"], "increasing order, got [2, 1]; did you mean [1, 2]?"),
        (["--student.layers", "1", "1"], "layers must not repeat, got [1, 1]"),
        (["--student.strategy", "best"], "'uniform', 'first', 'last', 'random', 'similarity', 's"),
        (["--batch-size", "many"], "--batch-size: invalid literal for int()"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--batch-size", "9", "--accumulation", "2"], "must be a multiple of --accumulation 2"),
        (["--ema-decay", "1"], "--ema-decay must lie in [0, 1), got 1.0"),
        (["--exp-name", ".."], "--exp-name must be a plain folder name, got '..'"),
        (
            ["--checkpoint-dir", "gs://a/b"],
            "--checkpoint-dir gs://a/b is an address, but a run needs",
        ),
        (["--exp-name", "a/b"], "--exp-name must be a plain folder name, got 'a/b'"),
        (
            ["--data.robot", "crane"],
            "unknown robot 'crane'; there are ['aloha', 'aloha_sim', 'droid',",
        ),
        (["--data.asset-id", ""], "--data.asset-id must name a folder inside a checkpoint's"),
        (["--data.asset-id", ".."], "such as droid or physical-intelligence/libero, got '..'"),
        (["--data.asset-id", "a/../../b"], "--data.asset-id must name a folder inside a"),
        (["--data.asset-id", "/tmp/a"], "--data.asset-id must name a folder inside a"),
        (["--data.asset-id", "a\\b"], "--data.asset-id must name a folder inside a"),
        (["--validation.interval", "-1"], "--validation.interval must be at least 0, got -1"),
        (["--validation.samples", "0"], "--validation.samples must be at least 1, got 0"),
        (["--validation.against", "me"], "'data', 'teacher'"),
        (["--data.num-threads", "-1"], "--data.num-threads must be at least 0, got -1"),
        (["--model.dtype", "float16"], "must be 'bfloat16' or 'float32', got 'float16'"),
        (["--schedule.peak-lr", "-1"], "--schedule.peak-lr must be a positive number, got -1.0"),
        (["--mesh.fsdp", "0"], "--mesh.fsdp must be 1 or more, or -1 to choose, got 0"),
        (["--losses.task", "-1"], "-1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_value_says_what_is_valid(capsys, arguments, message):
    assert message in _refused(capsys, "debug", *arguments)


def test_a_bad_value_of_the_task_says_what_is_valid(capsys):
    said = _refused(capsys, "pi0_turntable_l6", "--closed-loop.episodes", "0")
    assert "--closed-loop.episodes must be at least 1, got 0" in said


def test_every_field_can_be_set():
    experiment = _cli(
        *("debug", "--batch-size", "64", "--losses.attention", "0.1", "--student.depth", "3"),
        *("--teacher.path", "somewhere", "--model.expert.width", "24", "--no-tensorboard"),
        *("--mesh.fsdp", "2", "--data.num-threads", "3", "--exp-name", "second"),
        *("--data.asset-id", "physical-intelligence/libero"),
    )
    assert experiment.batch_size == 64
    assert experiment.losses.attention == 0.1
    assert experiment.student_model.depth == 3
    assert experiment.teacher.path == "somewhere"
    assert experiment.model.expert.width == 24
    assert not experiment.tensorboard
    assert experiment.mesh.fsdp == 2
    assert experiment.data.num_threads == 3
    assert experiment.data.asset_id == "physical-intelligence/libero"
    assert experiment.folder == pathlib.Path("checkpoints/debug/second")
    home = dataclasses.replace(experiment, checkpoint_dir="~/runs").folder
    assert home == pathlib.Path.home() / "runs/debug/second", "as a shell leaves --flag=~/runs"
    assert (
        dataclasses.replace(
            _cli("debug"),
            batch_size=64,
            losses=dataclasses.replace(experiment.losses),
            student=experiment.student,
            teacher=experiment.teacher,
            model=experiment.model,
            tensorboard=False,
            mesh=experiment.mesh,
            data=experiment.data,
            exp_name="second",
        )
        == experiment
    ), "nothing else changed"


def test_an_absent_teacher_cannot_decide_the_best_step(capsys):
    said = _refused(capsys, "pi0_turntable", "--validation.against", "teacher")
    assert "--validation.against teacher needs a teacher; set it to data" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["pi0_turntable_l6", "--student.depth", "6", "--student.layers", "0", "3", "5"],
            "--student.depth 6: --student.layers 0 3 5 keeps 3; give only one",
        ),
        (
            ["pi0_tabletop_last_l6", "--student.depth=4"],
            "--student.depth 4: --student.layers 0 3 7 10 14 17 18 21 25 28 32 35 keeps 12; give",
        ),
        (
            [
                *("pi0_turntable_l6", "--student.depth", "6", "--student.backbone-depth", "2"),
                *("--student.expert-depth", "4"),
            ],
            "6: --student.backbone-depth 2 and --student.expert-depth 4 set the layers of both",
        ),
        (
            ["pi0_turntable", "--closed-loop.no-baselines", "--strict"],
            "--closed-loop.baselines False: there is no teacher, and",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_that_others_contradict_is_refused_and_with_strict_one_without_effect(
    capsys, arguments, message
):
    assert message in _refused(capsys, *arguments)


def test_a_flag_without_effect_is_told(capsys):
    assert not _cli("debug", "--validation.samples", "7").data.strict
    said = capsys.readouterr().err
    assert "warning: --validation.samples 7 has no effect: there is nothing to validate" in said


def test_the_command_line_decides_if_warnings_are_errors(capsys):
    default = _cli("debug")
    strict = dataclasses.replace(default, data=dataclasses.replace(default.data, strict=True))
    without_effect = ["--validation.samples", "7"]
    with pytest.raises(SystemExit):
        command_line.cli(CONFIGS, "", without_effect, strict)
    assert "error: --validation.samples 7: there is nothing" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--strict makes this warning an error"):
        progress.warn("told")
    command_line.cli(CONFIGS, "", ["--no-strict", *without_effect], strict)
    progress.warn("told")
    exported = ["checkpoints/run", "--format", "openpi", "--strict"]
    flags.parse(export_student.Arguments, exported, "")
    with pytest.raises(ValueError, match="--strict makes this warning an error"):
        progress.warn("told")


@pytest.mark.parametrize(
    ("part", "changes", "fields"),
    [
        ("student", {"depth": 2, "layers": (0, 3, 5)}, "student.depth"),
        ("student", {"depth": 3, "layers": (0, 3, 5)}, ""),
        ("student", {"depth": 4, "backbone_depth": 2, "expert_depth": 4}, ""),
        ("student", {"strategy": "random", "image_tokens": 4}, "-student.layer_seed"),
        ("student", {"image_tokens": 4}, "-student.image_token_choice"),
        ("teacher", {"train": True}, "teacher.path -teacher.config"),
        ("losses", {"reflow": 1.0}, "-losses.reflow_deployed"),
        ("losses", {"attention": 0.0, "scorer": 1.0}, "losses.attention_heads"),
        (
            "losses",
            {"attention": 0.0},
            "losses.attention_heads losses.attention_queries losses.attention_layer",
        ),
        ("data", {"num_workers": 2, "cache": "disk"}, "data.num_threads -data.cache_dir"),
        ("data", {"cache": "none"}, "data.cache_gib"),
        ("data", {"held_out": 0.5}, "-validation.interval -validation.against"),
        ("data", {"source": "some.module:function"}, "-validation.interval -validation.against"),
        ("data", {"source": "synthetic"}, "data.path data.robot data.cache data.norm_stats"),
        ("closed_loop", {"sim": "tabletop"}, "closed_loop.tasks closed_loop.harder"),
        ("data", {"path": "somewhere"}, "closed_loop.demonstrations closed_loop.demonstrated"),
    ],
)
def test_a_field_without_effect_depends_on_others(part, changes, fields):
    plain = command_line.load(CONFIGS, "pi0_turntable_l6")
    changed = dataclasses.replace(
        plain, **{part: dataclasses.replace(getattr(plain, part), **changes)}
    )
    before, after = (
        {
            name
            for is_idle, names, _ in [*idle.fields(one), *idle.conflicts(one)]
            if is_idle
            for name in names.split()
        }
        for one in (plain, changed)
    )
    expected = set(fields.split())
    assert {name for name in expected if name[0] != "-"} <= after - before
    assert {name[1:] for name in expected if name[0] == "-"} <= before - after
    assert expected or before == after


def test_listed_layers_set_the_depth_too():
    experiment = _cli("pi0_turntable_l6", "--student.layers", "0", "3", "5", "--student.depth", "3")
    assert experiment.fixed_layer_map().layers == (0, 3, 5)
    assert experiment.student_model == dataclasses.replace(experiment.model, depth=3)


@pytest.mark.parametrize(
    ("strategy", "layers"),
    [
        ("uniform", (0, 3, 7, 10, 14, 17)),
        ("first", (0, 1, 2, 3, 4, 5)),
        ("last", tuple(range(12, 18))),
    ],
)
def test_a_strategy_gives_the_layers(strategy, layers):
    experiment = _cli("pi0_aloha_l6", "--student.strategy", strategy)
    assert experiment.fixed_layer_map().layers == layers


def test_a_random_strategy_follows_its_seed():
    maps = [
        _cli("pi0_aloha_l6", "--student.strategy", "random", "--student.layer-seed", seed)
        .fixed_layer_map()
        .layers
        for seed in ("1", "1", "2")
    ]
    assert maps[0] == maps[1] != maps[2]


def test_a_strategy_that_measures_has_no_map_yet_but_a_depth():
    experiment = _cli("pi0_aloha_l6", "--student.strategy", "similarity")
    assert experiment.fixed_layer_map() is None
    assert experiment.student_model.depth == 6
    with pytest.raises(SystemExit):
        _cli("pi0_aloha_l6", "--student.strategy", "similarity", "--student.depth", "19")


def test_help_lists_every_config_with_the_first_line_of_its_docstring(capsys):
    with pytest.raises(SystemExit) as error:
        _cli("--help")
    assert error.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage of the script.")
    files = sorted(path for path in CONFIGS.glob("*.py") if not path.name.startswith("_"))
    assert len(files) >= 6
    for path in files:
        first_line = path.read_text().splitlines()[0].removeprefix('"""')
        assert re.search(rf"^  {path.stem} +{re.escape(first_line)}$", out, re.MULTILINE)
    assert "_base" not in out


def test_no_name_is_answered_with_the_list_and_status_2(capsys):
    with pytest.raises(SystemExit) as error:
        _cli()
    assert error.value.code == 2
    assert "pi0_turntable_l6" in capsys.readouterr().out


def test_help_of_a_config_lists_its_fields_with_their_comments(capsys):
    with pytest.raises(SystemExit) as error:
        _cli("debug", "--help")
    assert error.value.code == 0
    out = capsys.readouterr().out
    for words in ("Synthetic batches", "--student.strategy", "Layers of backbone", "(default: 16)"):
        assert words in out
    assert "--name" not in out


def test_a_config_is_named_by_its_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        '"""First line.\n\nSecond."""\nimport _shared\nget_config = _shared.make\n'
    )
    (tmp_path / "_shared.py").write_text(
        "import pathlib\nfrom shallow_pi.training import command_line\n"
        f"make = lambda: command_line.load(pathlib.Path({str(CONFIGS)!r}), 'debug')\n"
    )
    assert command_line.names(tmp_path) == {"mine": "First line."}
    loaded = command_line.load(tmp_path, "mine")
    assert loaded == dataclasses.replace(command_line.load(CONFIGS, "debug"), name="mine")


def test_a_config_that_cannot_be_read_hides_no_other(tmp_path, capsys):
    (tmp_path / "broken.py").write_text('"""Mine."""\ndef get_config()\n    return 1\n')
    (tmp_path / "sound.py").write_text('"""Sound."""')
    assert command_line.names(tmp_path)["sound"] == "Sound."
    with pytest.raises(SystemExit):
        command_line.cli(tmp_path, "Usage.", ["--help"])
    out = capsys.readouterr().out
    assert re.search(r"^  broken  \(cannot be read: .*broken\.py, line 2\)\)$", out, re.M)
    with pytest.raises(ValueError, match=r"broken\.py: SyntaxError: .*line 2"):
        command_line.load(tmp_path, "broken")
    with pytest.raises(ValueError, match=r"unknown config 'brokn'.*; did you mean 'broken'"):
        command_line.load(tmp_path, "brokn")


def test_a_flag_in_place_of_the_name_is_told(capsys):
    with pytest.raises(SystemExit) as error:
        _cli("--data.path", "here")
    assert error.value.code == 2
    said = "error: the name of a config, or a file of your own, *.py, comes first; got --data.path."
    assert said in capsys.readouterr().err


def test_a_dataset_in_place_of_the_name_is_told(tmp_path):
    said = f"{tmp_path} is a folder: give a dataset after the name, as --data.path {tmp_path}"
    with pytest.raises(ValueError, match=re.escape(said)):
        command_line.load(CONFIGS, str(tmp_path))


def test_a_config_may_be_a_file_anywhere(tmp_path):
    path = tmp_path / "my_arm_l2.py"
    path.write_text('"""Mine."""\nimport debug\nget_config = debug.get_config\n')
    loaded = command_line.load(CONFIGS, str(path))
    assert loaded == dataclasses.replace(command_line.load(CONFIGS, "debug"), name="my_arm_l2")
    path.write_text(
        "import dataclasses, debug\nfrom shallow_pi.training import config\n"
        "student = config.StudentConfig(depth=2, layers=(0, 1, 3))\n"
        "def get_config(): return dataclasses.replace(debug.get_config(), student=student)\n"
    )
    with pytest.raises(
        ValueError, match=r"my_arm_l2\.py: the student's depth 2 and its layers 0 1"
    ):
        command_line.load(CONFIGS, str(path))
    (tmp_path / "_base.py").write_text("import debug\nget_config = debug.get_config\n")
    path.write_text("import _base\nget_config = _base.get_config\n")
    with pytest.raises(ValueError, match=r"AttributeError: .*_base.* has no attribute 'DEBUG_PI0'"):
        command_line.load(CONFIGS, str(path))  # `_base` is its own.
    path.write_text("def get_config():\n    return depth\n")
    with pytest.raises(ValueError, match=r"my_arm_l2\.py, line 2: NameError: .*docs/configs\.md"):
        command_line.load(CONFIGS, str(path))
    path.write_text("get_config = dict")
    with pytest.raises(ValueError, match=r"must return a DistillConfig, got dict"):
        command_line.load(CONFIGS, str(path))
    with pytest.raises(FileNotFoundError, match=r"no config .*absent\.py: expected a Python file"):
        command_line.load(CONFIGS, str(tmp_path / "absent.py"))


def test_a_teacher_is_trained_by_its_own_config_and_as_the_student_wants_it(capsys):
    experiment = _cli(
        *("pi0_turntable_l6", "--exp-name", "x", "--checkpoint-dir", "c", "--resume"),
        *("--model.depth", "7"),
    )
    own = command_line.teacher_experiment(CONFIGS, experiment)
    assert "The teacher is trained as pi0_turntable says" in capsys.readouterr().err
    assert own.name == "pi0_turntable"
    assert own.teacher is None
    assert own.model == experiment.model
    assert own.student_model.depth == 7
    assert own.folder == pathlib.Path("c/pi0_turntable/x")
    assert own.resume
    assert not own.overwrite


def test_a_teacher_nobody_here_can_train_is_an_error():
    with pytest.raises(ValueError, match=r"debug names no config that trains its teacher.*--teach"):
        command_line.teacher_experiment(CONFIGS, _cli("debug", "--teacher.train"))


def test_fields_that_may_change_exist():
    experiment = dataclasses.asdict(_cli("pi0_turntable_l6"))
    for field in config.SAFE_TO_CHANGE:
        values = experiment
        for name in field.split("."):
            values = values[name]


def test_errors_of_a_resumed_run_compare_with_those_before():
    fields = {f"validation.{field.name}" for field in dataclasses.fields(config.ValidationConfig)}
    assert fields & config.SAFE_TO_CHANGE == {"validation.interval"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pi0_aloha_l6"], (1000, 30_000)),
        (["pi0_aloha_l6", "--num-train-steps", "60"], (2, 60)),
        (["pi0_aloha_l6", "--num-train-steps=60", "--schedule.warmup-steps=5"], (5, 30_000)),
        (["pi0_aloha_l6", "--num_train_steps", "60", "--schedule.decay_steps", "70000"], None),
        (["pi0_aloha_l6", "--num-train-steps", "1"], (0, 1)),
        (["pi05_libero_l6", "--num-train-steps", "3"], (1, 3)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_schedule_goes_with_the_steps_unless_it_is_given(capsys, arguments, expected):
    schedule = _cli(*arguments).schedule
    said = capsys.readouterr().err
    expected = expected or (1000, 70_000)
    assert (schedule.warmup_steps, schedule.decay_steps) == expected
    scaled = "steps" in said
    assert scaled == (len(arguments) > 1 and "schedule" not in "".join(arguments))
    if scaled:
        warmup, decay = expected
        assert f"--schedule.warmup-steps {warmup} --schedule.decay-steps {decay}, in pro" in said


def test_a_resumed_run_keeps_the_schedule_it_began_with(tmp_path, capsys):
    arguments = ("debug", "--checkpoint-dir", str(tmp_path), "--num-train-steps", "20")
    began = _cli(*arguments)
    run_folder.save_config(_made(began.folder), dataclasses.asdict(began))
    capsys.readouterr()
    resumed = _cli(*arguments[:3], "--num-train-steps", "80", "--resume")
    assert resumed.schedule == began.schedule
    assert "--schedule.decay-steps 20, as the run began" in capsys.readouterr().err
    assert _cli(*arguments[:3], "--resume").schedule == began.schedule
    assert _cli(*arguments[:3], "--overwrite").schedule.decay_steps == 40
    run_folder.save_config(began.folder, {})  # Not of this program; to resume it is refused later.
    assert _cli(*arguments[:3], "--resume").schedule.decay_steps == 40


def _made(folder):
    folder.mkdir(parents=True)
    return folder
