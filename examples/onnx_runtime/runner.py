"""Run an ONNX export without JAX: from a robot's observation to its actions.

    python runner.py EXPORT [--port 8000] [--prompt TEXT] [--providers NAME ...]

EXPORT is a folder of `export_student.py --format onnx`. Needs numpy, onnxruntime (or
onnxruntime-gpu), sentencepiece and Pillow; msgpack and websockets to serve. Transforms, statistics
and tokenizer come from the export; the results match those of shallow_pi's `Policy`. In Python:

    policy = runner.OnnxPolicy("EXPORT")
    actions = policy.infer(observation)["actions"]
"""

import argparse
import asyncio
import json
import pathlib
import time
import warnings

import msgpack
import numpy as np
import onnxruntime
import sentencepiece
from PIL import Image

# The last part of a robot's key → other names for it in openpi's clients.
ALIASES = {
    "task": ("prompt",),
    "prompt": ("task",),
    "top": ("cam_high",),
    "image": ("base_rgb",),
    "wrist_image": ("wrist_rgb",),
}
# Texts into which Python and pandas turn an instruction that is not there.
ABSENT = ("None", "nan", "NaN", "<NA>", "null")


class OnnxPolicy:
    """An exported policy with its robot's transforms.

    Args:
      folder: the export.
      providers: ONNX Runtime's, in order of preference; None takes all that are installed.
      prompt: the instruction for observations without one.
      seed: of the noise that `infer` draws.

    Raises:
      FileNotFoundError, ValueError: no whole export, or a provider that is not installed.
    """

    def __init__(self, folder, *, providers=None, prompt=None, seed=0):
        self.folder, self.prompt = pathlib.Path(folder), prompt
        self.export = _read_whole(self.folder)
        assets = json.loads((self.folder / "assets" / "shallow_pi.json").read_text())
        self.robot = assets["robot_fields"]
        if config := self.robot.get("elsewhere"):
            raise ValueError(
                f"the transforms of robot {self.robot['name']} are code of openpi's config "
                f"{config}, which is not here: apply them yourself around the graphs"
            )
        stats = self.folder / "assets" / assets["asset_id"] / "norm_stats.json"
        self.stats = json.loads(stats.read_text())["norm_stats"]
        self.tokenizer = sentencepiece.SentencePieceProcessor(
            model_file=str(self.folder / "assets" / "tokenizer.model")
        )
        there = onnxruntime.get_available_providers()
        # ONNX Runtime itself would take the CPU instead.
        if unknown := sorted(set(providers or ()) - set(there)):
            raise ValueError(
                f"--providers: ONNX Runtime has no {', '.join(unknown)} here, only "
                f"{', '.join(there)} (GPUs need the package onnxruntime-gpu)"
            )
        self._asked, self._providers = providers or (), providers or there
        self._sessions, self._seed = {}, seed
        self.reset()

    @property
    def metadata(self):
        """Facts for clients, as shallow_pi's server sends them."""
        robot, export = self.robot, self.export
        return {
            "robot": robot["name"],
            "image_size": export["image_size"],
            "action_horizon": export["action_horizon"],
            "action_dim": robot["action_dim"],
            "state_dim": robot["state_dim"],
            "state_indices": robot.get("state_indices", []),
            "action_indices": robot.get("action_indices", []),
            "cameras": {name: robot["cameras"][name] for name in export["cameras"]},
            "fps": robot["fps"],
            "num_steps": export["num_steps"],
        }

    def reset(self):
        """Start an episode: reset the noise generator to the seed."""
        self._random = np.random.default_rng(self._seed)

    def warm_up(self):
        """Load every graph before the first observation."""
        for length in self.export["graphs"]:
            self._session(length)

    def infer(self, observation, noise=None):
        """Actions (horizon, dimensions) of the robot, and milliseconds in `timing`.

        Args:
          observation: the robot's keys; images as bytes (height, width, 3) or floats in [0, 1].
          noise: standard normal (horizon, the model's dimensions); None draws it.

        Raises:
          ValueError: a value is missing or does not fit the robot; names the key.
        """
        start = time.perf_counter()
        state, inputs, length = self._inputs(observation)
        shape = (1, self.export["action_horizon"], self.export["action_dim"])
        if noise is None:
            noise = self._random.standard_normal(shape, np.float32)
        inputs["noise"] = np.asarray(noise, np.float32).reshape(shape)
        ready = time.perf_counter()
        (normalized,) = self._session(length).run(["actions"], inputs)
        sampled = time.perf_counter()
        actions = self._outputs(normalized[0], state)
        end = time.perf_counter()
        parts = {"infer_ms": end - start, "transform_ms": ready - start}
        parts |= {"device_ms": sampled - ready, "output_ms": end - sampled}
        return {"actions": actions, "timing": {k: 1e3 * v for k, v in parts.items()}}

    def _session(self, length):
        if length not in self._sessions:
            path = self.folder / self.export["graphs"][length]["policy"]
            session = onnxruntime.InferenceSession(str(path), providers=self._providers)
            used = session.get_providers()
            if lacking := [provider for provider in self._asked if provider not in used]:
                raise ValueError(
                    f"--providers: {', '.join(lacking)} cannot be started here (the reason is "
                    f"printed above); leave it out to run on {', '.join(used)}"
                )
            self._sessions[length] = session
        return self._sessions[length]

    def _inputs(self, observation):
        """The robot's state, the graph's inputs, and which graph."""
        robot, export = self.robot, self.export
        found = self._find(observation)
        size = export["image_size"]
        images = [
            resize(as_uint8(found[robot["cameras"][name]], robot["cameras"][name]), size)
            for name in export["cameras"]
        ]
        keys = [robot["state_key"], *robot["state_more"]]
        parts = [np.atleast_1d(np.asarray(found[key], np.float32)) for key in keys]
        sizes = robot.get("state_sizes")
        if sizes and [len(part) for part in parts] != sizes:
            raise ValueError(
                f"{' + '.join(keys)} must have {' + '.join(map(str, sizes))} dimensions for robot "
                f"{robot['name']}, got {' + '.join(str(len(part)) for part in parts)}"
            )
        state = np.concatenate(parts)
        if indices := robot.get("state_indices"):  # The places that the model's state takes.
            if len(state) <= max(indices):
                raise ValueError(
                    f"{' + '.join(keys)} must have all values that robot {robot['name']} takes "
                    f"some from (up to place {max(indices)}), got {len(state)}"
                )
            state = state[indices]
        if state.shape != (robot["state_dim"],):
            raise ValueError(
                f"{' + '.join(keys)} must have {robot['state_dim']} dimensions for robot "
                f"{robot['name']}, got the shape {state.shape}; is this another robot's "
                "observation?"
            )
        if not np.isfinite(state).all():
            raise ValueError(f"{' + '.join(keys)} is not finite: {state.tolist()}")
        normalized = self._normalize(convert(state, robot["state_conversion"]))
        tokens = self._tokens(self._instruction(found), normalized)
        lengths = sorted(export["graphs"], key=int)
        length = next((n for n in lengths if int(n) >= len(tokens)), lengths[-1])
        if len(tokens) > int(length):
            warnings.warn(
                f"the prompt has {len(tokens)} tokens, {length} fit and the rest is cut",
                stacklevel=3,
            )
        tokens = tokens[: int(length)]
        prompt = np.zeros((1, int(length)), np.int32)
        prompt[0, : len(tokens)] = tokens
        inputs = {
            "images": np.stack(images)[None],
            "prompt": prompt,
            "prompt_mask": np.arange(int(length))[None] < len(tokens),
        }
        if export["normalization"] == "z_score":  # π0 reads the state, π0.5 has it in the prompt.
            padded = np.zeros((1, export["action_dim"]), np.float32)
            padded[0, : len(state)] = normalized
            inputs["state"] = padded
        return state, inputs, length

    def _find(self, observation):
        """The observation's values under the robot's keys."""
        robot = self.robot
        wanted = [robot["cameras"][name] for name in self.export["cameras"]]
        wanted += [robot["state_key"], *robot["state_more"]]
        optional = [] if robot["prompt"] else [robot["prompt_key"]]
        flat = {key: value for key, value in flatten(observation).items() if value is not None}
        by_name = {}
        for spelled, value in flat.items():
            by_name.setdefault(short(spelled), []).append(value)
        taken = {short(key) for key in wanted + optional}
        found = {}
        for key in wanted + optional:
            names = [short(key), *(a for a in ALIASES.get(short(key), ()) if a not in taken)]
            values = [flat[key]] if key in flat else [v for n in names for v in by_name.get(n, ())]
            if len(values) > 1:
                raise ValueError(f"{key!r} is in the observation under two names: send one of them")
            if values:
                found[key] = values[0]
        missing = [key for key in wanted if key not in found]
        if self.prompt is None and optional and optional[0] not in found:
            missing += optional
        if missing:
            raise ValueError(
                f"the observation lacks {', '.join(map(repr, missing))}, which robot "
                f"{robot['name']} sends; there are only {sorted(flat)}"
            )
        return found

    def _instruction(self, found):
        """The robot's own prompt, or the observation's, or else the policy's."""
        if self.robot["prompt"]:
            return self.robot["prompt"]
        key = self.robot["prompt_key"]
        text = found.get(key, self.prompt)
        if not isinstance(text, str):
            raise ValueError(f"{key!r} must be the instruction as a str, got {type(text).__name__}")
        if text.strip() not in ABSENT:
            return text
        if self.prompt is None:
            raise ValueError(
                f"{key!r} is {text!r}, which is no instruction: send one, or give --prompt"
            )
        return self.prompt

    def _tokens(self, text, state):
        text = text.strip().replace("_", " ").replace("\n", " ")
        encode = self.tokenizer.encode
        if not self.export["discrete_state_input"]:
            return encode(text, add_bos=True) + encode("\n")
        bins = np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1
        numbers = " ".join(map(str, bins))
        return encode(f"Task: {text}, State: {numbers};\nAction: ", add_bos=True)

    def _scale(self, key, dims):
        """(x − shift) / scale normalizes."""
        one = {name: np.asarray(value) for name, value in self.stats[key].items()}
        if self.export["normalization"] == "z_score":
            return one["mean"][:dims], one["std"][:dims] + 1e-6
        half = (one["q99"][:dims] - one["q01"][:dims] + 1e-6) / 2
        return one["q01"][:dims] + half, half

    def _normalize(self, state):
        shift, scale = self._scale("state", len(state))
        return ((steady(state, self.stats["state"]) - shift) / scale).astype(np.float32)

    def _outputs(self, normalized, state):
        """Normalized actions to the robot's units."""
        robot = self.robot
        shift, scale = self._scale("actions", robot["action_dim"])
        actions = (normalized[:, : robot["action_dim"]] * scale + shift).astype(np.float32)
        if delta := robot["delta"]:
            moved = convert(state, robot["state_conversion"])[: len(delta)]
            actions[:, : len(delta)] += np.where(delta, moved, 0).astype(np.float32)
        return convert(actions, robot["action_conversion"], back=True)


def _read_whole(folder):
    """The description of an export, after checking that all of its files are complete."""
    path = folder / "onnx.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: expected a folder of `export_student --format onnx`")
    export = json.loads(path.read_text())
    for name, size in export["files"].items():
        there = (folder / name).stat().st_size if (folder / name).is_file() else None
        if there != size:
            raise ValueError(
                f"{folder / name} has {there} bytes, expected {size}: the copy is not whole, "
                "copy the export again"
            )
    return export


def steady(state, stats):
    """The state, dimensions that hardly moved in training kept near where they were.

    They are divided by next to nothing, and a sensor's noise would become large.
    """
    mean, std = (np.asarray(stats[name])[: len(state)] for name in ("mean", "std"))
    low, high = mean - 2.33 * std, mean + 2.33 * std
    if stats.get("q01") is not None and stats.get("q99") is not None:
        low, high = (np.asarray(stats[name])[: len(state)] for name in ("q01", "q99"))
    spread = np.maximum(high - low, 4.653 * std)
    size = np.maximum(1, np.maximum(abs(low), abs(high)))
    room = np.where(spread < 0.01 * size, 2 * spread, np.inf)
    return np.clip(state, low - room, high + room)


def flatten(observation, prefix=""):
    """Nested maps as one flat map, names joined by a slash."""
    flat = {}
    for name, value in observation.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def short(key):
    """A key without the prefixes of openpi and LeRobot."""
    return key.replace(".", "/").removeprefix("observation/").removeprefix("images/")


def as_uint8(value, key):
    """An image as uint8, colours last."""
    found = np.asarray(value)
    if found.ndim == 3 and found.shape[0] == 3 != found.shape[-1]:
        found = np.moveaxis(found, 0, -1)
    if found.ndim != 3 or found.shape[-1] != 3 or not found.size:
        raise ValueError(f"{key!r} must be one RGB image, got the shape {np.shape(value)}")
    if np.issubdtype(found.dtype, np.floating):
        if not (found.min() >= 0 and found.max() <= 1):
            raise ValueError(f"{key!r}: floats must lie in [0, 1], or give bytes")
        found = (255 * found).astype(np.uint8)
    if found.dtype != np.uint8:
        raise ValueError(f"{key!r} must be uint8, or floats in [0, 1], got {found.dtype}")
    return found


def resize(image, size):
    """Resize to a square, keeping proportions, padded with black."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    ratio = max(width / size, height / size)
    new = int(height / ratio), int(width / ratio)
    scaled = Image.fromarray(image).resize(new[::-1], Image.Resampling.BILINEAR)
    padded = np.zeros((size, size, 3), np.uint8)
    top, left = (size - new[0]) // 2, (size - new[1]) // 2
    padded[top : top + new[0], left : left + new[1]] = np.asarray(scaled)
    return padded


def convert(values, conversion, back=False):
    """A robot's numbers to the model's units and signs, or back; ALOHA's grippers have a crank."""
    values = np.array(values, np.float64)
    if conversion is None:
        return values.astype(np.float32)
    factor, offset = np.asarray(conversion["factor"]), np.asarray(conversion["offset"] or 0.0)
    closed, opened, arm, horn = 0.01844, 0.05800, 0.036, 0.022
    if back:
        values = (values - offset) / factor
        for dim in conversion["crank"]:
            angle = values[..., dim]
            fingers = horn * np.sin(angle) + np.sqrt(arm**2 - (horn * np.cos(angle)) ** 2)
            values[..., dim] = (fingers - closed) / (opened - closed)
        return values.astype(np.float32)
    for dim in conversion["crank"]:
        fingers = values[..., dim] * (opened - closed) + closed
        sine = (horn**2 + fingers**2 - arm**2) / (2 * horn * fingers)
        values[..., dim] = np.arcsin(np.clip(sine, -1.0, 1.0))
    return (values * factor + offset).astype(np.float32)


def pack(value):
    """Msgpack as openpi's clients read it."""

    def array(found):
        if not isinstance(found, np.ndarray):
            raise TypeError(f"cannot send a {type(found).__name__}")
        whole = {b"__ndarray__": True, b"data": found.tobytes()}
        return whole | {b"dtype": found.dtype.str, b"shape": found.shape}

    return msgpack.packb(value, default=array)


def unpack(message):
    """A client's message; only arrays of numbers and booleans are accepted."""

    def read(found):
        if b"__ndarray__" not in found:
            return found
        dtype = np.dtype(found[b"dtype"])
        if dtype.kind not in "biuf":
            raise ValueError(f"an array of dtype {dtype} is refused")
        return np.ndarray(found[b"shape"], dtype, found[b"data"])

    return msgpack.unpackb(message, object_hook=read)


async def serve(policy, host, port, stop, ready=lambda port: None):
    """openpi's websocket protocol until `stop` is set; `/healthz` answers 200."""
    import websockets.asyncio.server

    turn = asyncio.Lock()

    async def handle(connection):
        await connection.send(pack(policy.metadata))
        async for message in connection:
            try:
                observation = unpack(message)
                async with turn:
                    result = await asyncio.to_thread(policy.infer, observation)
            except Exception as error:  # Report any error to the client, and keep serving.
                await connection.send(f"{type(error).__name__}: {error}")
                await connection.close(1011, "the reason is in the frame before")
                return
            timing = result.pop("timing")
            await connection.send(pack(result | {"policy_timing": timing, "server_timing": timing}))

    def health(connection, request):
        return connection.respond(200, "OK\n") if request.path == "/healthz" else None

    async with websockets.asyncio.server.serve(
        handle, host, port, process_request=health, compression=None, max_size=64 * 2**20
    ) as server:
        ready(server.sockets[0].getsockname()[1])
        await stop.wait()


def main():
    """Parse, load, serve."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("export")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--prompt", help="the instruction where an observation has none")
    parser.add_argument("--providers", nargs="*", help="ONNX Runtime's, in order of preference")
    given = parser.parse_args()

    def ready(port):
        print(f"serving {given.export} at ws://{given.host}:{port}", flush=True)

    try:
        policy = OnnxPolicy(given.export, providers=given.providers, prompt=given.prompt)
        policy.warm_up()
        asyncio.run(serve(policy, given.host, given.port, asyncio.Event(), ready))
    except (OSError, OverflowError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    main()
