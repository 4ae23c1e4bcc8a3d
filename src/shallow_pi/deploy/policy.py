"""A policy: observations of a robot in, action chunks of that robot out.

`Policy.from_checkpoint(step)` needs nothing but a step folder written by training; depth, model,
robot, tokenizer and statistics are in it. `infer` is what a robot or a server calls: one
observation, its noise drawn from the seed. `infer_each` answers observations of several robots
at once, each as if alone; `infer_batch` takes several with the caller's noise. All are thread-safe.
"""

import dataclasses
import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PyTree, UInt8

from shallow_pi import progress
from shallow_pi.checkpoints import run_folder, weights
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import robot as robots
from shallow_pi.deploy import (
    facts,
    observation_keys,
    robot_observation,
    robot_transforms,
    state_check,
    step_folder,
    warm_up,
)
from shallow_pi.inference import calibration as calibrations
from shallow_pi.inference import prepare, program, real_time, tuning
from shallow_pi.inference import quantize as quantization
from shallow_pi.models import observation


class Policy:
    """A model with its robot's transforms around it.

    Args:
      assets: the model's sizes, robot, tokenizer and statistics.
      params: the model's parameters, or a function that reads them, which is called when everything
        else has been checked.
      num_steps: integration steps of the sampler; None uses those it was trained for.
      seed: of the noise `infer` draws.
      prompt: the instruction where an observation has none.
      state_warn: spreads outside its training data beyond which a state is warned of; see
        `state_check`.
      state_refuse: the same, beyond which it is refused; 0 refuses none.
      quantize: products in 8 bits by this scheme (see `inference.quantize`); "none" rounds nothing,
        "tuned" takes the fastest that was measured, None does what the policy was trained for.
      quantized: the parts of the model in 8 bits.
      calibration: bounds of the activations, which int8 and fp8 need.
      resize_on_device: whether images are brought to the model's size on the device (within one
        grey level of Pillow's) or by Pillow; None is the faster, Pillow on a CPU.
    """

    def __init__(
        self,
        assets: policy_assets.Assets,
        params: PyTree | Callable[[], PyTree],
        *,
        num_steps: int | None = None,
        seed: int = 0,
        prompt: str | None = None,
        state_warn: float = state_check.WARN,
        state_refuse: float = state_check.REFUSE,
        resize_on_device: bool | None = None,
        quantize: calibrations.Asked | None = None,
        quantized: tuple[quantization.Part, ...] = quantization.PARTS,
        calibration: calibrations.Calibration | None = None,
    ) -> None:
        num_steps = assets.steps(num_steps)
        self.assets, self.num_steps, self.prompt = assets, num_steps, prompt
        if resize_on_device is None:
            resize_on_device = jax.default_backend() != "cpu"
        self.resize_on_device = resize_on_device
        self._transforms = robot_transforms.RobotTransforms(
            assets,
            prompt=prompt,
            resize=not resize_on_device,
            state_warn=state_warn,
            state_refuse=state_refuse,
        )
        self.quantize, bounds = calibrations.choose(
            assets.model, quantize, assets.quantize, calibration, num_steps
        )
        options = dataclasses.replace(
            tuning.best(assets.model), quantize=self.quantize, quantized=quantized
        )
        read = params() if callable(params) else params
        self.program = program.Program.create(assets.model, read, num_steps, options, bounds)
        key = jax.random.key(seed, impl=program.KEY_KIND)
        self._key, self._calls = np.asarray(jax.random.key_data(key)), 0
        # Compiled prompt lengths (`warm_up`); others are padded to the next of them.
        self._lengths: list[int] = []
        # Compiled batch sizes and the milliseconds each takes, and the same of chunks that go on
        # from a previous one; `warm_up` measures them.
        self.batch_ms: dict[int, float] = {1: 1.0}
        self.guided_ms: dict[int, float] = {1: 1.0}
        # The programs for chunks that go on from a previous one are compiled (`warm_up`).
        self.is_guided = False
        # Tells its parameters from others (`weights.digest`); empty if they are of no folder.
        self.parameters = ""
        # Share of these in the last turn.
        self._guided_share = 0.0
        self._lock = threading.Lock()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        *,
        step: str | int = "last",
        num_steps: int | None = None,
        seed: int = 0,
        robot: str | robots.Robot | None = None,
        prompt: str | None = None,
        warm_up: bool = True,
        asset_id: str | None = None,
        norm_stats: str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        state_warn: float = state_check.WARN,
        state_refuse: float = state_check.REFUSE,
        resize_on_device: bool | None = None,
        quantize: calibrations.Asked | None = None,
        quantized: tuple[quantization.Part, ...] = quantization.PARTS,
        **fields: Any,
    ) -> "Policy":
        """The policy of a step folder, its parameters in the model's compute dtype.

        Args:
          path: a step folder of ours, an export of one, a folder of openpi's or LeRobot's, or the
            folder of a run; local, `gs://` or `hf://`.
          step: of a run: "last", "best" or a number.
          num_steps: integration steps of the sampler; None uses those it was trained for.
          seed: of the noise `infer` draws.
          robot: for a folder that is not ours, which robot it is for; see `step_folder.assets`.
          prompt: the instruction where an observation has none.
          warm_up: compile now what the first observation will need; see `warm_up`.
          asset_id: whose statistics, where there are several.
          norm_stats: folder of other statistics than the checkpoint's.
          tokenizer: a SentencePiece model, where it is another than the folder's or PaliGemma's.
          state_warn: as of `Policy`.
          state_refuse: as of `Policy`.
          resize_on_device: as of `Policy`.
          quantize: as of `Policy`; int8 and fp8 read the bounds that scripts/calibrate.py wrote.
          quantized: as of `Policy`.
          fields: of the `Pi0Config`, where they are to be others; openpi's checkpoints do not hold
            `action_horizon` (50), `max_token_len` (48; π0.5: 200) and `discrete_state_input` (π0.5:
            True). Those that are assumed are named in a warning.

        Raises:
          FileNotFoundError, ValueError: not a complete step folder, or parameters that do not fit
            the model described in its assets.
        """
        folder = step_folder.find(path, step)
        assets = step_folder.assets(
            folder,
            robot=robot,
            asset_id=asset_id,
            norm_stats=norm_stats,
            tokenizer=tokenizer,
            **fields,
        )
        policy = cls(
            assets,
            lambda: step_folder.params(folder, assets.model),
            num_steps=num_steps,
            seed=seed,
            prompt=prompt,
            state_warn=state_warn,
            state_refuse=state_refuse,
            resize_on_device=resize_on_device,
            quantize=quantize,
            quantized=quantized,
            calibration=calibrations.load(folder / run_folder.ASSETS, assets.model),
        )
        policy.parameters = weights.digest(folder)
        if warm_up:
            policy.warm_up()
        return policy

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Shape of the noise of one observation: (action horizon, action dim)."""
        return self.assets.model.action_horizon, self.assets.model.action_dim

    @property
    def metadata(self) -> dict[str, Any]:
        """Facts for clients, in plain values; `action_dim` is the robot's."""
        return {
            **facts.metadata(self.assets),
            "parameters": self.parameters,
            "num_steps": self.num_steps,
            "quantize": self.quantize,
            # Observations may have this key too (see `observation_keys`).
            observation_keys.REAL_TIME_CHUNKING: self.is_guided,
            "state_low": self._transforms.check_state.low.tolist(),
            "state_high": self._transforms.check_state.high.tolist(),
        }

    @property
    def description(self) -> str:
        """One line: the model, its robot, and all that a folder of openpi's does not say."""
        return facts.description(self.assets, self.quantize)

    def reset(self) -> None:
        """Begin an episode: the noise sequence starts anew from the seed."""
        with self._lock:
            self._calls = 0

    def infer(
        self,
        observation: Mapping[str, object],
        noise: Float[np.ndarray, "ah ad"] | None = None,
        *,
        previous: Float[np.ndarray, "n rd"] | None = None,
        delay: int = 0,
        max_guidance_weight: float = real_time.MAX_WEIGHT,
    ) -> dict[str, object]:
        """One action chunk in the robot's units.

        Args:
          observation: the robot's (LeRobot's flat) keys; see `robot_observation`.
          noise: standard normal; None draws it from `fold_in(seed, n)` in the n-th call since the
            last reset, counted from 0.
          previous: what is left of the chunk being executed, in the robot's units, its first row
            the action due when the observation was made. The new chunk goes on from it (see
            `real_time`).
          delay: how many of these will have been executed when the new chunk arrives.
          max_guidance_weight: upper bound β of the pull towards the previous chunk.

        Returns:
          `actions`: float32 (action horizon, robot's dimensions). `timing`: milliseconds of the
          whole (`infer_ms`) and of its parts, `transform_ms`, `device_ms` and `output_ms`.
          `warnings`: a list of texts, only where there is something to warn of.

        Raises:
          ValueError: an observation the policy cannot be asked with; names the key.
        """
        start = time.perf_counter()
        if noise is not None and np.shape(noise) != self.noise_shape:
            raise ValueError(f"noise must have shape {self.noise_shape}, got {np.shape(noise)}")
        asked = self._transforms.to_model(observation, previous, delay)
        batch, guidance = self._transforms.stack([asked], max_guidance_weight)
        ready = time.perf_counter()
        start_from = self._next_seed() if noise is None else np.asarray(noise)[None]
        normalized = np.asarray(self.sample(batch, start_from, guidance))
        sampled = time.perf_counter()
        (actions,) = self._transforms.to_robot([asked], normalized)
        return _result(actions, _timing(start, ready, sampled), asked.warnings)

    def infer_each(
        self, observations: Sequence[Mapping[str, object]], calls: Sequence[int]
    ) -> list[dict[str, object] | ValueError]:
        """Answers to observations of several robots, computed together.

        Those that go on from a chunk are a batch of their own, because their program takes several
        times as long. A batch is filled up to the next size that `warm_up` compiled.

        Args:
          observations: one of each robot. After `warm_up(guided=True)` it may have the key
            `observation_keys.REAL_TIME_CHUNKING`.
          calls: number of observations of that robot answered before; its noise is drawn from
            `fold_in(seed, call)`, so that no robot depends on the others.

        Returns:
          For each what `infer` returns, with the times of the batch, or the error it raises.
        """
        start = time.perf_counter()
        answers: list[dict[str, object] | ValueError] = []
        rows: list[_Row] = []
        for place, (given, call) in enumerate(zip(observations, calls, strict=True)):
            answers.append({})
            try:
                rest, left, delay = robot_observation.split_previous(given)
                if left is not None and not self.is_guided:
                    raise ValueError(
                        f"the observation has {observation_keys.REAL_TIME_CHUNKING!r}: start the "
                        "server with --real-time-chunking, or send none"
                    )
                rows.append(_Row(place, call, self._transforms.to_model(rest, left, delay)))
            except ValueError as error:
                answers[place] = error
        free = [row for row in rows if not row.asked.left]
        guided = [row for row in rows if row.asked.left]
        self._guided_share = len(guided) / max(1, len(rows))
        for batch in filter(None, (free, guided)):
            for row, result in zip(batch, self._infer_rows(batch, start), strict=True):
                answers[row.place] = result
            start = time.perf_counter()
        return answers

    def _infer_rows(self, rows: list["_Row"], start: float) -> list[dict[str, object]]:
        """The answers to one batch, begun at `start`."""
        times = self.guided_ms if rows[0].asked.left else self.batch_ms
        size = warm_up.filled_size(times, len(rows))
        filled = rows + (size - len(rows)) * rows[-1:]
        batch, guidance = self._transforms.stack([row.asked for row in filled])
        seed = program.Seed(self._key, np.array([row.call for row in filled], np.uint32))
        ready = time.perf_counter()
        normalized = np.asarray(self.sample(batch, seed, guidance))[: len(rows)]
        sampled = time.perf_counter()
        actions = self._transforms.to_robot([row.asked for row in rows], normalized)
        timing = _timing(start, ready, sampled)
        pairs = zip(rows, actions, strict=True)
        return [_result(chunk, timing, row.asked.warnings) for row, chunk in pairs]

    def together(self, waiting: int) -> int:
        """Number of the waiting observations to answer at once: the most a second, as measured.

        They have not been read yet. So the share of them that go on from a chunk, which are a batch
        of their own, is taken to be that of the last turn.
        """

        def rate(count: int) -> float:
            guided = round(self._guided_share * count)
            parts = (self.batch_ms, count - guided), (self.guided_ms, guided)
            return count / sum(warm_up.milliseconds(times, part) for times, part in parts)

        return max(range(1, waiting + 1), key=lambda count: (rate(count), -count))

    def infer_batch(
        self,
        observations: Sequence[Mapping[str, object]],
        noise: Float[np.ndarray, "b ah ad"],
        *,
        previous: Sequence[Float[np.ndarray, "n rd"] | None] | None = None,
        delay: int = 0,
        max_guidance_weight: float = real_time.MAX_WEIGHT,
    ) -> Float[np.ndarray, "b ah rd"]:
        """Action chunks of several observations in the robot's units; arguments as of `infer`.

        An absurd state is refused as in `infer`, but no state causes a warning. Some observations
        may have no previous chunk (None, or n = 0), or one shorter than the delay, which then ends
        with it.
        """
        if np.shape(noise) != (len(observations), *self.noise_shape):
            raise ValueError(
                f"noise must have shape {(len(observations), *self.noise_shape)} for "
                f"{len(observations)} observations, got {np.shape(noise)}"
            )
        previous = len(observations) * [None] if previous is None else previous
        if len(previous) != len(observations):
            raise ValueError(
                f"expected a previous chunk for each of {len(observations)} observations, got "
                f"{len(previous)}"
            )
        pairs = zip(observations, previous, strict=True)
        asked = [self._transforms.to_model(one, left, delay) for one, left in pairs]
        batch, guidance = self._transforms.stack(asked, max_guidance_weight)
        return self._transforms.to_robot(asked, np.asarray(self.sample(batch, noise, guidance)))

    def prepare(self, observations: Sequence[Mapping[str, object]]) -> observation.Observation:
        """The model's batch of observations, on the host; images are still uint8.

        Raises:
          ValueError: as of `infer`.
        """
        return self._transforms.stack([self._transforms.to_model(one) for one in observations])[0]

    def pack(
        self,
        batch: observation.Observation,
        start: Float[np.ndarray, "b ah ad"] | program.Seed,
        guidance: real_time.Guidance | None = None,
    ) -> tuple[program.Layout, UInt8[np.ndarray, "b n"]]:
        """Pack the input of `program`, without absent cameras and padding."""
        config, batch = prepare.trim(self.assets.model, batch, self._lengths)
        sizes = tuple(batch.images[name].shape[1:3] for name in config.cameras)
        if set(sizes) == {(config.image_size, config.image_size)}:
            sizes = ()
        layout = program.Layout(config, guidance is not None, sizes)
        return layout, program.pack(layout, batch, start, guidance)

    def sample(
        self,
        batch: observation.Observation,
        start: Float[np.ndarray, "b ah ad"] | program.Seed,
        guidance: real_time.Guidance | None = None,
    ) -> jax.Array:
        """Normalized actions on device: what a latency measurement calls."""
        return self.program(*self.pack(batch, start, guidance))

    def warm_up(self, *, guided: bool = False, batch: int = 1) -> None:
        """Compile, so that no robot waits for it, and time each batch size.

        Every prompt length (see `prepare.trim`) is compiled that the policy's prompt, or usual ones
        where it has none, come to with any state, and the longest, so that no prompt is compiled
        for later. JAX's persistent cache, where it is on, keeps the programs.

        Args:
          guided: compile for chunks that go on from a previous one (`infer(previous=)`) as well.
          batch: most observations `infer_each` answers at once; compiles 1, 2, 4, 8 ... and this.
        """
        sizes, kinds = warm_up.batch_sizes(batch), [False, True] if guided else [False]
        lengths = warm_up.prompt_lengths(self.assets, self.prompt)
        with progress.bar("Compile", total=len(lengths) * len(kinds) * len(sizes)) as advance:
            for length, kind, size in itertools.product(lengths, kinds, sizes):
                jax.block_until_ready(self._made_up(length, kind, size)())
                advance(1)
        self._lengths = lengths
        self.is_guided |= guided
        if len(sizes) > 1:
            self.batch_ms = self._times(sizes, lengths[0], guided=False)
            if guided:
                self.guided_ms = self._times(sizes, lengths[0], guided=True)

    def _times(self, sizes: Sequence[int], length: int, *, guided: bool) -> dict[int, float]:
        return warm_up.times({size: self._made_up(length, guided, size) for size in sizes})

    def _made_up(self, length: int, guided: bool, size: int) -> Callable[[], jax.Array]:
        """A call of the program with images as a camera gives them."""
        resized = not self.resize_on_device
        given = warm_up.observations(self.assets, length, size, resized=resized)
        guidance = warm_up.guidance(self.assets, size) if guided else None
        return lambda: self.sample(given, program.Seed(self._key, 0), guidance)

    def _next_seed(self) -> program.Seed:
        with self._lock:
            call, self._calls = self._calls, self._calls + 1
        return program.Seed(self._key, call)


class _Row(NamedTuple):
    """One observation of several that are answered together."""

    # Its place among the observations, refused ones counted.
    place: int
    call: int
    asked: robot_transforms.ModelInput


def _timing(start: float, ready: float, sampled: float) -> dict[str, float]:
    """Milliseconds of an inference that ends now, from `time.perf_counter` after each part."""
    end = time.perf_counter()
    parts = {
        "infer_ms": end - start,
        "transform_ms": ready - start,
        "device_ms": sampled - ready,
        "output_ms": end - sampled,
    }
    return {name: 1e3 * seconds for name, seconds in parts.items()}


def _result(
    actions: Float[np.ndarray, "ah rd"], timing: Mapping[str, float], warnings: Sequence[str]
) -> dict[str, object]:
    result: dict[str, object] = {"actions": actions, "timing": dict(timing)}
    return result | ({"warnings": list(warnings)} if warnings else {})
