"""A load test speaks to a server as its robots do."""

import json

import numpy as np
import pytest
import serving

from shallow_pi.commands import load_test

METADATA = {
    **serving.METADATA,
    "cameras": {},
    "state_low": [0, 0],
    "state_high": [1, 1],
    "prompt_key": "prompt",
}


class GoesOn(serving.Echo):
    """Notes what is left of the chunks."""

    def __init__(self, **metadata):
        super().__init__()
        self.metadata, self.told = METADATA | metadata, []

    def infer(self, observation):
        self.told.append(observation.get("real_time_chunking"))
        return super().infer(observation)


def test_a_load_test_of_real_time_chunking_goes_on_from_a_chunk(capsys):
    robot = GoesOn(real_time_chunking=True)
    with serving.running(robot) as running:
        load_test.main(["--url", running.url, "--clients", "1", "--seconds", "0.5"])
        assert robot.told == len(robot.told) * [None]
        robot.told.clear()
        chunk = np.tile(robot.asked[0], (4, 1))
        load_test.main(
            ["--url", running.url, "--clients", "1", "--seconds", "0.5", "--real-time-chunking"]
        )
    first, *others = robot.told
    assert first is None
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(others) == result["requests"] > 0
    for left in others:
        np.testing.assert_array_equal(left["previous"], chunk[1:])
        assert left["delay"] == 1


def test_a_load_test_of_real_time_chunking_needs_a_server_that_does_it(capsys):
    with serving.running(GoesOn()) as running, pytest.raises(SystemExit):
        load_test.main(["--url", running.url, "--seconds", "0.5", "--real-time-chunking"])
    assert f"start the server at {running.url} with --real-time-ch" in capsys.readouterr().err
