"""Predict the time of one inference on another device, and show the arithmetic.

uv run scripts/predict_latency.py RUN --device DEVICE [--step last|best|N] [--num-steps N]

RUN is a run's folder or a step folder; DEVICE is one of orin-agx, orin-nx, thor, 4090, h100, h200.
Operations and weights are counted from the model's sizes; the assumed utilization of each device is
the one measured on an H200 (docs/edge.md).

    uv run scripts/predict_latency.py checkpoints/pi05_libero_l6/first --device orin-agx
    uv run scripts/predict_latency.py assets/pi0_turntable --device thor --num-steps 2
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from shallow_pi import flags
from shallow_pi.commands import exits
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.deploy import step_folder
from shallow_pi.speed import predict


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of the command."""

    # The run's folder, or a step folder; local, gs:// or hf://.
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # The device: orin-agx, orin-nx, thor, 4090, h100 or h200.
    device: str
    # Step of a run: last, best or a number; only its sizes are read.
    step: str = "last"
    # Integration steps; 0 uses the number that the policy was trained for.
    num_steps: int = 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, count, print."""
    given = flags.parse(Arguments, arguments, __doc__ or "")
    with exits.exit_on():
        assets = policy_assets.load(step_folder.find(given.run, given.step))
        print(
            "\n".join(predict.table(assets.seen, given.device, given.num_steps or assets.num_steps))
        )
