"""Options of the commands that load a policy from a checkpoint."""

import dataclasses
from typing import Any, Literal

from shallow_pi import progress
from shallow_pi.data.robots import robot as robots
from shallow_pi.deploy import policy, state_check
from shallow_pi.inference import quantize as quantization


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading:
    """Settings that a checkpoint may not store, and how its policy is run."""

    # Step of a run: last, best (on held-out episodes) or its number.
    step: str = "last"
    # Integration steps of the sampler; 0 uses the number that the policy was trained for.
    num_steps: int = 0
    # 8-bit products: int8 or fp8 (weights and activations; run scripts/calibrate.py first), w8 or
    # wf8 (weights alone), none, or tuned (the fastest that scripts/benchmark.py --tune --quantize
    # measured on this device). Empty uses what the policy was trained for.
    quantize: Literal["", "none", "int8", "fp8", "w8", "wf8", "tuned"] = ""
    # Parts of the model in 8 bits.
    quantized: tuple[quantization.Part, ...] = quantization.PARTS
    # Seed of the noise.
    seed: int = 0
    # Robot of an openpi or LeRobot folder: a name, or a file with a ROBOT. For any policy, such a
    # file may rename the keys of observations.
    robot: str = ""
    # Name of the statistics under assets/, if there are several.
    asset_id: str = ""
    # Folder of a norm_stats.json to use in place of the checkpoint's; local, gs:// or hf://.
    norm_stats: str = ""
    # SentencePiece model; empty uses the folder's, or PaliGemma's.
    tokenizer: str = ""
    # Actions in a chunk, which openpi's folders do not store; 0 uses the folder's, or 50.
    action_horizon: int = 0
    # Tokens of a prompt, which openpi's folders do not store; 0 uses the folder's, or openpi's
    # defaults (π0: 48, π0.5: 200).
    max_token_len: int = 0
    # π0.5 only: put the state into the prompt. Not stored in openpi's folders; None uses the
    # folder's value, or True.
    discrete_state_input: bool | None = None
    # Warn of a state this many spreads outside the training data (one spread: the range from
    # the 1st to the 99th percentile); 0 never warns.
    state_warn: float = state_check.WARN
    # Refuse a state this many spreads outside the training data; 0 refuses none.
    state_refuse: float = state_check.REFUSE

    def load(
        self, path: str, *, prompt: str | None = None, robot: robots.Robot | None = None
    ) -> policy.Policy:
        """Load the policy of a step folder or a run's folder; nothing is compiled yet.

        The folder is ours, openpi's or LeRobot's. The prompt is for observations without one;
        `robot` is that of a folder that is not ours, where the options name none.
        """
        fields: dict[str, Any] = {
            "action_horizon": self.action_horizon or None,
            "max_token_len": self.max_token_len or None,
            "discrete_state_input": self.discrete_state_input,
        }
        with progress.bar("Load", total=1) as advance:
            loaded = policy.Policy.from_checkpoint(
                path,
                step=self.step,
                num_steps=self.num_steps or None,
                quantize=self.quantize or None,
                quantized=self.quantized,
                seed=self.seed,
                robot=self.robot or robot,
                asset_id=self.asset_id or None,
                norm_stats=self.norm_stats or None,
                tokenizer=self.tokenizer or None,
                prompt=prompt,
                state_warn=self.state_warn,
                state_refuse=self.state_refuse,
                warm_up=False,
                **{name: value for name, value in fields.items() if value is not None},
            )
            advance(1)
        if loaded.quantize == "none" and set(self.quantized) != set(quantization.PARTS):
            progress.warn(
                f"--policy.quantized {' '.join(self.quantized)} has no effect: the policy rounds "
                "nothing; give --policy.quantize"
            )
        return loaded
