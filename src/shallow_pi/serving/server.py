"""A policy behind openpi's websocket protocol, so that any openpi client drives it.

A client connects, is sent the policy's metadata, and then sends observations and is sent
`{"actions", "policy_timing", "server_timing"}`, all in msgpack (`protocol.py`). What cannot be
answered is a text frame that says why, then close 1011, or 1013 where the queue was full. The event
loop stays free, during an inference too, for `/healthz`, `/metrics`, and the page at `/`.
"""

import asyncio
import concurrent.futures
import logging
import signal
from collections.abc import Callable

import websockets.asyncio.server

from shallow_pi.serving import recorder, routes, server_config, sessions

_log = logging.getLogger(__name__)
# The library's own lines: every port scan would be a traceback.
_quiet = logging.getLogger(f"{__name__}.connections")
_quiet.setLevel(logging.CRITICAL + 1)


def run(
    policy: sessions.Policy,
    config: server_config.ServerConfig,
    *,
    ready: Callable[[str], None] = lambda _: None,
    record: recorder.Recorder | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; a second one ends the process at once.

    Args:
      policy: warmed up; it is called from one thread only.
      config: where and how.
      ready: called with the address once clients can connect.
      record: keeps what passes; it is not closed here.
    """

    async def until_signal() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def ask() -> None:
            stop.set()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            # Python's own handler would wait for the inference.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ask)
        await serve(policy, config, stop=stop, ready=ready, record=record)

    asyncio.run(until_signal())


async def serve(
    policy: sessions.Policy,
    config: server_config.ServerConfig,
    *,
    stop: asyncio.Event,
    ready: Callable[[str], None] = lambda _: None,
    record: recorder.Recorder | None = None,
) -> None:
    """As `run`, until `stop` is set: what runs is finished, then clients are closed with 1001.

    Raises:
      ValueError: the address cannot be listened on.
    """
    with concurrent.futures.ThreadPoolExecutor(1, "inference") as worker:
        served = sessions.Sessions(policy, config, record, worker)
        try:
            listening = await websockets.asyncio.server.serve(
                served.handle,
                config.host,
                config.port,
                process_request=lambda *got: routes.answer(config, served.seen, *got),
                ssl=config.ssl_context(),
                compression=None,
                max_size=config.max_request_mb * 2**20,
                # A client that sends ahead waits in its own socket.
                max_queue=1,
                logger=_quiet,
            )
        except OSError as error:
            raise config.cannot_listen(error) from error
        if config.is_open and not config.api_key:
            _log.warning("whoever reaches %s can drive this policy: set an API key", config.host)
        ready(config.url(next(iter(listening.sockets)).getsockname()[1]))
        await stop.wait()
        listening.close(close_connections=False)
        # Not for what has only a socket open yet, as browsers keep one in store.
        await served.finish()
