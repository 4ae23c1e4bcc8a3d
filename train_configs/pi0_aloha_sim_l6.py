"""openpi's π0 for the simulated ALOHA cube transfer, 18 → 6 layers, at full size.

uv run scripts/train_distill.py pi0_aloha_sim_l6 --exp-name first
Teacher: gs://openpi-assets/checkpoints/pi0_aloha_sim. Data: lerobot/aloha_sim_transfer_cube_human,
one camera at 50 Hz; downloaded (uv sync --extra hf), or --data.path. As in openpi: joints and
gripper converted, actions absolute, the fixed prompt "Transfer cube", horizon 50, 20,000 steps.
Batch of 64, warm-up to 2.5e-5 in 1,000 steps, cosine to 2.5e-6. Validation on 2 % of the episodes.
Not run at full size yet; one 80 GB device or more."""

import _base

from shallow_pi.data import data_config
from shallow_pi.models import pi0
from shallow_pi.training import config, optimizer

DATASET = "lerobot/aloha_sim_transfer_cube_human"


def get_config() -> config.DistillConfig:
    """openpi's values; the paper's batch of 64."""
    return config.DistillConfig(
        model=pi0.Pi0Config(),
        data=data_config.DataConfig(
            path=DATASET,
            robot="aloha_sim",
            asset_id=DATASET,
            held_out=_base.HELD_OUT,
            num_threads=8,
        ),
        teacher=config.TeacherConfig(path=f"{_base.OPENPI}/pi0_aloha_sim"),
        student=config.StudentConfig(depth=6),
        schedule=optimizer.CosineSchedule(decay_steps=20_000),
        batch_size=64,
        num_train_steps=20_000,
    )
