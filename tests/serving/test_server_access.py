"""Who may come in, and where a server listens."""

import socket
import ssl
import subprocess

import pytest
import serving
import websockets.exceptions
import websockets.sync.client

from shallow_pi.serving import protocol, server_config

pytestmark = pytest.mark.filterwarnings(serving.OPENPI_WARNS)


@pytest.fixture(scope="module")
def echo():
    with serving.running(serving.Echo()) as running:
        yield running


def test_the_api_key_is_asked_for_before_anything():
    with serving.running(serving.Echo(), api_key="secret") as running:
        for wrong in (None, "secre", "secret2", "geheim"):
            with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
                serving.openpi(running, api_key=wrong)
            assert refused.value.response.status_code == 401
        assert serving.openpi(running, api_key="secret").infer(serving.STATE)["actions"].shape == (
            4,
            2,
        )
        assert running.get("/metrics")[0] == 401
        status, text, _ = running.get("/metrics", Authorization="Api-Key secret")
        assert status == 200
        assert 'shallow_pi_errors_total{kind="unauthorized"} 5.0' in text
        assert running.get("/healthz")[0] == 200


def test_one_client_too_many_is_refused_with_a_reason():
    with serving.running(serving.Echo(), max_clients=1) as running, running.connect():
        with pytest.raises(websockets.exceptions.InvalidStatus, match="503") as refused:
            running.connect()
        assert b"1 clients are connected" in refused.value.response.body


def test_an_unknown_path_lists_the_known_ones(echo):
    status, text, _ = echo.get("/favicon.ico")
    assert status == 404
    assert "/healthz" in text


def test_a_proxy_that_passes_no_websockets_on_is_told_what_to_do(echo, caplog):
    for _ in range(2):
        status, text, _ = echo.get("/", **{"Sec-WebSocket-Key": "MDEyMzQ1Njc4OWFiY2RlZg=="})
        assert status == 426
        assert "proxy_set_header Upgrade $http_upgrade" in text
    assert caplog.text.count("A proxy between client and server") == 1


def test_a_web_site_cannot_drive_the_robot(echo):
    for path in ("", "/live"):
        with pytest.raises(websockets.exceptions.InvalidStatus, match="403") as refused:
            echo.connect(path, origin="https://example.com")
        assert b"is from 'https://example.com' and requested '127" in refused.value.response.body
    with echo.connect("/live", origin=echo.http) as page:
        page.send("{}")
        assert page.recv(timeout=10).startswith("{")


def test_a_web_site_whose_name_points_here_cannot_drive_the_robot_either(echo):
    def connect(running, host):
        port = running.url.rpartition(":")[2]
        with (
            socket.create_connection(("127.0.0.1", int(port))) as own,
            websockets.sync.client.connect(
                f"ws://{host}:{port}/live", sock=own, origin=f"http://{host}:{port}"
            ) as page,
        ):
            page.send('{"key": "secret"}')
            assert page.recv(timeout=10).startswith("{")

    with pytest.raises(websockets.exceptions.InvalidStatus, match="403"):
        connect(echo, "rebound.example.com")
    connect(echo, "localhost")
    # Behind a proxy with a name of its own.
    with serving.running(serving.Echo(), api_key="secret") as running:
        connect(running, "robot.example.com")


def test_a_page_needs_the_key_too():
    with serving.running(serving.Echo(), api_key="secret") as running:
        assert running.get("/")[0] == 200
        for said in ("{}", '{"key": "wrong"}', '{"key": "\\ud800"}', "[", b"\x00", '{"key": 5}'):
            with running.connect("/live") as page:
                page.send(said)
                assert serving.close_code(page) == 4401
        with running.connect("/live") as page:
            page.send('{"key": "secret"}')
            assert page.recv(timeout=10).startswith("{")


def test_tls_is_spoken_where_a_certificate_is_given(certificate, tmp_path):
    cert, key = certificate
    context = ssl.create_default_context(cafile=cert)
    with serving.running(serving.Echo(), tls_cert=str(cert), tls_key=str(key)) as running:
        assert running.url.startswith("wss://")
        with running.connect(ssl=context) as raw:
            raw.recv()
            serving.ask(raw, serving.STATE)
            assert protocol.unpack(raw.recv())["actions"].shape == (4, 2)

    def refuse(why, cert, key):
        with pytest.raises(ValueError, match=why):
            server_config.ServerConfig(tls_cert=str(cert), tls_key=str(key)).ssl_context()

    (tmp_path / "cert.pem").write_text("not PEM")
    refuse("not a PEM certificate and its private key", tmp_path / "cert.pem", key)
    # OpenSSL would ask the terminal of a service for it.
    encrypt = f"openssl rsa -in {key} -aes128 -passout pass:secret -out {tmp_path / 'key.pem'}"
    subprocess.run(encrypt.split(), check=True, capture_output=True)
    refuse(r"key.pem is encrypted.*openssl pkey", cert, tmp_path / "key.pem")


def test_a_port_in_use_says_so(echo):
    port = int(echo.url.rsplit(":", 1)[1])
    expected = pytest.raises(ValueError, match=rf"port {port} of 127.0.0.1 is in use.*--port")
    with expected, serving.running(serving.Echo(), port=port):
        pass
    with expected:
        server_config.ServerConfig(port=port).check()


def test_an_address_that_is_not_this_machines_says_so():
    expected = pytest.raises(ValueError, match=r"cannot listen on port 0 of '192\.0\.2\.1'")
    with expected, serving.running(serving.Echo(), host="192.0.2.1"):
        pass
    with expected:
        server_config.ServerConfig(host="192.0.2.1", port=0).check()
    for host in ("", "[::1]", "127.0.0.1:8000", "ws://127.0.0.1"):
        with pytest.raises(ValueError, match="without scheme, port or brackets"):
            server_config.ServerConfig(host=host, port=0).check()


def test_an_open_server_without_a_key_warns(caplog):
    with serving.running(serving.Echo(), host="0.0.0.0"):
        assert "anyone who can reach 0.0.0.0 can drive this policy" in caplog.text
    caplog.clear()
    with serving.running(serving.Echo(), host="0.0.0.0", api_key="k"):
        assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("fields", "error", "why"),
    [
        ({"port": 70_000}, ValueError, "--port must lie in 0..65535, got 70000"),
        ({"max_waiting": 0}, ValueError, "--max-waiting must be at least 1"),
        ({"handshake_seconds": 0}, ValueError, "--handshake-seconds must be positive, got 0"),
        ({"stuck_seconds": -1.0}, ValueError, "--stuck-seconds must be positive, got -1"),
        ({"tls_cert": "a.pem"}, ValueError, "TLS needs a certificate and its key"),
        ({"tls_cert": "a.pem", "tls_key": "b.pem"}, FileNotFoundError, "no TLS file a.pem"),
        ({"api_key": "two words"}, ValueError, "printable ASCII without spaces"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused(fields, error, why):
    with pytest.raises(error, match=why):
        server_config.ServerConfig(**fields).ssl_context()


def test_the_key_is_not_shown():
    assert "secret" not in repr(server_config.ServerConfig(api_key="secret"))
