"""Predicted latencies: near the measured ones on an H200, and never below their floor."""

import json
import pathlib

import pytest

from shallow_pi.commands import predict_latency
from shallow_pi.models import pi0
from shallow_pi.speed import predict

ROOT = pathlib.Path(__file__).parents[2]
PI0 = pi0.Pi0Config(cameras=("a", "b"))
PI05 = pi0.Pi0Config(pi05=True, cameras=("a", "b"), max_token_len=200, action_horizon=10)


@pytest.mark.parametrize(
    ("file", "config"),
    [
        ("pi05_l6", pi0.at_depth(PI05, 6)),
        ("pi05_l18", PI05),
        ("pi0_l6", pi0.at_depth(PI0, 6)),
        ("pi0_l18", PI0),
    ],
)
def test_predictions_for_an_h200_are_within_30_percent_of_its_measurements(file, config):
    content = json.loads((ROOT / "benchmarks/h200" / f"{file}.json").read_text())
    found = predict.parts(config, predict.DEVICES["h200"])
    assert sum(part.expected for part in found) == pytest.approx(
        content["timing"]["device_ms"], rel=0.3
    )


@pytest.mark.parametrize("device", predict.DEVICES)
def test_no_prediction_is_below_its_floor(device):
    for part in predict.parts(PI05, predict.DEVICES[device], num_steps=3):
        assert part.expected > part.floor > 0


def test_fewer_steps_save_their_share():
    device = predict.DEVICES["thor"]
    ten, two = (predict.parts(PI05, device, n)[2].expected for n in (10, 2))
    assert two == pytest.approx(ten / 5)


def test_the_command_shows_the_arithmetic(capsys):
    predict_latency.main([str(ROOT / "assets/pi0_turntable"), "--device", "orin-agx"])
    out = capsys.readouterr().out
    assert "π0, 18 layers, 2 cameras, 12 prompt tokens, horizon 10" in out
    assert "/ 42.5 TFLOP/s" in out
    assert "paper" not in out, "which measured full size"
    assert "paper           110.00" in "".join(predict.table(PI05, "orin-agx"))


def test_an_unknown_device_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        predict_latency.main([str(ROOT / "assets/pi0_turntable"), "--device", "nano"])
    assert "unknown --device 'nano': there are orin-agx, orin-nx, thor" in capsys.readouterr().err
