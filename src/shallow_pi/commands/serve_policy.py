"""Serve a policy to robots over openpi's protocol; neither openpi nor torch is needed.

uv run scripts/serve_policy.py --policy.dir checkpoints/pi0_turntable_l6/first

Any openpi client on the same machine can use it unchanged:

    from openpi_client import websocket_client_policy
    policy = websocket_client_policy.WebsocketClientPolicy("127.0.0.1", 8000)
    actions = policy.infer(observation)["actions"]  # (action horizon, robot's dimensions)

`observation` has the robot's keys, nested or flat; `policy.get_server_metadata()` lists them.
openpi's example clients work unchanged: robot libero sends `observation/image`, `observation/state`
and `prompt`; droid `observation/exterior_image_1_left` and the like; aloha and aloha_sim `state`
and `images`. A robot file can rename the keys (--policy.robot my_robot.py).

With --real-time-chunking an observation may also contain the rest of the chunk being executed, so
that the new chunk continues it: `"real_time_chunking": {"previous": ..., "delay": ...}` are the
remaining actions, the first of them due now, and the number of them that will be executed before
the answer arrives. `shallow_pi.deploy.executors.RealTimeChunking` sends it through openpi's client;
docs/speed.md shows a loop that does not need this package.

A page at http://127.0.0.1:8000/ shows cameras, actions, latency and errors; /metrics is for
Prometheus. /healthz is for supervisors, as liveness and as readiness probe: it answers once the
policy is compiled, and with status 503 while one inference has been running for longer than
--stuck-seconds. Ctrl-C or SIGTERM stops the server after the current inference, a second one
immediately.

To serve robots on other machines, open it to the network, with a key that clients pass as
`api_key=`:

    SHALLOW_PI_API_KEY=... uv run scripts/serve_policy.py --policy.dir ... --host 0.0.0.0

--record DIR records observations and actions, one file per connection; read them with
`shallow_pi.serving.recorder.read`.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence

from shallow_pi import flags
from shallow_pi.checkpoints import run_folder
from shallow_pi.commands import exits, policy_arguments
from shallow_pi.deploy import observation_keys, policy
from shallow_pi.parallel import processes
from shallow_pi.serving import client, recorder, server, server_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyArguments(policy_arguments.Loading):
    """The policy."""

    # A run's folder, a step folder, or a checkpoint of openpi or LeRobot; local, gs:// or hf://.
    dir: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(server_config.Settings):
    """The policy, the address, and the limits of clients."""

    policy: PolicyArguments
    # Instruction for observations without one.
    prompt: str = ""
    # Let robots send the rest of the chunk they are executing, so that the next one continues it.
    # Compiles twice as many programs.
    real_time_chunking: bool = False
    # Treat warnings as errors: of values that the policy's folder lacks and that are assumed, and
    # of unused keys.
    strict: bool = False
    # File with the API key that clients must send. Without it the key is SHALLOW_PI_API_KEY; if
    # that is not set either, no key is required.
    api_key_file: str = ""
    # Folder to record observations and actions in.
    record: str = ""
    # Recording stops after this many gigabytes.
    record_limit_gb: float = 20.0

    def create(self) -> server_config.ServerConfig:
        """The server's config, with the key that was given."""
        names = [field.name for field in dataclasses.fields(server_config.Settings)]
        given = {name: getattr(self, name) for name in names}
        return server_config.ServerConfig(**given, api_key=_api_key(self.api_key_file))


def _api_key(path: str) -> str:
    if not path:
        return os.environ.get(client.KEY_VARIABLE, "")
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no API key file {file}; expected one line with the key")
    if not (key := file.read_text(encoding="utf-8").strip()):
        raise ValueError(f"the API key file {file} is empty; expected one line with the key")
    return key


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, warm up, serve until stopped."""
    given = flags.parse(Arguments, arguments, __doc__ or "", idle=_idle)
    # Imported libraries have configured logging already.
    line = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(format=line, level=logging.WARNING, force=True)
    logging.getLogger("shallow_pi").setLevel(logging.INFO)
    with exits.exit_on(), contextlib.ExitStack() as stack:
        serving = given.create()
        serving.check()
        if given.record:
            run_folder.check_output(given.record, "give another --record")
        processes.cache_compilations()
        chosen = given.policy.load(given.policy.dir, prompt=given.prompt or None)
        chosen.warm_up(batch=given.batch, guided=given.real_time_chunking)
        record = None
        if given.record:
            limit = int(given.record_limit_gb * 1e9)
            record = recorder.Recorder(given.record, chosen.metadata, limit_bytes=limit)
            stack.callback(record.close)
        server.run(chosen, serving, ready=lambda url: _ready(url, serving, chosen), record=record)


def _idle(given: Arguments) -> flags.Idle:
    yield not given.record, "record_limit_gb", "nothing is recorded; give --record"
    alone = f"--batch {given.batch} answers observations one at a time; give a larger --batch"
    yield given.batch == 1, "batch_wait_ms", alone


def _ready(url: str, serving: server_config.ServerConfig, chosen: policy.Policy) -> None:
    """Print the policy, the address, and a client that works."""
    found = chosen.metadata
    keys = [*found["cameras"].values(), *found["state_keys"], found["prompt_key"]]
    host, port = url.rsplit(":", 1)
    there = host if serving.tls_cert else host.removeprefix("ws://")
    for anywhere in ("0.0.0.0", "[::]"):
        there = there.replace(anywhere, "<this machine's address>")
    alone = "" if serving.is_open else " for this machine alone (--host 0.0.0.0 for others)"
    key = ', api_key="..."' if serving.api_key else ""
    batched = ""
    if serving.batch > 1:
        batched = f"answers several observations at once: {_times(chosen.batch_ms)}\n"
    if serving.batch > 1 and chosen.is_guided:
        batched += f"several that continue a chunk: {_times(chosen.guided_ms)}\n"
    more = f", and may have {observation_keys.REAL_TIME_CHUNKING!r}" if chosen.is_guided else ""
    print(
        f"{chosen.description}\n{batched}"
        f"on {url}{alone}, page at http{url.removeprefix('ws')}/\n"
        f"an observation has {', '.join(map(repr, keys))}{more}; a minimal client:\n"
        "    from openpi_client import websocket_client_policy\n"
        "    policy = websocket_client_policy.WebsocketClientPolicy("
        f'"{there}", {port}{key})\n'
        f'    actions = policy.infer(observation)["actions"]  '
        f"# ({found['action_horizon']}, {found['action_dim']})",
        flush=True,
    )


def _times(batch_ms: Mapping[int, float]) -> str:
    return ", ".join(f"{size} in {ms:.1f} ms" for size, ms in batch_ms.items())
