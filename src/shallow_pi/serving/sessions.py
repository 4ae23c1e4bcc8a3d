"""The clients of a server: they connect, ask, are answered in turn (`turns`), and leave.

An observation that cannot be answered is refused by a text frame with the reason, then a close, as
by openpi's server, and concerns that client alone. Every connection begins an episode, and so does
a client's reset: its noise is numbered from 0, whoever else is there. If the server is full,
clients that are gone without a word, or that never asked for anything, make room for a new one.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import time
import traceback
import urllib.parse

import websockets.asyncio.server
import websockets.exceptions
import websockets.http11

from shallow_pi.serving import page, protocol, recorder, server_config, telemetry, turns

_log = logging.getLogger(__name__)

# Close code of the websocket protocol.
TOO_LARGE = 1009
# Seconds a client has to read an answer.
READ = 20.0
# Seconds a client keeps its place without having sent an observation when its place is wanted.
UNUSED = 10.0

Connection = websockets.asyncio.server.ServerConnection


def path(request: websockets.http11.Request) -> str:
    """A request's path without its query."""
    return urllib.parse.urlsplit(request.path).path


def address(connection: Connection) -> str:
    """A peer's address, to show."""
    try:
        host, port, *_ = connection.remote_address
    except (TypeError, ValueError):
        return "unknown"
    return f"{host}:{port}"


class Sessions:
    """The connections of one server, on its event loop."""

    def __init__(
        self,
        policy: turns.Policy,
        config: server_config.ServerConfig,
        record: recorder.Recorder | None,
        worker: concurrent.futures.Executor,
    ) -> None:
        self.seen = telemetry.Telemetry(policy.metadata, config.stuck_seconds)
        self._config, self._record = config, record
        self._metadata = protocol.pack(dict(policy.metadata))
        self._turns = turns.Turns(policy, config, self.seen, worker)
        self._stopping = False
        self._pages: set[Connection] = set()
        self._clients: dict[Connection, telemetry.Client] = {}
        self._busy: set[Connection] = set()
        self._search: asyncio.Task[None] | None = None

    async def handle(self, connection: Connection) -> None:
        """One websocket, from its first frame to its last."""
        assert connection.request is not None
        # It may leave at any time, with or without a close frame.
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            if path(connection.request) != page.LIVE:
                await self._drive(connection)
                return
            self._pages.add(connection)
            try:
                await page.watch(connection, self.seen, self._config, address(connection))
            finally:
                self._pages.discard(connection)

    async def finish(self) -> None:
        """Close the idle with 1001, and the others once the running inference is over."""
        self._stopping = True
        self._turns.stop()
        idle = {*self._pages, *self._clients} - self._busy
        await asyncio.gather(*(one.close(turns.GOING_AWAY, "the server stops") for one in idle))
        while self._pages or self._clients or self._turns.is_asking:
            await asyncio.sleep(0.02)

    def count_pages(self) -> int:
        """Number of pages that look at this server."""
        return len(self._pages)

    async def make_room(self) -> bool:
        """Wait until one more client may come in; False if all places are taken by live ones."""
        if self._is_full():
            if self._search is None or self._search.done():
                self._search = asyncio.create_task(self._drop_absent())
            # Another newcomer may wait for the same search.
            await asyncio.shield(self._search)
        return not self._is_full()

    def _is_full(self) -> bool:
        return len(self._clients) >= self._config.max_clients

    async def _drop_absent(self) -> None:
        """Drop clients that answer no ping; if there are none, the oldest that never asked."""
        await asyncio.gather(*(self._ping(one) for one in set(self._clients) - self._busy))
        now = time.monotonic()
        unused = [
            (client.since, one)
            for one, client in self._clients.items()
            if not client.requests and one not in self._busy and now - client.since > UNUSED
        ]
        if self._is_full() and unused:
            _, oldest = min(unused, key=lambda pair: pair[0])
            reason = f"no observation for {UNUSED:.0f} s, and another client needed its place"
            self._drop(oldest, reason)
            await oldest.close(turns.TRY_AGAIN, reason)

    async def _ping(self, connection: Connection) -> None:
        # A newcomer waits for this during its handshake.
        seconds = self._config.handshake_seconds / 2
        try:
            async with asyncio.timeout(seconds):
                await (await connection.ping())
        except TimeoutError:
            if connection not in self._busy:
                self._drop(connection, f"no answer to a ping for {seconds:.1f} s")
                connection.transport.abort()
        except websockets.exceptions.ConnectionClosed:
            pass

    def _drop(self, connection: Connection, reason: str) -> None:
        if (client := self._clients.pop(connection, None)) is not None:
            _log.warning("client %d is dropped: %s", client.number, reason)
            self.seen.disconnect(client)

    async def _drive(self, connection: Connection) -> None:
        client = self.seen.connect(address(connection))
        self._clients[connection] = client
        name = self._record.begin(client.number) if self._record is not None else ""
        _log.info("client %d connected from %s", client.number, client.address)
        previous: dict[str, float] = {}
        warned, begun = False, 0
        gone = asyncio.create_task(connection.wait_closed())
        gone.add_done_callback(lambda _: self._turns.left(connection))
        try:
            if len(self._clients) > self._config.max_clients:
                # Several newcomers were let in at once.
                raise turns.Refusal(
                    "busy", "all places are taken; connect again later", turns.TRY_AGAIN
                )
            await self._send(connection, self._metadata)
            while not self._stopping:
                message = await connection.recv()
                if turns.is_reset(message):
                    begun = client.requests
                    await self._send(connection, turns.RESET_DONE)
                    continue
                arrived, call = time.monotonic(), client.requests - begun
                self._busy.add(connection)
                answer = await self._turns.answer(
                    turns.Request(connection, message, call, arrived, previous)
                )
                await self._send(connection, answer.packed)
                total_ms = 1000 * (time.monotonic() - arrived)
                previous = {"prev_total_ms": total_ms}
                self.seen.answer(
                    client,
                    answer.observation,
                    answer.actions,
                    queue_ms=answer.queue_ms,
                    infer_ms=answer.infer_ms,
                    total_ms=total_ms,
                    warnings=answer.warnings,
                )
                if answer.warnings and not warned:
                    warned = True
                    _log.warning("client %d: %s", client.number, "; ".join(answer.warnings))
                if self._record is not None and isinstance(message, bytes):
                    at = time.time() - total_ms / 1000
                    self._record.add(name, at, message, answer.packed)
                self._busy.discard(connection)
            await connection.close(turns.GOING_AWAY, "the server stops")
        except websockets.exceptions.ConnectionClosed as closed:
            if closed.sent is not None and closed.sent.code == TOO_LARGE:
                text = f"an observation larger than {self._config.max_request_mb} MiB"
                self.seen.fail("too_large", f"client {client.number}", text)
                _log.warning("client %d: %s", client.number, text)
        except turns.Refusal as refusal:
            _log.warning("client %d: %s", client.number, refusal.text)
            await self._refuse(connection, client, refusal)
        except Exception:
            _log.exception("client %d: its observation could not be answered", client.number)
            await self._refuse(
                connection, client, turns.Refusal("internal", traceback.format_exc())
            )
        finally:
            self._busy.discard(connection)
            gone.cancel()
            if self._clients.pop(connection, None) is not None:
                self.seen.disconnect(client)
            if self._record is not None:
                self._record.end(name)
            _log.info("client %d left after %d observations", client.number, client.requests)

    async def _refuse(
        self, connection: Connection, client: telemetry.Client, refusal: turns.Refusal
    ) -> None:
        self.seen.fail(refusal.kind, f"client {client.number}", refusal.text)
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            await self._send(connection, refusal.text)
        self._busy.discard(connection)
        await connection.close(refusal.code, "see the previous message for the reason")

    async def _send(self, connection: Connection, message: str | bytes) -> None:
        try:
            async with asyncio.timeout(READ):
                await connection.send(message)
        except TimeoutError:
            self._drop(connection, f"it has not read its answer for {READ:.0f} s")
            connection.transport.abort()
            raise websockets.exceptions.ConnectionClosedError(None, None) from None
