"""openpi's π0.5 for DROID, 18 → 6 layers, at full size.

uv run scripts/train_distill.py pi05_droid_l6 --data.path FOLDER --exp-name first
Teacher: gs://openpi-assets/checkpoints/pi05_droid. Data: DROID, or recordings of your own Franka,
as a LeRobot dataset with the keys of openpi's converter: one exterior and one wrist camera at 15
Hz, joint and gripper positions, joint velocities as actions. As in openpi: third camera masked,
state in the prompt (200 tokens), horizon 15, the teacher's statistics (droid), 20,000 steps. Batch
of 64, warm-up to 2.5e-5 in 1,000 steps, cosine to 2.5e-6. Validation on 2 % of the episodes. Not
run at full size yet; one 80 GB device or more, see --mesh."""

import _base

from shallow_pi.data import data_config
from shallow_pi.models import pi0
from shallow_pi.training import config, optimizer


def get_config() -> config.DistillConfig:
    """openpi's values; the paper's batch of 64."""
    return config.DistillConfig(
        model=pi0.Pi0Config(
            pi05=True, action_horizon=15, max_token_len=200, discrete_state_input=True
        ),
        data=data_config.DataConfig(
            robot="droid", asset_id="droid", held_out=_base.HELD_OUT, num_threads=8
        ),
        teacher=config.TeacherConfig(path=f"{_base.OPENPI}/pi05_droid"),
        student=config.StudentConfig(depth=6),
        schedule=optimizer.CosineSchedule(decay_steps=20_000),
        batch_size=64,
        num_train_steps=20_000,
    )
