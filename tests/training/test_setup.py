"""A run takes its teacher's tower sizes, and refuses what a config decides otherwise."""

import dataclasses

import jax
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.training import config, setup


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tiny_config, tiny_params):
    """A step folder of sizes that no config has."""
    step = tmp_path_factory.mktemp("teacher") / "9"
    weights.save_params(step / "params", tiny_params(tiny_config(vocab_size=320)))
    return step


@pytest.fixture
def experiment(tmp_path, tiny_experiment, teacher):
    """The config `debug` with that teacher; its own widths are other ones."""

    def make(path=teacher, **changes):
        own = tiny_experiment(tmp_path, teacher=config.TeacherConfig(str(path)))
        model = dataclasses.replace(own.model, **{"action_dim": 6, **changes})
        return dataclasses.replace(own, model=model)

    return make


def test_tower_sizes_are_the_checkpoints_and_are_told(experiment, tiny_config, teacher, capsys):
    own = experiment()
    step = setup.find_teacher(own)
    assert step == teacher
    resolved = setup.resolve(own, step)
    assert resolved.model.backbone == tiny_config().backbone
    assert resolved.student_model.expert == tiny_config().expert
    assert dataclasses.replace(resolved, model=own.model) == own
    first, *parts = capsys.readouterr().err.splitlines()
    assert first == "The sizes are those of the teacher's checkpoint:"
    assert parts[0].startswith("  backbone.width 32 → 24, backbone.")
    assert [line.split()[0].partition(".")[0] for line in parts[:3]] == [
        *("backbone", "expert", "image")
    ]
    assert setup.resolve(resolved, step) == resolved
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 4}, "the checkpoint has 3 layers, the config 4: give --model.depth 3"),
        ({"action_dim": 7}, "the checkpoint has 6 action dimensions, the config 7"),
        ({"pi05": True}, "use the other checkpoint, or a config of π0 (--model.no-pi05)"),
    ],
)
def test_what_the_config_decides_is_refused_and_widths_are_not(experiment, changes, message):
    with pytest.raises(ValueError, match="teacher") as caught:
        setup.find_teacher(experiment(**changes))
    assert message in str(caught.value)
    wrong = [line for line in str(caught.value).splitlines() if "llm/embedder" in line]
    assert not wrong, "sizes of a tower are taken over, so they do not differ"


@pytest.mark.parametrize("room", [None, 80 * 10**9])
def test_a_batch_that_the_devices_cannot_split_is_refused(experiment, room):
    """Also where a layout is chosen by their memory."""
    message = r"batch size 8 is not divisible by the 3 devices .* \(3 × 1\): set it to 6 or 9"
    with pytest.raises(ValueError, match=message):
        setup.make_mesh(experiment(), jax.devices()[:3], room)


def test_a_random_teacher_keeps_the_configs_sizes(experiment):
    own = experiment(setup.RANDOM)
    assert setup.resolve(own, setup.find_teacher(own)) is own


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_teacher_that_is_not_finite_is_refused_whatever_needs_it(
    experiment, tiny_config, tiny_params, tmp_path, value
):
    """A loss, validation alone, or nothing but the cut."""
    params = tiny_params(tiny_config(vocab_size=320))
    params["state_proj"]["kernel"] = params["state_proj"]["kernel"].at[0, 1].set(value)
    weights.save_params(tmp_path / "9" / "params", params)
    step = tmp_path / "9"
    own = setup.resolve(experiment(step), step)
    mesh = setup.make_mesh(own, jax.devices())
    with pytest.raises(
        ValueError, match=r"/9 is not finite in 1 of .*state_proj/kernel: .*--teacher"
    ):
        setup.load_teacher(own, step, mesh)


def test_a_teacher_is_looked_for_on_this_machine_alone(
    experiment, teacher, tmp_path, monkeypatch, capsys
):
    kept = tmp_path / "home" / "bucket" / "policy"
    kept.mkdir(parents=True)
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "home"))
    for path, found in {
        teacher: teacher,
        teacher / "params": teacher,
        "gs://bucket/policy": kept,
        "gs://bucket/policy/": kept,
        "gs://bucket/other": None,
        "hf://owner/policy": None,
        tmp_path / "absent": None,
        setup.RANDOM: None,
    }.items():
        assert setup.teacher_on_disk(experiment(path)) == found, path
    with pytest.raises(ValueError, match=r"has 3 layers, the config 4: give --model\.depth 3"):
        setup.resolve_from_disk(experiment(teacher, depth=4))
    absent = experiment(tmp_path / "absent")
    assert setup.resolve_from_disk(absent) is absent
    assert "absent is not on this machine" in capsys.readouterr().err
    alone = dataclasses.replace(experiment(), teacher=None, student=config.StudentConfig())
    assert setup.teacher_on_disk(alone) is None
