"""Measure a policy server's latency and throughput with many simultaneous clients.

uv run scripts/load_test.py --url ws://127.0.0.1:8000 --clients 1 2 4 8 --seconds 60

Every client sends random observations that fit the metadata of the server's policy, one after
another without a pause. For each number of clients, one line of JSON on standard output reports
answers per second, percentiles of the time from sending an observation to receiving its actions (in
milliseconds), and the mean number of observations that the server answered at once. An error of any
client ends the test with status 1. The API key is read from SHALLOW_PI_API_KEY.

With --real-time-chunking, which the server needs too, all but the first observation of each client
continue a chunk, which takes longer.
"""

import asyncio
import dataclasses
import http.client
import json
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import websockets.asyncio.client
import websockets.exceptions

from shallow_pi import flags, progress
from shallow_pi.commands import exits
from shallow_pi.deploy import observation_keys
from shallow_pi.serving import client as clients
from shallow_pi.serving import protocol


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The server, and the load."""

    # The server's address.
    url: str = "ws://127.0.0.1:8000"
    # Number of simultaneous clients; several numbers are tested one after another.
    clients: tuple[int, ...] = (8,)
    # Duration of the test with each number of clients.
    seconds: float = 60.0
    # Side of the images in pixels; 0 uses the model's size.
    image_size: int = 0
    # The instruction.
    prompt: str = "pick up the cup"
    # Send the remaining actions of a chunk with each observation.
    real_time_chunking: bool = False
    # Seed of the observations.
    seed: int = 0

    def __post_init__(self) -> None:
        clients.check(self.url)
        if min(self.clients, default=0) < 1 or self.seconds <= 0 or self.image_size < 0:
            raise ValueError(
                "--clients must be at least 1, --seconds positive and --image-size not negative"
            )


def observation(
    metadata: Mapping[str, Any], given: Arguments, generator: np.random.Generator
) -> dict[str, Any]:
    """A random observation of the robot of the server's policy.

    Raises:
      ValueError: the metadata does not describe observations.
    """
    missing = {"cameras", "state_keys", "state_low", "state_high", "prompt_key"} - set(metadata)
    if missing:
        raise ValueError(
            f"the server at {given.url} does not describe its observations (its metadata lacks "
            f"{sorted(missing)}): this test is for scripts/serve_policy.py"
        )
    side = given.image_size or metadata.get("image_size", 224)
    image = (side, side, 3)
    cameras = metadata["cameras"].values()
    found: dict[str, object] = {key: generator.integers(0, 256, image, np.uint8) for key in cameras}
    # Within the training data: the policy refuses a state that is far from it.
    state = generator.uniform(metadata["state_low"], metadata["state_high"]).astype(np.float32)
    keys, sizes = metadata["state_keys"], metadata.get("state_sizes") or []
    if indices := metadata.get("state_indices"):
        whole = np.zeros(max(sum(sizes), max(indices) + 1, len(keys)), np.float32)
        whole[indices] = state
        state = whole
    # Where any sizes are taken, the keys after the first have one value each.
    sizes = sizes or [len(state) - len(keys) + 1] + [1] * (len(keys) - 1)
    found |= dict(zip(keys, np.split(state, np.cumsum(sizes)[:-1]), strict=True))
    return {**found, metadata["prompt_key"]: given.prompt}


async def client(given: Arguments, number: int, until: float, times: list[float]) -> None:
    """One robot: observations without a pause; appends the seconds of each."""
    generator = np.random.default_rng((given.seed, number))
    options = clients.options(given.url)
    async with websockets.asyncio.client.connect(given.url, **options) as connection:
        metadata = protocol.unpack(_binary(await connection.recv()))
        # A few different ones, made before the clock starts.
        made = [observation(metadata, given, generator) for _ in range(4)]
        shape = (metadata["action_horizon"], metadata["action_dim"])

        async def ask(message: bytes) -> np.ndarray:
            await connection.send(message)
            actions: np.ndarray = protocol.unpack(_binary(await connection.recv()))["actions"]
            if actions.shape != shape or not np.isfinite(actions).all():
                raise ValueError(f"expected finite actions {shape}, got {actions.shape}")
            return actions

        if given.real_time_chunking:
            if not metadata.get(observation_keys.REAL_TIME_CHUNKING):
                raise ValueError(f"start the server at {given.url} with --real-time-chunking")
            left = (await ask(protocol.pack(made[0])))[1:]
            made = [observation_keys.with_previous(one, left, delay=1) for one in made]
        ready = list(map(protocol.pack, made))
        while not times or time.monotonic() < until:
            start = time.monotonic()
            await ask(ready[len(times) % len(ready)])
            times.append(time.monotonic() - start)


def _binary(message: str | bytes) -> bytes:
    if isinstance(message, str):
        raise ValueError(f"the server refused: {message.strip()}")
    return message


def served(url: str) -> tuple[float, float] | None:
    """Observations and turns counted by the server's /metrics; None if it has none."""
    parts = urllib.parse.urlsplit(url)
    scheme, path = parts.scheme.replace("ws", "http"), parts.path.rstrip("/")
    address = parts._replace(scheme=scheme, path=f"{path}/metrics").geturl()
    request = urllib.request.Request(address, headers=clients.headers())
    try:
        with clients.opener(url).open(request, timeout=10) as answer:
            lines = answer.read().decode(errors="replace").splitlines()
    except (OSError, http.client.HTTPException):
        return None
    found = dict(line.rsplit(" ", 1) for line in lines if " " in line)
    names = [f"shallow_pi_batch_size_{name}" for name in ("sum", "count")]
    return (float(found[names[0]]), float(found[names[1]])) if found.keys() >= set(names) else None


async def measure(given: Arguments, count: int) -> dict[str, object]:
    """Run that many clients at once; returns the result to print."""
    before = await asyncio.to_thread(served, given.url)
    start = time.monotonic()
    times: list[list[float]] = [[] for _ in range(count)]
    async with asyncio.TaskGroup() as group:
        for number, own in enumerate(times):
            group.create_task(client(given, number, start + given.seconds, own))
        with progress.bar("Load", total=max(1, round(given.seconds))) as advance:
            for _ in range(max(1, round(given.seconds))):
                await asyncio.sleep(min(1.0, given.seconds))
                advance(1, f"{sum(map(len, times))} answers")
    seconds = time.monotonic() - start
    after = await asyncio.to_thread(served, given.url)
    batch = None
    if before is not None and after is not None and after[1] > before[1]:
        batch = round((after[0] - before[0]) / (after[1] - before[1]), 2)
    every = 1000 * np.concatenate([np.asarray(own) for own in times])
    p50, p95, p99 = np.percentile(every, [50, 95, 99])
    return {
        "url": given.url,
        "clients": count,
        "seconds": round(seconds, 2),
        "requests": len(every),
        "requests_per_second": round(len(every) / seconds, 2),
        "p50_ms": round(float(p50), 2),
        "p95_ms": round(float(p95), 2),
        "p99_ms": round(float(p99), 2),
        "max_ms": round(float(every.max()), 2),
        # Null if the server does not tell.
        "mean_batch": batch,
        # Close together if clients are treated alike.
        "fewest_of_a_client": min(map(len, times)),
        "most_of_a_client": max(map(len, times)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print."""
    with exits.exit_on():
        given = flags.parse(Arguments, arguments, __doc__ or "")
        for count in given.clients:
            try:
                result = asyncio.run(measure(given, count))
            except ExceptionGroup as group:
                # All clients usually fail for the same reason.
                first = group.exceptions[0]
                if not isinstance(first, OSError | websockets.exceptions.WebSocketException):
                    raise first from None
                raise ValueError(clients.unreachable(given.url, first)) from first
            print(json.dumps(result), flush=True)
