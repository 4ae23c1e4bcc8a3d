"""A π0 trained on LIBERO with openpi, 18 → 6 layers, at full size.

uv run scripts/train_distill.py pi0_libero_l6 --teacher.path STEP --exp-name first
openpi publishes no such policy: train its config pi0_libero and give the step folder. Data:
physical-intelligence/libero, two cameras at 10 Hz; downloaded (uv sync --extra hf), or --data.path.
As in openpi: third camera masked, the state subtracted from actions 1 to 6 (robot libero_delta),
horizon 50, prompt of 48 tokens, 30,000 steps. Batch of 64, warm-up to 2.5e-5 in 1,000 steps, cosine
to 2.5e-6. Validation on 2 % of the episodes. Not run at full size yet; one 80 GB device or more,
see --mesh."""

import _base

from shallow_pi.data import data_config
from shallow_pi.models import pi0
from shallow_pi.training import config


def get_config() -> config.DistillConfig:
    """openpi's values; the paper's batch of 64."""
    return config.DistillConfig(
        model=pi0.Pi0Config(),
        data=data_config.DataConfig(
            path=_base.LIBERO,
            robot="libero_delta",
            asset_id=_base.LIBERO,
            held_out=_base.HELD_OUT,
            num_threads=8,
        ),
        teacher=config.TeacherConfig(path="checkpoints/pi0_libero"),
        student=config.StudentConfig(depth=6),
        batch_size=64,
        num_train_steps=30_000,
    )
