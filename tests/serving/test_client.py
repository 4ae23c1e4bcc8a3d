"""Our own commands reach a server whatever the environment says of proxies."""

import pytest
import serving
import websockets.exceptions
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
    refused = ConnectionRefusedError("refused")
    assert "http_proxy, https_proxy may apply" in client.unreachable("ws://10.0.0.7:8000", refused)
    for direct in ("ws://10.0.0.8:8000", "ws://127.0.0.1:8000"):
        assert "proxy" not in client.unreachable(direct, refused)


@pytest.mark.parametrize(
    "url", ["http://gpu:8000", "gpu:8000", "ws://", "ws:/gpu:8000", "ws://gpu:99999", "ws://gpu:0"]
)
def test_what_is_no_address_is_refused_with_the_form_of_one(url):
    with pytest.raises(ValueError, match=f"address, ws://HOST:PORT .*, got '{url}'"):
        client.check(url)
    assert client.check("wss://10.0.0.7") == "wss://10.0.0.7"


def why(url):
    """The text for an address that cannot be connected to."""
    with pytest.raises((OSError, websockets.exceptions.WebSocketException)) as caught:
        websockets.sync.client.connect(url, **client.options(url))
    return client.unreachable(url, caught.value)


def test_a_servers_own_reason_is_shown():
    with serving.running(serving.Echo(), max_clients=1, api_key="secret") as running:
        said = why(running.url)
        assert f"{running.url} refuses to connect (HTTP 401): This server requires" in said
        assert f"give its API key in {client.KEY_VARIABLE}" in said
    with serving.running(serving.Echo(), max_clients=1) as running, running.connect() as first:
        first.recv(timeout=10)
        assert "1 clients are connected, which is the limit (--max-clients)" in why(running.url)


def test_tls_on_one_side_alone_is_named(certificate):
    cert, key = map(str, certificate)

    with serving.running(serving.Echo(), tls_cert=cert, tls_key=key) as running:
        assert "certificate that this machine does not trust" in why(running.url)
        assert "SSL_CERT_FILE" in why(running.url)
        plain = running.url.replace("wss", "ws")
        assert f"if the server has TLS, its address is {running.url}" in why(plain)
    with serving.running(serving.Echo()) as running:
        secure = running.url.replace("ws", "wss")
        assert f"if the server has no TLS, its address is {running.url}" in why(secure)
