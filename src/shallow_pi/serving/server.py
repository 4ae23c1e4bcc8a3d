"""A policy behind openpi's websocket protocol, so that any openpi client drives it.

A client connects, is sent the policy's metadata, and then sends observations and is sent
`{"actions", "policy_timing", "server_timing"}`, all in msgpack (`protocol.py`). An observation that
cannot be answered is refused by a text frame with the reason, then close 1011, or 1013 if the queue
was full. The event loop stays free, during an inference too, for plain HTTP: `/healthz` and the
page at `/` are there for all (the page holds no data); `/metrics` and the websocket of
observations, at any other path, want the API key if one is set. A browser's page of another origin
is refused, so that no web site a user visits can drive a robot.

`/healthz` answers 200 "OK", as openpi's server does, or 503 while an inference is stuck, so that a
supervisor restarts the server. It serves as readiness probe too: nothing listens before the policy
is compiled, or once the server stops.
"""

import asyncio
import concurrent.futures
import functools
import http
import logging
import signal
import urllib.parse
from collections.abc import Callable, Mapping

import websockets.asyncio.server
import websockets.datastructures
import websockets.http11

from shallow_pi import interrupts
from shallow_pi.serving import page, recorder, server_config, sessions, telemetry, turns

# Seconds between pings. One that stays unanswered closes nothing: a client may be busy for minutes,
# as when its operator sets the scene, and the place of an absent one is taken when it is wanted
# (`sessions.Sessions.make_room`).
PING = 20.0

_log = logging.getLogger(__name__)
# The library's own lines: every port scan would be a traceback.
_quiet = logging.getLogger(f"{__name__}.connections")
_quiet.setLevel(logging.CRITICAL + 1)


def run(
    policy: turns.Policy,
    config: server_config.ServerConfig,
    *,
    ready: Callable[[str], None] = lambda _: None,
    record: recorder.Recorder | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; one that is repeated later ends the process at once.

    Args:
      policy: warmed up; it is called from one thread only.
      config: address, key and limits.
      ready: called with the address once clients can connect.
      record: keeps observations and answers; it is not closed here.
    """

    async def until_signal() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def ask() -> None:
            if not stop.is_set():
                stop.set()
                loop.call_later(interrupts.FORWARDED_SECONDS, give_back)

        def give_back() -> None:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            # Python's own handler would wait for the inference.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ask)
        await serve(policy, config, stop=stop, ready=ready, record=record)

    asyncio.run(until_signal())


async def serve(
    policy: turns.Policy,
    config: server_config.ServerConfig,
    *,
    stop: asyncio.Event,
    ready: Callable[[str], None] = lambda _: None,
    record: recorder.Recorder | None = None,
) -> None:
    """As `run`, until `stop` is set: running inferences end, then clients are closed with 1001.

    Raises:
      ValueError: the address cannot be listened on.
    """
    tls, sockets = config.ssl_context(), config.listen()
    with concurrent.futures.ThreadPoolExecutor(1, "inference") as worker:
        served = sessions.Sessions(policy, config, record, worker)

        async def answer(
            connection: sessions.Connection, request: websockets.http11.Request
        ) -> websockets.http11.Response | None:
            try:
                return await _answer(config, served, connection, request)
            finally:
                for one in sockets:
                    one.finished(connection.remote_address)

        listening = [
            await websockets.asyncio.server.serve(
                served.handle,
                sock=one,
                process_request=answer,
                open_timeout=config.handshake_seconds,
                close_timeout=config.handshake_seconds,
                ssl=tls,
                compression=None,
                ping_interval=PING,
                ping_timeout=None,
                max_size=config.max_request_mb * 2**20,
                # A client that sends ahead waits in its own socket.
                max_queue=1,
                logger=_quiet,
                ssl_handshake_timeout=config.handshake_seconds if tls else None,
            )
            for one in sockets
        ]
        if config.is_open and not config.api_key:
            _log.warning(
                "anyone who can reach %s can drive this policy: set an API key", config.host
            )
        ready(config.url(sockets[0].getsockname()[1]))
        await stop.wait()
        for one in listening:
            one.close(close_connections=False)
        # Connections without a request, as browsers keep them in store, are not waited for.
        await served.finish()


async def _answer(
    config: server_config.ServerConfig,
    served: sessions.Sessions,
    connection: sessions.Connection,
    request: websockets.http11.Request,
) -> websockets.http11.Response | None:
    """The answer to a request; None lets it become a websocket."""
    where, headers = sessions.path(request), request.headers
    upgrade = "websocket" in ",".join(headers.get_all("Upgrade")).lower()
    if where == "/healthz":
        if stuck := served.seen.stuck():
            return _respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{stuck}\n".encode())
        return _respond(http.HTTPStatus.OK, b"OK\n")
    if "Sec-WebSocket-Key" in headers and not upgrade:
        advice = (
            "A proxy between client and server has removed 'Upgrade: websocket': let it pass "
            "websockets through (nginx: proxy_http_version 1.1; proxy_set_header Upgrade "
            "$http_upgrade; proxy_set_header Connection upgrade)."
        )
        _tell(served, "message", connection, advice)
        more = {"Upgrade": "websocket"}
        return _respond(http.HTTPStatus.UPGRADE_REQUIRED, f"{advice}\n".encode(), more=more)
    if where == "/" and not upgrade:
        html, policy = page.html()
        secure = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
        secure |= {"Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
        return _respond(http.HTTPStatus.OK, html, "text/html; charset=utf-8", secure)
    if upgrade and not _same_origin(config, headers):
        origin, host = (" ".join(headers.get_all(name))[:100] for name in ("Origin", "Host"))
        why = (
            f"Pages of other origins are refused: this one is from {origin!r} and requested "
            f"{host!r}. Let a proxy pass the Host header through, and set an API key."
        )
        _tell(served, "unauthorized", connection, why)
        return _respond(http.HTTPStatus.FORBIDDEN, f"{why}\n".encode())
    if where == page.LIVE and upgrade:
        # A browser cannot send the key as a header: the page sends it as its first message.
        if (count := served.count_pages()) >= page.MAX_PAGES:
            reason = f"{count} pages are open, which is the limit: close one\n"
            return _respond(http.HTTPStatus.SERVICE_UNAVAILABLE, reason.encode())
        return None
    if config.api_key and not _authorized(config, headers):
        address = sessions.address(connection)
        served.seen.fail("unauthorized", address, "wrong or missing API key")
        text = b"This server requires 'Authorization: Api-Key <key>'.\n"
        return _respond(
            http.HTTPStatus.UNAUTHORIZED, text, more={"WWW-Authenticate": 'Api-Key realm="policy"'}
        )
    if where == "/metrics":
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return _respond(http.HTTPStatus.OK, served.seen.exposition(), kind)
    if not upgrade:
        text = b"This server has /, /healthz, /metrics, and a websocket for observations.\n"
        return _respond(http.HTTPStatus.NOT_FOUND, text)
    if not await served.make_room():
        reason = f"{config.max_clients} clients are connected, which is the limit (--max-clients)"
        served.seen.fail("busy", sessions.address(connection), reason)
        return _respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{reason}\n".encode())
    return None


def _tell(
    served: sessions.Sessions, kind: telemetry.Kind, connection: sessions.Connection, text: str
) -> None:
    """Count a refused request, and log it the first time: a page repeats it every few seconds."""
    served.seen.fail(kind, sessions.address(connection), text)
    _log_once(text)


@functools.lru_cache(maxsize=64)
def _log_once(text: str) -> None:
    _log.warning(text)


def _authorized(
    config: server_config.ServerConfig, headers: websockets.datastructures.Headers
) -> bool:
    given = headers.get_all("Authorization")
    scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    return scheme.lower() == "api-key" and config.is_key(key.strip())


def _same_origin(
    config: server_config.ServerConfig, headers: websockets.datastructures.Headers
) -> bool:
    """Browsers always name the page that connects; openpi's clients name none.

    A web site may let its own name point to this machine, so that its pages are of this origin (DNS
    rebinding). A server that is for this machine alone goes by this machine's names, unless a key
    protects it.
    """
    origins = [urllib.parse.urlsplit(o) for o in headers.get_all("Origin")]
    named = config.is_open or config.api_key
    return all(
        o.netloc in headers.get_all("Host")
        and (named or server_config.is_loopback(o.hostname or ""))
        for o in origins
    )


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
