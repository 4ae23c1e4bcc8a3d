"""The pages that look at a server: each is sent what happens for as long as it is open.

A browser cannot send a key with a websocket's request, and in an address it would end up in logs:
the page sends `{"key": ...}` as its first message instead, and later `{"client": number}` to look
at another client.
"""

import asyncio
import contextlib
import json
import time
from typing import Any

import websockets.asyncio.server
import websockets.exceptions

from shallow_pi.serving import live, routes, server_config, telemetry

# Seconds between two messages, with and without something new.
INTERVAL, IDLE = 0.1, 1.0
# Seconds a page has to send its key.
PATIENCE = 10.0
# Of our own (4000 to 4999 are free): the key is wrong.
WRONG_KEY = 4401


async def watch(
    connection: websockets.asyncio.server.ServerConnection,
    seen: telemetry.Telemetry,
    config: server_config.ServerConfig,
) -> None:
    """Serve one page until it is closed."""
    try:
        async with asyncio.timeout(PATIENCE):
            first = _wish(await connection.recv())
    except TimeoutError:
        first = {}
    if config.api_key and not config.is_key(str(first.get("key", ""))):
        seen.fail("unauthorized", routes.address(connection), "a page's API key is wrong")
        await connection.close(WRONG_KEY, "wrong API key")
        return
    wanted = {"client": first.get("client")}

    async def listen() -> None:
        async for message in connection:
            wanted.update(_wish(message))

    listening = asyncio.create_task(listen())
    try:
        sent, at = None, 0.0
        while not listening.done():
            now = (seen.version, seen.waiting, wanted["client"])
            if now != sent or time.monotonic() - at > IDLE:
                sent, at = now, time.monotonic()
                number = wanted["client"] if isinstance(wanted["client"], int) else None
                found = live.snapshot(seen, config.max_waiting, number)
                await connection.send(await asyncio.to_thread(live.message, *found))
            await asyncio.sleep(INTERVAL)
    finally:
        listening.cancel()
        with contextlib.suppress(asyncio.CancelledError, websockets.exceptions.ConnectionClosed):
            await listening


def _wish(message: str | bytes) -> dict[str, Any]:
    """What a page asks for: {"key": ..., "client": ...}; nothing where it is unreadable."""
    try:
        found = json.loads(message)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
