"""A load test speaks to a server as its robots do."""

import http.server
import json
import threading

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


@pytest.mark.parametrize("end", ["", "/"])
def test_a_load_test_counts_the_observations_of_a_turn(end, capsys):
    with serving.running(GoesOn()) as running:
        load_test.main(["--url", running.url + end, "--clients", "1", "--seconds", "0.2"])
    assert json.loads(capsys.readouterr().out)["mean_batch"] == 1


class Page(http.server.BaseHTTPRequestHandler):
    """A web server that shows the same page everywhere."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>\nhello\n</html>")

    def log_message(self, *_):
        pass


def test_a_load_test_of_another_server_says_so(certificate, capsys):
    cert, key = map(str, certificate)
    with http.server.HTTPServer(("127.0.0.1", 0), Page) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        with pytest.raises(SystemExit):
            load_test.main(["--url", f"ws://127.0.0.1:{web.server_port}", "--seconds", "0.2"])
        web.shutdown()
    assert f"no policy server at ws://127.0.0.1:{web.server_port} (" in capsys.readouterr().err
    with serving.running(serving.Echo(), tls_cert=cert, tls_key=key) as running:
        with pytest.raises(SystemExit):
            load_test.main(["--url", running.url.replace("wss", "ws"), "--seconds", "0.2"])
        assert f"if the server has TLS, its address is {running.url}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        load_test.main(["--url", "http://127.0.0.1:8000"])
    assert "address, ws://HOST:PORT" in capsys.readouterr().err


def test_a_load_test_of_real_time_chunking_needs_a_server_that_does_it(capsys):
    with serving.running(GoesOn()) as running, pytest.raises(SystemExit):
        load_test.main(["--url", running.url, "--seconds", "0.5", "--real-time-chunking"])
    assert f"start the server at {running.url} with --real-time-ch" in capsys.readouterr().err
