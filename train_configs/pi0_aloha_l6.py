"""openpi's π0 base model on ALOHA, 18 → 6 layers, at full size.

uv run scripts/train_distill.py pi0_aloha_l6 --data.path FOLDER --exp-name first
Teacher: gs://openpi-assets/checkpoints/pi0_base (about 6.5 GB in bfloat16), fetched once. Data: a
LeRobot v3.0 dataset of an ALOHA with three cameras. Not run at full size yet; one 80 GB device or
more, see --mesh."""

import _base

from shallow_pi.models import pi0
from shallow_pi.training import batches, config


def get_config() -> config.DistillConfig:
    """openpi's sizes and schedule; the paper's batch of 64."""
    return config.DistillConfig(
        name="pi0_aloha_l6",
        model=pi0.Pi0Config(),
        data=batches.DataConfig(robot="aloha", asset_id="trossen", num_threads=8),
        teacher=config.TeacherConfig(path=f"{_base.OPENPI}/pi0_base"),
        student=config.StudentConfig(depth=6),
        batch_size=64,
        num_train_steps=30_000,
    )
