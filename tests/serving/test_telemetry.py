"""Metrics, messages to people, and the time range of a chunk."""

import json

import numpy as np
import pytest

from shallow_pi.serving import page, telemetry

METADATA = {"fps": 10, "action_horizon": 5, "state_keys": ["state"], "robot": "turntable"}


class Clock:
    """Seconds, as the test says."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def seen(clock):
    return telemetry.Telemetry(METADATA, 120.0, clock)


def answer(seen, client, *, total_ms=20.0, value=0.0, warnings=(), **observation):
    observation = {"state": np.float32([value, value])} | observation
    actions = np.full((5, 2), value, np.float32)
    seen.answer(
        client, observation, actions, queue_ms=5, infer_ms=10, total_ms=total_ms, warnings=warnings
    )


def test_health_names_the_worst(seen, clock):
    assert seen.health() == ("idle", "Ready; no robot is connected")
    client = seen.connect("robot")
    assert seen.health() == ("idle", "Connected; no observation received yet")
    answer(seen, client)
    assert seen.health() == ("good", "Running: answers take up to 20 ms, a chunk lasts 500 ms")
    answer(seen, client, total_ms=900)
    level, text = seen.health()
    assert level == "warn"
    assert text.startswith("Too slow: answers take up to ")
    clock.now += 60
    level, text = seen.health()
    assert level == "warn"
    assert text.startswith("Silent: no observation for 6")
    seen.fail("observation", "client 1", "it lacks a camera")
    assert seen.health() == ("bad", "Refused: it lacks a camera")
    clock.now += telemetry.ALARM + 1
    assert seen.health()[0] == "warn"
    seen.disconnect(client)
    assert seen.health()[0] == "idle"


def test_an_inference_without_an_end_is_no_silence_of_the_robot(seen, clock):
    client = seen.connect("robot")
    answer(seen, client)
    seen.begin_inference(1)
    clock.now += 30
    assert seen.health() == ("warn", "Waiting: an inference has been running for 30 s")
    assert seen.stuck() is None
    assert b"\nshallow_pi_inference_running_seconds 30.0\n" in seen.exposition()
    clock.now += 91
    seen.disconnect(client)
    level, text = seen.health()
    assert level == "bad"
    assert text.startswith("Stuck: an inference has been running for 121 s, longer than --stuck-s")
    seen.end_inference()
    assert seen.stuck() is None
    assert seen.health() == ("idle", "Ready; no robot is connected")
    assert b"\nshallow_pi_inference_running_seconds 0.0\n" in seen.exposition()


def test_warnings_are_counted_and_shown_in_one_line_a_client(seen, clock):
    client = seen.connect("robot")
    for _ in range(3):
        answer(seen, client, warnings=["the state is far from the training data"])
    assert seen.health() == ("warn", "Warning: the state is far from the training data")
    assert b"shallow_pi_warnings_total 3.0" in seen.exposition()
    assert [(e.kind, e.client) for e in seen.events] == [("warning", "client 1")]
    assert seen.errors == 0
    clock.now += telemetry.ALARM + 1
    answer(seen, client)
    assert seen.health()[0] == "good"


def test_a_strangers_wrong_key_is_no_alarm(seen):
    seen.fail("unauthorized", "stranger", "a wrong API key")
    assert seen.health()[0] == "idle"
    assert b'shallow_pi_errors_total{kind="unauthorized"} 1.0' in seen.exposition()


@pytest.mark.parametrize(
    ("seconds", "steps"), [(0.3, 3), (0.01, 1), (10.0, 5)], ids=["as due", "at once", "too late"]
)
def test_a_chunk_begins_where_the_clock_had_come_to(seen, clock, seconds, steps):
    """Ten steps a second; at least one of a chunk is executed, and at most all five."""
    client = seen.connect("robot")
    answer(seen, client)
    clock.now += seconds
    answer(seen, client)
    assert [chunk.start for chunk in client.chunks] == [0, steps]


def test_what_is_kept_is_bounded(seen):
    client = seen.connect("robot")
    for _ in range(telemetry.SERVED + 10):
        answer(seen, client)
        seen.fail("message", "client 1", "bad")
    assert len(seen.served) == telemetry.SERVED
    assert len(seen.events) == telemetry.EVENTS
    assert len(client.chunks) == telemetry.CHUNKS


@pytest.mark.parametrize("gap", [1.0, 0.1, 0.004])
def test_answers_a_second_are_those_of_the_last_seconds(seen, clock, gap):
    """Also where more come than are kept."""
    client = seen.connect("robot")
    for _ in range(1500):
        clock.now += gap
        answer(seen, client)
    assert seen.rate() == pytest.approx(1 / gap, rel=0.03)
    clock.now += 60
    assert seen.rate() == 0


def test_metrics_count_answers_and_time(seen):
    client = seen.connect("robot")
    answer(seen, client, total_ms=20)
    answer(seen, client, total_ms=600)
    text = seen.exposition().decode()
    assert "shallow_pi_requests_total 2.0" in text
    assert "shallow_pi_clients 1.0" in text
    assert 'shallow_pi_request_seconds_bucket{le="0.025"} 1.0' in text
    assert 'shallow_pi_request_seconds_bucket{le="1.0"} 2.0' in text
    assert "shallow_pi_request_seconds_sum 0.62" in text


def test_the_state_is_found_under_its_keys():
    nested = {"observation": {"joints": np.arange(3), "gripper": 0.5}}
    both = {"state_keys": ["observation/joints", "observation/gripper"]}
    np.testing.assert_array_equal(telemetry.find_state(nested, both), [0, 1, 2, 0.5])
    taking = both | {"state_indices": [3, 1]}
    np.testing.assert_array_equal(telemetry.find_state(nested, taking), [0.5, 1])
    assert telemetry.find_state(nested, {"state_keys": ["angles"]}) is None
    assert telemetry.find_state({"a": "text"}, {"state_keys": ["a"]}) is None
    assert telemetry.find_state(nested, {}) is None


def test_the_pages_json_has_no_number_json_does_not_know(seen):
    client = seen.connect("robot")
    answer(seen, client, value=np.nan, prompt="touch", more={"image": np.ones((9, 9, 3), "u1")})
    content = json.loads(page.message(*page.snapshot(seen, 16)), parse_constant=pytest.fail)
    assert content["view"]["chunks"][0] == [0, [[None, None]] * 5]
    assert content["view"]["texts"] == {"prompt": "touch"}
    assert list(content["cameras"]) == ["more/image"]
    assert content["health"]["level"] == "good"
    assert content["budget_ms"] == 500


def test_the_page_looks_at_the_client_it_asks_for(seen, clock):
    first, second = seen.connect("a"), seen.connect("b")
    answer(seen, first)
    clock.now += 1
    answer(seen, second)
    for wanted, shown in ((None, 1), (1, 1), (2, 2), (99, 1)):
        assert page.snapshot(seen, 16, wanted)[0]["view"]["number"] == shown


@pytest.mark.parametrize(
    ("shape", "dtype", "is_image"),
    [
        ((480, 640, 3), "u1", True),
        ((3, 64, 48), "u1", True),
        ((64, 64, 3), "f4", True),
        ((2000, 3000, 3), "u1", True),
        ((8, 6000, 3), "u1", True),
        ((64, 64), "u1", False),
        ((64, 64, 4), "u1", False),
        ((7, 64, 3), "u1", False),
        ((64, 64, 3), "i8", False),
        ((0, 64, 3), "u1", False),
    ],
)
def test_images_are_found_and_made_small(shape, dtype, is_image):
    found = page.images({"camera": np.ones(shape, dtype)})
    assert ("camera" in found) == is_image
    assert all(len(text) < 20_000 for text in found.values())


def test_the_policy_of_the_page_allows_its_own_script_alone():
    html, policy = page.html()
    assert policy.count("sha256-") == 2
    assert "unsafe" not in policy
    assert b"http://" not in html
    assert b"https://" not in html
