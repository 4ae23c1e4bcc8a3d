"""What a server answers before a websocket is open: plain HTTP, and who may come in.

`/healthz` and the page at `/` are there for all (the page holds no data); `/metrics` and the
websocket of observations, at any other path, want the API key where one is set. A browser's page of
another origin is refused, so that no web site a user visits can drive a robot.
"""

import http
import urllib.parse
from collections.abc import Mapping

import websockets.asyncio.server
import websockets.datastructures
import websockets.http11

from shallow_pi.serving import live, server_config, telemetry

LIVE = "/live"


def path(request: websockets.http11.Request) -> str:
    """A request's path without its query."""
    return urllib.parse.urlsplit(request.path).path


def address(connection: websockets.asyncio.server.ServerConnection) -> str:
    """A peer's address, to show."""
    try:
        host, port, *_ = connection.remote_address
    except (TypeError, ValueError):
        return "unknown"
    return f"{host}:{port}"


def answer(
    config: server_config.ServerConfig,
    seen: telemetry.Telemetry,
    connection: websockets.asyncio.server.ServerConnection,
    request: websockets.http11.Request,
) -> websockets.http11.Response | None:
    """The answer to a request; None lets it become a websocket."""
    where, headers = path(request), request.headers
    upgrade = "websocket" in ",".join(headers.get_all("Upgrade")).lower()
    if where == "/healthz":
        return _respond(http.HTTPStatus.OK, b"OK\n")
    if where == "/" and not upgrade:
        html, policy = live.page()
        secure = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
        secure |= {"Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
        return _respond(http.HTTPStatus.OK, html, "text/html; charset=utf-8", secure)
    if upgrade and not _same_origin(headers):
        return _respond(http.HTTPStatus.FORBIDDEN, b"Pages of other origins are refused.\n")
    if where == LIVE and upgrade:
        # A browser cannot send the key as a header: the page sends it as its first message.
        return None
    if config.api_key and not _authorized(config, headers):
        seen.fail("unauthorized", address(connection), "a wrong API key, or none")
        text = b"This server wants 'Authorization: Api-Key <key>' with its own key.\n"
        return _respond(
            http.HTTPStatus.UNAUTHORIZED, text, more={"WWW-Authenticate": 'Api-Key realm="policy"'}
        )
    if where == "/metrics":
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return _respond(http.HTTPStatus.OK, seen.exposition(), kind)
    if not upgrade:
        text = b"There are /, /healthz, /metrics, and a websocket that takes observations.\n"
        return _respond(http.HTTPStatus.NOT_FOUND, text)
    if len(seen.clients) >= config.max_clients:
        reason = f"{config.max_clients} clients are connected, which is the limit (max_clients)"
        seen.fail("busy", address(connection), reason)
        return _respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{reason}\n".encode())
    return None


def _authorized(
    config: server_config.ServerConfig, headers: websockets.datastructures.Headers
) -> bool:
    given = headers.get_all("Authorization")
    scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    return scheme.lower() == "api-key" and config.is_key(key.strip())


def _same_origin(headers: websockets.datastructures.Headers) -> bool:
    """Browsers always say whose page connects; openpi's clients say nothing."""
    origins = headers.get_all("Origin")
    return all(urllib.parse.urlsplit(o).netloc in headers.get_all("Host") for o in origins)


def _respond(
    status: http.HTTPStatus,
    body: bytes,
    kind: str = "text/plain; charset=utf-8",
    more: Mapping[str, str] | None = None,
) -> websockets.http11.Response:
    headers = websockets.datastructures.Headers(
        {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Connection": "close",
            **(more or {}),
        }
    )
    return websockets.http11.Response(status.value, status.phrase, headers, body)
