"""Policies behind a server, ours or openpi's, as policies under test.

Every simulator has a connection of its own, so that a server that batches can. Our server says what
it reads, and gets the simulator's observation as it is; openpi's gets the form that openpi's own
example client for the robot sends. Noise is drawn by the server, so episodes repeat only as far as
its answers do.
"""

import concurrent.futures
import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import websockets.exceptions
import websockets.sync.client
from jaxtyping import Float, Int

from shallow_pi.data.robots import robot as robots
from shallow_pi.deploy import observation_keys
from shallow_pi.serving import client, protocol
from shallow_pi.sims import simulator

# Seconds for an answer: a server may compile first, or plan for many simulators one by one.
PATIENCE = 900.0


def is_url(source: str) -> bool:
    """A policy's name is meant as the address of a server (`client.check`)."""
    return re.match(r"(wss?|https?)://|[\w.-]+:\d+/?$", source, re.IGNORECASE) is not None


class Served:
    """A policy behind a websocket server (see `policies.Policy`).

    Plans have at least `needed` actions; if the policy `continues`, they go on from what is
    executed meanwhile (real-time chunking).

    Raises:
      ConnectionError: there is no server.
      ValueError: the url is no address, or the server's policy is of another robot, or cannot go
        on from a previous chunk.
    """

    def __init__(
        self, url: str, robot: robots.Robot, needed: int, *, continues: bool = False
    ) -> None:
        self.url, self._robot, self._needed = client.check(url), robot, needed
        self._connections: list[websockets.sync.client.ClientConnection] = []
        self._open = contextlib.ExitStack()
        self._pool = concurrent.futures.ThreadPoolExecutor(64, "server")
        self.metadata = self._connect()
        self._is_ours = "state_keys" in self.metadata
        ours: dict[str, object] = {"action_dim": robot.action_dim, "state_dim": robot.state_dim}
        ours |= {"state_indices": [], "action_indices": []}
        different = [
            f"{name} {self.metadata[name]} (the simulator's: {own})"
            for name, own in ours.items()
            if self.metadata.get(name, own) != own
        ]
        if different:
            self.close()
            raise ValueError(
                f"the policy at {url} is of robot {self.metadata.get('robot', 'unknown')!r} and "
                f"does not fit the simulator's, {robot.name!r}: it has {'; '.join(different)}"
            )
        if continues and not self.metadata.get(observation_keys.REAL_TIME_CHUNKING):
            self.close()
            raise ValueError(
                f"{url} does not continue a previous chunk: start it with "
                "--real-time-chunking (scripts/serve_policy.py; openpi's server has no such "
                "option), or give --executor skip or late"
            )

    def _connect(self) -> dict[str, Any]:
        try:
            # A server that compiles or infers may be silent for longer than pings wait.
            connection = self._open.enter_context(
                websockets.sync.client.connect(
                    self.url, ping_interval=None, close_timeout=1, **client.options(self.url)
                )
            )
            metadata = self._unpack(connection.recv(timeout=PATIENCE))
        except (OSError, websockets.exceptions.WebSocketException) as error:
            raise ConnectionError(client.unreachable(self.url, error)) from error
        self._connections.append(connection)
        return dict(metadata) if isinstance(metadata, Mapping) else {}

    def plan(
        self,
        observations: Sequence[simulator.Observation],
        keys: Int[np.ndarray, "b 2"],
        sims: Sequence[simulator.Simulator],
        *,
        previous: Sequence[Float[np.ndarray, "m rd"]] | None = None,
        delay: int = 0,
    ) -> Float[np.ndarray, "n ah rd"]:
        """One chunk for each simulator.

        Raises:
          ConnectionError: the server has ended.
          ValueError: it refused the observation, or its actions do not fit.
        """
        while len(self._connections) < len(sims):
            self._connect()
        asked = [
            dict(one) if self._is_ours else openpi_form(self._robot, one)
            for one in observations[: len(sims)]
        ]
        if previous is not None:
            asked = [
                observation_keys.with_previous(one, left, delay)
                for one, left in zip(asked, previous[: len(sims)], strict=True)
            ]
        messages = map(protocol.pack, asked)
        found = list(self._pool.map(self._ask, self._connections, messages))
        # All plans of a batch have one length.
        return np.stack([actions[: min(map(len, found))] for actions in found])

    def _ask(
        self, connection: websockets.sync.client.ClientConnection, message: bytes
    ) -> Float[np.ndarray, "ah rd"]:
        try:
            connection.send(message)
            answer = connection.recv(timeout=PATIENCE)
        except TimeoutError as error:
            raise ConnectionError(
                f"the server at {self.url} has not answered for {PATIENCE:g} s: restart it and "
                "repeat the command, which goes on with the unfinished episodes"
            ) from error
        except (OSError, websockets.exceptions.WebSocketException) as error:
            raise ConnectionError(
                f"the server at {self.url} ended in the middle of an episode ({error}): restart it "
                "and repeat the command, which goes on with the unfinished episodes"
            ) from error
        found = self._unpack(answer)
        try:
            actions = np.asarray(found["actions"], np.float32)
        except (KeyError, TypeError, ValueError) as error:
            got = sorted(found) if isinstance(found, Mapping) else type(found).__name__
            raise ValueError(
                f"expected a map with an array of actions from {self.url}, got {got} ({error!r}): "
                "it is not a policy server"
            ) from error
        if actions.ndim != 2 or actions.shape[1] != self._robot.action_dim:
            raise ValueError(
                f"expected actions (horizon, {self._robot.action_dim}) of robot "
                f"{self._robot.name!r} from {self.url}, got the shape {actions.shape}: its policy "
                "is for another robot"
            )
        if len(actions) < self._needed:
            raise ValueError(
                f"{self.url} plans {len(actions)} actions: --execute-steps and --late-ms need "
                f"{self._needed}"
            )
        return actions

    def _unpack(self, message: str | bytes) -> Any:
        if isinstance(message, str):
            raise ValueError(f"the server at {self.url} refused: {message.strip()[-1000:]}")
        try:
            return protocol.unpack(message)
        except ValueError as error:
            raise ValueError(f"{self.url} is not a policy server: {error}") from error

    def close(self) -> None:
        """Close the connections."""
        self._open.close()
        self._connections.clear()
        self._pool.shutdown()


def openpi_form(robot: robots.Robot, observation: simulator.Observation) -> dict[str, Any]:
    """An observation as openpi's example client for this robot sends it; else as it is."""
    form = _FORMS.get(robot.name)
    return dict(observation) if form is None else form(observation)


def _libero(observation: simulator.Observation) -> dict[str, Any]:
    keys = ("image", "wrist_image", "state")
    return {f"observation/{k}": observation[k] for k in keys} | {"prompt": observation["task"]}


def _aloha_sim(observation: simulator.Observation) -> dict[str, Any]:
    # Channels first, and without a prompt, which openpi's server has itself.
    image = np.moveaxis(observation["observation.images.top"], -1, 0)
    state = observation["observation.state"]
    return {"state": state, "images": {"cam_high": image}}


_FORMS: dict[str, Callable[[simulator.Observation], dict[str, Any]]] = {
    "libero": _libero,
    "aloha_sim": _aloha_sim,
}
