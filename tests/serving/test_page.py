"""The page at / in a real browser: numbers, cameras and curves, and nothing from elsewhere."""

import threading
import time

import chromium
import msgpack
import numpy as np
import pytest
import serving
import websockets.exceptions
from openpi_client import websocket_client_policy

from shallow_pi.serving import page

pytestmark = [
    pytest.mark.skipif(chromium.PROGRAM is None, reason="no chromium here (see .ci/run)"),
    pytest.mark.filterwarnings(serving.OPENPI_WARNS),
]


def observation(value):
    image = np.full((48, 64, 3), (250, 20, 20), np.uint8)
    state = np.float32([value, -value])
    return {"base": image, "wrist": image[:, :, ::-1].copy(), "state": state, "task": "touch"}


def robot(running, stop, **client):
    """Sends an observation every 50 ms until told otherwise, or until the server stops."""
    connected = websocket_client_policy.WebsocketClientPolicy(running.url, **client)
    count = 0
    try:
        while not stop.is_set():
            connected.infer(observation(np.sin(count / 5)))
            count += 1
            time.sleep(0.05)
    except websockets.exceptions.ConnectionClosed:
        pass
    except RuntimeError as error:  # What the client makes of an answer in words.
        if "the server stops" not in str(error):
            raise
    connected._ws.close()


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with chromium.tab(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def driven():
    """Runs a robot in a thread until it is called."""
    stops = []

    def start(running, **client):
        stop = threading.Event()
        thread = threading.Thread(target=robot, args=(running, stop), kwargs=client)
        thread.start()

        def end():
            stop.set()
            thread.join(10)

        stops.append(end)
        return end

    yield start
    for end in stops:
        end()


# The share of a canvas that is drawn on, and whether an image's middle has this colour.
INK = """[...document.querySelectorAll('%s')].map(c => {
  const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
  let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n / (d.length / 4); })"""
COLOURS = """[...document.querySelectorAll('#cameras img')].map(image => {
  const c = document.createElement('canvas'); c.width = c.height = 1;
  c.getContext('2d').drawImage(image, 0, 0, 1, 1);
  return [...c.getContext('2d').getImageData(0, 0, 1, 1).data.slice(0, 3)]; })"""


# The titles of the panels that are shown.
PANELS = """[...document.querySelectorAll('section h2')].filter(h => h.checkVisibility())
  .map(h => h.textContent)"""


def test_the_page_shows_what_the_robot_does_and_calls_nobody(tab, driven, tmp_path):
    with serving.running(serving.Echo(0.01)) as running:
        tab.open(running.http + "/")
        tab.wait("document.getElementById('health').className === 'idle'")
        tab.wait("document.getElementById('verdict').textContent.startsWith('Ready')")
        assert tab.run(PANELS) == []
        end = driven(running)
        tab.wait("latest && latest.requests > 20")
        tab.wait("document.getElementById('health').className === 'good'")
        text = tab.run("document.getElementById('tiles').innerText")
        assert "Answers a second" in text
        assert "Median latency" in text
        assert tab.run("document.getElementById('prompt').textContent") == "touch"
        # Both cameras, in their own colours.
        tab.wait("document.querySelectorAll('#cameras img').length === 2")
        names = "[...document.querySelectorAll('figcaption')].map(c => c.textContent)"
        assert tab.run(names) == ["base", "wrist"]
        (red, blue) = tab.run(COLOURS)
        assert red[0] > 200 > 100 > red[2]
        assert blue[2] > 200 > 100 > blue[0]
        assert tab.run(PANELS) == [
            "Cameras",
            "Latency, ms",
            "Actions by dimension, over control steps",
            "Clients",
        ]
        # A curve for each of the two dimensions under its name, and the latency.
        titles = "[...document.querySelectorAll('#actions span')].map(s => s.textContent)"
        assert [title.split(":")[0] for title in tab.run(titles)] == ["shoulder", "elbow"]
        for canvas, count in (("#actions canvas", 2), ("#latency", 1)):
            ink = tab.run(INK % canvas)
            assert len(ink) == count
            assert min(ink) > 0.005
        assert tab.run("document.querySelectorAll('#clients tr').length") == 1
        sizes = "document.documentElement.scrollWidth <= innerWidth"
        assert tab.run(sizes)
        tab.screenshot(tmp_path / "phone.png", width=360, height=800)
        assert tab.run(sizes)
        # The robot's mistake is there to read, as text whatever is in it.
        with running.connect() as raw:
            raw.recv()
            raw.send(msgpack.packb({b"<img src=/x onerror=alert(1)>": 1}))
            serving.refusal(raw)
        tab.wait("document.getElementById('events').innerText.includes('<img src=/x')")
        assert tab.run("document.getElementById('health').className") == "bad"
        end()
        tab.wait("latest.clients.length === 0")
        asked, complaints = set(tab.requested), list(tab.complaints)
        assert asked == {running.http + "/", running.url + "/live"}
        assert not complaints
    tab.wait("document.getElementById('verdict').textContent === 'The server stopped'")


def test_another_client_is_shown_when_it_is_chosen(tab, driven):
    with serving.running(serving.Echo()) as running:
        tab.open(running.http + "/")
        driven(running), driven(running)
        tab.wait("document.querySelectorAll('#clients button').length === 2")
        for number in (1, 2, 1):
            tab.run(f"document.querySelectorAll('#clients button')[{number - 1}].click()")
            tab.wait(f"latest.view && latest.view.number === {number}")
            time.sleep(0.2)
            assert tab.run("latest.view.number") == number


def test_with_a_key_the_page_asks_for_it_and_shows_nothing_before(tab, driven):
    with serving.running(serving.Echo(), api_key="secret") as running:
        driven(running, api_key="secret")
        tab.open(running.http + "/")
        tab.wait("!document.getElementById('key').hidden")
        assert not tab.run("latest")
        submit = (
            "document.getElementById('secret').value = '%s';"
            "document.querySelector('#key button').click()"
        )
        tab.run(submit % "wrong")
        tab.wait(
            "document.getElementById('health').className === 'idle' && socket.readyState === 3"
        )
        assert not tab.run("latest")
        tab.run(submit % "secret")
        tab.wait("latest && latest.requests > 2 && document.getElementById('key').hidden")


def test_the_page_comes_back_when_the_server_does(tab):
    with serving.running(serving.Echo()) as running:
        port = int(running.url.rsplit(":", 1)[1])
        tab.open(running.http + "/")
        tab.wait("latest")
    tab.wait("document.getElementById('health').className === 'bad'")
    with serving.running(serving.Echo(), port=port):
        tab.wait("document.getElementById('health').className === 'idle'")


def test_images_are_made_small_only_while_someone_looks(monkeypatch):
    made, small = [], page.images
    monkeypatch.setattr(page, "images", lambda found: made.append(1) or small(found))
    with serving.running(serving.Echo()) as running:
        client = websocket_client_policy.WebsocketClientPolicy(running.url)
        for value in range(5):
            client.infer(observation(value))
        assert not made
        with running.connect("/live") as looking:
            looking.send("{}")
            looking.recv(timeout=10)
        assert made
