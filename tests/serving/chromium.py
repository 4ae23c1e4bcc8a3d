"""A headless Chromium, driven through its DevTools websocket; for tests of a page."""

import base64
import contextlib
import itertools
import json
import pathlib
import shutil
import subprocess
import time
import urllib.request

import websockets.sync.client

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage --window-size=1280,1100 --remote-debugging-port=0"
)


class Tab:
    """One tab: what it asked the network for, what its console said, and JavaScript in it."""

    def __init__(self, address):
        self._socket = websockets.sync.client.connect(address, max_size=None)
        self._ids = itertools.count(1)
        self.requested, self.complaints = [], []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message["method"], message["params"])

    def _note(self, method, found):
        if method == "Network.requestWillBeSent":
            url = found["request"]["url"]
            if not url.startswith("data:"):
                self.requested.append(url)
        elif method == "Network.webSocketCreated":
            self.requested.append(found["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(found["exceptionDetails"])
        elif method == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.complaints.append(found["entry"])
        elif method == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning"):
            self.complaints.append(found["args"])

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href === {json.dumps(url)}")

    def run(self, expression):
        """The value of an expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression, seconds=15):
        """The value of an expression once it is true; an error that shows the page otherwise."""
        until = time.monotonic() + seconds
        while not (value := self.run(expression)):
            assert time.monotonic() < until, (expression, self.run("document.body.innerText"))
            time.sleep(0.05)
        return value

    def screenshot(self, path, dark=False, width=1280, height=1100):
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        time.sleep(1.2)  # The page draws anew with the next message.
        screenshot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        pathlib.Path(path).write_bytes(base64.b64decode(screenshot["data"]))


@contextlib.contextmanager
def tab(folder):
    """A tab of a separate browser with its profile in that folder."""
    process = subprocess.Popen(
        [PROGRAM, *FLAGS.split(), f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        file, until = pathlib.Path(folder) / "DevToolsActivePort", time.monotonic() + 60
        while not (file.exists() and file.read_text().count("\n")):
            assert process.poll() is None, "chromium ended"
            assert time.monotonic() < until, "chromium did not start"
            time.sleep(0.05)
        port = file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
            (page,) = [t for t in json.load(answer) if t["type"] == "page"]
        opened = Tab(page["webSocketDebuggerUrl"])
        try:
            yield opened
        finally:
            opened._socket.close()
    finally:
        process.terminate()
        process.wait(20)
