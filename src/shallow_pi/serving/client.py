"""Connections of our own commands to a policy server: key, proxy, and advice if there is none.

A connection to this machine goes to no proxy of the environment (`http_proxy` and the like), which
would look for the server on its own machine.
"""

import inspect
import os
import urllib.parse
import urllib.request
from typing import Any

import websockets.sync.client

from shallow_pi.serving import server_config

# Environment variable with the API key.
KEY_VARIABLE = "SHALLOW_PI_API_KEY"
# Versions of websockets before 15 know of no proxies.
_KNOWS_PROXIES = "proxy" in inspect.signature(websockets.sync.client.connect).parameters


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


def advice(url: str) -> str:
    """Advice where no server answers at an address; it continues the sentence of an error."""
    host = urllib.parse.urlsplit(url).hostname or ""
    text = f"check the address, and the API key in {KEY_VARIABLE}"
    is_direct = _is_here(url) or urllib.request.proxy_bypass(host)
    if _KNOWS_PROXIES and not is_direct and (proxies := urllib.request.getproxies()):
        names = sorted({f"{name}_proxy" for name in proxies} - {"no_proxy"})
        text += f"; {', '.join(names)} may apply to it: no_proxy={host} goes without"
    return text


def _is_here(url: str) -> bool:
    return server_config.is_loopback(urllib.parse.urlsplit(url).hostname or "")
