"""The report's numbers, words and files, from evaluations written out by hand."""

import dataclasses
import io
import json
import math
import sys

import numpy as np
import pytest
import rich.console
from PIL import Image

from shallow_pi.data.robots import robot
from shallow_pi.evaluation import late_plans, plots, report, rollout, validation_tables
from shallow_pi.speed import latency


def evaluation(label, outcomes):
    """Episodes from seed 500 on, alternately `touch` and `insert`; 1 is a success."""
    episodes = tuple(
        rollout.Episode(500 + i, ("touch", "insert")[i % 2], outcome == "1", 10 + i)
        for i, outcome in enumerate(outcomes)
    )
    return rollout.Evaluation(label, 5, episodes)


EVALUATIONS = {
    name: evaluation(name, outcomes)
    for name, outcomes in {
        "expert": "11111111111111111111",
        "teacher": "11111111111111111110",
        "student": "11111111111111111010",
        "cut_only": "00000000000000000000",
        "task_only": "10101010101010101000",
        "random_init": "10001000100010001000",
    }.items()
}


@pytest.fixture
def full():
    grid = np.linspace(0, 255, 12 * 12).reshape(12, 12).astype(np.uint8)
    frames = np.stack([np.stack([grid, np.roll(grid, t, 0), grid], -1) for t in range(11)])
    rows = [
        {
            "step": step,
            "task_loss": 0.3 + 1 / (1 + step),
            "velocity_loss": 1 / (1 + step),
            "attention_loss": 0.5 / (1 + step),
            "teacher_task_loss": 0.25,
            "learning_rate": 1e-3,
        }
        for step in range(0, 200, 10)
    ]
    bare = [{"step": row["step"], "task_loss": row["task_loss"]} for row in rows]
    return report.Report(
        title="pi0_turntable_l6/first",
        config={"name": "pi0_turntable_l6", "losses": {"attention": 0.1}},
        evaluations=EVALUATIONS,
        latency=latency.Latency(
            {"teacher": 6.0, "student": 2.0}, {"teacher": 7.0, "student": 3.0}, 50, "cpu"
        ),
        stage_seconds={"demonstrations": 7.0, "student": 100.5},
        curves={"student": rows, "task_only": bare},
        recording=rollout.Recording(
            label="student",
            prompt="touch the red block",
            episode=rollout.Episode(500, "touch", True, 10),
            times=np.arange(11) / 20,
            frames={"base": frames, "wrist": frames},
        ),
    )


def test_contents_hold_what_the_format_promises(full):
    found = report.contents(full)
    assert json.loads(json.dumps(found)) == found
    assert set(found["success"]) == set(EVALUATIONS)
    student = found["success"]["student"]
    assert set(student) == {"rate", "low", "high", "episodes"}
    assert student["rate"] == 0.9
    assert student["episodes"] == 20
    # Wilson for 18 of 20, by hand.
    assert (student["low"], student["high"]) == pytest.approx((0.698966, 0.972135), abs=1e-5)
    assert found["latency_ms"] == {"teacher": 6.0, "student": 2.0}
    assert found["latency_ratio"] == 3
    assert found["stage_seconds"] == {"demonstrations": 7.0, "student": 100.5}
    assert found["config"] == full.config
    assert {"python", "jax", "numpy", "mujoco"} <= set(found["versions"])


def test_contents_split_success_and_differences_by_task(full):
    found = report.contents(full)
    assert found["by_task"]["task_only"]["touch"]["rate"] == 0.9
    assert found["by_task"]["task_only"]["insert"]["rate"] == 0
    against_task = found["differences"]["student - task_only"]
    assert against_task["insert"]["difference"] == pytest.approx(0.8)
    assert against_task["insert"]["verdict"] == "higher"
    assert against_task["touch"]["only_a"] == 1
    assert against_task["touch"]["verdict"] == "undecided"
    against_teacher = found["differences"]["student - teacher"]["all tasks"]
    assert against_teacher["difference"] == pytest.approx(-0.05)
    assert against_teacher["low"] < -0.05 < against_teacher["high"]


def test_sentences_claim_no_more_than_the_interval(full):
    lines = report.sentences(full)
    assert lines[0].startswith("all tasks: student − teacher = −5.0 points (95 % interval −")
    assert lines[0].endswith("no difference between student and teacher is shown.")
    assert any(
        line.startswith("insert: student − task_only = +80.0")
        and line.endswith("student is better than task_only.")
        for line in lines
    )
    assert "3.00 times as fast" in lines[-1]


@pytest.fixture
def late(full):
    columns = [
        dataclasses.replace(
            column, evaluations={name: EVALUATIONS[name] for name in ("teacher", "student")}
        )
        for column in late_plans.columns(full.latency.median_ms)
    ]
    return dataclasses.replace(full, late=columns)


def test_late_plans_are_a_table_of_both_policies(late):
    (table,) = [
        rows for header, rows in report.tables(late) if header[0].startswith("success when")
    ]
    assert [row[0] for row in table] == [
        "in time",
        *(
            f"{ms}, {way}"
            for ms in ("6 and 2 ms (measured here)", "364 and 110 ms (the paper's)")
            for way in ("as they come", "late actions skipped", "real-time chunking")
        ),
    ]
    assert table[0][1:] == ["95 % (76–99)", "90 % (70–97)"]
    assert report.contents(late)["late_plans"]["in time"]["student"]["rate"] == 0.9


def test_a_latency_counts_in_whole_control_steps_rounded_up():
    column = late_plans.LatePlans("", {"teacher": 364.0, "student": 100.0})
    assert column.steps("teacher", 20) == 8
    assert column.steps("student", 20) == 2
    assert late_plans.LatePlans("", {}).steps("student", 20) == 0


def test_report_without_baselines_or_latency_is_complete(tmp_path):
    evaluations = {name: EVALUATIONS[name] for name in ("expert", "teacher", "student")}
    bare = report.Report("debug", {}, evaluations)
    found = report.contents(bare)
    assert list(found["differences"]) == ["student - teacher"]
    assert "latency_ms" not in found
    written = {path.name for path in report.write(tmp_path, bare)}
    assert written == {"report.json", "report.md", "success.png"}


def test_a_page_names_what_the_run_was_made_from():
    config = {
        "teacher": {"path": "gs://bucket/pi0"},
        "data": {"path": "~/one", "more": ["~/two"]},
        "model": {"depth": 18},
        "student": {"depth": 6, "layers": []},
        "num_train_steps": 30_000,
        "batch_size": 64,
    }
    page = report.markdown(report.Report("pi0/first", config), {}).splitlines()
    assert page[:3] == [
        "# pi0/first",
        "",
        "teacher gs://bucket/pi0, dataset ~/one + ~/two, 6 of the teacher's 18 layers, "
        "30,000 steps, 64 samples a step",
    ]
    deeper = config | {"student": {"depth": 6, "backbone_depth": 2, "expert_depth": 8}}
    assert ", 8 of the teacher's 18 layers, " in report.origin(deeper)
    alone = report.markdown(report.Report("pi0", config | {"teacher": None}), {}).splitlines()
    assert alone[2].startswith("dataset ~/one + ~/two, 18 layers, ")
    assert report.origin({}) == ""


def test_policies_that_met_other_episodes_are_not_compared():
    other = dict(EVALUATIONS, student=evaluation("student", "1111"))
    with pytest.raises(ValueError, match="evaluate both on the same"):
        report.contents(report.Report("x", {}, other))


def test_write_leaves_every_file_and_legible_plots(full, tmp_path):
    written = report.write(tmp_path / "run", full)
    assert [path.name for path in written] == [
        "report.json",
        "report.md",
        "success.png",
        "losses.png",
        "episode.png",
        "episode.gif",
    ]
    assert json.loads(written[0].read_text()) == report.contents(full)
    page = written[1].read_text()
    assert "| student | 90.0 % | 69.9–97.2 | 20 | 2.00 |" in page
    assert "| success in | insert | touch |" in page
    assert "| student | 80 % | 100 % |" in page
    assert all(f"]({path.name})" in page for path in written[2:])
    for path in written[2:5]:
        plot = np.asarray(Image.open(path).convert("L"))
        assert min(plot.shape) >= 300
        assert plot.std() > 20
    with Image.open(written[5]) as moving:
        assert moving.n_frames == 11
        assert moving.info["duration"] == 50


def test_animation_keeps_the_pixels_and_the_time_of_the_episode(full, tmp_path):
    plots.animation(tmp_path / "a.gif", full.recording, side=48)
    durations = []
    with Image.open(tmp_path / "a.gif") as moving:
        for index in range(moving.n_frames):
            moving.seek(index)
            durations.append(moving.info["duration"])
            view = np.asarray(moving.convert("RGB"), int)[2:48:4, 2:48:4]
            want = full.recording.frames["base"][index]
            assert abs(view - want).mean() < 6  # a palette of 128 colours
    assert durations == [50] * 10 + [1500]


def test_a_report_that_the_disk_has_no_room_for_leaves_no_half(full, tmp_path, small_disk):
    """Nor a report.json, which says that a study is finished."""
    with (
        small_disk(10_000),
        pytest.raises(OSError, match=r"success\.png cannot be written .* go on with --resume"),
    ):
        report.write(tmp_path, full)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_animation_leaves_no_half_film(full, tmp_path, monkeypatch):
    def interrupted(self, file, *_, **__):
        (file.write if hasattr(file, "write") else file.write_bytes)(b"GIF89a")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plots.animation(tmp_path / "episode.gif", full.recording)
    assert not (tmp_path / "episode.gif").exists()


def test_curves_without_a_known_loss_are_left_out(tmp_path):
    rows = [{"step": 0, "speed": 1.0, "task_loss": None}]
    bare = report.Report("x", {}, curves={"student": rows})
    assert "losses.png" not in {path.name for path in report.write(tmp_path, bare)}


def test_a_curve_that_only_wavers_is_drawn_flat(tmp_path):
    """Its axis begins at 0, so it lies in the upper quarter of the plot."""
    rows = [{"step": step, "task_loss": 0.3 + 0.001 * (step % 3)} for step in range(20)]
    plots.loss_curves(tmp_path / "l.png", {"student": rows}, {"task_loss": "task loss"})
    plot = np.asarray(Image.open(tmp_path / "l.png").convert("RGB"), int)
    line = np.abs(plot - [0xD5, 0x5E, 0x00]).sum(-1) < 30
    rows, _ = np.nonzero(line)  # Most of them the curve, some the legend.
    assert np.quantile(rows, 0.75) < plot.shape[0] / 4


def test_running_mean_keeps_a_line_straight_and_halves_noise():
    line = np.linspace(0, 1, 400)
    smooth = plots._smooth(line)
    np.testing.assert_allclose(smooth[10:-10], line[10:-10], atol=1e-12)
    noise = np.random.default_rng(0).normal(size=400)
    assert plots._smooth(noise).std() < 0.5


def test_report_is_written_without_matplotlib(full, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    names = {path.name for path in report.write(tmp_path, full)}
    assert names == {"report.json", "report.md", "episode.gif"}
    assert "uv sync --extra plots" in (tmp_path / "report.md").read_text()
    assert "uv sync --extra plots" in capsys.readouterr().err


def test_tables_fit_a_terminal_of_eighty_columns(late):
    console = rich.console.Console(width=80, record=True, file=io.StringIO())
    report.show(late, console)
    text = console.export_text()
    cells = ("expert (scripted)", "random, task loss only", "69.9–97.2", "6.00", "insert")
    for cell in (*cells, "90 % (70–97)", "(the paper's), late actions"):
        assert cell in text
    assert "…" not in text


def test_harder_variants_are_scopes_of_their_own(full):
    """They add a column, differences and figures, and leave the success on the task alone."""
    harder = {"tight": {name: full.evaluations[name] for name in ("teacher", "student")}}
    found = dataclasses.replace(full, harder=harder)
    assert report.contents(found)["success"] == report.contents(full)["success"]
    rate = report.contents(found)["harder"]["tight"]["student"]["rate"]
    assert rate == full.evaluations["student"].rate
    assert "tight" in report.contents(found)["differences"]["student - teacher"]
    assert "tight" not in report.contents(found)["differences"]["student - task_only"]
    assert report.tables(found)[1][0][-1] == "tight"


def _row(step, to_data, to_teacher, **more):
    return {
        "step": step,
        "task_loss": 1 / step,
        "validation/task_loss": 2 / step,
        "validation/error_to_data": to_data,
        "validation/error_to_teacher": to_teacher,
        "validation/teacher_error_to_data": 0.1,
        **{f"validation/{name}": value for name, value in more.items()},
    }


@pytest.fixture
def trained():
    """A run without a task: measured at steps 10, 20 and 30, best to the data at 20."""
    arm = {"error_to_data/left_arm": 0.03, "teacher_error_to_data/left_arm": 0.02}
    rows = [
        {"step": 5, "task_loss": 0.2},
        _row(10, 0.4, 0.3),
        _row(20, 0.2, 0.25, **arm),
        _row(30, 0.3, 0.2),
    ]
    groups = (robot.Group("left_arm", 6, "rad"), robot.Group("gripper", 1))
    return report.Report("pi0_aloha_l6/first", {}, curves={"student": rows}, groups=groups)


def test_a_run_without_a_task_reports_held_out_errors_and_losses(trained):
    errors, groups, losses = report.tables(trained)
    assert errors[1] == [
        ["teacher", "", "0.1", ""],
        ["student, best step", "20", "0.2", "0.25"],
        ["student, last step", "30", "0.3", "0.2"],
    ]
    assert groups == (
        ["at the best step", "to the data", "teacher to the data"],
        [["left arm (rad)", "0.03", "0.02"]],
    )
    assert losses[1] == [["student, task loss", "0.2", "0.0333", "0.0667"]]
    found = report.contents(trained)["validation"]["student"]
    assert found["best"]["step"] == 20
    assert found["best"]["error_to_data/left_arm"] == 0.03
    assert (found["last"]["step"], found["last"]["error_to_teacher"]) == (30, 0.2)
    assert report.contents(trained)["success"] == {}


def test_errors_of_joints_stand_below_those_of_their_group(trained, tmp_path):
    """Joints of two groups may have the same name."""
    names = ("left_arm", "left_arm/waist", "right_arm", "right_arm/waist", "left_armrest")
    rows = [_row(10, 0.4, 0.3, **{f"error_to_data/{n}": i / 8 for i, n in enumerate(names)})]
    groups = (robot.Group("left_arm", 6, "rad"), robot.Group("right_arm", 6, "rad"))
    found = dataclasses.replace(trained, curves={"student": rows}, groups=groups)
    assert report.tables(found)[1][1] == [
        ["left arm (rad)", "0"],
        ["· waist", "0.125"],
        ["right arm (rad)", "0.25"],
        ["· waist", "0.375"],
    ]
    assert "validation_groups.png" in {path.name for path in report.write(tmp_path, found)}


def test_the_criterion_decides_which_step_is_the_best(trained):
    by_teacher = dataclasses.replace(trained, criterion="validation/error_to_teacher")
    assert report.contents(by_teacher)["validation"]["student"]["best"]["step"] == 30
    rows = report.tables(by_teacher)[0][1]
    assert rows[1:] == [["student, best and last step", "30", "0.3", "0.2"]]


def test_the_bare_cut_is_compared_but_never_the_best(trained):
    """It is measured at step 0, which has no checkpoint."""
    start = dict.fromkeys(("validation/error_to_data", "validation/error_to_teacher"), 0.01)
    rows = [{"step": 0, **start}, *trained.curves["student"]]
    measured = dataclasses.replace(trained, curves={"student": rows})
    table = report.tables(measured)[0][1]
    assert table[1] == ["student, before training", "0", "0.01", "0.01"]
    assert table[2] == ["student, best step", "20", "0.2", "0.25"]
    found = report.contents(measured)["validation"]["student"]
    assert found["start"] == {"step": 0, "error_to_data": 0.01, "error_to_teacher": 0.01}
    assert found["best"]["step"] == 20
    only = dataclasses.replace(trained, curves={"student": rows[:1]})
    assert report.contents(only)["validation"] == {}


def test_a_held_out_error_that_is_not_finite_is_reported_and_never_the_best(trained, tmp_path):
    rows = [_row(5, math.nan, math.nan), *trained.curves["student"][1:], _row(40, math.nan, 0.2)]
    written = report.write(tmp_path, dataclasses.replace(trained, curves={"student": rows}))
    assert "validation.png" in {path.name for path in written}
    found = json.loads((tmp_path / "report.json").read_text())["validation"]["student"]
    assert found["best"]["step"] == 20
    assert (found["last"]["step"], found["last"]["error_to_data"]) == (40, None)
    assert "| student, last step | 40 | nan | 0.2 |" in (tmp_path / "report.md").read_text()


def test_a_run_without_held_out_data_reports_its_losses(tmp_path):
    rows = [{"step": 10, "task_loss": 0.5}, {"step": 20, "task_loss": 0.25}]
    bare = report.Report("debug/first", {}, curves={"student": rows})
    assert report.tables(bare) == [
        (["loss", "first", "last", "held out"], [["student, task loss", "0.5", "0.25", ""]])
    ]
    assert report.contents(bare)["validation"] == {}
    written = {path.name for path in report.write(tmp_path, bare)}
    assert written == {"report.json", "report.md", "losses.png"}
    page = (tmp_path / "report.md").read_text()
    assert "met the same episodes" not in page
    assert validation_tables.NOTE not in page


def test_held_out_errors_are_drawn_and_fit_a_terminal(trained, tmp_path):
    written = report.write(tmp_path, trained)
    names = ["losses.png", "validation.png", "validation_groups.png"]
    assert [path.name for path in written[2:]] == names
    for path in written[2:]:
        assert np.asarray(Image.open(path).convert("L")).std() > 15
    page = written[1].read_text()
    assert "| left arm (rad) | 0.03 | 0.02 |" in page
    assert validation_tables.NOTE in page
    console = rich.console.Console(width=80, record=True, file=io.StringIO())
    report.show(trained, console)
    text = console.export_text()
    assert "…" not in text
    assert "student, best step" in text


def test_held_out_errors_are_reported_with_success(full, trained):
    both = dataclasses.replace(full, curves=trained.curves, groups=trained.groups)
    headers = [header[0] for header, _ in report.tables(both)]
    assert headers == ["policy", "success in", "held-out action error", "at the best step"]
