"""The server's page: one HTML file, and the JSON it draws.

The page loads nothing from elsewhere, and its Content-Security-Policy lets it run only its own
script and talk only to this server. It holds no data: its numbers and images come through the
websocket `/live` (`watch`), at most ten times a second and only while someone looks.

A browser cannot send a key with a websocket's request, and in an address it would end up in logs:
the page sends `{"key": ...}` as its first message instead, and later `{"client": number}` to look
at another client.
"""

import asyncio
import base64
import contextlib
import functools
import hashlib
import importlib.resources
import io
import json
import math
import re
import time
from collections.abc import Mapping

import numpy as np
import PIL.Image
import websockets.asyncio.server
import websockets.exceptions

from shallow_pi.deploy import observation_keys
from shallow_pi.serving import server_config, telemetry

# Path of the websocket that a page listens to.
LIVE = "/live"
# Pages that may look at once.
MAX_PAGES = 16
# Longest side of an image on the page, pixels.
IMAGE_SIZE = 320
# Seconds between two messages, with and without something new.
INTERVAL, IDLE = 0.1, 1.0
# Largest wish, characters: anyone may send one, and it is read on the event loop.
WISH = 4096
# Seconds a page has to send its key, and to read a message.
PATIENCE = 10.0
# Close code of our own (4000 to 4999 are free): the key is wrong.
WRONG_KEY = 4401


@functools.cache
def html() -> tuple[bytes, str]:
    """The HTML, and the Content-Security-Policy that goes with it."""
    file = importlib.resources.files("shallow_pi.serving") / "page.html"
    text = file.read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = [hashlib.sha256(inner.encode()).digest() for inner in found]
        return " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "img-src data:; connect-src 'self'; form-action 'none'; base-uri 'none'; "
        "frame-ancestors 'none'"
    )
    return text.encode(), policy


async def watch(
    connection: websockets.asyncio.server.ServerConnection,
    seen: telemetry.Telemetry,
    config: server_config.ServerConfig,
    address: str,
) -> None:
    """Serve the page at an address until it is closed."""
    try:
        async with asyncio.timeout(PATIENCE):
            first = _wish(await connection.recv())
    except TimeoutError:
        first = {}
    if config.api_key and not config.is_key(str(first.get("key", ""))):
        seen.fail("unauthorized", address, "a page's API key is wrong")
        await connection.close(WRONG_KEY, "wrong API key")
        return
    wanted = first.get("client")

    async def listen() -> None:
        nonlocal wanted
        async for wish in connection:
            wanted = _wish(wish).get("client", wanted)

    listening = asyncio.create_task(listen())
    try:
        sent, at = None, 0.0
        while not listening.done():
            now = (seen.version, seen.waiting, wanted)
            if now != sent or time.monotonic() - at > IDLE:
                sent, at = now, time.monotonic()
                number = wanted if isinstance(wanted, int) else None
                found = snapshot(seen, config.max_waiting, number)
                content = await asyncio.to_thread(message, *found)
                async with asyncio.timeout(PATIENCE):
                    await connection.send(content)
            await asyncio.sleep(INTERVAL)
    except TimeoutError:
        connection.transport.abort()
    finally:
        listening.cancel()
        with contextlib.suppress(asyncio.CancelledError, websockets.exceptions.ConnectionClosed):
            await listening


def _wish(text: str | bytes) -> dict[str, object]:
    """A page's wish, {"key": ..., "client": ...}; empty if it is too large or unreadable."""
    if len(text) > WISH:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def snapshot(
    seen: telemetry.Telemetry, max_waiting: int, client: int | None = None
) -> tuple[dict[str, object], Mapping[str, object]]:
    """The content of the page without its images, and the observation that has them.

    Args:
      seen: clients, answers and events.
      max_waiting: the queue's bound.
      client: number of the client to show; by default the one connected longest.
    """
    now = seen.clock()
    level, text = seen.health()
    served = [s for s in seen.served if now - s.at < 60]
    recent = [s.total_ms for s in served]
    shown = _shown(seen, client)
    content = {
        "health": {"level": level, "text": text},
        "metadata": {k: v for k, v in seen.metadata.items() if isinstance(v, str | int | float)},
        "names": list(seen.metadata.get("action_names") or ()),
        "uptime": now - seen.start,
        "requests": seen.requests,
        "errors": seen.errors,
        "queue": {"waiting": seen.waiting, "limit": max_waiting},
        "budget_ms": None if seen.chunk_seconds is None else 1000 * seen.chunk_seconds,
        "rate": seen.rate(),
        "percentiles": dict(
            zip(("p50", "p95", "p99"), np.percentile(recent, [50, 95, 99]), strict=True)
        )
        if recent
        else None,
        "latency": [[now - s.at, s.client, s.queue_ms, s.infer_ms, s.total_ms] for s in served],
        "clients": [
            {
                "number": c.number,
                "address": c.address,
                "connected": now - c.since,
                "requests": c.requests,
                "silent": now - c.last,
            }
            for c in seen.clients.values()
        ],
        "events": [
            {"ago": now - e.at, "client": e.client, "kind": e.kind, "text": e.text}
            for e in reversed(seen.events)
        ],
        "view": None if shown is None else _view(shown),
    }
    return content, {} if shown is None else shown.observation


def message(content: dict[str, object], observation: Mapping[str, object]) -> str:
    """A snapshot with its images, as JSON; takes milliseconds, and may run in any thread."""
    whole = {**content, "cameras": images(observation)}
    return json.dumps(_finite(whole), separators=(",", ":"))


def images(observation: Mapping[str, object]) -> dict[str, str]:
    """Every image of an observation as a small JPEG in a data: URL.

    An image is an array (h, w, 3) or (3, h, w), uint8 or float in [0, 1].
    """
    found = {}
    for name, value in observation_keys.flatten(observation).items():
        if not isinstance(value, np.ndarray) or value.ndim != 3 or value.dtype.kind not in "uf":
            continue
        if value.shape[-1] != 3:
            value = np.moveaxis(value, 0, -1)
        if value.shape[-1] != 3 or min(value.shape[:2]) < 8:
            continue
        # Of a large image every second or third pixel is enough; drop the others first.
        stride = max(1, max(value.shape) // (2 * IMAGE_SIZE))
        value = value[::stride, ::stride]
        if value.dtype.kind == "f":
            value = (255 * np.clip(np.nan_to_num(value), 0, 1)).round()
        image = PIL.Image.fromarray(np.ascontiguousarray(value.astype(np.uint8)))
        image.thumbnail((IMAGE_SIZE, IMAGE_SIZE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        found[name] = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return found


def _shown(seen: telemetry.Telemetry, number: int | None) -> telemetry.Client | None:
    clients = [client for client in seen.clients.values() if client.requests]
    chosen = [client for client in clients if client.number == number]
    return min(chosen or clients, key=lambda client: client.number, default=None)


def _view(client: telemetry.Client) -> dict[str, object]:
    chunks = list(client.chunks)
    return {
        "number": client.number,
        "texts": {
            name: value[:300]
            for name, value in observation_keys.flatten(client.observation).items()
            if isinstance(value, str)
        },
        "chunks": [[chunk.start, chunk.actions.tolist()] for chunk in chunks],
        "states": [
            [chunk.start, chunk.state.tolist()]
            for chunk in chunks
            # A state is drawn over the actions only if they have the same dimensions.
            if chunk.state is not None and chunk.state.shape == chunk.actions.shape[1:]
        ],
    }


def _finite(value: object) -> object:
    """Numbers shortened, and null for those JSON does not have."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return value
