"""Our own commands reach a server whatever the environment says of proxies."""

import pytest
import serving
import websockets.sync.client

from shallow_pi.serving import client

PROXY = "http://127.0.0.1:9"


@pytest.fixture
def proxied(monkeypatch):
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.setenv(name, PROXY if name != "no_proxy" else "10.0.0.8")


def test_a_server_on_this_machine_is_asked_without_a_proxy(proxied, monkeypatch):
    monkeypatch.setenv(client.KEY_VARIABLE, "secret")
    with serving.running(serving.Echo(), api_key="secret") as running:
        with websockets.sync.client.connect(running.url, **client.options(running.url)) as one:
            assert isinstance(one.recv(timeout=10), bytes)
        with client.opener(running.url).open(f"{running.http}/healthz", timeout=10) as answer:
            assert answer.status == 200


def test_a_proxy_that_may_be_to_blame_is_named(proxied):
    assert "http_proxy, https_proxy may apply" in client.advice("ws://10.0.0.7:8000")
    for direct in ("ws://10.0.0.8:8000", "ws://127.0.0.1:8000"):
        assert "proxy" not in client.advice(direct)
