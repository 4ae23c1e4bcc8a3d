"""A run is opened once, in the order of what that costs, and its folder is touched last."""

import dataclasses
import json
import re
import signal
import sys

import pytest

from shallow_pi import progress
from shallow_pi.checkpoints import fetch, run_folder, weights
from shallow_pi.data import data_config
from shallow_pi.data.lerobot import reader
from shallow_pi.data.robots import assets
from shallow_pi.evaluation import study
from shallow_pi.training import config, setup
from shallow_pi.training import run as runs


@pytest.fixture
def experiment(tmp_path, tiny_experiment, tiny_dataset):
    """An experiment on a recorded dataset with a random teacher."""
    dataset, tokenizer = tiny_dataset
    data = data_config.DataConfig(path=str(dataset), tokenizer=str(tokenizer), held_out=0.34)
    return tiny_experiment(tmp_path / "runs", data=data)


@pytest.fixture
def remote(experiment, monkeypatch):
    """The same with a teacher far away; fails a test that begins to fetch it."""
    monkeypatch.setattr(fetch, "locate", lambda url: pytest.fail(f"{url} is fetched"))
    teacher = config.TeacherConfig("gs://bucket/a-teacher-of-6-GB")
    return dataclasses.replace(experiment, teacher=teacher)


def test_a_run_says_what_it_trains_on(experiment, capsys):
    run = runs.open_run(experiment)
    said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"Dataset: .*/dataset, 2 episodes \(1[567] frames\) to train on, 1 held out", said[0]
    )
    assert said[1] == "Statistics: computed from the dataset"
    assert said[2].startswith("Cameras: base_0_rgb ← observation.images.base, left_")
    assert said[3].startswith("warning: 44% of the actions lie beyond an episode's end: episodes ")
    assert said[4] == "Teacher: random"
    assert said[5].startswith("Mesh: data 8 × fsdp 1 × tensor 1 (8 cpu")
    assert said[6].startswith("Memory per device: about ")
    assert said[7].startswith("Recomputed: nothing (--remat none); attention: xla")
    assert said[8] == "Layers: 2 of the teacher's 3: 0 2"
    assert len(said) == 9
    assert not run.folder.exists()
    with runs.claimed(experiment):
        run.save_config()
    assert json.loads((run.folder / "config.json").read_text())["layer_map"] == [0, 2]


def test_the_first_lines_name_every_part_that_is_cut(experiment):
    image = dataclasses.replace(experiment.model.image, depth=3)
    cut = dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, image=image),
        student=config.StudentConfig(depth=3, backbone_depth=1, vision_depth=2, image_tokens=2),
    )
    assert runs.describe_layers(setup.make_spec(cut)) == [
        "Layers: 3 of the teacher's 3: 0 1 2",
        "Whole backbone layers: 1 (0), keys and values alone: 2 (1 2); expert layers: 3 (0 1 2)",
        "Image tower: 2 of the teacher's 3 layers: 0 2; loss on its tokens: --losses.vision 1",
        "Image tokens: 2 of 4 a camera, means of neighbours",
    ]
    scored = config.StudentConfig(depth=3, image_tokens=1, image_token_choice="scored")
    assert runs.describe_layers(setup.make_spec(dataclasses.replace(cut, student=scored)))[1:] == [
        "Image tokens: 1 of 4 a camera, chosen by a scorer: --losses.scorer 1",
    ]


def test_the_students_steps_and_bits_are_saved_and_fewer_steps_want_reflow(
    experiment, tmp_path, capsys
):
    few = dataclasses.replace(
        experiment,
        student=dataclasses.replace(experiment.student, num_steps=2, quantize="fp8"),
        losses=dataclasses.replace(experiment.losses, reflow=1.0),
    )
    run = runs.open_run(few)
    assert "--student.num-steps" not in capsys.readouterr().err
    assert (run.spec.num_steps, run.spec.quantize) == (2, "fp8")
    run.save_assets(tmp_path / "1" / "assets")
    saved = assets.load(tmp_path / "1")
    assert (saved.num_steps, saved.quantize) == (2, "fp8")
    without = dataclasses.replace(few, losses=experiment.losses)
    runs.check(without)
    assert "--student.num-steps 2 without --losses.reflow" in capsys.readouterr().err


def test_doubtful_data_are_warned_of_once_and_refused_before_there_is_a_folder(experiment, capsys):
    """All episodes but one are left out, so that all samples have one prompt."""
    data = dataclasses.replace(experiment.data, episodes=("0",), held_out=0.0, strict=True)
    doubtful = dataclasses.replace(experiment, data=data)
    progress.be_strict()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"all 9 prompts are equal: .* \(--strict makes this"):
            runs.open_run(doubtful)
    assert not doubtful.folder.parent.exists()
    progress.be_strict(False)
    run = runs.open_run(doubtful)
    runs.variant(run, run.experiment, run.folder / "baselines" / "task_only")
    assert capsys.readouterr().err.count("warning: all 9 prompts are equal") == 1


def test_the_dataset_is_opened_once(experiment, monkeypatch):
    opened, start = [], reader.Dataset.__init__

    def noting(self, *args, **kwargs):
        opened.append(self)
        start(self, *args, **kwargs)

    monkeypatch.setattr(reader.Dataset, "__init__", noting)
    run = runs.open_run(experiment)
    runs.variant(run, run.experiment, run.folder / "baselines" / "task_only")
    assert len(opened) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 7}, "not divisible"),
        ({"mesh": {"tensor": 3}}, "tensor"),
        ({"data": {"path": "nowhere"}}, "no LeRobot dataset at"),
        ({"data": {"robot": "aloha"}}, "lacks camera"),
        (
            {"model": {"action_dim": 2}},
            "turntable has state dimension 3, more than the model's action_dim 2",
        ),
        ({"attention": "cudnn"}, "--attention cudnn: .* needs an NVIDIA GPU"),
        ({"losses": {"scorer": 1.0}}, "trains a scorer that is not there"),
        ({"wandb": "mine"}, "uv sync --extra wandb"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_found_before_anything_is_fetched(remote, monkeypatch, changes, message):
    monkeypatch.setitem(sys.modules, "wandb", None)  # Not installed.
    for name, values in changes.items():
        if isinstance(values, dict):
            values = dataclasses.replace(getattr(remote, name), **values)
        remote = dataclasses.replace(remote, **{name: values})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        runs.open_run(remote)
    assert not remote.folder.exists()


def test_a_run_that_is_there_is_left_alone_before_anything_is_opened(remote):
    other = dataclasses.replace(remote, teacher=dataclasses.replace(remote.teacher, path="random"))
    data = dataclasses.replace(other.data, source="synthetic", path="", tokenizer="")
    _begin(dataclasses.replace(other, data=data))
    with pytest.raises(ValueError, match=r"already holds a run: --resume"):
        runs.open_run(remote)
    with pytest.raises(ValueError, match="another config") as error:
        runs.open_run(dataclasses.replace(remote, resume=True))
    assert "data.source: saved 'synthetic', now 'lerobot'" in str(error.value)
    assert "  model." not in str(error.value)


def _begin(experiment):
    """Open a run and leave it before its first step; returns the path of its config."""
    run = runs.open_run(experiment)
    with runs.claimed(experiment):
        run.save_config()
    return run.folder / "config.json"


def test_a_run_begun_before_a_config_field_existed_resumes(experiment, capsys):
    data = dataclasses.replace(experiment.data, source="synthetic", path="", tokenizer="")
    experiment = dataclasses.replace(experiment, data=data, ema_decay=0.0)
    path = _begin(experiment)
    saved = json.loads(path.read_text())
    del saved["ema_decay"], saved["teacher"]["dtype"], saved["validation"]["against"]
    path.write_text(json.dumps(saved))
    capsys.readouterr()
    other = dataclasses.replace(experiment, resume=True, ema_decay=0.5)
    with pytest.raises(ValueError, match=r"ema_decay: saved 'absent', now 0.5\nresume"):
        runs.open_run(other)
    stricter = dataclasses.replace(data, strict=True)  # Nor do warnings change what is learned.
    _begin(dataclasses.replace(other, ema_decay=0.0, data=stricter))
    assert "newer than this run, and at their defaults: --teacher.dtype" in capsys.readouterr().err
    assert json.loads(path.read_text())["validation"]["against"] == "data"


def test_a_run_in_which_another_process_works_keeps_its_config(experiment):
    """A second one is refused before it opens anything."""
    path = _begin(experiment)
    more = dataclasses.replace(experiment, resume=True, num_train_steps=99)
    busy = pytest.raises(ValueError, match="another process works in")
    with run_folder.held(experiment.folder), busy:
        runs.open_run(more)
    assert json.loads(path.read_text())["num_train_steps"] == experiment.num_train_steps
    _begin(more)
    assert json.loads(path.read_text())["num_train_steps"] == 99


def test_resume_is_advised_only_where_the_folder_is_this_runs(experiment, monkeypatch):
    """Ctrl-C while a run that shall overwrite another is opened leaves that one where it is."""
    _begin(experiment)
    again = dataclasses.replace(experiment, overwrite=True)
    monkeypatch.setattr(setup, "find_teacher", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        study.run(again)
    with pytest.raises(KeyboardInterrupt, match="go on with --resume"), runs.claimed(again):
        signal.raise_signal(signal.SIGINT)


def test_data_that_a_run_made_and_refuses_are_kept_for_its_resumption(experiment):
    refused = pytest.raises(ValueError, match=r"^doubtful\n/.*first is kept: go on with --resume$")
    with refused, runs.claimed(experiment):
        raise ValueError("doubtful")
    resumed = dataclasses.replace(experiment, resume=True)
    _begin(resumed)
    with pytest.raises(ValueError, match=r"^later$"), runs.claimed(resumed):
        raise ValueError("later")


def test_a_run_name_that_orbax_could_not_read_is_refused_before_all(remote, monkeypatch):
    monkeypatch.setattr(reader.Dataset, "__init__", lambda *_, **__: pytest.fail("a dataset opens"))
    with pytest.raises(ValueError, match=r"Orbax cannot read .*: 'lr\[1\]' has"):
        runs.open_run(dataclasses.replace(remote, exp_name="lr[1]"))


def test_a_place_that_cannot_be_written_is_found_before_a_dataset_is_opened(
    remote, tmp_path, monkeypatch
):
    monkeypatch.setattr(reader.Dataset, "__init__", lambda *_, **__: pytest.fail("a dataset opens"))
    (tmp_path / "file").write_text("")
    lost = dataclasses.replace(remote, checkpoint_dir=str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"file is a file, expected a folder: .*--checkpoint-dir"):
        runs.open_run(lost)


def test_a_teacher_here_that_does_not_fit_is_found_before_a_dataset_is_opened(
    experiment, tmp_path, tiny_config, tiny_params
):
    step = tmp_path / "teacher"
    weights.save_params(step / "params", tiny_params(tiny_config(depth=4, vocab_size=320)))
    data = dataclasses.replace(experiment.data, path="nowhere")
    wrong = dataclasses.replace(experiment, data=data, teacher=config.TeacherConfig(str(step)))
    with pytest.raises(ValueError, match="the checkpoint has 4 layers"):
        runs.open_run(wrong)
    absent = dataclasses.replace(wrong, teacher=config.TeacherConfig(str(tmp_path / "absent")))
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        runs.open_run(absent)


def test_lengths_other_than_the_teachers_own_are_warned_of(
    experiment, tmp_path, tiny_params, capsys
):
    step = tmp_path / "teacher"
    own = dataclasses.replace(experiment.model, action_horizon=7, max_token_len=33)
    weights.save_params(step / "params", tiny_params(experiment.model))
    (step / "assets").mkdir()
    content = json.dumps({"model": dataclasses.asdict(own)})
    (step / "assets" / assets.FILE_NAME).write_text(content)
    data = dataclasses.replace(experiment.data, source="synthetic", path="", tokenizer="")
    own_teacher = config.TeacherConfig(str(step))
    runs.open_run(dataclasses.replace(experiment, data=data, teacher=own_teacher))
    said = capsys.readouterr().err
    horizon, length = experiment.model.action_horizon, experiment.model.max_token_len
    for field, flag, its, given in (
        ("action_horizon", "--model.action-horizon", 7, horizon),
        ("max_token_len", "--model.max-token-len", 33, length),
    ):
        line = f"with {field} {its}, but this run uses {given}: give {flag} {its}\n"
        assert said.count(line) == 1


def test_a_variant_shares_all_but_its_spec_and_folder(experiment):
    run = runs.open_run(experiment)
    alone = dataclasses.replace(
        run.experiment, losses=dataclasses.replace(experiment.losses, velocity=0.0, attention=0.0)
    )
    other = runs.variant(run, alone, run.folder / "baselines" / "task_only")
    assert other.data is run.data
    assert other.mesh is run.mesh
    assert other.spec.layer_map == run.spec.layer_map
    assert not other.spec.losses.needs_teacher
    other.save_config()
    assert (run.folder / "baselines" / "task_only" / "config.json").is_file()
    with pytest.raises(ValueError, match=r"losses\.velocity: saved 0.0, now"):
        runs.variant(run, run.experiment, other.folder).save_config()


def test_a_random_teacher_needs_no_folder(experiment):
    assert setup.find_teacher(experiment) is None
