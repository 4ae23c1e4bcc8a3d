"""metrics.jsonl has every step once, despite interruptions; extras are selected by name."""

import json
import math
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from shallow_pi.checkpoints import run_folder
from shallow_pi.training import metrics


def test_rows_read_are_those_logged(tmp_path):
    with metrics.MetricsLog(tmp_path) as log:
        log.log(1, {"loss": jnp.float32(0.5), "rate": 1e-3})
        log.log(2, {"loss": 2})
    assert metrics.read(tmp_path) == [
        {"step": 1, "loss": 0.5, "rate": 1e-3},
        {"step": 2, "loss": 2.0},
    ]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_resumed_run_logs_no_step_twice(tmp_path):
    with metrics.MetricsLog(tmp_path, tensorboard=False) as log:
        for step in (1, 2, 3, 4):
            log.log(step, {"run": 1})
    with metrics.MetricsLog(tmp_path, tensorboard=False, first_step=3) as log:
        log.log(3, {"run": 2})
    assert [(row["step"], row["run"]) for row in metrics.read(tmp_path)] == [(1, 1), (2, 1), (3, 2)]


def test_a_line_cut_short_by_a_kill_is_dropped_and_one_in_the_middle_is_an_error(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert metrics.read(tmp_path) == [{"step": 1, "loss": 0.5}]
    with metrics.MetricsLog(tmp_path, tensorboard=False, first_step=2) as log:
        log.log(2, {"loss": 0.25})
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2]
    file.write_text('{"step": 1, "lo\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        metrics.read(tmp_path)


def test_a_value_that_is_not_finite_stays_valid_json(tmp_path):
    with metrics.MetricsLog(tmp_path, tensorboard=False) as log:
        log.log(1, {"loss": float("nan"), "norm": float("inf")})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (row,) = metrics.read(tmp_path)
    assert math.isnan(row["loss"])
    assert math.isnan(row["norm"])


def test_only_scalars_are_logged(tmp_path):
    with metrics.MetricsLog(tmp_path, tensorboard=False) as log:
        with pytest.raises(ValueError, match=r"'loss' must be one number, got \(2,\)"):
            log.log(1, {"loss": jnp.zeros(2)})
        with pytest.raises(ValueError, match='"step" is the name of the step'):
            log.log(1, {"step": 3})
    assert metrics.read(tmp_path) == []


def test_a_run_without_metrics_reads_as_no_rows(tmp_path):
    assert metrics.read(tmp_path) == []


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_extra_says_how_to_install_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"uv sync --extra {name}"):
        metrics.MetricsLog(tmp_path / "run", **{name: "project"})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_an_extra_gets_every_row_of_a_run_and_its_continuation_as_one(tmp_path, monkeypatch, name):
    begun, calls = [], []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    module = types.ModuleType(name)
    module.init = lambda **options: begun.append(options) or run
    monkeypatch.setitem(sys.modules, name, module)
    folder = tmp_path / "debug" / "first"
    for step in (5, 6):
        with metrics.MetricsLog(folder, tensorboard=False, **{name: "shallow"}) as log:
            log.log(step, {"loss": 1.0})
        run_folder.save_config(folder, {"seed": 1})
    assert calls == [(5, {"loss": 1.0}), "end", (6, {"loss": 1.0}), "end"]
    identity = (folder / "tracker_id").read_text()
    first = {"project": "shallow", "name": f"debug-first-{identity}", "resume": "allow"}
    first |= {"id": identity} if name == "wandb" else {}
    assert begun == [{**first, "config": None}, {**first, "config": {"seed": 1}}]
    with metrics.MetricsLog(tmp_path / "other", tensorboard=False, **{name: "shallow"}):
        assert begun[-1]["name"] != begun[0]["name"]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_does_not_start_says_what_to_do(tmp_path, monkeypatch, name):
    def refuse(**_):
        raise RuntimeError("api_key not configured (no-tty)")

    module = types.ModuleType(name)
    module.init = refuse
    monkeypatch.setitem(sys.modules, name, module)
    message = rf"--{name} p cannot be logged to \(RuntimeError: api_key not.*WANDB_MODE=offline"
    with pytest.raises(ValueError, match=message):
        metrics.MetricsLog(tmp_path, **{name: "p"})


def test_events_of_a_resumed_run_hide_what_came_after_its_checkpoint(tmp_path):
    image = np.zeros((2, 3, 3), np.uint8)
    with metrics.MetricsLog(tmp_path, first_step=3) as log:
        log.image(3, "sheet", image)
        log.log(3, {"loss": 0.5})
    (file,) = (tmp_path / "tensorboard").glob("events.*")
    events = [event_pb2.Event.FromString(record) for record in _records(file)]
    assert events[1].step == 3
    assert events[1].session_log.status == event_pb2.SessionLog.START
    values = [(event.step, value.tag) for event in events for value in event.summary.value]
    assert values == [(3, "sheet"), (3, "loss")]
    assert events[-1].summary.value[0].simple_value == 0.5


def _records(path):
    """Of a TFRecord file: length, checksum, record, checksum."""
    data, start = path.read_bytes(), 0
    while start < len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        yield data[start + 12 : start + 12 + length]
        start += length + 16


def test_a_full_disk_is_reported_with_the_files_name_and_a_remedy(tmp_path, small_disk):
    row = {f"loss {i}": 1.0 for i in range(200)}
    with small_disk(1000):
        log = metrics.MetricsLog(tmp_path, tensorboard=False)
        message = r"metrics.jsonl cannot be written \(File too large\).*--resume"
        with pytest.raises(OSError, match=message):
            log.log(1, row)
        log.close()


def test_a_full_disk_ends_the_events_of_tensorboard_too(tmp_path, small_disk):
    """tensorboardX's own thread dies of it, and the run would wait for it for good."""
    log = metrics.MetricsLog(tmp_path)
    message = r"tensorboard cannot be written \(File too large\)"
    with small_disk(2000), pytest.raises(OSError, match=message):
        log.image(1, "sheet", np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    log.close()
