"""Connections of our own commands to a policy server: address, key, proxy; and why there is none.

A connection to this machine goes to no proxy of the environment (`http_proxy` and the like), which
would look for the server on its own machine.
"""

import inspect
import os
import ssl
import urllib.parse
import urllib.request
from typing import Any

import websockets.exceptions
import websockets.sync.client

from shallow_pi.serving import server_config

# Environment variable with the API key.
KEY_VARIABLE = "SHALLOW_PI_API_KEY"
# Versions of websockets before 15 know of no proxies.
_KNOWS_PROXIES = "proxy" in inspect.signature(websockets.sync.client.connect).parameters


def check(url: str) -> str:
    """Return a server's address, checked.

    Raises:
      ValueError: it is not an address of a websocket server.
    """
    parts = urllib.parse.urlsplit(url)
    try:
        is_address = parts.scheme in ("ws", "wss") and parts.hostname and parts.port != 0
    except ValueError:  # The port is not a number below 65536.
        is_address = False
    if not is_address:
        raise ValueError(
            f"expected a policy server's address, ws://HOST:PORT (wss://HOST:PORT with TLS), got "
            f"{url!r}"
        )
    return url


def headers() -> dict[str, str]:
    """The headers with the API key, if there is one."""
    key = os.environ.get(KEY_VARIABLE)
    return {"Authorization": f"Api-Key {key}"} if key else {}


def options(url: str) -> dict[str, Any]:
    """Options of the `connect` of websockets for a server's address."""
    direct = {"proxy": None} if _KNOWS_PROXIES and _is_here(url) else {}
    return {"compression": None, "max_size": None, "additional_headers": headers(), **direct}


def opener(url: str) -> urllib.request.OpenerDirector:
    """Opens plain HTTP requests to a server."""
    proxies: dict[str, str] | None = {} if _is_here(url) else None
    return urllib.request.build_opener(urllib.request.ProxyHandler(proxies))


def unreachable(url: str, error: Exception) -> str:
    """The text of an error: no connection to a policy server, why, and what to do."""
    if isinstance(error, websockets.exceptions.InvalidStatus):
        answer = error.response
        said = (answer.body or b"").decode(errors="replace").strip()[:500]
        key = f"; give its API key in {KEY_VARIABLE}" if answer.status_code == 401 else ""
        return f"{url} refuses to connect (HTTP {answer.status_code}): {said or str(error)}{key}"
    why = str(error) or type(error).__name__
    return f"no policy server at {url} ({why}): {_advice(url, error)}"


def _advice(url: str, error: Exception) -> str:
    parts = urllib.parse.urlsplit(url)
    is_tls = parts.scheme == "wss"
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            "it has a certificate that this machine does not trust: name the file of that "
            "certificate, or of the authority that signed it, in SSL_CERT_FILE"
        )
    # Which of the two a mismatch causes depends on who hangs up first.
    if is_tls and isinstance(error, ssl.SSLError | ConnectionResetError):
        return f"if the server has no TLS, its address is {parts._replace(scheme='ws').geturl()}"
    if not is_tls and isinstance(error, websockets.exceptions.InvalidMessage):
        return f"if the server has TLS, its address is {parts._replace(scheme='wss').geturl()}"
    host = parts.hostname or ""
    text = f"start it, or check the address, and the API key in {KEY_VARIABLE}"
    is_direct = _is_here(url) or urllib.request.proxy_bypass(host)
    if _KNOWS_PROXIES and not is_direct and (proxies := urllib.request.getproxies()):
        names = sorted({f"{name}_proxy" for name in proxies} - {"no_proxy"})
        text += f"; {', '.join(names)} may apply to it: no_proxy={host} goes without"
    return text


def _is_here(url: str) -> bool:
    return server_config.is_loopback(urllib.parse.urlsplit(url).hostname or "")
